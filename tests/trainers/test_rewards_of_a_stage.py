"""What a stage adds to the rewards: the greedy answer as a baseline, the penalty on overlong responses."""

from __future__ import annotations

import pytest
import torch

from rlhf.batching import make_batch
from rlhf.trainers.rewarding import penalty_metrics
from rlhf.trainers.rounds import scored_groups
from tests.trainers.fake_roles import FakeSampler, FakeScorer, fake_stage, group

RECIPE = {"method": "grpo", "reward": [{"function": "gsm8k"}], "trainer": {"steps": 1, "prompts_per_step": 1}}


def test_remax_compares_with_the_greedy_answer_to_the_same_prompt(tmp_path, monkeypatch):
    """Would catch: a random sample as the baseline, one prompt's baseline under another, a missing reward taken as 0."""

    def respond(prompt, sample, params):
        greedy = params.temperature == 0 and params.top_k == 0 and params.top_p == 1
        return ((prompt.token_ids[1] if greedy else 99), 0), "stop"

    rewards = {10: 0.25, 11: -2.0, 12: None, 99: 7.0}
    scorer = FakeScorer(lambda r: rewards[r.response_ids[0]])
    recipe = {**RECIPE, "algorithm": {"advantage": "remax"}}
    stage = fake_stage(recipe, tmp_path, monkeypatch, sampler=FakeSampler(respond), scorer=scorer)
    baselines = stage.greedy_rewards([group(1, 1.0, 0.0), group(0, 1.0, 0.0, 1.0), group(2, 1.0)], 4)
    want = torch.tensor([-2.0, -2.0, 0.25, 0.25, 0.25, float("nan")])
    torch.testing.assert_close(baselines, want, equal_nan=True, rtol=0, atol=0)
    assert stage.sampler.asked[0]["samples"] == 1


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0.0), (12, 0.0), (14, 0.25), (16, 0.5), (18, 0.75), (20, 1.0)]
)
def test_overlong_responses_lose_what_dapo_takes(tokens, penalty, tmp_path, monkeypatch):
    """Would catch: a bonus for length, the penalty from the first token on, its weight left out. DAPO eq. 13 with L_max = 20
    and L_cache = 8: 0 up to 12 tokens, (12 - length) / 8 up to 20."""
    recipe = {
        **RECIPE,
        "rollout": {"group_size": 2, "max_response_tokens": 20},
        "algorithm": {"overlong_buffer": 8, "overlong_penalty": 2.0},
    }
    sampler = FakeSampler(lambda prompt, sample, params: ((5,) * (tokens if sample else 1), "stop"))
    stage = fake_stage(recipe, tmp_path, monkeypatch, sampler=sampler, scorer=FakeScorer(lambda _: 1.0))
    short, long = scored_groups(stage, 0)[0].rollouts
    assert short.reward == 1.0 and long.reward == pytest.approx(1.0 - 2.0 * penalty)
    assert long.reward_parts["overlong"] == pytest.approx(-penalty)
    assert penalty_metrics([short, long]) == {"reward/overlong/mean": pytest.approx(-penalty / 2)}
    assert make_batch(
        [short, long], group_ids=[0, 0], correct_above=0.5
    ).right.all()  # late, and right all the same
