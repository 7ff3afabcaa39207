"""Distillation against TRL's GKDTrainer: our loss as a run with `distill.top_k: all` computes it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from rlhf.batching import SftExample, make_sft_batch  # noqa: E402

# Name of a row: our divergence and jsd_beta, TRL's beta.
CASES = {
    "forward_kl": ("forward_kl", 0.5, 0.0),
    "reverse_kl": ("reverse_kl", 0.5, 1.0),
    "jsd, 0.5": ("jsd", 0.5, 0.5),
    "jsd, 0.1": ("jsd", 0.1, 0.1),
}
ROWS = [
    SftExample("a", (5, 6, 7), (8, 9, 10, 11, 12)),
    SftExample("b", (5,), (20, 21)),
    SftExample("c", (30, 31), (40, 41, 42, 43), response_mask=(True, False, False, True)),
]


def apart(model: torch.nn.Module) -> torch.nn.Module:
    """The model further away: divergences near 0 are differences of rounded numbers."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p += 0.1 * torch.randn(p.shape, generator=noise)
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_divergences(name, temperature, ours, theirs, agree):
    """Catches: teacher and student swapped, the mixture's weights swapped, logits scaled twice, another token's logits, a
    mean over rows."""
    from trl.experimental.gkd import GKDTrainer

    divergence, jsd_beta, beta = CASES[name]
    settings = {"divergence": divergence, "temperature": temperature, "top_k": "all"}
    settings |= {"jsd_beta": jsd_beta} if divergence == "jsd" else {}
    recipe = ours.recipe(
        "distill",
        data={"response_column": "completion"},
        teacher={"path": str(ours.folder / "reference")},
        distill=settings,
    )
    batch = make_sft_batch(ROWS)
    mine, _ = ours.loss("distill", recipe, batch, teacher=apart(ours.model("reference", trainable=False)))

    student, teacher = theirs.model(), apart(theirs.model("reference"))
    inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask.long()}
    labels = torch.where(batch.loss_mask, batch.token_ids, -100)[:, 1:]
    logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1]
    loss = GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, labels=labels, beta=beta, temperature=temperature
    )
    agree(f"distill: {name}, temperature {temperature:g}", mine, (student, temperature**2 * loss))
