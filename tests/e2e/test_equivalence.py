"""However a step is computed, it is the same step: cut into micro-batches, split by ZeRO, recomputed, on two processes,
or with an adapter merged. 20 steps of five methods in fp32, compared number by number and weight by weight.

Nothing here feeds one run's rollouts to another. At this size the rounding differences (about 1e-7) flip no sampled
token in 20 steps, so that ppo and grpo are compared as they are, responses included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from rlhf.batching import make_preference_batch, make_sft_batch
from rlhf.data import load_preferences, load_sft
from rlhf.logprobs import batch_logits, batch_logprobs
from rlhf.models import load_model, load_tokenizer
from rlhf.models.scalar import load_scalar_model
from rlhf.recipe.load import load_plan, plan_from_dict
from rlhf.recipe.schema import DatasetConfig, ModelConfig, Recipe, TokenizerConfig
from rlhf.runtime.run import train_plan
from rlhf.values import batch_rewards
from tests.e2e.running import TINY, merged, of_method, records

TOLERANCE = 1e-5  # of each number, relative above 1
HELD_OUT = {"held": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 12, "terms": 3}}}
NUMBERS = [{"function": "format", "args": {"pattern": "[0-3]$"}}]  # random weights earn it now and then

BASE = {
    "model": TINY["model"],
    "tokenizer": TINY["tokenizer"],
    "data": {"task": "chain_arithmetic", "task_args": {"count": 60, "terms": 3}},
    "rollout": {"group_size": 2, "max_response_tokens": 6, "page_tokens": 16},
    "trainer": {"steps": 20, "prompts_per_step": 4, "lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 8192},
    "run": {"seed": 3, "save_every": 100},
    "runtime": {"threads": 1},
    "tracking": {"wandb": "off", "console_samples": 0, "report_every": 1000},
}
METHODS = {
    "sft": {"method": "sft", "data": {"response_column": "response"}},
    "rm": {"method": "rm", "reward_modeling": {"center_coef": 0.01}, "evaluation": {"pairs": HELD_OUT}},
    "dpo": {"method": "dpo", "evaluation": {"pairs": HELD_OUT}},
    "ppo": {
        "method": "ppo",
        "reward": NUMBERS,
        "algorithm": {"kl_coef": 0.05, "kl_target": 0.1, "kl_horizon": 100.0},
        "critic": {"lr": 1e-3},
        "trainer": {"minibatches_per_step": 2},
    },
    "grpo": {
        "method": "grpo",
        "reward": NUMBERS,
        "algorithm": {"kl_coef": 0.01},
        "trainer": {"minibatches_per_step": 2},
    },
}
# The base runs have one micro-batch in every update and ZeRO 0.
FORMS = {
    "one row at a time": {"trainer": {"micro_batch_tokens": 1}},
    "a few rows at a time, ZeRO 2, gradient checkpointing": {
        "trainer": {"micro_batch_tokens": 50, "zero_stage": 2},
        "model": {"gradient_checkpointing": True},
    },
    "ZeRO 3": {"trainer": {"zero_stage": 3}},
}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Train:
    """train(method, changes) -> the run directory; the same run is made once."""
    folder, made = tmp_path_factory.mktemp("equivalence"), {}

    def run(method: str, changes: dict | None = None) -> Path:
        recipe = of_method(BASE, merged(METHODS[method], changes or {}))
        key = repr(recipe)
        if key not in made:
            recipe["run"] |= {"name": f"{method}-{len(made)}", "output_dir": str(folder)}
            made[key] = train_plan(plan_from_dict(recipe)).parent
        return made[key]

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_however_a_step_is_cut_or_split_the_curve_is_the_same(train: Train, method: str, form: str):
    """Would catch: a mean of means, a statistic of one micro-batch, a denominator of one micro-batch, whitening after
    the cut, a gradient that a shard or a recomputation loses, a state that another ZeRO stage sees differently."""
    assert_same_curve(train(method), train(method, FORMS[form]))


def test_whatever_guesses_the_sampler_makes_the_run_is_the_same(train: Train):
    """Would catch: a guess that changes a sample, and guesses that no run makes. To the bit: the sampler's promise."""
    small = {"rollout": {"max_response_tokens": 24}, "trainer": {"prompts_per_step": 2, "steps": 60}}
    plain = train("grpo", small)
    guessing = train("grpo", merged(small, {"rollout": {"draft_tokens": 4}}))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (plain / name).read_bytes() == (guessing / name).read_bytes()
    accepted = [
        r["rollout/accepted_tokens"]
        for r in records(guessing, "timings.jsonl")
        if "rollout/accepted_tokens" in r
    ]
    assert sum(accepted) > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_same_curve(train: Train, one_cluster: None, method: str):
    """Would catch: a mean, a maximum or whitening over one process's rows, a pair that is parted, responses that depend
    on which engine samples them, a reference or a critic that only one process has."""
    roles = plan_from_dict(of_method(BASE, METHODS[method])).stages[0].recipe.roles
    changes = {
        "placement": {"all": {"roles": list(roles), "processes": 2}},
        "runtime": {"backend": "ray"},
        "trainer": {"zero_stage": 2, "micro_batch_tokens": 50},
    }
    assert_same_curve(train(method), train(method, changes))


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[None]:
    """A Ray cluster for all runs that ask for one, which spares each the start of its own."""
    from rlhf.runtime.groups import GroupSpec
    from rlhf.runtime.ray_groups import Cluster

    spec = GroupSpec("all", ("actor",), num_processes=2, gpus=0, worker="rlhf.trainers.worker:Worker")
    cluster = Cluster([spec], plan_from_dict(of_method(BASE, METHODS["sft"])).stages[0].recipe.runtime)
    yield
    cluster.stop()


def test_an_exported_adapter_gives_the_same_logits_and_trains_on(train: Train):
    """Would catch: an adapter merged with another scale, into a rounded weight, or twice; a model that goes on from the
    base. Every step sees all rows, so that the loss of a step is a function of the weights alone."""
    all_rows = {"data": {"task_args": {"count": 4}}}
    run = train("sft", merged(all_rows, {"model": {"lora": {"rank": 4}}, "trainer": {"lr": 1e-2}}))
    config = ModelConfig(path=str(run / "model"), dtype="float32")
    tokenizer = load_tokenizer(config, TokenizerConfig())
    data = load_sft(recipe_of(run).data, tokenizer, name="train")
    batch = make_sft_batch([data[i] for i in range(len(data))])
    exported, unmerged = load_model(config, tokenizer, seed=0, trainable=False), adapted(run)
    with torch.no_grad():
        merged_in, beside = (batch_logits(m, batch, targets=batch.loss_mask)[1] for m in (exported, unmerged))
        with unmerged.disable_adapter():
            before = batch_logits(unmerged, batch, targets=batch.loss_mask)[1]
        logprobs, _ = batch_logprobs(unmerged, batch, temperature=1.0, targets=batch.loss_mask)
    assert (merged_in - beside).abs().max() <= TOLERANCE
    assert (beside - before).abs().max() > 0.1  # the adapter has learned something
    goes_on = {"model": {"build": None, "path": str(run / "model")}, "tokenizer": {"build": None}}
    first = records(train("sft", all_rows | goes_on | {"trainer": {"steps": 1}}))[0]
    assert first["sft/loss"] == pytest.approx(-logprobs.sum().item() / batch.num_loss_tokens, abs=TOLERANCE)


def test_an_exported_reward_model_scores_like_its_adapter(train: Train):
    """Would catch: a head that is trained beside the adapter and exported as it was before."""
    run = train("rm", {"model": {"lora": {"rank": 4}}, "trainer": {"lr": 1e-2}})
    config = ModelConfig(path=str(run / "model"), dtype="float32")
    tokenizer = load_tokenizer(config, TokenizerConfig())
    pairs = load_preferences(DatasetConfig(**HELD_OUT["held"]), tokenizer, name="held")
    exported = load_scalar_model(config, tokenizer, head="load", seed=0, trainable=False)
    with torch.no_grad():
        scores = batch_rewards(exported, make_preference_batch([pairs[i] for i in range(len(pairs))]))
    margin = (scores[0::2] - scores[1::2]).mean().item()
    first, last = records(run)[0]["eval/held/margin"], records(run)[-1]["eval/held/margin"]
    assert margin == pytest.approx(last, abs=TOLERANCE)
    assert abs(last - first) > 0.1


def assert_same_curve(one: Path, other: Path) -> None:
    """Every number of every step and every weight agree within TOLERANCE; the responses are the same."""
    for a, b in zip(records(one), records(other), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage"}:
            assert a[name] == pytest.approx(b[name], rel=TOLERANCE, abs=TOLERANCE), (a["step"], name)
    mine, theirs = (records(run, "samples.jsonl") for run in (one, other))
    assert [r["response"] for r in mine] == [r["response"] for r in theirs]
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    worst = max((mine[name] - theirs[name]).abs().max().item() for name in mine)
    assert worst <= TOLERANCE, f"weights differ by {worst:.1e}"


def recipe_of(run: Path) -> Recipe:
    return load_plan(run / "recipe.yaml").stages[0].recipe


def adapted(run: Path) -> torch.nn.Module:
    """The model that the run started from, with its adapter beside the weights."""
    recipe = recipe_of(run)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    model = load_model(recipe.model, tokenizer, seed=recipe.run.seed, trainable=True)
    saved = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, saved)
    return model
