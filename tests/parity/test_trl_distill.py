"""Divergences between teacher and student against TRL's GKDTrainer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from rlhf.divergence import logits_divergence  # noqa: E402

# Name of a row: our divergence and jsd_beta, TRL's beta.
CASES = {
    "forward_kl": ("forward_kl", 0.5, 0.0),
    "reverse_kl": ("reverse_kl", 0.5, 1.0),
    "jsd, 0.5": ("jsd", 0.5, 0.5),
    "jsd, 0.1": ("jsd", 0.1, 0.1),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_divergences(name, temperature, note):
    """Catches: teacher and student swapped, the mixture's weights swapped, logits scaled twice."""
    from trl.experimental.gkd import GKDTrainer

    noise = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(3, 7, 50, generator=noise) for _ in range(2))
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    divergence, jsd_beta, beta = CASES[name]
    ours = logits_divergence(
        mine.flatten(0, 1),
        teacher.flatten(0, 1),
        divergence=divergence,
        temperature=temperature,
        jsd_beta=jsd_beta,
    ).mean()
    trl = GKDTrainer.generalized_jsd_loss(
        theirs, teacher, labels=torch.zeros(3, 7, dtype=torch.long), beta=beta, temperature=temperature
    )
    (a,), (b,) = torch.autograd.grad(ours, mine), torch.autograd.grad(trl, theirs)
    loss, gradient = float((ours - trl).abs() / trl), float((a - b).norm() / b.norm())
    note(f"distill: {name}, temperature {temperature:g}", loss, gradient=gradient)
    assert loss <= 1e-5 and gradient <= 1e-4
