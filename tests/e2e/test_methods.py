"""Every method at the smallest size: it runs, its numbers are finite and mean what they should."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.data.tasks import make_rows
from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.runtime.run import train_plan
from tests.e2e.running import ROOT, TINY, merged, of_method, records

HELD_OUT = {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 20, "terms": 3}}

METHODS = {
    "sft": {
        "method": "sft",
        "data": {"response_column": "response"},
        "evaluation": {"pairs": {"held": HELD_OUT}},
    },
    "rm": {"method": "rm", "evaluation": {"sets": {}, "pairs": {"held": HELD_OUT}}},
    "prm": {"method": "prm", "evaluation": {"sets": {}}, "data": {"step_separator": " "}},
    "dpo": {"method": "dpo"},
    "tr_dpo": {"method": "dpo", "reference": {"update_every": 2, "update_mix": 0.6}},
    "aot": {"method": "dpo", "preference": {"losses": {"aot": 1.0}}},
    "simpo": {"method": "dpo", "preference": {"losses": {"simpo": 1.0}, "beta": 2.0}},
    "wpo": {"method": "dpo", "preference": {"wpo": True}},
    "kto": {
        "method": "kto",
        "data": {"response_column": "judged"},
        "evaluation": {"pairs": {"held": HELD_OUT}},
    },
    "online_dpo": {
        "method": "online_dpo",
        "reward": [{"function": "gsm8k"}, {"function": "format", "args": {"pattern": "1"}}],
    },
    "spin": {"method": "online_dpo", "online": {"pairs": "gold"}, "data": {"response_column": "response"}},
    "rejection": {"method": "rejection"},
    "best_of_n": {"method": "rejection", "online": {"train": False}},
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
    "gspo": {
        "method": "grpo",
        "algorithm": {
            "objective": "gspo",
            "aggregation": "sequence_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
        },
    },
    "reinforce_pp": {
        "method": "grpo",
        "algorithm": {"advantage": "reinforce_pp", "kl_coef": 0.01},
    },
    "curriculum": {
        "method": "grpo",
        "curriculum": {"kind": "variance", "revisit": 0.3, "correct_above": 0.05},
        "data": {"task_args": {"split": "train", "count": 16, "terms": 3}},
        "reward": [{"function": "format", "args": {"pattern": "[0-9]$"}}],
    },
    "replay": {
        "method": "grpo",
        "algorithm": {"replay": {"groups": 6, "fraction": 0.5}, "correction": "tis"},
        "reward": [{"function": "format", "args": {"pattern": "[0-9]$"}}],
        "trainer": {"minibatches_per_step": 2},
    },
    "several_k": {"method": "grpo", "evaluation": {"samples": 4, "ks": [2, 3], "temperature": 1.0}},
    "remax": {"method": "grpo", "algorithm": {"advantage": "remax"}, "rollout": {"group_size": 1}},
    "kl_cov": {"method": "grpo", "algorithm": {"covariance": "kl_cov", "cov_frac": 0.05}},
    "adaptive": {
        "method": "grpo",
        "algorithm": {"kl_coef": 0.05, "kl_target": 0.1, "correction": "tis"},
        "reference": {"update_every": 2},
    },
    "ppo": {
        "method": "ppo",
        "algorithm": {"kl_coef": 0.01},
        "critic": {"lr": 1e-3, "pretrain_steps": 1},
    },
    "shared_critic": {
        "method": "ppo",
        "algorithm": {"kl_coef": 0.01, "ptx_coef": 0.1},
        "critic": {"shared": True},
        "trainer": {"minibatches_per_step": 2, "zero_stage": 2},
        "ptx": {
            "data": {
                "task": "chain_arithmetic",
                "task_args": {"count": 50, "terms": 3},
                "response_column": "response",
            },
            "rows_per_step": 4,
        },
    },
    "vapo": {
        "method": "ppo",
        "algorithm": {
            "critic_lam": 1.0,
            "length_adaptive_lam": 0.05,
            "positive_nll_coef": 0.1,
            "aggregation": "token_mean",
        },
        "critic": {"lr": 1e-3},
    },
    "ptx": {
        "method": "ppo",
        "algorithm": {"ptx_coef": 0.1},
        "ptx": {
            "data": {
                "task": "chain_arithmetic",
                "task_args": {"count": 50, "terms": 3},
                "response_column": "response",
            },
            "rows_per_step": 4,
        },
    },
}

DISTILL = {
    "forward_kl": {"divergence": "forward_kl", "top_k": 5, "nll_coef": 0.1},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3, "temperature": 2.0},
    "on_policy": {"divergence": "reverse_kl", "on_policy_frac": 1.0},
    "half_on_policy": {"divergence": "jsd", "on_policy_frac": 0.5},
    "sampled_kl": {"divergence": "sampled_kl", "on_policy_frac": 1.0},
}


def recipe_for(changes: dict) -> dict:
    """The tiny recipe with one stage: this method, from random weights."""
    recipe = copy.deepcopy(TINY)
    recipe.pop("stages")
    recipe["data"].pop("response_column")
    recipe["trainer"] = {
        "steps": 4,
        "prompts_per_step": 8,
        "lr": 1e-3,
        "zero_stage": 0,
        "micro_batch_tokens": 128,
    }
    return of_method(recipe, changes)


@pytest.fixture
def run(tmp_path):
    """run(recipe) -> the run directory, in this process."""

    def train(recipe: dict):
        recipe["run"]["output_dir"] = str(tmp_path)
        train_plan(plan_from_dict(recipe))
        return tmp_path / recipe["run"]["name"]

    return train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The folder of a larger model with the tiny recipe's vocabulary, which prefers some tokens by far."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer()
    config = TINY["model"]["build"]["config"] | {"hidden_size": 48, "num_hidden_layers": 3}
    model = build_model(BuildModelConfig(config=config), tokenizer, seed=11)
    model.get_input_embeddings().weight.data *= 6  # and the output's, which is tied
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", METHODS)
def test_method_runs_and_its_numbers_are_finite(run, name):
    """Would catch: a method that is only wired up on paper, a metric that is NaN, an update that is never applied."""
    steps = checked_steps(run(recipe_for(METHODS[name])))
    assert any(r.get("policy/grad_norm", 0) > 0 for r in steps) != (name == "best_of_n"), steps[-1]


@pytest.mark.parametrize("name", DISTILL)
def test_a_student_comes_nearer_to_its_teacher(run, teacher, name):
    """Would catch: a distance to something else than the teacher, gradients that point away from it, top-k tokens that
    are not the teacher's, steps on the student's own responses that learn from the data's."""
    distill = {
        "method": "distill",
        "teacher": {"path": teacher},
        "distill": DISTILL[name],
        "data": {"response_column": "response"},
    }
    recipe = merged(
        recipe_for(distill),
        {"trainer": {"steps": 24, "lr": 1e-2}, "evaluation": {"every": 12}, "rollout": {"group_size": 8}},
    )
    run_dir = run(recipe)
    steps = checked_steps(run_dir, steps=24)
    own = [r for r in steps if "rollout/response_tokens_mean" in r]
    assert (
        len(own) == 24 * DISTILL[name].get("on_policy_frac", 0)
        or 6 <= len(own) <= 18
        and name == "half_on_policy"
    )
    assert all(r["mismatch/logprob_abs_max"] == 0.0 for r in own if name == "sampled_kl")
    assert not any("reward/mean" in r or r["rollout/masked_frac"] for r in own)  # nothing here needs a reward
    distance = [r["distill/divergence"] for r in steps]
    assert 0 < mean(distance[-4:]) < 0.6 * mean(distance[:4]), distance
    start = build_model(
        BuildModelConfig(**TINY["model"]["build"]), tiny_tokenizer(), seed=TINY["run"]["seed"]
    )
    end = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    before, after = (apart(AutoModelForCausalLM.from_pretrained(teacher), model) for model in (start, end))
    assert after < 0.75 * before, (before, after)


def tiny_tokenizer():
    return build_tokenizer(BuildTokenizerConfig(**TINY["tokenizer"]["build"]))


def apart(teacher, student) -> float:
    """Mean total variation distance of the two models' next tokens in worked answers, by transformers alone."""
    texts = [
        row["prompt"] + row["response"] for row in make_rows("chain_arithmetic", **HELD_OUT["task_args"])
    ]
    distances = []
    for text in texts:
        ids = tiny_tokenizer()(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            p, q = (model.float().eval()(ids).logits[0].double().softmax(-1) for model in (teacher, student))
        distances.append(0.5 * (p - q).abs().sum(-1).mean().item())
    return mean(distances)


def checked_steps(run_dir: Path, steps: int = 4) -> list[dict]:
    """The records of the steps, which are all there, finite and in docs/metrics.md, and moved the weights."""
    found = [r for r in records(run_dir) if r["step"] > 0]
    assert [r["step"] for r in found] == list(range(1, steps + 1))
    for record in found:
        for metric, value in record.items():
            assert not isinstance(value, float) or math.isfinite(value), (record["step"], metric, value)
    assert found[-1]["robust/skipped_steps"] == 0
    assert (run_dir / "model" / "config.json").is_file()
    emitted = {metric for record in found for metric in record} - {"step", "stage"}
    assert emitted <= documented(emitted), f"not in docs/metrics.md: {sorted(emitted - documented(emitted))}"
    return found


def documented(metrics: set[str]) -> set[str]:
    """Those of the metrics that docs/metrics.md names. In a row of its table a name without a prefix has that of the
    one before it; `<set>` and `<part>` stand for anything, @k for any k."""
    patterns, prefix = [], ""
    for row in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        for name in re.findall(r"`([^`]+)`", row.split("|")[1] if row.startswith("|") else ""):
            if "/" in name:
                prefix = name.rpartition("/")[0]
            full = name if "/" in name else f"{prefix}/{name}"
            pattern = (
                re.escape(full).replace("<set>", "[^/]+").replace("<part>", "[^/]+").replace("@k", r"@\d+")
            )
            patterns.append(re.compile(pattern))
    return {metric for metric in metrics if any(pattern.fullmatch(metric) for pattern in patterns)}


def test_first_dpo_loss_is_log_two(run):
    """Would catch: a reference that is not the policy at the start."""
    run_dir = run(recipe_for(METHODS["dpo"]))
    first = next(r for r in records(run_dir) if r["step"] == 1)
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["dpo/accuracy"] == 0.5
