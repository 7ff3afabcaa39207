"""Parts of whole-run tests: the smallest recipe that still does everything, and how runs are compared."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from rlhf.recipe.reads import unread
from rlhf.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "run": {"name": "tiny", "seed": 3, "save_every": 2},
    "model": {
        "dtype": "float32",
        "build": {
            "model_type": "qwen3",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            },
        },
    },
    "tokenizer": {"build": {"kind": "characters"}},
    "data": {
        "task": "chain_arithmetic",
        "task_args": {"split": "train", "count": 200, "terms": 3},
        "response_column": "response",
    },
    "reward": [{"function": "gsm8k"}, {"function": "format", "weight": 0.1, "args": {"pattern": "#"}}],
    "evaluation": {
        "every": 3,
        "sets": {
            "sums": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 20, "terms": 3}}
        },
    },
    "rollout": {"group_size": 4, "max_response_tokens": 12, "page_tokens": 16},
    "runtime": {"threads": 1},
    "tracking": {"wandb": "off", "console_samples": 0},
    "stages": {
        "warmup": {
            "method": "sft",
            "trainer": {"steps": 4, "prompts_per_step": 16, "lr": 1e-2, "zero_stage": 0},
        },
        "grpo": {
            "method": "grpo",
            "algorithm": {"kl_coef": 0.01},
            "trainer": {
                "steps": 6,
                "prompts_per_step": 4,
                "lr": 1e-3,
                "zero_stage": 2,
                "micro_batch_tokens": 128,
            },
        },
    },
}


def merged(base: dict, changes: dict) -> dict:
    """`base` with `changes`: dictionaries key by key, all else (and an empty dictionary) replaced."""
    result = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and value and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if deeper else value
    return result


def of_method(base: dict, changes: dict) -> dict:
    """`base` with `changes`, without what of `base` their method does not read, which a recipe may not state."""
    recipe = merged(base, changes)
    whole = Recipe.model_construct(
        **{
            name: TypeAdapter(Recipe.model_fields[name].annotation).validate_python(v)
            for name, v in recipe.items()
        }
    )
    for found in unread(whole):
        if _at(changes, found.key) is None and _at(recipe, found.key) is not None:
            recipe = _without(recipe, found.key)
    return recipe


def _at(recipe: dict, key: tuple[str, ...]) -> object:
    for name in key:
        recipe = recipe.get(name) if isinstance(recipe, dict) else None
    return recipe


def _without(recipe: dict, key: tuple[str, ...]) -> dict:
    rest = {name: value for name, value in recipe.items() if name != key[0]}
    return rest if len(key) == 1 else {**rest, key[0]: _without(recipe[key[0]], key[1:])}


def trainer_in(folder: Path):
    """run(recipe, *overrides, name=..., faults=..., env=...) -> (finished process, run directory) in `folder`."""

    def run(
        recipe: dict,
        *overrides: str,
        name: str = "tiny",
        faults: str = "",
        timeout: int = 240,
        env: Mapping[str, str] | None = None,
    ):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        variables = {"PYTHONPATH": str(ROOT), "RLHF_FAULTS": faults, "WANDB_MODE": "offline", **(env or {})}
        command = [sys.executable, "-m", "rlhf.cli", "train", str(path), f"run.name={name}", *overrides]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done, folder / "runs" / name

    return run


def forked_run(recipe: dict, faults: str, log: str) -> None:
    """Run a recipe in this process, which has imported its modules but run nothing; what it says goes to a file."""
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["RLHF_FAULTS"] = faults
    from rlhf.recipe.load import plan_from_dict
    from rlhf.runtime.run import run_plan

    sys.exit(run_plan(plan_from_dict(recipe)))


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def digest(path: Path) -> str:
    """Of one file, or of every file of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    h = hashlib.sha256()
    for file in files:
        h.update(file.name.encode() + file.read_bytes())
    return h.hexdigest()


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, samples and weights are equal to the last bit."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for name in ("model", "stages/warmup/model"):
        assert digest(one / name / "model.safetensors") == digest(other / name / "model.safetensors"), name
