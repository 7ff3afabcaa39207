"""Evaluation metrics of several responses to a prompt."""

from __future__ import annotations

import pytest

from rlhf.recipe.schema import EvaluationConfig, RewardConfig
from rlhf.records import Prompt, Rollout
from rlhf.reward import Scorer
from rlhf.trainers.evaluate import eval_metrics


def responses(*texts: str) -> list[Rollout]:
    prompt = Prompt(id="p", token_ids=(1,), text="?", row={"answer": "#### 7"})
    return [
        Rollout(f"0/0/{i}", prompt, (2,), (True,), (0.0,), (0,), "stop", text) for i, text in enumerate(texts)
    ]


def test_pass_mean_and_majority_of_each_prompt():
    """Would catch: responses counted over prompts instead of within one, the majority judged by another response, k = 1
    written twice."""
    scorer = Scorer([RewardConfig(function="gsm8k")])
    rollouts = scorer.score(
        [*responses("#### 7", "#### 7.0", "#### 5", "none"), *responses("#### 7", "#### 5", "5", "#### 4")]
    )
    config = EvaluationConfig(samples=4, ks=[1, 2, 4], temperature=1.0)
    metrics = eval_metrics("t", rollouts, config, extract=scorer.answer_of)
    assert metrics["eval/t/pass@1"] == metrics["eval/t/mean@4"] == 3 / 8
    assert metrics["eval/t/pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert metrics["eval/t/pass@4"] == 1.0
    assert metrics["eval/t/maj@4"] == 0.5  # 7 wins the first vote, 5 the second
    assert "eval/t/maj@4" not in eval_metrics("t", rollouts, config)


def test_one_response_has_no_other_k():
    """Would catch: mean@1 or maj@1 written beside pass@1."""
    scorer = Scorer([RewardConfig(function="gsm8k")])
    metrics = eval_metrics(
        "t", scorer.score(responses("#### 7")), EvaluationConfig(), extract=scorer.answer_of
    )
    assert sorted(metrics) == ["eval/t/pass@1", "eval/t/reward_mean", "eval/t/truncated_frac"]
