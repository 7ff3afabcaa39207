"""The clipped objective against a loop, its gradient, and the sums that describe it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses import merge_sums
from rlhf.objectives import ppo_clip, ratio_sums

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
seeds = st.integers(0, 10_000)


def _random(seed: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, generator=noise, dtype=torch.float64) * 0.4 for _ in range(3)]


@given(seed=seeds)
def test_equal_to_the_loop(seed: int) -> None:
    """Would catch: max for min, swapped bounds, a sign."""
    policy, old, advantages = _random(seed)
    want = []
    for p, o, a in zip(policy.flatten().tolist(), old.flatten().tolist(), advantages.flatten().tolist()):
        r = math.exp(p - o)
        want.append(-min(r * a, min(max(r, 0.8), 1.28) * a))
    got = ppo_clip(policy, old, advantages, **CLIP)
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64))


def test_gradients() -> None:
    """Would catch: a detached ratio, or a gradient halved where both sides of the minimum are equal."""
    policy, old, advantages = _random(0)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ppo_clip(p, old, advantages, **CLIP), policy)
    ppo_clip(policy, policy.detach(), advantages, **CLIP).sum().backward()
    torch.testing.assert_close(policy.grad, -advantages, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1.0, 0), (1.5, -1.0, 1.5), (0.5, -1.0, 0), (0.5, 1.0, -0.5), (1.25, 1.0, -1.25), (0.9, -1.0, 0.9)],
)
def test_clip_stops_only_what_has_gone_far_enough(ratio: float, advantage: float, slope: float) -> None:
    """Would catch: a clip on both sides for either sign, which cannot undo a mistake."""
    policy = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = ppo_clip(policy, torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage), **CLIP)
    loss.sum().backward()
    assert policy.grad.item() == pytest.approx(slope)


def test_an_extreme_ratio_stays_finite() -> None:
    """Would catch: exp overflow to inf, and inf * 0 = NaN for a zero advantage."""
    loss = ppo_clip(
        torch.tensor([[0.0, 0.0]]), torch.tensor([[-200.0, -200.0]]), torch.tensor([[-1.0, 0.0]]), **CLIP
    )
    assert loss.isfinite().all()


@given(seed=seeds)
def test_sums_equal_the_loop_and_add_up(seed: int, random_batch) -> None:
    """Would catch: a fraction taken per micro-batch, tokens outside the mask counted, old and new swapped."""
    batch = random_batch(seed, garbage=math.nan)
    policy = batch.rollout_logprobs
    args = (policy, batch.old_logprobs, batch.advantages, batch.loss_mask)
    tokens = [(math.exp(p - o), a) for p, o, a, m in zip(*(x.flatten().tolist() for x in args)) if m]
    want = {
        "policy/clip_frac_low": sum(a < 0 and r < 0.8 for r, a in tokens),
        "policy/clip_frac_high": sum(a > 0 and r > 1.28 for r, a in tokens),
        "policy/approx_kl": sum(r - 1 - math.log(r) for r, _ in tokens),
        "policy/ratio_mean": sum(r for r, _ in tokens),
        "policy/ratio_min": min((r for r, _ in tokens), default=math.inf),
        "policy/ratio_max": max((r for r, _ in tokens), default=-math.inf),
    }
    got = ratio_sums(*args, **CLIP)
    assert {name: value.item() for name, value in got.items()} == pytest.approx(want, abs=1e-9)
    parts = [ratio_sums(*(x[rows] for x in args), **CLIP) for rows in ([0], [1, 2, 3], [], [4])]
    assert {n: v.item() for n, v in merge_sums(parts).items()} == pytest.approx(want, abs=1e-9)


@given(seed=seeds)
def test_nothing_is_clipped_on_policy(seed: int, random_batch) -> None:
    """Would catch: >= for > with bounds of 0, and any rounding in the ratio of equal log-probs."""
    batch = random_batch(seed)
    logprobs = batch.old_logprobs.float()
    sums = ratio_sums(logprobs, logprobs, batch.advantages, batch.loss_mask, clip_low=0.0, clip_high=0.0)
    assert sums["policy/clip_frac_low"] == sums["policy/clip_frac_high"] == sums["policy/approx_kl"] == 0
    assert sums["policy/ratio_mean"] == batch.num_loss_tokens
    if batch.num_loss_tokens:
        assert sums["policy/ratio_min"] == sums["policy/ratio_max"] == 1
