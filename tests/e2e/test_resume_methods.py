"""Killed at any point, every method goes on to the run that was never interrupted: metrics, samples, the exported model
and the whole state of the last checkpoint (moments, averages, reference, critic) are equal to the last bit.

The runs are forked from a process that has imported everything already, so that a start takes no longer than it must;
that the command line does the same is `test_run.py`'s matter.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.models import build_model, build_tokenizer, save_model
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from tests.e2e.running import TINY, digest, forked_run, merged, of_method

pytestmark = pytest.mark.slow

PRELOADED = ["rlhf.runtime.run", "deepspeed", "peft", "transformers.models.qwen3.modeling_qwen3"]
TASK = {"task": "chain_arithmetic", "task_args": {"count": 60, "terms": 3}}
HELD_OUT = {"held": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 12, "terms": 3}}}
NUMBERS = [{"function": "format", "args": {"pattern": "[0-3]$"}}]  # random weights earn it now and then
LORA = {"lora": {"rank": 4}}

BASE = {
    "model": TINY["model"],
    "tokenizer": TINY["tokenizer"],
    "data": TASK,
    "rollout": {"group_size": 2, "max_response_tokens": 8, "page_tokens": 16},
    "trainer": {
        **{"steps": 6, "prompts_per_step": 4, "minibatches_per_step": 2, "lr": 1e-2, "zero_stage": 0},
        **{"schedule": "cosine", "warmup_steps": 2, "micro_batch_tokens": 128},
    },
    "run": {"seed": 3, "save_every": 2, "keep_last": 1},
    "runtime": {"threads": 1},
    "tracking": {"wandb": "off", "console_samples": 0, "report_every": 1000},
}
# What is trained, and where it is killed, in this order: point@step, each in a start of its own.
CASES: dict[str, tuple[dict, str]] = {
    "ppo": (
        {
            "method": "ppo",
            "reward": NUMBERS,
            "algorithm": {
                "kl_coef": 0.05,
                "kl_target": 0.1,
                "kl_horizon": 50.0,
                "ptx_coef": 0.1,
                "early_stop_kl": 0.05,
            },
            "reference": {"update_every": 1, "update_mix": 0.6},
            "critic": {"lr": 1e-2, "pretrain_steps": 1},
            "ptx": {"data": TASK | {"response_column": "response"}, "rows_per_step": 2},
            "placement": {
                "policy": {"roles": ["actor", "rollout"]},
                "critic": {"roles": ["critic"]},
                "reference": {"roles": ["reference"]},
            },
        },
        "train.backward@1 optimizer.before@3 checkpoint.before_rename@4 track@6",
    ),
    "dpo": (
        {
            "method": "dpo",
            "preference": {"losses": {"dpo": 1.0, "aot": 0.5}},
            "evaluation": {"every": 3, "pairs": HELD_OUT, "keep_best": "eval/held/margin"},
        },
        # before the reference's log-probs are whole, right after they are, and while training
        "reference.mid@* track@* optimizer.after@3 checkpoint.after_rename@4",
    ),
    "tr_dpo": (
        {
            "method": "dpo",
            "model": LORA,
            "reference": {"update_every": 1, "update_mix": 0.6},
            "trainer": {"neftune_alpha": 5.0, "ema_decay": 0.8, "zero_stage": 2},
        },
        "optimizer.after@3 track@6",
    ),
    "kto": ({"method": "kto", "data": {"response_column": "judged"}}, "track@3 train.backward@6"),
    "rm": (
        {
            "method": "rm",
            "model": LORA,
            "reward_modeling": {"center_coef": 0.01},
            "evaluation": {"every": 2, "pairs": HELD_OUT, "keep_best": "eval/held/accuracy"},
        },
        "optimizer.before@3 stage.export@6",
    ),
    "online_dpo": (
        {
            "method": "online_dpo",
            "reward": NUMBERS,
            "rollout": {"group_size": 4},
            "reference": {"update_every": 3},
        },
        "rollout.mid@4 publish.mid@6",
    ),
    "spin": (
        {
            "method": "online_dpo",
            "online": {"pairs": "gold"},
            "data": {"response_column": "response"},
            "reference": {"update_every": 2, "update_mix": 0.6},
        },
        "rollout.mid@4 optimizer.after@5 track@6",
    ),
    "rejection": (
        {
            "method": "rejection",
            "reward": NUMBERS,
            "rollout": {"group_size": 4},
            "online": {"min_reward": 0.0},
        },
        "optimizer.after@3 track@5",
    ),
    "distill": (
        {"method": "distill", "data": {"response_column": "response"}, "trainer": {"zero_stage": 3}},
        "optimizer.before@4 track@5",
    ),
    "dapo, remax": (
        {
            "method": "grpo",
            "reward": NUMBERS,
            "rollout": {"group_size": 4},
            "algorithm": {"advantage": "remax", "dynamic_sampling": True, "max_sampling_rounds": 2},
            "trainer": {"ema_decay": 0.8},
        },
        "reward.mid@3 optimizer.after@4 publish.mid@5",
    ),
}
Start = Callable[..., tuple[int, Path]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The folder of a model to imitate."""
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    model = build_model(BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=99)
    folder = tmp_path_factory.mktemp("teacher")
    save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def start(tmp_path) -> Start:
    """start(recipe, name, faults) -> (exit status, run directory); a negative status is a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(recipe: dict, name: str, faults: str = "") -> tuple[int, Path]:
        recipe = merged(recipe, {"run": {"name": name, "output_dir": str(tmp_path)}})
        process = context.Process(target=forked_run, args=(recipe, faults, str(tmp_path / f"{name}.log")))
        process.start()
        process.join()
        return process.exitcode, tmp_path / name

    return run


@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again_is_the_uninterrupted_run(
    start: Start, teacher: str, tmp_path: Path, name: str
):
    """Would catch: state that a checkpoint forgets (a moving reference, a critic, an average, the KL's weight, a
    position, a count), a reference computed from an actor that has moved, a draw from a stream, records lost or doubled."""
    changes, faults = CASES[name]
    recipe = of_method(BASE, changes)
    if recipe["method"] == "distill":
        recipe["teacher"] = {"path": teacher}
    status, whole = start(recipe, "whole")
    assert status == 0, (tmp_path / "whole.log").read_text()
    for fault in faults.split():
        status, killed = start(recipe, "killed", f"{fault}=kill9")
        assert status == -signal.SIGKILL, (fault, status, (tmp_path / "killed.log").read_text())
    status, killed = start(recipe, "killed")
    assert status == 0, (tmp_path / "killed.log").read_text()
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
    exact = [
        path.relative_to(whole) for pattern in ("*.safetensors", "s*.jsonl") for path in whole.rglob(pattern)
    ]
    assert any(path.parent.name == "step-00000006" for path in exact)
    differing = [str(path) for path in exact if digest(whole / path) != digest(killed / path)]
    assert not differing
