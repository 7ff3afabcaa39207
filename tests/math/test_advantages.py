"""Group advantages against loops written from the papers, and what must hold for any rewards."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.advantages import (
    ADVANTAGES,
    STD_EPS,
    advantage_metrics,
    group_normalized,
    with_advantages,
    zero_std_groups,
)
from rlhf.batching import make_batch
from rlhf.records import Prompt, Rollout

NAN = math.nan
step_rewards = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.just(NAN), st.floats(-100, 100, width=32))),
    min_size=1,
    max_size=16,
)


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


@pytest.mark.parametrize("name", ADVANTAGES)
@given(step_rewards)
def test_equal_to_the_loop(name: str, step: list[tuple[int, float]]) -> None:
    """Would catch: the wrong std (n for n - 1), a mean that counts missing rewards as zeros, groups mixed
    up.
    """
    groups, rewards = [g for g, _ in step], [r for _, r in step]
    got = ADVANTAGES[name](torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    want = torch.tensor(_loop(name, rewards, groups), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(step_rewards, st.randoms(use_true_random=False))
def test_sum_to_zero_in_every_group_and_do_not_depend_on_row_order(name: str, step, shuffler) -> None:
    """Would catch: groups found by position instead of by their number; a baseline that is not the
    group's.
    """
    rewards, groups = torch.tensor([r for _, r in step]), torch.tensor([g for g, _ in step])
    advantages = ADVANTAGES[name](rewards, groups)
    assert advantages.dtype == torch.float32 and not advantages.isnan().any()
    for group in groups.unique():
        own = advantages[groups == group].double()
        assert abs(own.sum().item()) <= 1e-6 * max(1.0, own.abs().sum().item())
    order = list(range(len(step)))
    shuffler.shuffle(order)
    torch.testing.assert_close(ADVANTAGES[name](rewards[order], groups[order]), advantages[order])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize(
    "rewards", [[0.1] * 3, [0.1, NAN, 0.1], [NAN, 0.7, NAN], [NAN] * 3, [1e30] * 3], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_without_a_difference_get_exactly_zero(name: str, rewards: list[float], dtype) -> None:
    """Would catch: rounding noise of the mean blown up by 1 / eps, and 0 / 0."""
    got = ADVANTAGES[name](torch.tensor([*rewards, 1.0, 0.0], dtype=dtype), torch.tensor([4, 4, 4, 2, 2]))
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
    want = with_advantages(make_batch(plain, group_ids=[0] * 3), name)
    got = with_advantages(make_batch(tools, group_ids=[0] * 3), name)
    assert torch.equal(got.advantages[got.response_mask], want.advantages[want.response_mask])
    assert not got.advantages[~got.response_mask].any()
    assert not got.advantages[2].any()


def test_metrics_are_over_responses_and_count_flat_groups() -> None:
    """Would catch: statistics diluted by the zeros at padding and masked rows, or weighted by length."""
    rollouts = [_rollout(r, (True,) * n) for r, n in [(1.0, 3), (0.0, 1), (5.0, 2), (5.0, 2), (None, 2)]]
    batch = with_advantages(make_batch(rollouts, group_ids=[0, 0, 1, 1, 1]), "dr_grpo")
    assert advantage_metrics(batch) == {
        "reward/groups_zero_std_frac": 0.5,
        "advantage/mean": pytest.approx(0.0),
        "advantage/std": pytest.approx(statistics.pstdev([0.5, -0.5, 0.0, 0.0])),
        "advantage/min": -0.5,
        "advantage/max": 0.5,
    }
    nothing = with_advantages(make_batch([_rollout(None, (True,))], group_ids=[0]), "grpo")
    assert advantage_metrics(nothing) == {"reward/groups_zero_std_frac": 1.0}


def test_bad_input_is_refused() -> None:
    """Would catch: an infinite reward that turns its whole group into NaN."""
    with pytest.raises(ValueError, match="inf of row 1 is infinite"):
        group_normalized(torch.tensor([0.0, math.inf]), torch.tensor([0, 0]))
    batch = make_batch([_rollout(1.0, (True,))], group_ids=[0])
    with pytest.raises(ValueError, match="'gae' is unknown; choose one of grpo, dr_grpo, rloo"):
        with_advantages(batch, "gae")
