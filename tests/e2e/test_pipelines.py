"""Stages that take what earlier ones made: a chain of seven stages, the DeepSeek-R1 line, at the smallest size."""

from __future__ import annotations

import copy
import json

import pytest

from rlhf.checkpoint import find_checkpoint
from rlhf.recipe.load import RecipeError, load_plan, plan_from_dict
from rlhf.recipe.outputs import start_stage
from rlhf.recipe.schema import ModelConfig
from rlhf.runtime.identity import model_identity
from tests.e2e.running import ROOT, TINY, digest, merged, records, trainer_in

SUMS = {"task": "chain_arithmetic", "task_args": {"split": "train", "count": 100, "terms": 2}}
SELECTED = {"path": "stage:select", "task": None, "task_args": None, "prompt_column": "not there"}


def trainer(steps: int, lr: float = 1e-2) -> dict:
    return {"steps": steps, "prompts_per_step": 8, "lr": lr, "zero_stage": 0, "micro_batch_tokens": 256}


def line() -> dict:
    """Cold start, RL, rejection sampling, SFT from the cold start's weights on what was selected, RL over two tasks,
    distillation into a model of another shape, and a reward model at the end."""
    recipe = copy.deepcopy(TINY)
    recipe["data"].pop("response_column")
    recipe["reward"] = [{"function": "format", "args": {"pattern": "[0-9]"}}]  # what random weights can do
    start = {"path": "stage:cold_start", "build": None}
    small = {"build": {"config": {"hidden_size": 16, "num_hidden_layers": 1}}}
    student = {"teacher": {"path": "stage:mixed"}, "distill": {"on_policy_frac": 0.5}}
    recipe["stages"] = {
        "cold_start": {"method": "sft", "data": {"response_column": "response"}, "trainer": trainer(4)},
        "grpo": {"method": "grpo", "algorithm": {"kl_coef": 0.01}, "trainer": trainer(2, 1e-3)},
        "select": {
            "method": "rejection",
            "online": {"keep_best": 2, "min_reward": 0.5, "train": False},
            "trainer": trainer(5),
        },
        "sft": {"method": "sft", "model": start, "data": SELECTED, "trainer": trainer(3)},
        "mixed": {"method": "grpo", "mix": {"pairs": {**SUMS, "weight": 0.5}}, "trainer": trainer(4, 1e-3)},
        "distill": {"method": "distill", "model": small, "data": SELECTED, **student, "trainer": trainer(4)},
        "rm": {"method": "rm", "evaluation": {"sets": None}, "trainer": trainer(3)},
    }
    return json.loads(json.dumps(recipe))  # no value twice: YAML would write an alias


STEPS = {"cold_start": 4, "grpo": 2, "select": 5, "sft": 3, "mixed": 4, "distill": 4, "rm": 3}
# Whose model each stage starts from: the SFT of the R1 line goes back to the cold start, and all after it goes on from there.
STARTS = {
    "cold_start": None,
    "grpo": "cold_start",
    "select": "grpo",
    "sft": "cold_start",
    "mixed": "sft",
    "distill": None,
    "rm": "mixed",
}
# Killed at each of these, in order; steps count over the run.
KILLED_AT = (("track", 9), ("checkpoint.before_rename", 11), ("reward.mid", 17), ("train.backward", 21))


@pytest.fixture(scope="module")
def whole_line(tmp_path_factory):
    done, run_dir = trainer_in(tmp_path_factory.mktemp("line"))(line(), name="line")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_every_stage_takes_what_the_earlier_ones_made(whole_line):
    """Would catch: a stage that starts from the wrong weights, trains on the wrong rows, or is left out."""
    steps = [r["stage"] for r in records(whole_line) if "robust/skipped_steps" in r]
    assert steps == [name for name, n in STEPS.items() for _ in range(n)]
    by_stage = {name: [r for r in records(whole_line) if r["stage"] == name] for name in STEPS}
    weights = {
        name: digest(whole_line / "stages" / name / "model" / "model.safetensors")
        for name in list(STEPS)[:-1]
    }
    assert weights["select"] == weights["grpo"] != weights["cold_start"]
    assert len(set(weights.values())) == len(weights) - 1
    small = (whole_line / "stages" / "distill" / "model" / "model.safetensors").stat().st_size
    assert small < 0.5 * (whole_line / "stages" / "mixed" / "model" / "model.safetensors").stat().st_size
    assert by_stage["distill"][-1]["distill/divergence"] > 0
    assert "rm/accuracy" in by_stage["rm"][-1]


def test_every_stage_starts_from_the_latest_of_its_line(whole_line):
    """Would catch: a stage after a restart that goes on from what the restart left behind, a scoring model as a start."""
    stages = plan_from_dict(line()).stages
    assert {s.name: start_stage(i, stages) for i, s in enumerate(stages)} == STARTS
    for name, start in STARTS.items():
        saved = find_checkpoint(whole_line / "stages" / name / "checkpoints").meta["identity"]["model"]
        folder = whole_line / "stages" / str(start) / "model"
        if start is None:
            assert list(saved) == ["build"], name
        else:
            assert saved == model_identity(ModelConfig(path=str(folder)), seed=0, model=None), name


def test_the_recipe_of_the_r1_line_starts_its_stages_as_the_paper_does():
    """Would catch: RL over mixed tasks from the weights before the second SFT, which nothing would then use."""
    stages = load_plan(str(ROOT / "recipes" / "arithmetic" / "r1.yaml")).stages
    assert {s.name: start_stage(i, stages) for i, s in enumerate(stages)} == {
        "warmup": None,
        "rl": "warmup",
        "select": "rl",
        "sft": "warmup",
        "rl_mixed": "sft",
        "distill": None,
    }


def test_what_was_selected_is_what_the_next_stage_learns_from(whole_line):
    """Would catch: rows of another step or order, responses that were not selected, a prompt rendered twice."""
    rows = records(whole_line, "stages/select/selected.jsonl")
    assert {row["step"] for row in rows} <= set(range(1, 6)) and [r["step"] for r in rows] == sorted(
        r["step"] for r in rows
    )
    assert rows and all(
        row["reward"] == 1 and row["prompt"].endswith("=") and "<|" not in row["response"] for row in rows
    )
    fracs = {r["step"] - 6: r["rollout/selected_frac"] for r in records(whole_line) if r["stage"] == "select"}
    for step, frac in fracs.items():
        assert sum(row["step"] == step for row in rows) == frac * 8 * 4


def test_killed_in_every_stage_is_the_uninterrupted_line(train, whole_line):
    """Would catch: selected rows written twice or lost, a mixture in another order, a stage that starts over from
    another one's weights."""
    for point, step in KILLED_AT:
        done, killed = train(line(), name="killed", faults=f"{point}@{step}=kill9")
        assert done.returncode == -9, (point, step, done.returncode, done.stdout + done.stderr)
    done, killed = train(line(), name="killed")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("metrics.jsonl", "samples.jsonl", "stages/select/selected.jsonl"):
        assert (whole_line / name).read_text() == (killed / name).read_text(), name
    for name in ("model", *(f"stages/{stage}/model" for stage in list(STEPS)[:-1])):
        assert digest(whole_line / name / "model.safetensors") == digest(
            killed / name / "model.safetensors"
        ), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"data": {"path": "stage:selekt"}}}, "there is no earlier stage 'selekt'; did you mean select?"),
        ({"sft": {"data": {"path": "stage:grpo"}}}, "stage 'grpo' (grpo) writes no data"),
        ({"rm": {"data": dict(SELECTED)}}, "stage 'select' selects answers, and rm needs judged ones"),
        ({"mixed": {"mix": {"pairs": {"path": "stage:sft", "task": None}}}}, "stage 'sft' (sft) writes no data"),
        ({"mixed": {"mix": {"pairs": {"weight": 0}}}}, "weight: 0 is not above 0"),
        ({"cold_start": {"mix": {"more": {**SUMS}}}}, "sft needs the column with the answer to imitate"),
        ({"grpo": {"evaluation": {"sets": {"sums": SELECTED}}}}, "not held out"),
        ({"grpo": {"online": {"train": False}}}, "online.train: false only selects, which grpo does not"),
        ({"distill": {"teacher": {"path": "stage:rm"}}}, "there is no earlier stage 'rm'"),
    ],
)  # fmt: skip
def test_a_line_that_does_not_fit_together_is_refused(changes, message):
    """Would catch: a mistake in stage six that shows itself only after five stages."""
    recipe = merged(line(), {"stages": changes})
    with pytest.raises(RecipeError) as refused:
        plan_from_dict(recipe)
    assert message in str(refused.value), str(refused.value)
