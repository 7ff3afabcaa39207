"""Every method at the smallest size: it runs, its numbers are finite and mean what they should."""

from __future__ import annotations

import copy
import math
import re

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.run import train_plan
from tests.e2e.running import ROOT, TINY, records

METHODS = {
    "rm": {"method": "rm", "evaluation": {"sets": {}, "pairs": {"held": {}}}},
    "prm": {"method": "prm", "evaluation": {"sets": {}}, "data": {"step_separator": ""}},
    "dpo": {"method": "dpo"},
    "tr_dpo": {"method": "dpo", "reference": {"update_every": 2, "update_mix": 0.6}},
    "aot": {"method": "dpo", "preference": {"losses": {"aot": 1.0}}},
    "simpo": {"method": "dpo", "preference": {"losses": {"simpo": 1.0}, "beta": 2.0}},
    "wpo": {"method": "dpo", "preference": {"wpo": True}},
    "kto": {"method": "kto", "data": {"response_column": "judged"}},
    "online_dpo": {"method": "online_dpo", "reward": [{"function": "gsm8k"}, {"function": "format", "args": {"pattern": "1"}}]},
    "spin": {"method": "online_dpo", "online": {"pairs": "gold"}, "data": {"response_column": "response"}},
    "rejection": {"method": "rejection"},
    "dapo": {
        "method": "grpo",
        "algorithm": {
            "clip_high": 0.28,
            "dynamic_sampling": True,
            "max_sampling_rounds": 2,
            "mask_truncated": True,
            "overlong_buffer": 4,
        },
    },
    "gspo": {"method": "grpo", "algorithm": {"objective": "gspo", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4}},
    "reinforce_pp": {"method": "grpo", "algorithm": {"advantage": "reinforce_pp", "kl_coef": 0.01, "kl_estimator": "k1"}},
    "remax": {"method": "grpo", "algorithm": {"advantage": "remax"}, "rollout": {"group_size": 1}},
    "kl_cov": {"method": "grpo", "algorithm": {"covariance": "kl_cov", "cov_frac": 0.05}},
    "adaptive": {"method": "grpo", "algorithm": {"kl_coef": 0.05, "kl_target": 0.1, "correction": "tis"}, "reference": {"update_every": 2}},
    "ppo": {"method": "ppo", "algorithm": {"kl_coef": 0.01, "kl_estimator": "k1"}, "critic": {"lr": 1e-3, "pretrain_steps": 1}},
    "vapo": {
        "method": "ppo",
        "algorithm": {"critic_lam": 1.0, "length_adaptive_lam": 0.05, "positive_nll_coef": 0.1, "aggregation": "token_mean"},
        "critic": {"lr": 1e-3},
    },
    "ptx": {
        "method": "ppo",
        "algorithm": {"ptx_coef": 0.1},
        "ptx": {"data": {"task": "chain_arithmetic", "task_args": {"count": 50, "terms": 3}, "response_column": "response"}, "rows_per_step": 4},
    },
}


def recipe_for(changes: dict) -> dict:
    """The tiny recipe with one stage: this method, from random weights."""
    recipe = copy.deepcopy(TINY)
    recipe.pop("stages")
    recipe["data"].pop("response_column")
    recipe["trainer"] = {"steps": 4, "prompts_per_step": 8, "lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 128}
    return merged(recipe, changes)


def merged(base: dict, changes: dict) -> dict:
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and value and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    if "pairs" in result and result["pairs"] == {"held": {}}:
        result["pairs"] = {"held": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 20, "terms": 3}}}
    return result


@pytest.fixture
def run(tmp_path):
    """run(recipe) -> the run directory, in this process."""

    def train(recipe: dict):
        recipe["run"]["output_dir"] = str(tmp_path)
        train_plan(plan_from_dict(recipe))
        return tmp_path / recipe["run"]["name"]

    return train


@pytest.mark.parametrize("name", METHODS)
def test_method_runs_and_its_numbers_are_finite(run, name):
    """Would catch: a method that is only wired up on paper, a metric that is NaN, an update that is never applied."""
    run_dir = run(recipe_for(METHODS[name]))
    steps = [r for r in records(run_dir) if r["step"] > 0]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for record in steps:
        for metric, value in record.items():
            assert not isinstance(value, float) or math.isfinite(value), (record["step"], metric, value)
    assert any(r.get("policy/grad_norm", 0) > 0 for r in steps), steps[-1]
    assert steps[-1]["robust/skipped_steps"] == 0
    assert (run_dir / "model" / "config.json").is_file()
    emitted = {metric for record in steps for metric in record} - {"step", "stage"}
    assert emitted <= documented(emitted), f"not in docs/metrics.md: {sorted(emitted - documented(emitted))}"


def documented(metrics: set[str]) -> set[str]:
    """Those of the metrics that docs/metrics.md names. In a row of its table a name without a prefix has that of the
    one before it; `<set>` and `<part>` stand for anything, pass@k for any k."""
    patterns, prefix = [], ""
    for row in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        for name in re.findall(r"`([^`]+)`", row.split("|")[1] if row.startswith("|") else ""):
            if "/" in name:
                prefix = name.rpartition("/")[0]
            full = name if "/" in name else f"{prefix}/{name}"
            pattern = re.escape(full).replace("<set>", "[^/]+").replace("<part>", "[^/]+").replace("pass@k", r"pass@\d+")
            patterns.append(re.compile(pattern))
    return {metric for metric in metrics if any(pattern.fullmatch(metric) for pattern in patterns)}


def test_first_dpo_loss_is_log_two(run):
    """Would catch: a reference that is not the policy at the start."""
    run_dir = run(recipe_for(METHODS["dpo"]))
    first = next(r for r in records(run_dir) if r["step"] == 1)
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["dpo/accuracy"] == 0.5
