"""The command line: start-up time, exit codes, no torch before a recipe is valid."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

VALID = """\
model: {path: some/model}
data: {path: train.jsonl}
reward: [{function: exact_match}]
trainer: {steps: 10}
"""


def rlhf(*args, code="from rlhf.cli import main; main()"):
    """The finished command and the processor seconds it took, which other work on the machine does not stretch much."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "120"}
    before = _seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, _seconds_of_children() - before


def _seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(recipe) -> its path, in a working directory with the training set that VALID names."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(32)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def _write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return _write


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["validate", "--help"], ["--version"]])
def test_help_is_immediate(args):
    """Catches: an import of torch, or of anything slow, at the top of the command line."""
    done, seconds = rlhf(*args)
    assert done.returncode == 0, done.stderr
    assert seconds < 1


def test_help_names_the_commands():
    out = rlhf("--help")[0].stdout
    assert "train" in out and "validate" in out
    assert rlhf()[0].stdout.split() == out.split()
    assert rlhf("--version")[0].stdout.startswith("rlhf 0.")


def test_a_bad_recipe_is_refused_within_three_seconds_with_exit_code_2(write):
    path = write(VALID.replace("steps", "stepps"))
    for command in ("validate", "train"):
        done, took = rlhf(command, path, "rollout.group_size=1", "run.nme=x")
        assert done.returncode == 2
        assert took < 3
        assert "Traceback" not in done.stderr and done.stdout == ""
        for said in (
            ":4: trainer.stepps: unknown key; did you mean trainer.steps?",
            "group_size >= 2",
            "run.name?",
        ):
            assert said in done.stderr


def test_valid_recipes_are_summarised(write):
    done, _ = rlhf(
        "validate", write(VALID), "runtime.backend=ray", "placement={a: {roles: [actor, rollout], gpus: 2}}"
    )
    assert done.returncode == 0, done.stderr
    assert "grpo, 10 steps of 32 prompts; a = actor, rollout on 2 GPUs" in done.stdout


def test_show_prints_a_recipe_that_is_valid(write):
    shown, _ = rlhf("validate", write(VALID), "--show", "trainer.lr=3e-4")
    again, _ = rlhf("validate", write(shown.stdout), "--show")
    assert "lr: 0.0003" in shown.stdout and again.stdout == shown.stdout


def test_an_unknown_option_is_explained(write):
    done, _ = rlhf("train", write(VALID), "--trainer.lr=3")
    assert done.returncode == 2
    assert (
        "--trainer.lr=3: no such option; a recipe's keys are given without dashes, as key=value"
        in done.stderr
    )


HEAVY = (
    "import sys, atexit\n"
    "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'datasets', 'wandb', 'pandas'}\n"
    "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
    "from rlhf.cli import main; main()"
)

MANY_MISTAKES = """\
model:
  build: {model_type: qwen3, config: {hiden_size: 96, num_attention_heads: 6, num_key_value_heads: 4}}
tokenizer: {build: {alphabet: "00"}}
data: {path: train.jsonl, prompt_column: question}
reward:
  - function: gsm8kk
  - function: rewards.py:judge
rollout: {group_size: 1}
evaluation: {sets: {held_out: {path: tset.jsonl}, sums: {task: chain_arithmetic, task_args: {count: 3, term: 2}}}}
trainer: {steps: 10, lrr: 1}
reference: {path: ./nowhere/model}
"""


@pytest.mark.parametrize("command", ["validate", "train"])
def test_torch_is_not_imported_before_the_recipe_is_valid(write, command):
    """Catches: seconds of waiting for a typo."""
    done, _ = rlhf(command, write("a: 1"), code=HEAVY.replace("{'torch'", "{'numpy', 'torch'"))
    assert done.returncode == 2 and "HEAVY []" in done.stdout


@pytest.mark.parametrize("command", ["validate", "train"])
def test_what_a_recipe_names_is_in_the_same_report(write, command):
    """Catches: a missing file, function or column that is found after torch has loaded, alone, with exit code 1."""
    done, took = rlhf(command, write(MANY_MISTAKES), code=HEAVY)
    assert done.returncode == 2 and "HEAVY []" in done.stdout and "Traceback" not in done.stderr
    assert took < 3
    for said in (
        ":2: model.build.config.hiden_size: qwen3 has no such key; did you mean hidden_size?",
        ":2: model.build.config.num_key_value_heads: num_attention_heads=6 is not a multiple of num_key_value_heads=4",
        ":3: tokenizer.build.alphabet: has '0' more than once",
        ":4: data.prompt_column: the dataset has no column 'question'; it has answer, prompt",
        ":6: reward.0.function: there is no reward function 'gsm8kk'; did you mean gsm8k?",
        ":7: reward.1.function: there is no file rewards.py",
        ":8: rollout.group_size: group_size=1",
        ":9: evaluation.sets.held_out.path: 'tset.jsonl' does not exist",
        ":9: evaluation.sets.sums.task_args.term: task chain_arithmetic has no such argument; did you mean terms?",
        ":10: trainer.lrr: unknown key; did you mean trainer.lr?",
        ":11: reference.path: there is no folder ./nowhere/model",
    ):
        assert said in done.stderr, done.stderr


def test_a_finished_run_is_told_without_torch(write, tmp_path):
    """Catches: seconds of loading to say that there is nothing to do."""
    path = write(VALID)
    shown, _ = rlhf("validate", path, "--show")
    run_dir = tmp_path / "runs" / "run"
    (run_dir / "stages" / "grpo" / "checkpoints").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(shown.stdout)
    (run_dir / "finished.json").write_text("{}")
    done, took = rlhf("train", path, code=HEAVY)
    assert done.returncode == 0 and "HEAVY []" in done.stdout, done.stderr
    assert "runs/run is already finished; --fresh" in done.stdout and took < 2
    done, _ = rlhf("train", path, "trainer.lr=3e-4", code=HEAVY)
    assert done.returncode == 1 and "HEAVY []" in done.stdout
    assert "another recipe (trainer.lr: 1e-06 -> 0.0003)" in done.stderr and "--fresh" in done.stderr


def test_train_hands_over_the_plan_and_its_exit_code(write):
    code = (
        "import sys, types\n"
        "fake = types.ModuleType('rlhf.runtime.run')\n"
        "fake.run_plan = lambda plan, fresh: print(plan.stages[0].recipe.trainer.steps, fresh) or 7\n"
        "sys.modules['rlhf.runtime.run'] = fake\n"
        "from rlhf.cli import main; main()"
    )
    done, _ = rlhf("train", write(VALID), "trainer.steps=11", code=code)
    assert (done.stdout.strip(), done.returncode) == ("11 False", 7), done.stderr
    done, _ = rlhf("train", write(VALID), "trainer.steps=11", "--fresh", code=code)
    assert (done.stdout.strip(), done.returncode) == ("11 True", 7), done.stderr


def test_warnings_are_printed_and_stop_nothing(write):
    """Catches: an ablation of clips that nobody is told does nothing."""
    done, _ = rlhf("validate", write(VALID), "algorithm.clip_high=0.3")
    assert done.returncode == 0 and "is valid" in done.stdout
    assert "warning: command line: algorithm.clip_high=0.3: no effect of clip_high: 0.3" in done.stderr
    assert "warning" not in rlhf("validate", write(VALID))[0].stderr


def test_one_mistake_on_many_lines_is_told_for_the_first_three(write):
    """Catches: a page of one sentence, in which the other mistakes drown."""
    path = write(VALID.replace("steps: 10", "steps: &n 10") + "a: *n\nb: *n\nc: *n\nd: *n\ne: *n\n")
    done, _ = rlhf("validate", path)
    assert done.returncode == 2 and done.stderr.startswith("5 problems in the recipe:")
    assert done.stderr.count("the YAML alias *n is refused") == 3
    assert f"{path}: and 2 more lines: 8, 9" in done.stderr
