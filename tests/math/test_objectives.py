"""The objectives against loops written from the papers, their gradients, what their clips have stopped, and the choice
of tokens by covariance.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses import merge_sums
from rlhf.objectives import CLIPPED_SIDES, OBJECTIVES, ppo_clip, ratio_sums, select_by_covariance
from rlhf.settings import bind

SETTINGS = SimpleNamespace(clip_low=0.2, clip_high=0.28, dual_clip=None, sapo_tau_pos=1.0, sapo_tau_neg=1.7)
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}
OF_SEQUENCES = ("gspo", "gmpo")  # one value per sequence: every token carries it
seeds = st.integers(0, 10_000)
names = pytest.mark.parametrize("name", OBJECTIVES)
Row = list[
    tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]  # (logprob, old logprob, advantage) of a row's tokens


def _settings(name: str, **changes: float | None) -> SimpleNamespace:
    narrow = {"gspo": (0.02, 0.03), "gspo_token": (0.02, 0.03), "gmpo": (0.1, 0.15)}.get(name, (0.2, 0.28))
    return SimpleNamespace(**{**vars(SETTINGS), "clip_low": narrow[0], "clip_high": narrow[1], **changes})


def _arguments(batch, seed: int) -> tuple[torch.Tensor, ...]:
    """Log-probs with gradient, old log-probs, advantages, mask."""
    noise = torch.Generator().manual_seed(seed)
    away = torch.randn(batch.token_ids.shape, generator=noise, dtype=torch.float64) * 0.4
    old = torch.where(batch.loss_mask, batch.old_logprobs, 0.0)
    policy = torch.where(batch.loss_mask, old + away, 0.0).requires_grad_()
    return policy, old, torch.where(batch.loss_mask, batch.advantages, 0.0), batch.loss_mask


def _rows(arguments: tuple[torch.Tensor, ...]) -> list[Row]:
    policy, old, advantages, mask = arguments
    return [
        [(policy[b, t], old[b, t], advantages[b, t]) for t in range(mask.shape[1]) if mask[b, t]]
        for b in range(len(mask))
    ]


def _clip(x, low: float, high: float):
    return min(max(x, low), high)


def _reference(name: str, row: Row, s: SimpleNamespace) -> list[torch.Tensor]:
    """A loss for each token of one response, one at a time, from the papers; differentiable."""
    if not row:
        return []
    ratios = [(p - o).exp() for p, o, _ in row]
    sequence = math.prod(ratios) ** (1 / len(row))
    losses = []
    for r, (p, _, a) in zip(ratios, row):
        if name == "ppo_clip":
            gain = min(r * a, _clip(r, 1 - s.clip_low, 1 + s.clip_high) * a)
            if s.dual_clip is not None and a < 0:
                gain = max(gain, s.dual_clip * a)
        elif name == "gspo":
            gain = min(sequence * a, _clip(sequence, 1 - s.clip_low, 1 + s.clip_high) * a)
        elif name == "gspo_token":
            own = sequence.detach() * p.exp() / p.exp().detach()
            gain = min(own * a, _clip(own, 1 - s.clip_low, 1 + s.clip_high) * a)
        elif name == "cispo":
            gain = _clip(r.detach(), 1 - s.clip_low, 1 + s.clip_high) * a * p
        elif (
            name == "gmpo"
        ):  # (prod min(r^sgn, clip(r, e^-low, e^high)^sgn))^(sgn / n) A, sgn of each token's A
            bounds = math.exp(-s.clip_low), math.exp(s.clip_high)
            product = 1.0
            for q, (_, _, b) in zip(ratios, row):
                sign = 1 if b > 0 else -1
                product = product * min(q**sign, _clip(q, *bounds) ** sign) ** sign
            gain = product ** (1 / len(row)) * a
        elif name == "sapo":
            tau = s.sapo_tau_pos if a > 0 else s.sapo_tau_neg
            gain = 4 / tau / (1 + (-tau * (r - 1)).exp()) * a
        else:
            gain = a * p
        losses.append(-gain)
    return losses


@names
@pytest.mark.parametrize("dual_clip", [None, 1.4])
@given(seed=seeds)
def test_equal_to_the_loop_in_value_and_gradient(name: str, dual_clip, seed: int, random_batch) -> None:
    """Would catch: max for min, swapped bounds, a sign, a ratio that should be detached or should not, tau of the other
    side, an arithmetic mean of ratios, tokens outside the mask in a sequence's mean.
    """
    batch, settings = random_batch(seed), _settings(name, dual_clip=dual_clip)
    arguments = _arguments(batch, seed)
    policy, mask = arguments[0], batch.loss_mask
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = bind(OBJECTIVES[name], settings)(*arguments)
    assert got.shape == mask.shape
    want = [loss for row in _rows(arguments) for loss in _reference(name, row, settings)]
    torch.testing.assert_close(got[mask], torch.stack(want) if want else got[mask])
    if want:
        total = sum(w * loss for w, loss in zip(weights[mask], want)) + (policy * 0).sum()
        expected = torch.autograd.grad(total, policy)[0]
        torch.testing.assert_close(torch.autograd.grad((weights * got)[mask].sum(), policy)[0], expected)


@names
def test_gradcheck(name: str, random_batch) -> None:
    """Would catch: a gradient that is not the value's, where no stop-gradient is meant to part them."""
    policy, old, advantages, mask = _arguments(random_batch(3), 3)
    if name not in ("cispo", "gspo_token"):
        objective = bind(OBJECTIVES[name], _settings(name))
        assert torch.autograd.gradcheck(lambda p: objective(p, old, advantages, mask)[mask], policy)


@names
@given(seed=seeds)
def test_on_policy_the_gradient_is_the_policy_gradient(name: str, seed: int, random_batch) -> None:
    """Would catch: a gate whose slope at ratio 1 is not 1, a gradient halved where both sides of a minimum are equal.

    With one advantage per sequence and means over sequences; gspo and gmpo are defined so.
    """
    batch = random_batch(seed)
    policy, _, advantages, mask = _arguments(batch, seed)
    advantages = torch.where(mask, torch.where(batch.rewards > 0, 1.0, -0.5)[:, None].double(), 0.0)
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    loss = bind(OBJECTIVES[name], _settings(name))(policy, policy.detach(), advantages, mask)
    gradient = torch.autograd.grad((loss / counts)[mask].sum(), policy)[0]
    torch.testing.assert_close(gradient, -advantages / counts)


@names
@given(seed=seeds)
def test_rows_do_not_see_each_other_and_masked_tokens_do_not_count(
    name: str, seed: int, random_batch
) -> None:
    """Would catch: a mean over the batch where a sequence's is meant; padding or tool tokens in that mean."""
    arguments = _arguments(random_batch(seed), seed)
    mask = arguments[3]
    objective = bind(OBJECTIVES[name], _settings(name))
    want = objective(*arguments)
    rows = [4, 2]
    torch.testing.assert_close(objective(*(x[rows] for x in arguments))[mask[rows]], want[rows][mask[rows]])
    other = [torch.where(mask, x.detach(), -7.0) for x in arguments[:3]]
    torch.testing.assert_close(objective(*other, mask)[mask], want[mask])


@given(seed=seeds)
def test_gspo_token_is_gspo_when_advantages_are_the_sequences(seed: int, random_batch) -> None:
    """Would catch: the token's own ratio in the value, a gradient that misses or doubles the sequence's ratio."""
    batch = random_batch(seed)
    policy, old, _, mask = _arguments(batch, seed)
    advantages = batch.rewards[:, None].expand_as(mask)
    results = []
    for name in ("gspo", "gspo_token"):
        loss = bind(OBJECTIVES[name], _settings("gspo"))(policy, old, advantages, mask)
        means = (torch.where(mask, loss, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).sum()
        results.append((means, torch.autograd.grad(means, policy)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "slope"),
    [
        (1.5, 1.0, None, 0),
        (1.5, -1.0, None, 1.5),
        (0.5, -1.0, None, 0),
        (0.5, 1.0, None, -0.5),
        (1.25, 1.0, None, -1.25),
        (0.9, -1.0, None, 0.9),
        (3.5, -1.0, 3.0, 0),
        (2.5, -1.0, 3.0, 2.5),
        (1.25, 1.0, 3.0, -1.25),
    ],
)
def test_clip_stops_only_what_has_gone_far_enough(
    ratio: float, advantage: float, dual_clip: float | None, slope: float
) -> None:
    """Would catch: a clip on both sides for either sign, which cannot undo a mistake; a dual clip for A > 0."""
    policy = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    clip = {**CLIP, "dual_clip": dual_clip}
    ppo_clip(policy, old, torch.full((1, 1), advantage), one, **clip).sum().backward()
    assert policy.grad.item() == pytest.approx(slope)


@names
def test_an_extreme_ratio_stays_finite(name: str) -> None:
    """Would catch: exp overflow to inf, and inf * 0 = NaN for a zero advantage."""
    policy = torch.tensor([[0.0, 0.0], [-200.0, -200.0]], requires_grad=True)
    old, advantages = torch.tensor([[-200.0] * 2, [0.0] * 2]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss = bind(OBJECTIVES[name], _settings(name))(
        policy, old, advantages, torch.ones(2, 2, dtype=torch.bool)
    )
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), policy)[0].isfinite().all()


# -- sums --------------------------------------------------------------------------------------------------------------


def _sums(
    name: str, arguments: tuple[torch.Tensor, ...], settings: SimpleNamespace
) -> dict[str, torch.Tensor]:
    policy, old, _, mask = arguments
    return ratio_sums(policy.detach(), old, mask, bind(CLIPPED_SIDES[name], settings)(*arguments))


@names
@given(seed=seeds)
def test_sides_are_the_tokens_whose_gradient_the_clip_has_stopped(name: str, seed: int, random_batch) -> None:
    """Would catch: sides counted with other bounds, or another ratio, than the objective clips."""
    batch = random_batch(seed)
    policy, old, advantages, mask = _arguments(batch, seed)
    if name in OF_SEQUENCES:
        advantages = torch.where(mask, batch.rewards[:, None], 0.0)
    arguments, settings = (policy, old, advantages, mask), _settings(name, dual_clip=1.4)
    low, high = (side & mask for side in bind(CLIPPED_SIDES[name], settings)(*arguments))
    assert not (low & high).any()
    gradient = torch.autograd.grad(bind(OBJECTIVES[name], settings)(*arguments)[mask].sum(), policy)[0]
    if name == "cispo":
        weight = gradient / -advantages
        for side, bound in ((low, 0.8), (high, 1.28)):
            assert torch.equal(side[mask], ((weight - bound).abs() < 1e-9)[mask])
    else:
        assert torch.equal((low | high)[mask], (gradient == 0)[mask])


@given(seed=seeds)
def test_sums_equal_the_loop_and_add_up(seed: int, random_batch) -> None:
    """Would catch: a fraction taken per micro-batch, tokens outside the mask counted, old and new swapped."""
    batch = random_batch(seed, garbage=math.nan)
    args = (batch.rollout_logprobs, batch.old_logprobs, batch.advantages, batch.loss_mask)
    tokens = [(math.exp(p - o), a) for p, o, a, m in zip(*(x.flatten().tolist() for x in args)) if m]
    want = {
        "policy/clip_frac_low": sum(a < 0 and r < 0.8 for r, a in tokens),
        "policy/clip_frac_high": sum(a > 0 and r > 1.28 for r, a in tokens),
        "policy/approx_kl": sum(r - 1 - math.log(r) for r, _ in tokens),
        "policy/ratio_mean": sum(r for r, _ in tokens),
        "policy/ratio_min": min((r for r, _ in tokens), default=math.inf),
        "policy/ratio_max": max((r for r, _ in tokens), default=-math.inf),
    }
    got = _sums("ppo_clip", args, SETTINGS)
    assert {name: value.item() for name, value in got.items()} == pytest.approx(want, abs=1e-9)
    parts = [_sums("ppo_clip", tuple(x[rows] for x in args), SETTINGS) for rows in ([0], [1, 2, 3], [], [4])]
    assert {n: v.item() for n, v in merge_sums(parts).items()} == pytest.approx(want, abs=1e-9)


@names
@given(seed=seeds)
def test_nothing_is_clipped_on_policy(name: str, seed: int, random_batch) -> None:
    """Would catch: >= for > with bounds of 0, and any rounding in the ratio of equal log-probs."""
    batch = random_batch(seed)
    logprobs = batch.old_logprobs.float()
    arguments = (logprobs, logprobs, batch.advantages, batch.loss_mask)
    sums = _sums(name, arguments, _settings(name, clip_low=0.0, clip_high=0.0))
    assert sums["policy/clip_frac_low"] == sums["policy/clip_frac_high"] == sums["policy/approx_kl"] == 0
    assert sums["policy/ratio_mean"] == batch.num_loss_tokens
    if batch.num_loss_tokens:
        assert sums["policy/ratio_min"] == sums["policy/ratio_max"] == 1


# -- covariance --------------------------------------------------------------------------------------------------------


def _covariances(batch) -> dict[tuple[int, int], float]:
    places = [tuple(place) for place in batch.loss_mask.nonzero().tolist()]
    p = [batch.old_logprobs[place].item() for place in places]
    a = [batch.advantages[place].item() for place in places]
    p_mean, a_mean = (math.fsum(x) / len(x) if x else 0.0 for x in (p, a))
    return {place: (x - p_mean) * (y - a_mean) for place, x, y in zip(places, p, a)}


def _select(batch, kind: str, *, frac: float = 0.3, low: float = 0.0, high: float = 5.0, key: int = 1):
    selected = select_by_covariance(
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        covariance=kind,
        cov_frac=frac,
        cov_low=low,
        cov_high=high,
        key=key,
    )
    return {tuple(place) for place in selected.nonzero().tolist()}


@given(seed=seeds, frac=st.floats(0.001, 1.0))
def test_kl_cov_takes_the_largest(seed: int, frac: float, random_batch) -> None:
    """Would catch: covariance by row instead of by batch, the smallest taken, tokens outside the mask, none at all of a
    small batch.
    """
    batch = random_batch(seed, garbage=math.nan)
    covariances = _covariances(batch)
    count = max(1, int(frac * len(covariances)))
    want = sorted(covariances, key=lambda place: -covariances[place])[:count]
    assert _select(batch, "kl_cov", frac=frac) == set(want)


@given(seed=seeds, frac=st.floats(0.001, 1.0))
def test_clip_cov_draws_from_between_the_bounds(seed: int, frac: float, random_batch) -> None:
    """Would catch: bounds ignored or swapped, more tokens than asked for, a draw that is not the key's."""
    batch = random_batch(seed, garbage=math.nan)
    covariances = _covariances(batch)
    eligible = {place for place, c in covariances.items() if -0.1 < c < 0.4}
    count = min(len(eligible), max(1, int(frac * len(covariances))))
    got = _select(batch, "clip_cov", frac=frac, low=-0.1, high=0.4)
    assert got <= eligible and len(got) == count
    assert got == _select(batch, "clip_cov", frac=frac, low=-0.1, high=0.4)


def test_clip_cov_is_another_draw_with_another_key(random_batch) -> None:
    """Would catch: the first tokens of the batch every time."""
    batch = random_batch(3, rows=40)
    draws = {frozenset(_select(batch, "clip_cov", frac=0.1, low=-9.0, high=9.0, key=k)) for k in range(5)}
    assert len(draws) == 5


def test_an_unknown_kind_is_refused(random_batch) -> None:
    with pytest.raises(ValueError, match="'cov' selects no tokens; choose clip_cov or kl_cov"):
        _select(random_batch(3), "cov")
