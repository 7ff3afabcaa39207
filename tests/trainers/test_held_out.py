"""Held-out rows of the training data's kind: the numbers, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf import batching
from rlhf.batching import LabelExample, SftExample, StepExample
from rlhf.data.rows import Dataset
from rlhf.trainers.held_out import evaluate_rows
from tests.trainers.fake_roles import FakeActor, fake_stage


def rows(*items) -> Dataset:
    return Dataset(items, "print", {"kept": len(items), "bad_rows": 0})


def test_loss_of_answers_is_the_mean_over_learned_tokens(tmp_path, monkeypatch):
    """Would catch: a mean of means, prompts or a user's turns in the loss, the tokens of the last batch alone."""
    monkeypatch.setattr(batching, "_ROWS_AT_ONCE", 1)
    held = rows(
        SftExample("a", (1, 1), (2, 3, 4)), SftExample("b", (1,), (5, 6), response_mask=(False, True))
    )
    actor = FakeActor(score=lambda batch: -batch.token_ids.float() / 2)
    recipe = {
        "method": "sft",
        "data": {"path": "none", "response_column": "answer"},
        "trainer": {"steps": 1},
    }
    stage = fake_stage(recipe, tmp_path, monkeypatch, actor=actor)
    metrics = evaluate_rows("held", held, stage)
    assert metrics["eval/held/loss"] == pytest.approx((2 + 3 + 4 + 6) / 2 / 4)
    assert metrics["eval/held/perplexity"] == pytest.approx(math.exp(15 / 8))


def test_wanted_answers_are_compared_with_unwanted_ones(tmp_path, monkeypatch):
    """Would catch: labels swapped, ties counted as won, scores without beta or without the reference."""
    held = rows(*(LabelExample(str(i), (1,), (i,), i in (3, 5)) for i in (2, 3, 4, 5, 6)))
    # log-ratios: 2 -> 1, 3 -> 1 (wanted), 4 -> 2, 5 -> 4 (wanted), 6 -> 3
    ratio = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 4.0, 3.0])
    recipe = {
        "method": "kto",
        "data": {"path": "none", "response_column": "answer"},
        "kto": {"beta": 0.5},
        "trainer": {"steps": 1},
    }
    stage = fake_stage(
        recipe,
        tmp_path,
        monkeypatch,
        actor=FakeActor(score=lambda batch: ratio[batch.token_ids] - 9.0),
        reference=FakeActor(score=lambda batch: torch.full(batch.token_ids.shape, -9.0)),
    )
    assert evaluate_rows("held", held, stage) == {
        "eval/held/auc": (0.5 + 0 + 0 + 1 + 1 + 1) / 6,
        "eval/held/reward_desirable": 0.5 * 2.5,
        "eval/held/reward_undesirable": 0.5 * 2.0,
    }


def test_verdicts_on_steps_are_counted(tmp_path, monkeypatch):
    """Would catch: tokens between steps counted, a verdict read against the wrong step, answers averaged before steps."""
    held = rows(
        StepExample("a", (1,), (9, 2, 9, 3), (1, 3), (1.0, 1.0)), StepExample("b", (1,), (4,), (0,), (0.0,))
    )
    logits = torch.tensor([0.0, 0.0, 2.0, -1.0, -3.0, 0.0, 0.0, 0.0, 0.0, 50.0])
    actor = FakeActor()
    actor.step_scores = lambda batch: logits[batch.token_ids]
    stage = fake_stage({"method": "prm", "trainer": {"steps": 1}}, tmp_path, monkeypatch, actor=actor)
    metrics = evaluate_rows("held", held, stage)
    loss = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log1p(math.exp(-3))) / 3
    assert metrics["eval/held/loss"] == pytest.approx(loss)
    assert metrics["eval/held/accuracy"] == metrics["eval/held/label_mean"] == pytest.approx(2 / 3)
    assert 0 < metrics["eval/held/accuracy_low"] < 2 / 3 < metrics["eval/held/accuracy_high"] < 1


def test_a_stage_measures_its_held_out_rows_before_during_and_after(tmp_path, monkeypatch):
    """Would catch: a held-out set that is loaded and never looked at."""
    recipe = {
        "method": "sft",
        "data": {"path": "none", "response_column": "answer"},
        "trainer": {"steps": 4},
        "evaluation": {
            "every": 2,
            "held_out": {"held": {"path": "none", "response_column": "answer"}},
        },
    }
    held = {"held": rows(SftExample("a", (1, 1), (2,)))}
    stage = fake_stage(recipe, tmp_path, monkeypatch, held_out=held)
    written = []
    stage.tracker.log = lambda step, name, metrics, timings: written.append((step, metrics))
    for step in stage.steps():
        stage.track(step, batch=None, updates=[])
    assert [step for step, metrics in written if "eval/held/loss" in metrics] == [0, 2, 4]


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_the_best_of_losses_is_the_lowest(metric, tmp_path, monkeypatch):
    """Would catch: the model with the highest loss kept as the best."""
    losses = {0: 3.0, 1: 2.0, 2: 2.5, 3: 2.0, 4: 1.0}
    recipe = {
        "method": "sft",
        "data": {"path": "none", "response_column": "answer"},
        "trainer": {"steps": 4},
        "evaluation": {
            "every": 1,
            "keep_best": f"eval/held/{metric}",
            "held_out": {"held": {"path": "none", "response_column": "answer"}},
        },
    }
    exported = []
    stage = fake_stage(
        recipe,
        tmp_path,
        monkeypatch,
        actor=FakeActor(score=lambda b: torch.full(b.token_ids.shape, -losses[stage.progress.step])),
        held_out={"held": rows(SftExample("a", (1, 1), (2,)))},
        export=lambda folder: exported.append(stage.progress.step),
    )
    for step in stage.steps():
        stage.track(step, batch=None, updates=[])
    assert exported == [0, 1, 4]
