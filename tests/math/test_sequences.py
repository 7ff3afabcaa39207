"""Log-probs of whole responses against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.sequences import desensitized_weights, sequence_lengths, sequence_logprobs


@given(seed=st.integers(0, 10_000))
def test_sums_and_lengths_are_those_of_the_mask(seed: int, random_batch) -> None:
    """Would catch: a mean instead of a sum, prompt or padding counted, NaN from outside the mask let in."""
    batch = random_batch(seed, garbage=math.nan)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    sums = sequence_logprobs(logprobs, batch.response_mask)
    lengths = sequence_lengths(batch.response_mask)
    for row in range(len(batch)):
        tokens = [float(v) for v, m in zip(logprobs[row].detach(), batch.response_mask[row]) if m]
        assert sums[row].item() == pytest.approx(sum(tokens), abs=1e-12)
        assert lengths[row].item() == len(tokens)
    (gradient,) = torch.autograd.grad(sums.sum(), logprobs)
    assert torch.equal(gradient, batch.response_mask.double())


def test_small_differences_of_long_sums_survive_fp32() -> None:
    """Would catch: a sum in fp32, whose rounding over thousands of tokens is of the size of a log-ratio."""
    policy = torch.full((1, 20_000), -1.1)
    policy[0, ::2] = -0.7
    reference = policy.clone()
    reference[0, 0] -= 1e-4
    mask = torch.ones_like(policy, dtype=torch.bool)
    rho = sequence_logprobs(policy, mask) - sequence_logprobs(reference, mask)
    assert rho.item() == pytest.approx(float(policy[0, 0].double() - reference[0, 0].double()), abs=1e-9)


def test_tokens_beyond_the_shared_length_weigh_alpha() -> None:
    """Would catch: positions counted from the prompt, tool tokens counted, an off-by-one at the border."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    weights = desensitized_weights(mask, torch.tensor([2.0, 2.0]), ld_alpha=0.25)
    assert weights.tolist() == [[0, 1, 1, 0, 0.25, 0.25], [0, 0, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match="ld_alpha=1.5"):
        desensitized_weights(mask, torch.tensor([2.0, 2.0]), ld_alpha=1.5)
