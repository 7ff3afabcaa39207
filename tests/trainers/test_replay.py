"""What a replay buffer keeps, draws and saves."""

from __future__ import annotations

from rlhf.recipe.schema import ReplayConfig
from rlhf.records import Prompt, Rollout, RolloutGroup
from rlhf.trainers.replay import Replay


def group(number: int, *rewards: float | None) -> RolloutGroup:
    prompt = Prompt(id=str(number), token_ids=(1, number), text=f"p{number}", row={"answer": object()})
    rollouts = (
        Rollout(
            f"{number}/0/{i}", prompt, (4, 5 + i), (True, False), (-0.1 / 3, 0.0), (number, number), "stop", "x",
            reward=reward, reward_parts={} if reward is None else {"rule": reward}, reward_error=None if reward is not None else "why",
        )
        for i, reward in enumerate(rewards)
    )  # fmt: skip
    return RolloutGroup(prompt, tuple(rollouts))


def numbers(groups: list[RolloutGroup]) -> list[int]:
    return [int(g.prompt.id) for g in groups]


def test_it_keeps_the_last_groups_with_an_advantage():
    """Would catch: groups without an advantage kept, the newest pushed out, a group replayed in the step that made it."""
    buffer = Replay(ReplayConfig(groups=3, fraction=4.0), seed=0)
    assert buffer.exchange([group(1, 0.0, 1.0), group(2, 1.0, 1.0), group(3, None, 1.0)], 0) == []
    assert numbers(buffer.exchange([group(4, 0.0, 1.0), group(5, 0.5, 1.0, None)], 1)) == [1]
    assert numbers(buffer.exchange([group(6, 0.0, 1.0)], 2)) == [1, 4, 5]
    assert numbers(buffer.exchange([], 3)) == [] and len(buffer) == 3
    assert numbers(buffer.exchange([group(7, 1.0)], 4)) == [4, 5, 6]


def test_draws_differ_from_step_to_step_and_not_from_run_to_run(tmp_path):
    """Would catch: the same groups every time, a draw from a stream, a number or a type lost on the disk."""

    def filled() -> Replay:
        buffer = Replay(ReplayConfig(groups=50, fraction=0.25), seed=3)
        buffer.exchange([group(n, 0.0, 1.0, None) for n in range(20)], 0)
        return buffer

    one, other = filled(), Replay(ReplayConfig(groups=50, fraction=0.25), seed=3)
    one.save(tmp_path)
    other.load(tmp_path)
    fresh = [group(n, 0.0, 0.0) for n in range(30, 38)]
    draws = [one.exchange(fresh, step) for step in (1, 2, 3)]
    assert [other.exchange(fresh, step) for step in (1, 2, 3)] == draws
    assert all(len(d) == 2 for d in draws) and len({tuple(numbers(d)) for d in draws}) > 1
