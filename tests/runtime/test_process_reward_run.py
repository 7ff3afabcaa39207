"""Whole runs in this process: a process reward model from its training to the reward it gives, and what the Python API
measures on held-out rows."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import KTOTrainer, PRMTrainer, SFTTrainer
from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.load import RecipeError, plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.runtime.run import train_plan
from tests.e2e.running import TINY, merged, records

SUMS = {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 30, "terms": 3}}


def trainer(steps: int) -> dict:
    return {"steps": steps, "prompts_per_step": 8, "lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 256}


def chain(folder) -> dict:
    """A process reward model, GRPO with its verdicts as the reward, and best of n by another aggregate."""
    recipe = copy.deepcopy({name: TINY[name] for name in ("model", "tokenizer", "runtime", "tracking")})
    recipe["run"] = {"name": "chain", "output_dir": str(folder)}
    recipe["tracking"] = {**recipe["tracking"], "samples_per_step": 6}
    recipe["data"] = {k: TINY["data"][k] for k in ("task", "task_args")}
    sampled = {"rollout": {"group_size": 3, "max_response_tokens": 12}, "trainer": trainer(2)}
    judge = {"path": "stage:prm"}
    held_out = {"held": {**SUMS, "step_separator": " "}}
    recipe["stages"] = {
        "prm": {
            "method": "prm",
            "data": {"step_separator": " "},
            "evaluation": {"held_out": held_out},
            "trainer": trainer(3),
        },
        "grpo": {"method": "grpo", "reward_model": judge, **sampled},
        "best": {
            "method": "rejection",
            "reward_model": {**judge, "steps": "product", "weight": 2.0},
            **sampled,
        },
    }
    return json.loads(json.dumps(recipe))


def test_a_process_reward_model_gives_the_reward_of_later_stages(tmp_path):
    """Would catch: a model folder that does not say what ends a step, verdicts read at the answer's last token, a held-out
    set of steps that nothing measures."""
    train_plan(plan_from_dict(chain(tmp_path)))
    run = tmp_path / "chain"
    config = json.loads((run / "stages" / "prm" / "model" / "config.json").read_text())
    assert config["step_separator"] == " "
    by_stage = {name: [r for r in records(run) if r["stage"] == name] for name in ("prm", "grpo", "best")}
    verdicts = [r for r in by_stage["prm"] if "eval/held/accuracy" in r]
    assert [r["step"] for r in verdicts] == [0, 3] and 0 <= verdicts[-1]["eval/held/accuracy"] <= 1
    for record in by_stage["grpo"]:
        assert 0 < record["reward/min"] <= record["reward/max"] < 1
        assert record["reward/mean"] == pytest.approx(record["reward/reward_model/mean"])
    for record in by_stage["best"]:
        assert record["reward/mean"] == pytest.approx(2 * record["reward/reward_model/mean"])
    samples = [s for s in records(run, "samples.jsonl") if s["stage"] in ("grpo", "best")]
    known = [steps_by_transformers(run / "stages" / "prm" / "model", s) for s in samples]
    assert max(len(steps) for steps in known) > 1
    for sample, steps in zip(samples, known, strict=True):
        want = min(steps) if sample["stage"] == "grpo" else 2 * math.prod(steps)
        assert sample["reward"] == pytest.approx(want, rel=1e-4)


def steps_by_transformers(folder, sample: dict) -> list[float]:
    """The probability of each step of a sample under the saved model, one forward pass for each beginning."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    text, found = sample["prompt"], []
    for step in [step for step in sample["response"].split(" ") if step] or [""]:
        text += step + " "
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(float(model(ids).logits[0, 0].sigmoid()))
    return found


def test_a_stage_whose_steps_have_no_end_gives_no_reward(tmp_path):
    """Would catch: a run that trains a process reward model for hours and then cannot use it."""
    recipe = merged(chain(tmp_path), {"stages": {"prm": {"data": {"step_separator": ""}}}})
    with pytest.raises(RecipeError, match="its step_separator is empty"):
        plan_from_dict(recipe)


ROWS = [
    {
        "prompt": f"{a}+{b}=",
        "answer": str(a + b + (a + b) % 2),
        "label": (a + b) % 2 == 0,
        "completions": [f"{a}+{b}", f"={a + b + b % 2}"],
        "labels": [True, b % 2 == 0],
    }
    for a in range(6)
    for b in range(4)
]


@pytest.mark.parametrize(
    ("kind", "settings", "measured"),
    [
        (SFTTrainer, {"response_column": "answer"}, {"loss", "perplexity"}),
        (KTOTrainer, {"response_column": "answer"}, {"auc", "reward_desirable", "reward_undesirable"}),
        (
            PRMTrainer,
            {"step_separator": " "},
            {"loss", "accuracy", "accuracy_low", "accuracy_high", "label_mean"},
        ),
    ],
)
def test_eval_dataset_holds_rows_like_the_training_s(kind, settings, measured, tmp_path):
    """Would catch: held-out answers that are taken for prompts to be rewarded."""
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    model = build_model(BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=0)
    kind(
        model, tokenizer=tokenizer, train_dataset=ROWS[:16], eval_dataset=ROWS[16:], output_dir=str(tmp_path),
        name="api", steps=2, prompts_per_step=4, lr=1e-3, threads=1, wandb="off", zero_stage=0, **settings,
    ).train()  # fmt: skip
    for record in (records(tmp_path / "api")[0], records(tmp_path / "api")[-1]):
        assert {k.removeprefix("eval/eval/") for k in record if k.startswith("eval/")} == measured
