"""Steps in which only the critic learns are no part of the actor's schedule."""

from __future__ import annotations

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.run import train_plan
from tests.e2e.running import TINY, merged, of_method, records

PPO = {
    "method": "ppo",
    "run": {"name": "ppo"},
    "critic": {"lr": 1e-2, "pretrain_steps": 3},
    "rollout": {"group_size": 2},
    "evaluation": {"sets": {}},
    "trainer": {
        **{"steps": 6, "prompts_per_step": 4, "minibatches_per_step": 2, "lr": 1e-3, "schedule": "linear"},
        **{"zero_stage": 0, "micro_batch_tokens": 128},
    },
}


def run(changes: dict, folder) -> list[dict]:
    base = {name: value for name, value in TINY.items() if name != "stages"}
    recipe = merged(of_method(merged(base, PPO), changes), {"run": {"output_dir": str(folder)}})
    train_plan(plan_from_dict(recipe))
    return records(folder / "ppo")


def test_the_actor_s_rate_ends_where_the_stage_does(tmp_path):
    """Would catch: a schedule over steps in which the actor does not learn, so that its end is cut off; a critic's that
    ends before the stage."""
    steps = [r for r in run({}, tmp_path) if r["step"]]
    assert [r.get("policy/lr") for r in steps[:3]] == [None] * 3
    # a record has the rate of its step's second update, of 6 (actor) and 12 (critic): 0 at the last
    assert [r["policy/lr"] for r in steps[3:]] == pytest.approx([1e-3 * (1 - u / 5) for u in (1, 3, 5)])
    assert [r["value/lr"] for r in steps] == pytest.approx([1e-2 * (1 - u / 11) for u in range(1, 12, 2)])


def test_epochs_of_no_more_than_the_pretraining_are_refused(tmp_path):
    """Would catch: a whole stage after which the policy is what it was."""
    short = {"trainer": {"steps": None, "epochs": 1}, "data": {"task_args": {"count": 12}}}
    with pytest.raises(ValueError, match="pretrain_steps=3 of the 3 steps that epochs=1 make"):
        run(short, tmp_path)
