"""Preference losses against float64 references from the papers, pair by pair; what must not change them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlhf.batching import PreferenceExample, make_preference_batch, recount
from rlhf.preference import (
    COUPLED,
    F_DIVERGENCES,
    PER_TOKEN,
    PREFERENCE_LOSSES,
    REFERENCE_FREE,
    Pairs,
    log_odds,
    pair_rows,
    preference_loss,
    with_baselines,
)
from rlhf.recipe.schema import PreferenceConfig
from rlhf.records import Batch
from rlhf.settings import setting_names

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
BETA, SMOOTHING, TAU, GAMMA, LAMBDA = 0.7, 0.1, 0.05, 0.3, 0.4


def _settings(*names: str, **changes) -> PreferenceConfig:
    values = {
        "losses": {name: 1.0 for name in names},
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "discopop_tau": TAU,
        "simpo_gamma": GAMMA,
        "orpo_lambda": LAMBDA,
    }
    return PreferenceConfig(**(values | changes))


def _pairs_batch(random_batch: Callable[..., Batch], seed: int, *, pairs: int = 4) -> Batch:
    """Ragged pairs in any order of rows; a pair with an empty response has no loss tokens on either side."""
    batch = random_batch(seed, rows=2 * pairs, group_size=2)
    whole = batch.response_mask.any(-1).view(pairs, 2).all(-1).repeat_interleave(2)
    batch = batch.replace(
        labels=torch.tensor([1.0, -1.0] * pairs), loss_mask=batch.response_mask & whole[:, None]
    )
    order = list(range(2 * pairs))
    random.Random(seed).shuffle(order)
    return recount(batch.select(order))


def _policy(batch: Batch, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(batch.token_ids.shape, generator=noise, dtype=torch.float64)
    return (values * 0.5 - 1).requires_grad_()


def _sides(batch: Batch) -> list[tuple[int, int]]:
    """(chosen row, rejected row) of the pairs that count, found one by one."""
    found = []
    for group in sorted(set(batch.group_ids.tolist())):
        rows = [r for r in range(len(batch)) if batch.group_ids[r] == group and batch.loss_mask[r].any()]
        if rows:
            found.append(tuple(sorted(rows, key=lambda r: -float(batch.labels[r]))))
    return found


def _s(x):
    return 1 / (1 + (-x).exp())


def _log_s(x):
    return -(1 + (-x).exp()).log()


class _Row:
    """One response: policy's and reference's log-prob, and its length."""

    def __init__(self, batch: Batch, logprobs: torch.Tensor, row: int):
        tokens = [t for t in range(batch.token_ids.shape[1]) if batch.loss_mask[row, t]]
        self.p = sum(logprobs[row, t] for t in tokens)
        self.r = sum(batch.ref_logprobs[row, t] for t in tokens)
        self.n = len(tokens)
        self.rho = self.p - self.r


def _bernoulli_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


# Each from its paper, for one pair of rows won, lost.
PAPERS = {
    "dpo": lambda won, lost: (
        -(1 - SMOOTHING) * _log_s(BETA * (won.rho - lost.rho))
        - SMOOTHING * _log_s(BETA * (lost.rho - won.rho))
    ),
    "robust": lambda won, lost: (
        (
            -(1 - SMOOTHING) * _log_s(BETA * (won.rho - lost.rho))
            + SMOOTHING * _log_s(BETA * (lost.rho - won.rho))
        )
        / (1 - 2 * SMOOTHING)
    ),
    "ipo": lambda won, lost: (won.rho / won.n - lost.rho / lost.n - 0.5 / BETA) ** 2,
    "hinge": lambda won, lost: max(0 * won.rho, 1 - BETA * (won.rho - lost.rho)),
    "exo_pair": lambda won, lost: _bernoulli_kl(
        _s(BETA * (won.rho - lost.rho)), torch.tensor(1 - SMOOTHING, dtype=torch.float64)
    ),
    "nca_pair": lambda won, lost: (
        -(_log_s(BETA * won.rho) + 0.5 * (_log_s(-BETA * won.rho) + _log_s(-BETA * lost.rho)))
    ),
    "sppo_hard": lambda won, lost: (
        (won.rho - 1 / BETA * (1 - 0.5)) ** 2 + (lost.rho - 1 / BETA * (0 - 0.5)) ** 2
    ),
    "apo_zero": lambda won, lost: 1 - _s(BETA * won.rho) + _s(BETA * lost.rho),
    "apo_down": lambda won, lost: 1 + _s(BETA * won.rho) - _s(BETA * (won.rho - lost.rho)),
    "discopop": lambda won, lost: (
        (1 - _s(BETA * (won.rho - lost.rho) / TAU)) * -_log_s(BETA * (won.rho - lost.rho))
        + _s(BETA * (won.rho - lost.rho) / TAU) * (-BETA * (won.rho - lost.rho)).exp()
    ),
    "sigmoid_norm": lambda won, lost: -_log_s(BETA / won.n * won.rho - BETA / lost.n * lost.rho),
    "simpo": lambda won, lost: -_log_s(BETA / won.n * won.p - BETA / lost.n * lost.p - GAMMA),
    "cpo": lambda won, lost: -_log_s(BETA * won.p - BETA * lost.p),
    "orpo": lambda won, lost: -won.p / won.n - LAMBDA * _log_s((_odds(won) / _odds(lost)).log()),
    "sft": lambda won, lost: -won.p / won.n,
}


def _odds(row: _Row):
    p = (row.p / row.n).exp()
    return p / (1 - p)


def _negative(logprobs: torch.Tensor) -> torch.Tensor:
    """As log-probs must be: ORPO takes the logarithm of 1 - p."""
    return (-logprobs.detach().abs() - 0.01).requires_grad_()


def _check(batch: Batch, logprobs: torch.Tensor, settings: PreferenceConfig, per_pair: list) -> None:
    """preference_loss equals the mean of the pairs' losses, in value and gradient."""
    got, sums = preference_loss(batch, logprobs, settings)
    want = sum(per_pair) / len(per_pair)
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    assert sums["dpo/loss"].item() == got.item() and sums["num_pairs"] == len(per_pair)
    (got_gradient,) = torch.autograd.grad(got, logprobs)
    (want_gradient,) = torch.autograd.grad(want, logprobs)
    torch.testing.assert_close(got_gradient, want_gradient, **CLOSE)
    assert not got_gradient[~batch.loss_mask].any()


def test_every_loss_has_a_reference_and_every_parameter_a_field() -> None:
    """Would catch: a loss that no test looks at; a parameter that no recipe can set."""
    assert set(PAPERS) | COUPLED == set(PREFERENCE_LOSSES)
    tables = [*PREFERENCE_LOSSES.values(), *F_DIVERGENCES.values()]
    assert {name for function in tables for name in setting_names(function)} <= set(
        PreferenceConfig.model_fields
    )


@pytest.mark.parametrize("name", PAPERS)
@hypothesis_settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_value_and_gradient_equal_the_paper(name: str, seed: int, random_batch) -> None:
    """Would catch: a sign, a sum for a mean over tokens, won and lost exchanged, a wrong denominator."""
    batch = _pairs_batch(random_batch, seed)
    logprobs = _negative(_policy(batch, seed))
    sides = _sides(batch)
    assume(sides)
    per_pair = [PAPERS[name](_Row(batch, logprobs, won), _Row(batch, logprobs, lost)) for won, lost in sides]
    _check(batch, logprobs, _settings(name), per_pair)


def _smoothed(x):
    return -(1 - SMOOTHING) * _log_s(BETA * x) - SMOOTHING * _log_s(-BETA * x)


def _value(x: torch.Tensor) -> float:
    return x.item()


def _coupled_reference(name: str, rows: list[tuple[_Row, _Row]]) -> list:
    """The formulas over the whole batch at once, with gradient through both sides where the paper has it."""
    if name == "bco_pair":
        delta = sum(_value(row.rho) for pair in rows for row in pair) / (2 * len(rows))
        return [-_log_s(BETA * (won.rho - delta)) - _log_s(-BETA * (lost.rho - delta)) for won, lost in rows]
    if name == "aot":
        policy = sorted((won.p - lost.p for won, lost in rows), key=_value)
        reference = sorted((won.r - lost.r for won, lost in rows), key=_value)
        return [_smoothed(u - v) for u, v in zip(policy, reference)]
    chosen = sorted((won.rho for won, _ in rows), key=_value)
    rejected = sorted((lost.rho for _, lost in rows), key=_value)
    return [_smoothed(x - y) for x, y in zip(chosen, rejected)]


@pytest.mark.parametrize("name", sorted(COUPLED))
@given(seed=st.integers(0, 10_000))
def test_coupled_losses_equal_the_formula_over_the_whole_batch(name: str, seed: int, random_batch) -> None:
    """Would catch: half a gradient for aot_unpaired, ranks mixed up, a gradient through delta."""
    batch = _pairs_batch(random_batch, seed, pairs=6)
    logprobs = _policy(batch, seed)
    sides = _sides(batch)
    assume(sides)
    rows = [(_Row(batch, logprobs, won), _Row(batch, logprobs, lost)) for won, lost in sides]
    settings = _settings(name)
    ready = with_baselines(batch, logprobs, settings)
    assert not ready.baselines.requires_grad
    _check(ready, logprobs, settings, _coupled_reference(name, rows))


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@given(seed=st.integers(0, 10_000))
def test_f_divergences_equal_the_paper(divergence: str, seed: int, random_batch) -> None:
    """Would catch: u and 1 / u exchanged, TRL's alpha for the paper's."""
    alpha = 0.3
    derivative = {  # f'(u), table 1 of arXiv 2309.16240
        "reverse_kl": lambda u: u.log() + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: (2 * u / (1 + u)).log(),
        "alpha": lambda u: (1 - u**-alpha) / alpha,
    }[divergence]
    batch = _pairs_batch(random_batch, seed)
    logprobs = _policy(batch, seed)
    sides = _sides(batch)
    assume(sides)
    per_pair = []
    for won, lost in sides:
        u_w, u_l = _Row(batch, logprobs, won).rho.exp(), _Row(batch, logprobs, lost).rho.exp()
        per_pair.append(_log_s(BETA * derivative(u_w) - BETA * derivative(u_l)) * -1)
    settings = _settings("dpo", label_smoothing=0.0, f_divergence=divergence, f_alpha=alpha)
    _check(batch, logprobs, settings, per_pair)


@given(seed=st.integers(0, 10_000))
def test_weighted_sum_nll_and_length_desensitisation(seed: int, random_batch) -> None:
    """Would catch: a weight dropped, the NLL weighed by ld_alpha or summed, alpha on the wrong tokens."""
    alpha, nll = 0.4, 0.8
    batch = _pairs_batch(random_batch, seed)
    logprobs = _policy(batch, seed)
    sides = _sides(batch)
    assume(sides)
    per_pair = []
    for won, lost in sides:
        shared = min(int(batch.loss_mask[row].sum()) for row in (won, lost))
        rho = {}
        for row in (won, lost):
            tokens = batch.loss_mask[row].nonzero()[:, 0].tolist()
            weight = [1.0 if k < shared else alpha for k in range(len(tokens))]
            rho[row] = sum(
                a * (logprobs[row, t] - batch.ref_logprobs[row, t]) for a, t in zip(weight, tokens)
            )
        plain = _Row(batch, logprobs, won)
        h = BETA * (rho[won] - rho[lost])
        per_pair.append(-2.0 * _log_s(h) + 0.5 * max(0 * h, 1 - h) - nll * plain.p / plain.n)
    settings = _settings(label_smoothing=0.0, losses={"dpo": 2.0, "hinge": 0.5}, nll_coef=nll, ld_alpha=alpha)
    _check(batch, logprobs, settings, per_pair)


@given(seed=st.integers(0, 10_000))
def test_wpo_weighs_pairs_by_aligned_likelihood_without_gradient(seed: int, random_batch) -> None:
    """Would catch: a gradient through the weights, a sum over tokens for the mean, one side forgotten."""
    batch = _pairs_batch(random_batch, seed)
    logprobs = _policy(batch, seed)
    sides = _sides(batch)
    assume(sides)
    entropy = torch.rand(batch.token_ids.shape, dtype=torch.float64)
    settings = _settings("dpo", wpo=True)
    per_pair = []
    for won, lost in sides:
        weight = 1.0
        for row in (won, lost):
            tokens = batch.loss_mask[row].nonzero()[:, 0].tolist()
            # p / sum p^2, with the entropy being -log sum p^2
            aligned = [math.exp(logprobs[row, t].item()) / math.exp(-entropy[row, t]) for t in tokens]
            weight *= math.prod(aligned) ** (1 / len(tokens))
        per_pair.append(weight * PAPERS["dpo"](_Row(batch, logprobs, won), _Row(batch, logprobs, lost)))
    got, _ = preference_loss(batch, logprobs, settings, collision_entropy=entropy)
    want = sum(per_pair) / len(per_pair)
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    for gradient, expected in zip(torch.autograd.grad(got, logprobs), torch.autograd.grad(want, logprobs)):
        torch.testing.assert_close(gradient, expected, **CLOSE)
    with pytest.raises(ValueError, match="wpo needs the collision entropy"):
        preference_loss(batch, logprobs, settings)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@hypothesis_settings(max_examples=20)
@given(seed=st.integers(0, 10_000), cut=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_no_cut_by_pairs_changes_gradient_or_sums(name: str, seed: int, cut: list[int], random_batch) -> None:
    """Would catch: a mean or a rank taken inside a micro-batch, an empty micro-batch that breaks."""
    batch = _pairs_batch(random_batch, seed, pairs=6)
    logprobs = _negative(_policy(batch, seed))
    settings = _settings(name, nll_coef=0.3)
    batch = with_baselines(batch, logprobs, settings)
    whole, whole_sums = preference_loss(batch, logprobs, settings)
    (want,) = torch.autograd.grad(whole, logprobs)
    shares, parts = [], []
    for part in range(4):
        rows = [r for r in reversed(range(len(batch))) if cut[int(batch.group_ids[r])] == part]
        micro = batch.select(rows)
        share, sums = preference_loss(micro, logprobs[rows][:, : micro.token_ids.shape[1]], settings)
        shares.append(share)
        parts.append(sums)
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], want, **CLOSE)
    for key, value in whole_sums.items():
        assert all(list(sums) == list(whole_sums) for sums in parts)
        torch.testing.assert_close(sum(sums[key] for sums in parts), value, **CLOSE)


@given(seed=st.integers(0, 10_000))
def test_policy_equal_to_reference_gives_log_two(seed: int, random_batch) -> None:
    """Would catch: reference and policy summed over different tokens, or a constant in the loss."""
    batch = _pairs_batch(random_batch, seed)
    assume(batch.num_loss_sequences)
    loss, sums = preference_loss(batch, batch.ref_logprobs.clone().requires_grad_(), _settings("dpo"))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert sums["dpo/margin"] == 0 and sums["dpo/accuracy"] == sums["num_pairs"] / 2


@given(seed=st.integers(0, 10_000))
def test_swapping_chosen_and_rejected_negates_the_margin(seed: int, random_batch) -> None:
    """Would catch: labels ignored in favour of the order of rows."""
    batch = _pairs_batch(random_batch, seed)
    logprobs = _policy(batch, seed)
    settings = _settings("dpo")
    sums = preference_loss(batch, logprobs, settings)[1]
    swapped = preference_loss(batch.replace(labels=-batch.labels), logprobs, settings)[1]
    assert swapped["dpo/margin"].item() == pytest.approx(-sums["dpo/margin"].item())
    assert swapped["dpo/accuracy"] == sums["num_pairs"] - sums["dpo/accuracy"]
    assert swapped["dpo/reward_chosen"] == sums["dpo/reward_rejected"]
    assert swapped["dpo/logprob_rejected"] == sums["dpo/logprob_chosen"]


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_losses_ignore_the_reference(name: str, random_batch) -> None:
    """Would catch: a reference that is read where it is said not to be needed."""
    batch = _pairs_batch(random_batch, 4)
    logprobs = _negative(_policy(batch, 4))
    settings = _settings(name, nll_coef=0.5)
    want, want_sums = preference_loss(batch, logprobs, settings)
    got, sums = preference_loss(batch.replace(ref_logprobs=None), logprobs, settings)
    assert torch.equal(got, want) and sums == want_sums
    with pytest.raises(ValueError, match="losses dpo need ref_logprobs"):
        preference_loss(batch.replace(ref_logprobs=None), logprobs, _settings(name, "dpo"))


def test_metrics_are_those_of_the_pairs(random_batch) -> None:
    """Would catch: rewards without beta, log-probs averaged over tokens."""
    batch = _pairs_batch(random_batch, 5)
    logprobs = _policy(batch, 5)
    rows = [(_Row(batch, logprobs, won), _Row(batch, logprobs, lost)) for won, lost in _sides(batch)]
    _, sums = preference_loss(batch, logprobs, _settings("dpo"))
    assert sums["dpo/reward_chosen"].item() == pytest.approx(sum(BETA * won.rho.item() for won, _ in rows))
    assert sums["dpo/logprob_rejected"].item() == pytest.approx(sum(lost.p.item() for _, lost in rows))
    assert sums["dpo/accuracy"].item() == sum(float(won.rho > lost.rho) for won, lost in rows)
    assert not any(value.requires_grad for value in sums.values())  # they would keep the step's graph alive
    _, sums = preference_loss(batch, logprobs, _settings("simpo"))
    assert sums["dpo/reward_chosen"].item() == pytest.approx(
        sum(BETA * won.p.item() / won.n for won, _ in rows)
    )


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - COUPLED - {"sft"}))
def test_accuracy_and_margin_are_of_what_the_loss_compares(name: str) -> None:
    """Would catch: cpo, which compares sums, judged by means, or ipo and sigmoid_norm by sums: here a long answer is ahead
    by its mean and behind by its sum."""
    long, short = (1, 2, *range(3, 13)), (1, 2, 3, 4)
    batch = make_preference_batch([PreferenceExample("a", long[:2], long[2:], short[2:], None)])
    logprobs = torch.where(batch.labels[:, None] > 0, -1.0, -2.0).double() * batch.loss_mask
    batch = batch.replace(ref_logprobs=torch.zeros_like(logprobs))
    settings = _settings(name)
    loss, sums = preference_loss(batch, logprobs, settings)
    swapped, _ = preference_loss(batch.replace(labels=-batch.labels), logprobs, settings)
    assert sums["dpo/accuracy"].item() == float(loss < swapped) == float(name in PER_TOKEN)
    assert (sums["dpo/margin"] > 0) == (loss < swapped)


def test_a_share_keeps_the_dtype_of_the_log_probs(random_batch) -> None:
    """Would catch: a float64 loss that a bf16 or fp32 engine would have to cast."""
    batch = _pairs_batch(random_batch, 5)
    loss, _ = preference_loss(batch, _policy(batch, 5).detach().float().requires_grad_(), _settings("dpo"))
    assert loss.dtype == torch.float32


def _pair(rho_w: float, rho_l: float) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    won, lost = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (rho_w, rho_l))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return Pairs(won, lost, zero, zero, won, lost, one, one, zero, zero), won, lost


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"orpo"}))
@pytest.mark.parametrize("rho", [(1e4, -1e4), (-1e4, 1e4), (-3e2, -9e3), (0.0, 0.0)], ids=str)
def test_far_log_ratios_give_no_nan(name: str, rho: tuple[float, float]) -> None:
    """Would catch: exp(-h) of DiscoPOP that overflows and is multiplied by 0; log of a sigmoid that is 0."""
    pairs, won, lost = _pair(*rho)
    settings = _settings(name)
    function = PREFERENCE_LOSSES[name]
    loss = function(pairs, **{n: getattr(settings, n) for n in setting_names(function)})
    gradients = torch.autograd.grad(loss.sum(), (won, lost), allow_unused=True)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_scores_stay_finite_and_rising(name: str) -> None:
    """Would catch: e^-rho of the forward KL that overflows, or a limit that ends the pull back."""
    rho = torch.linspace(-1000, 30, 500).requires_grad_()
    scores = F_DIVERGENCES[name](rho, f_alpha=0.5)
    (slope,) = torch.autograd.grad(scores.sum(), rho)
    assert scores.isfinite().all() and slope.isfinite().all()
    assert (slope >= 0).all() and (slope[rho < 0] > 0).all()
    at_one = F_DIVERGENCES[name](torch.zeros(1), f_alpha=0.5)
    torch.testing.assert_close(at_one, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_accurate_from_end_to_end(dtype: torch.dtype) -> None:
    """Would catch: log(1 - e^lp) of ORPO, which is log 0 or rounding noise where p is near 1."""
    eps = torch.finfo(dtype).eps
    for value in (-1e-4, -0.1, -math.log(2), -0.7, -3.0, -60.0, -8 * eps):
        lp = torch.tensor(value, dtype=dtype, requires_grad=True)
        got = log_odds(lp)
        exact = float(lp.detach().double())
        assert got.item() == pytest.approx(exact - math.log(-math.expm1(exact)), rel=20 * eps, abs=20 * eps)
        slope = torch.autograd.grad(got, lp)[0].item()
        assert slope == pytest.approx(-1 / math.expm1(exact), rel=100 * eps)
    at_one = torch.zeros((), dtype=dtype, requires_grad=True)
    assert log_odds(at_one).isfinite() and torch.autograd.grad(log_odds(at_one), at_one)[0].isfinite()


def test_pairs_that_are_cut_apart_are_refused(random_batch) -> None:
    """Would catch: a chosen row silently compared with another prompt's rejected one."""
    batch = _pairs_batch(random_batch, 3)
    chosen, rejected = pair_rows(batch)
    assert (
        torch.equal(batch.group_ids[chosen], batch.group_ids[rejected]) and (batch.labels[chosen] > 0).all()
    )
    alone = [r for r in range(len(batch)) if r != int(rejected[0])]
    with pytest.raises(ValueError, match="has 1 chosen and 0 rejected rows"):
        pair_rows(batch.select(alone))
    with pytest.raises(ValueError, match="has 2 chosen and 0 rejected rows"):
        pair_rows(batch.replace(labels=batch.labels.abs()))


def test_a_step_without_pairs_gives_zero(random_batch) -> None:
    """Would catch: 0 / 0, or a loss that the backward of an idle process cannot run through."""
    batch = _pairs_batch(random_batch, 3)
    batch = recount(batch.replace(loss_mask=batch.loss_mask & False))
    logprobs = _policy(batch, 3)
    for name in PREFERENCE_LOSSES:
        settings = _settings(name)
        loss, sums = preference_loss(with_baselines(batch, logprobs, settings), logprobs, settings)
        assert loss == 0 and sums["num_pairs"] == 0
        assert not torch.autograd.grad(loss, logprobs)[0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_settings("ipo", f_divergence="js"), "f_divergence='js' is defined for discopop, dpo.*not for ipo"),
        (_settings("simpo", ld_alpha=0.5), "ld_alpha=0.5 weighs the tokens of a sum, but simpo averages"),
        (_settings("aot", "bco_pair"), "losses aot, bco_pair each need baselines of their own"),
        (_settings("exo_pair", label_smoothing=0.0), "label_smoothing=0.0: exo_pair needs a value in"),
        (_settings("aot"), "call with_baselines on the whole batch first"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message: str, random_batch) -> None:
    """Would catch: a setting that silently does nothing, an infinite loss."""
    batch = _pairs_batch(random_batch, 3)
    with pytest.raises(ValueError, match=message):
        preference_loss(batch, _policy(batch, 3), settings)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"hinge", "aot", "aot_unpaired"}))
def test_gradcheck(name: str, random_batch) -> None:
    """Would catch: a detach in the wrong place (aot_unpaired has one on purpose; its own test covers it)."""
    batch = _pairs_batch(random_batch, 7, pairs=2)
    assert batch.num_loss_sequences
    logprobs = _negative(_policy(batch, 7))
    settings = _settings(name)
    batch = with_baselines(batch, logprobs, settings)
    assert torch.autograd.gradcheck(lambda p: preference_loss(batch, p, settings)[0], logprobs)
