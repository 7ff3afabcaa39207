"""Advantages against loops written from the papers, and what must hold for any rewards."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.advantages import (
    ADVANTAGES,
    STD_EPS,
    advantage_metrics,
    gae,
    group_centered,
    group_normalized,
    leave_one_out,
    remax,
    return_to_go,
    sequence_rewards,
    token_rewards,
    whiten,
    with_advantages,
    with_gae,
    zero_std_groups,
)
from rlhf.batching import make_batch
from rlhf.records import Batch, Prompt, Rollout

GROUP = {"grpo": group_normalized, "dr_grpo": group_centered, "rloo": leave_one_out}
SETTINGS = {
    "advantage": "grpo",
    "kl_coef": 0.0,
    "kl_in_reward": False,
    "reward_clip": None,
    "gamma": 0.9,
    "lam": 0.8,
    "critic_lam": None,
    "length_adaptive_lam": None,
    "whiten_advantages": False,
}
NAN = math.nan
seeds = st.integers(0, 10_000)
step_rewards = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.just(NAN), st.floats(-100, 100, width=32))),
    min_size=1,
    max_size=16,
)


def _with(batch: Batch, name: str = "grpo", **changes) -> Batch:
    return with_advantages(batch, SimpleNamespace(**{**SETTINGS, "advantage": name, **changes}))


def _loop(name: str, rewards: list[float], groups: list[int]) -> list[float]:
    """One response at a time, from the papers."""
    result = []
    for mine, group in zip(rewards, groups):
        present = [r for r, g in zip(rewards, groups) if g == group and not math.isnan(r)]
        if math.isnan(mine) or len(present) < 2:
            result.append(0.0)
        elif name == "rloo":
            result.append(mine - (math.fsum(present) - mine) / (len(present) - 1))
        else:
            std = statistics.stdev(present) + STD_EPS if name == "grpo" else 1.0
            result.append((mine - statistics.fmean(present)) / std)
    return result


@pytest.mark.parametrize("name", GROUP)
@given(step_rewards)
def test_equal_to_the_loop(name: str, step: list[tuple[int, float]]) -> None:
    """Would catch: the wrong std (n for n - 1), a mean that counts missing rewards as zeros, groups mixed
    up.
    """
    groups, rewards = [g for g, _ in step], [r for _, r in step]
    got = GROUP[name](torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    want = torch.tensor(_loop(name, rewards, groups), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", GROUP)
@given(step_rewards, st.randoms(use_true_random=False))
def test_sum_to_zero_in_every_group_and_do_not_depend_on_row_order(name: str, step, shuffler) -> None:
    """Would catch: groups found by position instead of by their number; a baseline that is not the
    group's.
    """
    rewards, groups = torch.tensor([r for _, r in step]), torch.tensor([g for g, _ in step])
    advantages = GROUP[name](rewards, groups)
    assert advantages.dtype == torch.float32 and not advantages.isnan().any()
    for group in groups.unique():
        own = advantages[groups == group].double()
        assert abs(own.sum().item()) <= 1e-6 * max(1.0, own.abs().sum().item())
    order = list(range(len(step)))
    shuffler.shuffle(order)
    torch.testing.assert_close(GROUP[name](rewards[order], groups[order]), advantages[order])


@pytest.mark.parametrize("name", GROUP)
@pytest.mark.parametrize(
    "rewards", [[0.1] * 3, [0.1, NAN, 0.1], [NAN, 0.7, NAN], [NAN] * 3, [1e30] * 3], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_without_a_difference_get_exactly_zero(name: str, rewards: list[float], dtype) -> None:
    """Would catch: rounding noise of the mean blown up by 1 / eps, and 0 / 0."""
    got = GROUP[name](torch.tensor([*rewards, 1.0, 0.0], dtype=dtype), torch.tensor([4, 4, 4, 2, 2]))
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[3] > 0 > got[4]
    assert zero_std_groups(
        torch.tensor([*rewards, 1.0, 0.0], dtype=dtype), torch.tensor([4, 4, 4, 2, 2])
    ) == (1, 2)


@given(step_rewards, st.floats(-10, 10), st.floats(0.1, 10))
def test_grpo_ignores_shift_and_scale(step, shift: float, scale: float) -> None:
    """Would catch: normalisation over the batch instead of the group, or by something other than the std."""
    rewards, groups = (
        torch.tensor([r for _, r in step], dtype=torch.float64),
        torch.tensor([g for g, _ in step]),
    )
    rewards = rewards.round()  # differences well above eps
    got = group_normalized(rewards * scale + shift, groups)
    torch.testing.assert_close(got, group_normalized(rewards, groups), rtol=1e-3, atol=1e-3)


def _rollout(reward: float | None, mask: tuple[bool, ...]) -> Rollout:
    n = len(mask)
    prompt = Prompt(id="p", token_ids=(1, 2), text="")
    return Rollout(
        "0/0/0", prompt, (5,) * n, mask, (-1.0,) * n, (0,) * n, finish_reason="stop", reward=reward
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_tool_tokens_get_nothing_and_change_nothing(name: str) -> None:
    """Would catch: advantages on tool output, or a length that enters the baseline."""
    plain = [_rollout(1.0, (True,) * 3), _rollout(0.0, (True,) * 2), _rollout(None, (True,))]
    tools = [plain[0].replace(**vars(_rollout(1.0, (True, False, True, False, True)))), *plain[1:]]
    baselines = torch.tensor([0.5, 0.25, NAN])
    want, got = (
        _with(
            make_batch(rollouts, group_ids=[0] * 3).replace(baselines=baselines), name, whiten_advantages=True
        )
        for rollouts in (plain, tools)
    )
    assert torch.equal(got.advantages[got.response_mask], want.advantages[want.response_mask])
    assert not got.advantages[~got.response_mask].any()
    assert not got.advantages[2].any()


def _metrics(batch: Batch, name: str, **changes) -> dict[str, float]:
    return advantage_metrics(batch, SimpleNamespace(**{**SETTINGS, "advantage": name, **changes}))


def test_metrics_are_over_responses_and_count_flat_groups() -> None:
    """Would catch: statistics diluted by the zeros at padding and masked rows, or weighted by length."""
    rollouts = [_rollout(r, (True,) * n) for r, n in [(1.0, 3), (0.0, 1), (5.0, 2), (5.0, 2), (None, 2)]]
    batch = _with(make_batch(rollouts, group_ids=[0, 0, 1, 1, 1]), "dr_grpo")
    assert _metrics(batch, "dr_grpo") == {
        "reward/groups_zero_std_frac": 0.5,
        "advantage/mean": pytest.approx(0.0),
        "advantage/std": pytest.approx(statistics.pstdev([0.5, -0.5, 0.0, 0.0])),
        "advantage/min": -0.5,
        "advantage/max": 0.5,
    }
    nothing = _with(make_batch([_rollout(None, (True,))] * 2, group_ids=[0, 0]), "grpo")
    assert _metrics(nothing, "grpo") == {"reward/groups_zero_std_frac": 1.0}
    for name in ("reinforce_pp", "remax"):  # a group of equal rewards has advantages all the same
        assert "reward/groups_zero_std_frac" not in _metrics(batch, name)
    critic = batch.replace(returns=torch.where(batch.response_mask, 2.0, NAN))
    assert _metrics(critic, "grpo")["return/mean"] == 2.0
    assert "reward/groups_zero_std_frac" not in _metrics(critic, "grpo")


def test_flat_groups_are_those_whose_rewards_are_equal_as_they_are_compared() -> None:
    """Would catch: a group called flat that the KL in its rewards tells apart, or live where the clip leaves nothing."""
    rollouts = [_rollout(r, (True,) * 2) for r in (4.0, 3.0, 1.0, 1.0)]
    batch = make_batch(rollouts, group_ids=[0, 0, 1, 1])
    batch = batch.replace(ref_logprobs=batch.rollout_logprobs * torch.arange(4)[:, None])
    for changes, share in (
        ({}, 0.5),
        ({"reward_clip": 2.0}, 1.0),
        ({"kl_coef": 0.1, "kl_in_reward": True}, 0.0),
    ):
        assert (
            _metrics(_with(batch, "rloo", **changes), "rloo", **changes)["reward/groups_zero_std_frac"]
            == share
        )


def test_whitened_advantages_have_the_mean_of_their_tokens() -> None:
    """Would catch: a mean far from 0 where long answers are better than short ones, which nothing is wrong with."""
    rollouts = [_rollout(1.0, (True,) * 9), _rollout(0.0, (True,)), _rollout(0.0, (True,))]
    batch = _with(make_batch(rollouts, group_ids=[0] * 3), "reinforce_pp", whiten_advantages=True)
    found = _metrics(batch, "reinforce_pp", whiten_advantages=True)
    assert found["advantage/mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["advantage/std"] == pytest.approx(
        math.sqrt(10 / 11), rel=1e-3
    )  # divided by n, whitened by n - 1


def test_remax_clips_both_sides_alike() -> None:
    """Would catch: an answer as good as the greedy one, of which the reward alone is clipped."""
    batch = make_batch([_rollout(5.0, (True,)), _rollout(-9.0, (True,))], group_ids=[0, 1])
    batch = _with(batch.replace(baselines=torch.tensor([5.0, 0.5])), "remax", reward_clip=1.0)
    assert batch.advantages[batch.response_mask].tolist() == [0.0, -1.5]


def test_bad_input_is_refused() -> None:
    """Would catch: an infinite reward that turns its whole group into NaN."""
    with pytest.raises(ValueError, match="inf of row 1 is infinite"):
        group_normalized(torch.tensor([0.0, math.inf]), torch.tensor([0, 0]))
    batch = make_batch([_rollout(1.0, (True,))], group_ids=[0])
    with pytest.raises(ValueError, match="'gae' is unknown; choose one of grpo, dr_grpo, rloo"):
        _with(batch, "gae")
    with pytest.raises(ValueError, match="remax needs baselines"):
        _with(batch, "remax")
    with pytest.raises(ValueError, match="a KL in the reward needs ref_logprobs"):
        _with(batch, kl_coef=0.1, kl_in_reward=True)
    with pytest.raises(ValueError, match="a KL in the reward needs old_logprobs"):
        _with(batch.replace(rollout_logprobs=None), kl_coef=0.1, kl_in_reward=True)


# -- rewards with the KL in them ---------------------------------------------------------------------------------------


def _step(random_batch, seed: int, *, garbage: float = 0.0) -> Batch:
    """A batch with rewards of all sizes, some missing, and values."""
    batch = random_batch(seed, garbage=garbage)
    noise = torch.Generator().manual_seed(seed)
    missing = torch.rand(len(batch), generator=noise) < 0.2
    values = torch.randn(batch.token_ids.shape, generator=noise, dtype=torch.float64)
    return batch.replace(
        rewards=torch.where(missing, NAN, batch.rewards * 4),
        loss_mask=batch.loss_mask & ~missing[:, None],
        values=torch.where(batch.response_mask, values, garbage),
        baselines=torch.randn(len(batch), generator=noise, dtype=torch.float64),
    )


def _kl(batch: Batch, row: int) -> dict[int, float]:
    """KL of each policy token (k1), by column."""
    tokens = batch.response_mask[row].nonzero()[:, 0].tolist()
    return {t: (batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]).item() for t in tokens}


def _clipped(reward: float) -> float:
    return min(max(reward, -2.5), 2.5) if reward == reward else NAN


@given(seed=seeds)
def test_rewards_with_the_kl_in_them_equal_the_loop(seed: int, random_batch) -> None:
    """Would catch: a KL added instead of taken off, by another estimator than k1, on tool tokens or the prompt; the
    reward on the last real token instead of the last policy token, or clipped after the KL.
    """
    batch = _step(random_batch, seed, garbage=NAN)
    shaping = {"kl_coef": 0.3, "reward_clip": 2.5}
    tokens, sequences = token_rewards(batch, **shaping), sequence_rewards(batch, **shaping)
    for row in range(len(batch)):
        kl, reward = _kl(batch, row), _clipped(batch.rewards[row].item())
        want = [-0.3 * kl.get(t, 0.0) for t in range(tokens.shape[1])]
        if kl:
            want[max(kl)] += reward
        torch.testing.assert_close(tokens[row], torch.tensor(want, dtype=torch.float64), equal_nan=True)
        total = reward - 0.3 * sum(kl.values())
        assert sequences[row].item() == pytest.approx(total, nan_ok=True)
    unscored = batch.replace(old_logprobs=None, rollout_logprobs=batch.old_logprobs)
    assert torch.equal(token_rewards(unscored, **shaping).nan_to_num(9), tokens.nan_to_num(9))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "remax"])
@given(seed=seeds)
def test_the_kl_reaches_every_estimator(name: str, seed: int, random_batch) -> None:
    """Would catch: an estimator that reads the rewards without their KL, or with one that belongs in the loss."""
    batch = _step(random_batch, seed)
    shaped = sequence_rewards(batch, kl_coef=0.3, reward_clip=2.5)
    want = (
        remax(shaped, batch.baselines.clamp(-2.5, 2.5))
        if name == "remax"
        else GROUP[name](shaped, batch.group_ids)
    )
    got = _with(batch, name, kl_coef=0.3, kl_in_reward=True, reward_clip=2.5).advantages
    judged = batch.response_mask & ~batch.rewards.isnan()[:, None]
    torch.testing.assert_close(got, torch.where(judged, want[:, None], 0.0).float())
    plain = _with(batch, name, kl_coef=0.3, kl_in_reward=False).advantages
    assert torch.equal(plain, _with(batch.replace(ref_logprobs=None), name).advantages)


@given(seed=seeds)
def test_reinforce_pp_equals_the_loop(seed: int, random_batch) -> None:
    """Would catch: a sum from the start instead of to the end, a discount for tool tokens, whitening by row, missing
    rewards or masked rows in the mean.
    """
    batch = _step(random_batch, seed, garbage=NAN)
    settings = {"kl_coef": 0.3, "kl_in_reward": True, "reward_clip": 2.5}
    got = _with(batch, "reinforce_pp", whiten_advantages=True, **settings).advantages
    returns: dict[tuple[int, int], float] = {}
    for row in range(len(batch)):
        kl, ahead = _kl(batch, row), _clipped(batch.rewards[row].item())
        for i, t in enumerate(sorted(kl, reverse=True)):
            ahead = -0.3 * kl[t] + (ahead if i == 0 else 0.9 * ahead)
            returns[row, t] = ahead
    inside = {place: g for place, g in returns.items() if batch.loss_mask[place]}
    want = torch.zeros(got.shape, dtype=torch.float64)
    if inside:
        mean = statistics.fmean(inside.values())
        variance = statistics.variance(inside.values()) if len(inside) > 1 else 0.0
        for place, g in inside.items():
            want[place] = (g - mean) / math.sqrt(variance + 1e-8)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_remax_is_the_distance_from_the_greedy_reward() -> None:
    """Would catch: the baseline's sign, NaN from a greedy response whose reward is missing."""
    got = remax(torch.tensor([1.0, 2.0, NAN, 3.0]), torch.tensor([0.25, NAN, 1.0, 5.0]))
    assert got.tolist() == [0.75, 0.0, 0.0, -2.0]


@given(seed=seeds)
def test_whitening_equals_the_loop(seed: int, random_batch) -> None:
    """Would catch: zeros at padding in the mean, n for n - 1, statistics by row."""
    batch = random_batch(seed, garbage=NAN)
    got = whiten(batch.advantages, batch.loss_mask)
    inside = batch.advantages[batch.loss_mask].tolist()
    if len(inside) > 1:
        want = [(x - statistics.fmean(inside)) / statistics.stdev(inside) for x in inside]
        assert got[batch.loss_mask].tolist() == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert not got[~batch.loss_mask].any() and not got.isnan().any()


@pytest.mark.parametrize("values", [[], [3.0], [0.1] * 3, [1e8] * 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_of_nothing_and_of_equal_values_gives_zero(values: list[float], dtype) -> None:
    """Would catch: 0 / 0, and rounding noise of the mean blown up by 1 / sqrt(eps)."""
    padded = torch.tensor([[*values, 7.0]], dtype=dtype)
    mask = torch.arange(len(values) + 1)[None] < len(values)
    assert whiten(padded, mask).abs().max() < 1e-6


# -- generalised advantage estimation ----------------------------------------------------------------------------------


def _gae_loop(u: list[float], v: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """From the definition: A_t = sum_k (gamma lam)^k delta_t+k."""
    deltas = [x + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t, x in enumerate(u)]
    a = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(u))]
    return a, [x + y for x, y in zip(a, v)]


@given(seed=seeds, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0))
def test_gae_equals_the_loop(seed: int, gamma: float, lam: float, random_batch) -> None:
    """Would catch: a value bootstrapped at the end or from padding, gamma or lambda left out, NaN outside the mask."""
    batch = _step(random_batch, seed, garbage=NAN)
    rewards = torch.where(batch.response_mask, batch.advantages, NAN)  # any number on any token
    advantages, returns = gae(rewards, batch.values, batch.response_mask, gamma=gamma, lam=lam)
    for row in range(len(batch)):
        inside = batch.response_mask[row]
        want = _gae_loop(rewards[row, inside].tolist(), batch.values[row, inside].tolist(), gamma, lam)
        assert advantages[row, inside].tolist() == pytest.approx(want[0])
        assert returns[row, inside].tolist() == pytest.approx(want[1])
    assert not advantages[~batch.response_mask].any() and not returns[~batch.response_mask].any()


@pytest.mark.parametrize("lam", [0.95, 1.0, torch.tensor([0.0, 0.5, 0.99, 1.0])])
def test_gae_of_long_rows_equals_a_walk_over_the_tokens(lam) -> None:
    """Would catch: sums over too few tokens, or a token counted twice, where a row is longer than the first few spans;
    and rows whose bits depend on the batch, on padding, or on the part that they are worked on in.
    """
    gamma, dice = 0.999, torch.Generator().manual_seed(0)
    u, v = (torch.randn(4, 1500, generator=dice, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 1500, generator=dice) < 0.9
    mask[1, 700:] = False
    mask[2] = False
    got = gae(u, v, mask, gamma=gamma, lam=lam)
    lams = torch.as_tensor(lam, dtype=torch.float64).expand(4)
    next_value, next_advantage = torch.zeros(2, 4, dtype=torch.float64)
    for t in reversed(range(1500)):
        here = u[:, t] + gamma * next_value - v[:, t] + gamma * lams * next_advantage
        next_advantage = torch.where(mask[:, t], here, next_advantage)
        next_value = torch.where(mask[:, t], v[:, t], next_value)
        expected = torch.where(mask[:, t], here, 0.0)
        torch.testing.assert_close(got[0][:, t], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1][:, t], torch.where(mask[:, t], here + v[:, t], 0.0))
    for row in range(4):
        padded = [torch.nn.functional.pad(x[row : row + 1], (3, 800)) for x in (u, v, mask)]
        alone = gae(*padded, gamma=gamma, lam=lams[row : row + 1])
        for a, b in zip(alone, got):
            assert torch.equal(a[0, 3:1503], b[row])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("values \\(4, 6\\) for token_rewards \\(4, 7\\)", {"values": torch.zeros(4, 6)}),
        ("mask \\(1, 7\\) for token_rewards", {"mask": torch.ones(1, 7, dtype=torch.bool)}),
        ("mask of torch.int64", {"mask": torch.ones(4, 7, dtype=torch.long)}),
        ("lam \\(3,\\) for token_rewards", {"lam": torch.ones(3)}),
    ],
)
def test_gae_names_what_does_not_fit(name: str, arguments) -> None:
    """Would catch: one row's mask or lambda used for all."""
    usual = {"token_rewards": torch.zeros(4, 7), "values": torch.zeros(4, 7), "gamma": 1.0, "lam": 1.0}
    with pytest.raises(ValueError, match=name):
        gae(**{**usual, "mask": torch.ones(4, 7, dtype=torch.bool), **arguments})


@given(seed=seeds)
def test_gae_at_its_ends(seed: int, random_batch) -> None:
    """Would catch: lambda where gamma belongs. lambda 1: return - V; lambda 0: the one-step error."""
    batch = _step(random_batch, seed)
    u, v, mask = batch.advantages, batch.values, batch.response_mask
    advantages, returns = gae(u, v, mask, gamma=0.9, lam=1.0)
    to_go = return_to_go(torch.where(mask, u, NAN), mask, gamma=0.9)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - torch.where(mask, v, 0.0))
    one_step = gae(u, v, mask, gamma=0.9, lam=0.0)[0]
    for row in range(len(batch)):
        tokens = mask[row].nonzero()[:, 0].tolist()
        for t, after in zip(tokens, [*tokens[1:], None]):
            target = u[row, t] + (0.0 if after is None else 0.9 * v[row, after])
            torch.testing.assert_close(one_step[row, t], target - v[row, t])


@given(seed=seeds, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0))
def test_skipping_tool_tokens_equals_deleting_them(seed: int, gamma: float, lam: float, random_batch) -> None:
    """Would catch: a tool's tokens as steps: discounted, bootstrapped from, or cutting the response in two."""
    batch = _step(random_batch, seed)
    for row in range(len(batch)):
        inside = batch.response_mask[row]
        u, v = batch.advantages[row : row + 1], batch.values[row : row + 1]
        skipped = gae(u, v, inside[None], gamma=gamma, lam=lam)
        deleted = gae(u[:, inside], v[:, inside], inside[None, inside], gamma=gamma, lam=lam)
        for got, want in zip(skipped, deleted):
            assert torch.equal(got[:, inside], want)


@pytest.mark.parametrize(("critic_lam", "alpha"), [(None, None), (1.0, None), (None, 0.4), (1.0, 0.4)])
@given(seed=seeds)
def test_ppo_s_advantages_and_returns_equal_the_loop(critic_lam, alpha, seed: int, random_batch) -> None:
    """Would catch: one lambda for both, lengths that count the prompt or tools, returns of whitened advantages, a
    missing reward that counts as 0 in the whitening or the returns.
    """
    batch = _step(random_batch, seed, garbage=NAN)
    changes = {"kl_coef": 0.3, "kl_in_reward": True, "critic_lam": critic_lam, "length_adaptive_lam": alpha}
    got = with_gae(batch, SimpleNamespace(**{**SETTINGS, **changes}))
    for row in range(len(batch)):
        inside = batch.response_mask[row]
        if batch.rewards[row].isnan():
            assert not got.advantages[row].any() and not got.returns[row].any()
            continue
        u, v = got.token_rewards[row, inside].tolist(), batch.values[row, inside].tolist()
        lam = 0.8 if alpha is None else max(0.0, 1 - 1 / (0.4 * max(len(u), 1)))
        want = _gae_loop(u, v, 0.9, lam)[0], _gae_loop(u, v, 0.9, critic_lam or 0.8)[1]
        assert got.advantages[row, inside].tolist() == pytest.approx(want[0], rel=1e-5, abs=1e-5)
        assert got.returns[row, inside].tolist() == pytest.approx(want[1], rel=1e-5, abs=1e-5)
    white = with_gae(batch, SimpleNamespace(**{**SETTINGS, **changes, "whiten_advantages": True}))
    torch.testing.assert_close(white.advantages, whiten(got.advantages, batch.loss_mask))
    assert torch.equal(white.returns, got.returns)
    assert white.advantages.dtype == white.returns.dtype == white.token_rewards.dtype == torch.float32
