"""Parts of whole-run tests: the smallest recipe that still does everything, and how runs are compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
        "sets": {"sums": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 20, "terms": 3}}},
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
            "trainer": {"steps": 6, "prompts_per_step": 4, "lr": 1e-3, "zero_stage": 2, "micro_batch_tokens": 128},
        },
    },
}


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
