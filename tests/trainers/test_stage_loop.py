"""What the loops do with a recipe's switches: who is updated when, what is kept, which rows come next."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf.batching import PreferenceExample
from rlhf.data.rows import Dataset
from rlhf.trainers.grpo import train_grpo
from rlhf.trainers.ppo import train_ppo
from rlhf.trainers.reward_scale import store_scale
from tests.trainers.fake_roles import (
    GOOD,
    FakeActor,
    FakeCritic,
    FakeSampler,
    FakeScorer,
    fake_stage,
    prompts,
    rollout,
)


def apart(kl: float):
    """An update that found the policy `kl` nats per token from the old one."""
    of_two = torch.tensor(2.0 * kl, dtype=torch.float64)
    sums = {"num_tokens": torch.tensor(2.0), "policy/approx_kl": of_two}
    return dataclasses.replace(GOOD, sums=sums)


def rl_stage(method: str, folder, monkeypatch, *, outcomes=(), steps=1, **sections):
    recipe = {
        "method": method,
        "reward": [{"function": "gsm8k"}],
        "rollout": {"group_size": 2},
        "trainer": {"steps": steps, "prompts_per_step": 4, "minibatches_per_step": 4},
        **sections,
    }
    critic = {"critic": FakeCritic()} if method == "ppo" else {}
    scorer = FakeScorer(lambda r: float(r.sample_id[-1]))
    actor = FakeActor(outcomes)
    return fake_stage(
        recipe, folder, monkeypatch, actor=actor, sampler=FakeSampler(), scorer=scorer, **critic
    )


def test_a_critic_learns_alone_for_its_first_steps(tmp_path, monkeypatch):
    """Would catch: value pre-training that moves the policy, or never ends."""
    stage = rl_stage("ppo", tmp_path, monkeypatch, steps=3, critic={"pretrain_steps": 2})
    moved = []
    whole_step = stage.track

    def track(step, **numbers):
        moved.append((len(stage.critic.updates), len(stage.actor.updates), stage.progress.version))
        whole_step(step, **numbers)

    stage.track = track
    train_ppo(stage)
    assert moved == [(4, 0, 0), (8, 0, 0), (12, 4, 4)]


@pytest.mark.parametrize(("method", "train"), [("grpo", train_grpo), ("ppo", train_ppo)])
def test_updates_stop_where_the_policy_has_gone_far_enough(method, train, tmp_path, monkeypatch):
    """Would catch: early_stop_kl off, stopping below its limit, the critic stopped too, the next step stopped as well."""
    outcomes = [apart(kl) for kl in (0.01, 0.03, 0.031, 0.0, 0.0, 0.0, 0.0)]
    stage = rl_stage(
        method, tmp_path, monkeypatch, outcomes=outcomes, steps=2, algorithm={"early_stop_kl": 0.03}
    )
    train(stage)
    assert len(stage.actor.updates) == 3 + 4
    assert stage.progress.updates == stage.progress.version == 7
    if method == "ppo":
        assert len(stage.critic.updates) == 8


def test_without_a_limit_every_update_is_made(tmp_path, monkeypatch):
    """Would catch: a limit that nobody set."""
    stage = rl_stage("grpo", tmp_path, monkeypatch, outcomes=[apart(9.0)] * 4)
    train_grpo(stage)
    assert len(stage.actor.updates) == 4


def test_the_best_model_is_the_one_that_is_kept(tmp_path, monkeypatch):
    """Would catch: the worst or the last model kept, a model that is only as good as the one before."""
    passed = {0: 2, 1: 1, 2: 3, 3: 3, 4: 2}  # of 4 held-out prompts, after each step
    exported = []
    recipe = {
        "method": "sft",
        "data": {"path": "none", "response_column": "answer"},
        "reward": [{"function": "gsm8k"}],
        "trainer": {"steps": 4},
        "evaluation": {"every": 1, "keep_best": "eval/held/pass@1", "sets": {"held": {"path": "none"}}},
    }

    def reward(rollout):
        return float(rollout.prompt.row["number"] < passed[stage.progress.step])

    stage = fake_stage(
        recipe,
        tmp_path,
        monkeypatch,
        sampler=FakeSampler(),
        scorer=FakeScorer(reward),
        eval_sets={"held": prompts(4)},
        export=lambda folder: exported.append((stage.progress.step, folder.name)),
    )
    for step in stage.steps():
        stage.track(step, batch=None, updates=[GOOD])
    assert exported == [(0, "model-best"), (2, "model-best")]
    assert stage.progress.best == 0.75


def test_rows_that_always_pass_are_passed_over(tmp_path, monkeypatch):
    """Would catch: a curriculum that chooses the easy rows, or takes rows as they come."""
    sections = {
        "curriculum": {"low": 0.1, "high": 0.9, "revisit": 0.0},
        "data": {"path": "none"},
    }
    stage = rl_stage("grpo", tmp_path, monkeypatch, **sections)
    rows = stage.next_rows()
    ids = sorted(row.id for row in rows)
    assert len(set(ids)) == 4  # all untried
    stage.scorer = FakeScorer(lambda r: 1.0 if r.prompt.id in ids[:2] else float(r.sample_id[-1]))
    stage.reward([rollout(f"0/{i}/{j}", (5, 0), prompt=row) for i, row in enumerate(rows) for j in range(2)])
    others = {row.id for row in stage.data.items} - set(ids)
    again = [row.id for _ in range(6) for row in stage.next_rows()]
    assert not set(ids[:2]) & set(again)
    assert set(ids[2:]) | others == set(again)


def test_the_scale_of_a_reward_model_is_that_of_its_first_pairs(tmp_path, monkeypatch):
    """Would catch: scores of the chosen answers alone, mean and spread swapped, the spread of a population."""
    pairs = tuple(PreferenceExample(f"train/{i}", (1,), (2 + i,), (8 + i,), None) for i in range(2))
    data = Dataset(pairs, "print", {"kept": 2, "bad_rows": 0})
    actor = FakeActor(rewards=lambda batch: batch.token_ids[:, 1].float())  # 2, 8, 3, 9
    recipe = {"method": "rm", "trainer": {"steps": 1, "prompts_per_step": 2}}
    stage = fake_stage(recipe, tmp_path, monkeypatch, actor=actor, data=data)
    store_scale(stage)
    ((method, mean, std),) = actor.group.calls
    assert method == "store_reward_scale" and mean == 5.5
    assert std == pytest.approx(((3.5**2 + 2.5**2 + 2.5**2 + 3.5**2) / 3) ** 0.5)
