"""Bad input: one clear error each, with the value, the rule and the way out, and no traceback on the screen."""

from __future__ import annotations

import json

import pytest

from tests.e2e.running import TINY


def _shown(done) -> str:
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("stages.grpo.rollout.group_size=1", 2, ["group_size=1", "use group_size >= 2"]),
        (
            "stages.grpo.rollout.max_response_tokens=64",
            2,
            ["max_response_tokens=64", "64 tokens", "lower it"],
        ),
        ("stages.warmup.data.response_column=answr", 2, ["answr", "did you mean 'answer'?"]),
        ("stages.warmup.trainer.prompts_per_step=999", 2, ["999", "200", "lower it to at most 200"]),
        ("trainer.stepz=3", 2, ["stepz", "steps"]),
        (
            "data.max_prompt_tokens=2",
            1,
            ["none of 200 rows is left", "6 tokens and the room is 2", "raise data.max_"],
        ),
    ],
)
def test_recipe_and_data_errors(tiny, train, override, code, says):
    """Would catch: a traceback, a hang or a silent default instead of a message."""
    done, _ = train(tiny, override)
    assert done.returncode == code, _shown(done)
    assert "Traceback" not in _shown(done)
    for text in says:
        assert text in _shown(done), _shown(done)


def test_unknown_model_folder(tiny, train):
    """Would catch: an attempt to download, or an error that does not name the folder."""
    tiny["model"] = {"path": "./no/such/folder", "dtype": "float32"}
    tiny["tokenizer"] = {}
    done, run_dir = train(tiny)
    assert done.returncode == 2 and "no/such/folder" in _shown(done) and "Traceback" not in _shown(done)
    assert not run_dir.exists()


def test_a_hub_that_cannot_be_reached_names_the_way_out(tiny, train, monkeypatch):
    """Would catch: a library's traceback about connections in the place of what to do."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny["model"] = {"path": "no-such-org/no-such-model", "dtype": "float32"}
    done, _ = train(tiny)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    for text in ("model.path: there is no folder no-such-org/no-such-model", "give a folder", "HF_TOKEN"):
        assert text in " ".join(_shown(done).split())
    tiny["model"] = TINY["model"]
    tiny["data"] = {"path": "no-such-org/no-such-set", "response_column": "response"}
    done, _ = train(tiny)
    assert done.returncode == 1
    for text in (
        "data.path='no-such-org/no-such-set' is no file here",
        "give the path of a file",
        "HF_TOKEN",
    ):
        assert text in " ".join(_shown(done).split())


def test_empty_dataset(tiny, train, tmp_path):
    """Would catch: a run over nothing."""
    (tmp_path / "empty.jsonl").write_text("")
    for stage in tiny["stages"].values():
        stage["data"] = {"path": "empty.jsonl", "task": None, "task_args": {}}
    done, _ = train(tiny)
    assert done.returncode == 2 and "Traceback" not in _shown(done)
    assert "'empty.jsonl' holds no rows" in _shown(done) and "is for a built-in task" in _shown(done)


def _with_reward(tiny: dict, tmp_path, body: str) -> dict:
    (tmp_path / "rewards.py").write_text(f"def judge(prompts, responses, **columns):\n    {body}\n")
    tiny["reward"] = [{"function": "rewards.py:judge"}]
    return tiny


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0]", ["judge", "1"]),
        ("return ['yes'] * len(responses)", ["judge", "yes"]),
        ("return [None] * len(responses)", ["judge", "5%"]),
    ],
)
def test_reward_that_breaks_its_contract_stops_the_run(tiny, train, tmp_path, body, says):
    """Would catch: a missing reward read as zero, or a run that goes on without a signal."""
    done, _ = train(_with_reward(tiny, tmp_path, body))
    assert done.returncode == 1 and "Traceback" not in _shown(done), _shown(done)
    for text in says:
        assert text in _shown(done), _shown(done)


def test_one_nan_reward_is_masked_and_counted(tiny, train, tmp_path):
    """Would catch: NaN in the loss, or a bad sample counted as zero."""
    body = "return [float('nan') if i == 3 else float(len(r) % 3) for i, r in enumerate(responses)]"
    tiny["stages"]["grpo"]["trainer"]["prompts_per_step"] = (
        16  # 1 of 64 is under the 5 % at which the run stops
    )
    tiny["evaluation"] = {"sets": {}}
    done, run_dir = train(_with_reward(tiny, tmp_path, body))
    assert done.returncode == 0, _shown(done)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward/error_frac"] == pytest.approx(1 / 64)
    assert last["policy/grad_norm"] == last["policy/grad_norm"] and last["robust/skipped_steps"] == 0
