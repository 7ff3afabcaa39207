"""The composed losses against a slow reference, and what must not change them: cutting, processes, padding,
garbage.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rlhf.batching import recount
from rlhf.corrections import CORRECTIONS
from rlhf.kl import kl_k2
from rlhf.losses import finish_stats, merge_sums, policy_loss, sft_loss
from rlhf.objectives import OBJECTIVES
from rlhf.records import Batch
from rlhf.settings import bind

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
LENGTH = 12  # the constant
PLAIN = {
    "objective": "ppo_clip",
    "aggregation": "token_mean",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": None,
    "sapo_tau_pos": 1.0,
    "sapo_tau_neg": 1.05,
    "covariance": "none",
    "kl_cov_coef": 0.7,
    "kl_coef": 0.0,
    "kl_in_reward": False,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "correction": "none",
    "correction_cap": 1.3,
    "correction_low": 0.7,
    "correction_high": 1.5,
    "positive_nll_coef": 0.0,
}
FULL = {**PLAIN, "kl_coef": 0.3, "entropy_coef": 0.01}
EVERYTHING = {
    **FULL,
    "correction": "icepop",
    "covariance": "kl_cov",
    "positive_nll_coef": 0.1,
    "dual_clip": 1.4,
}
TINY_TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def _current(batch: Batch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a current policy, with gradient."""
    noise = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(batch.token_ids.shape, generator=noise, dtype=torch.float64) * 0.5 - 1
    entropy = torch.rand(batch.token_ids.shape, generator=noise, dtype=torch.float64)
    return logprobs.requires_grad_(), entropy.requires_grad_()


def _loss(
    batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor | None, settings: dict
) -> tuple[torch.Tensor, dict]:
    return policy_loss(batch, logprobs, entropy, SimpleNamespace(**settings), constant_length=LENGTH)


def _with_cov_tokens(batch: Batch, seed: int) -> Batch:
    """Some tokens held back, some of them outside the loss mask."""
    noise = torch.Generator().manual_seed(seed)
    return recount(batch.replace(cov_tokens=torch.rand(batch.token_ids.shape, generator=noise) < 0.3))


def _reference(batch: Batch, logprobs: torch.Tensor, entropy: torch.Tensor, settings: dict) -> torch.Tensor:
    """One token at a time, in float64, from the papers; differentiable."""
    rows = []
    for b in range(len(batch)):
        tokens = []
        for t in range(batch.token_ids.shape[1]):
            if not batch.loss_mask[b, t]:
                continue
            ratio = (logprobs[b, t] - batch.old_logprobs[b, t]).exp()
            clipped = min(max(ratio, 1 - settings["clip_low"]), 1 + settings["clip_high"])
            d = logprobs[b, t] - batch.ref_logprobs[b, t]
            kl = d**2 / 2 if settings["kl_estimator"] == "k2" else (-d).exp() - 1 + d
            gain = min(ratio * batch.advantages[b, t], clipped * batch.advantages[b, t])
            tokens.append(settings["entropy_coef"] * -entropy[b, t] + settings["kl_coef"] * kl - gain)
        if tokens:
            rows.append(tokens)
    if not rows:
        return (logprobs * 0).sum()
    if settings["aggregation"] == "token_mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if settings["aggregation"] == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (len(rows) * LENGTH)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@given(seed=st.integers(0, 10_000))
def test_value_and_gradients_equal_the_reference(
    aggregation: str, estimator: str, seed: int, random_batch
) -> None:
    """Would catch: a sign of KL or entropy, a coefficient applied twice, KL outside the aggregation."""
    batch = random_batch(seed)
    logprobs, entropy = _current(batch, seed)
    settings = {**FULL, "aggregation": aggregation, "kl_estimator": estimator}
    loss, sums = _loss(batch, logprobs, entropy, settings)
    want = _reference(batch, logprobs, entropy, settings)
    torch.testing.assert_close(loss, want, **TINY_TOLERANCE)
    assert sums["policy/loss"].item() == loss.item() and not sums["policy/loss"].requires_grad
    got_gradients = torch.autograd.grad(loss, (logprobs, entropy))
    want_gradients = torch.autograd.grad(want, (logprobs, entropy), allow_unused=True)
    for got_gradient, want_gradient in zip(got_gradients, want_gradients):
        zeros = torch.zeros_like(logprobs)
        torch.testing.assert_close(
            got_gradient, zeros if want_gradient is None else want_gradient, **TINY_TOLERANCE
        )


def test_gradcheck(random_batch) -> None:
    """Would catch: a detach in the wrong place."""
    batch = random_batch(3)
    assert batch.num_loss_tokens > 5
    assert torch.autograd.gradcheck(lambda p, h: _loss(batch, p, h, FULL)[0], _current(batch))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=st.integers(0, 10_000), cut=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_no_cut_changes_gradient_or_statistics(
    aggregation: str, seed: int, cut: list[int], random_batch
) -> None:
    """Would catch: any denominator or mean taken inside a micro-batch or process; an empty micro-batch that
    breaks.
    """
    batch = _with_cov_tokens(random_batch(seed), seed)
    logprobs, entropy = _current(batch, seed)
    settings = {**EVERYTHING, "aggregation": aggregation}
    whole, whole_sums = _loss(batch, logprobs, entropy, settings)
    want = torch.autograd.grad(whole, (logprobs, entropy))
    shares, parts = [], []
    for part in range(4):
        rows = [row for row in reversed(range(5)) if cut[row] == part]
        micro = batch.select(rows)
        width = micro.token_ids.shape[1]
        share, sums = _loss(micro, logprobs[rows][:, :width], entropy[rows][:, :width], settings)
        shares.append(share)
        parts.append(sums)
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole, **TINY_TOLERANCE)
    for got, expected in zip(torch.autograd.grad(total, (logprobs, entropy)), want):
        torch.testing.assert_close(got, expected, **TINY_TOLERANCE)
    merged = merge_sums([merge_sums(parts[:2]), merge_sums(parts[2:])])
    assert finish_stats(merged) == pytest.approx(finish_stats(whole_sums), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 10_000))
def test_nothing_outside_the_loss_mask_matters(seed: int, random_batch) -> None:
    """Would catch: mask * value, which lets NaN through, forwards or backwards."""
    clean, dirty = (
        _with_cov_tokens(b, seed) for b in (random_batch(seed), random_batch(seed, garbage=math.nan))
    )
    logprobs, entropy = _current(clean, seed)
    want, want_sums = _loss(clean, logprobs, entropy, EVERYTHING)
    spoilt = [
        torch.where(clean.loss_mask, x.detach(), math.nan).requires_grad_() for x in (logprobs, entropy)
    ]
    got, got_sums = _loss(dirty, *spoilt, EVERYTHING)
    assert torch.equal(got, want)
    assert finish_stats(got_sums) == finish_stats(want_sums)
    for gradient in torch.autograd.grad(got, spoilt):
        assert not gradient.isnan().any() and not gradient[~clean.loss_mask].any()


@given(seed=st.integers(0, 10_000))
def test_without_old_logprobs_the_ratio_is_exactly_one(seed: int, random_batch) -> None:
    """Would catch: ratio = exp(logprobs - logprobs) with the gradient cancelled, or a ratio off by
    rounding.
    """
    batch = random_batch(seed).replace(old_logprobs=None)
    logprobs, _ = _current(batch, seed)
    loss, sums = _loss(batch, logprobs, None, PLAIN)
    tokens = max(batch.num_loss_tokens, 1)
    want = torch.where(batch.loss_mask, -batch.advantages / tokens, 0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], want, **TINY_TOLERANCE)
    stats = finish_stats(sums)
    if batch.num_loss_tokens:
        assert stats["policy/ratio_mean"] == stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1
        assert stats["policy/clip_frac"] == stats["policy/approx_kl"] == 0
        distance = (logprobs.detach() - batch.rollout_logprobs)[batch.loss_mask].abs().mean().item()
        assert stats["mismatch/logprob_abs_mean"] == pytest.approx(distance)


def test_a_step_with_no_loss_token_gives_zero_and_no_nan(random_batch) -> None:
    """Would catch: 0 / 0 in the loss or in a metric when every reward of a step is missing."""
    batch = _with_cov_tokens(random_batch(0), 0)
    batch = recount(batch.replace(loss_mask=torch.zeros_like(batch.loss_mask)))
    logprobs, entropy = _current(batch)
    loss, sums = _loss(batch, logprobs, entropy, EVERYTHING)
    assert not torch.autograd.grad(loss, logprobs)[0].any()
    assert finish_stats(sums) == {"policy/loss": 0.0}


def test_nan_inside_the_loss_mask_is_seen(random_batch) -> None:
    """Would catch: a NaN filtered out on its way to the engine's check or to the dashboard."""
    batch = random_batch(3)
    logprobs, entropy = _current(batch)
    row, col = batch.loss_mask.nonzero()[0]
    spoilt = logprobs.detach().clone()
    spoilt[row, col] = math.nan
    loss, sums = _loss(batch, spoilt, entropy, FULL)
    stats = finish_stats(sums)
    assert loss.isnan()
    names = "loss", "kl_ref", "approx_kl", "ratio_mean", "ratio_min", "ratio_max"
    assert all(math.isnan(stats[f"policy/{name}"]) for name in names)


def test_metrics_by_name(random_batch) -> None:
    """Would catch: a metric under another name or in another unit than the dashboard's."""
    batch = random_batch(3)
    logprobs, entropy = _current(batch)
    sums = _loss(batch, logprobs, entropy, FULL)[1]
    stats = finish_stats(sums)
    policy = ["loss", "entropy", "approx_kl", "kl_ref", "clip_frac", "clip_frac_low", "clip_frac_high"]
    policy += ["ratio_mean", "ratio_min", "ratio_max"]
    mismatch = ["logprob_abs_mean", "logprob_abs_max", "kl", "outside_frac", "ess"]
    assert set(stats) == {f"policy/{n}" for n in policy} | {f"mismatch/{n}" for n in mismatch}
    d = (logprobs.detach() - batch.ref_logprobs)[batch.loss_mask]
    assert stats["policy/kl_ref"] == pytest.approx(((-d).exp() - 1 + d).mean().item())
    assert stats["policy/entropy"] == pytest.approx(entropy[batch.loss_mask].mean().item())
    assert stats["policy/clip_frac"] == stats["policy/clip_frac_low"] + stats["policy/clip_frac_high"] > 0
    twice = finish_stats(merge_sums([sums, sums]), num_updates=2)
    assert twice == pytest.approx(stats)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("correction", CORRECTIONS)
@examples(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_objectives_and_corrections_multiply(
    objective: str, correction: str, seed: int, random_batch
) -> None:
    """Would catch: a correction of KL and entropy too, one that changes the denominator, an objective that is given
    the sampler's log-probs, settings of another's name.
    """
    batch = random_batch(seed)
    logprobs, entropy = _current(batch, seed)
    settings = {**FULL, "objective": objective, "correction": correction, "kl_estimator": "k2"}
    section, mask = SimpleNamespace(**settings), batch.loss_mask
    loss, sums = _loss(batch, logprobs, entropy, settings)
    weights = bind(CORRECTIONS[correction], section)(batch.old_logprobs, batch.rollout_logprobs, mask)
    per_token = bind(OBJECTIVES[objective], section)(logprobs, batch.old_logprobs, batch.advantages, mask)
    rest = 0.3 * kl_k2(logprobs, batch.ref_logprobs) - 0.01 * entropy
    want = (weights * per_token + rest)[mask].sum() / max(batch.num_loss_tokens, 1)
    torch.testing.assert_close(loss, want, **TINY_TOLERANCE)
    got, expected = (torch.autograd.grad(x, logprobs)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected, **TINY_TOLERANCE)
    if correction != "none" and batch.num_loss_tokens:
        stats = finish_stats(sums)
        assert stats["policy/correction_mean"] == pytest.approx(weights[mask].mean().item())
        assert stats["policy/correction_kept_frac"] == pytest.approx(
            (weights[mask] > 0).double().mean().item()
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(seed=st.integers(0, 10_000))
def test_clip_cov_takes_the_gradient_of_those_tokens_and_no_other(
    objective: str, seed: int, random_batch
) -> None:
    """Would catch: tokens left out of the denominator, a gradient that comes back through the sequence's ratio, the
    KL's gradient gone with it.
    """
    batch = _with_cov_tokens(random_batch(seed), seed)
    logprobs, _ = _current(batch, seed)
    settings = {**PLAIN, "objective": objective, "covariance": "clip_cov"}
    loss, sums = _loss(batch, logprobs, None, settings)
    plain, _ = _loss(batch, logprobs, None, {**settings, "covariance": "none"})
    assert loss.item() == plain.item()
    gradient, plain_gradient = (torch.autograd.grad(x, logprobs)[0] for x in (loss, plain))
    torch.testing.assert_close(gradient, plain_gradient.masked_fill(batch.cov_tokens, 0.0), **TINY_TOLERANCE)
    pulled, _ = _loss(batch, logprobs, None, {**settings, "kl_coef": 0.3, "kl_estimator": "k2"})
    held = batch.cov_tokens & batch.loss_mask
    assert torch.autograd.grad(pulled, logprobs)[0][held].all()
    if batch.num_loss_tokens:
        assert finish_stats(sums)["policy/cov_frac"] == held.sum().item() / batch.num_loss_tokens


@given(seed=st.integers(0, 10_000))
def test_kl_cov_adds_the_kl_from_the_old_policy_on_those_tokens(seed: int, random_batch) -> None:
    """Would catch: KL(policy || old) for KL(old || policy), the KL to the reference, every token."""
    batch = _with_cov_tokens(random_batch(seed), seed)
    logprobs, _ = _current(batch, seed)
    loss, _ = _loss(batch, logprobs, None, {**PLAIN, "covariance": "kl_cov"})
    want, _ = _loss(batch, logprobs, None, PLAIN)
    for place in (batch.cov_tokens & batch.loss_mask).nonzero().tolist():
        log_ratio = logprobs[tuple(place)] - batch.old_logprobs[tuple(place)]
        want = want + 0.7 * (log_ratio.exp() - 1 - log_ratio) / batch.num_loss_tokens
    torch.testing.assert_close(loss, want, **TINY_TOLERANCE)
    got, expected = (torch.autograd.grad(x, logprobs)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected, **TINY_TOLERANCE)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=st.integers(0, 10_000))
def test_right_answers_are_imitated_too(aggregation: str, seed: int, random_batch) -> None:
    """Would catch: the NLL of every response, or of every one with a reward above 0, or over every token's count, a sign;
    the aggregation in its way."""
    batch = random_batch(seed)
    logprobs, _ = _current(batch, seed)
    settings = {**PLAIN, "aggregation": aggregation}
    loss, _ = _loss(batch, logprobs, None, {**settings, "positive_nll_coef": 0.1})
    right = [logprobs[b, t] for b, t in batch.loss_mask.nonzero().tolist() if batch.rewards[b].item() > 0.5]
    want = _loss(batch, logprobs, None, settings)[0] - 0.1 * sum(right) / max(len(right), 1)
    torch.testing.assert_close(loss, want, **TINY_TOLERANCE)


def test_a_stale_count_of_right_answers_is_noticed(random_batch) -> None:
    """Would catch: the NLL of right answers divided by 1, many times too large."""
    batch = random_batch(3).replace(right=torch.ones(5, dtype=torch.bool), num_positive_tokens=0)
    with pytest.raises(AssertionError, match="num_positive_tokens is stale"):
        _loss(batch, _current(batch)[0], None, {**PLAIN, "positive_nll_coef": 0.1})


def test_a_kl_in_the_reward_is_not_in_the_loss_again(random_batch) -> None:
    """Would catch: the KL counted twice; its metric lost."""
    batch = random_batch(3)
    logprobs, _ = _current(batch)
    settings = {**PLAIN, "kl_coef": 0.3, "kl_in_reward": True, "kl_estimator": "k1"}
    loss, sums = _loss(batch, logprobs, None, settings)
    assert loss.item() == _loss(batch, logprobs, None, PLAIN)[0].item()
    assert finish_stats(sums)["policy/kl_ref"] > 0


def test_sft_is_the_mean_negative_log_likelihood_of_the_step(random_batch) -> None:
    """Would catch: a mean per micro-batch; a sign."""
    batch = random_batch(3)
    logprobs, _ = _current(batch)
    want = -logprobs[batch.loss_mask].mean()
    loss, sums = sft_loss(batch, logprobs)
    torch.testing.assert_close(loss, want)
    parts = []
    for rows in ([1, 4], [], [0, 2, 3]):
        micro = batch.select(rows)
        parts.append(sft_loss(micro, logprobs[rows][:, : micro.token_ids.shape[1]])[1])
    assert finish_stats(merge_sums(parts)) == {"sft/loss": pytest.approx(want.item())}
    assert finish_stats(sums) == {"sft/loss": pytest.approx(want.item())}


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"objective": "ppo"}, {}, "objective 'ppo' is unknown; choose one of ppo_clip, gspo"),
        ({"correction": "mis"}, {}, "correction 'mis' is unknown; choose one of none, tis"),
        ({"correction": "tis"}, {"rollout_logprobs": None}, "'tis' needs rollout_logprobs"),
        ({"covariance": "clip_cov"}, {}, "'clip_cov' needs cov_tokens; select them"),
        ({"aggregation": "mean"}, {}, "'mean' is unknown"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, {}, "only k2, k3, k3_k2 pull"),
        ({"kl_coef": 0.1}, {"ref_logprobs": None}, "kl_coef=0.1 needs ref_logprobs"),
        ({"entropy_coef": 0.1}, {}, "entropy_coef=0.1 needs the entropy"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict, missing: dict, message: str, random_batch) -> None:
    """Would catch: a coefficient that silently does nothing."""
    batch = random_batch(0).replace(**missing)
    logprobs, _ = _current(batch)
    with pytest.raises(ValueError, match=message):
        _loss(batch, logprobs, None, {**PLAIN, **settings})
