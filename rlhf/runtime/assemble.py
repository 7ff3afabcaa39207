"""From a recipe to what a stage works with: datasets, sampling, groups of processes, roles.

Not here: the order in which it happens and what a run directory holds (`rlhf.runtime.run`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.data import load_labels, load_preferences, load_prompts, load_sft, load_steps, mixed
from rlhf.data.rows import MIX
from rlhf.models import context_length, generation_stop_ids
from rlhf.recipe import rules
from rlhf.recipe.schema import DatasetConfig, Recipe, RewardConfig
from rlhf.reward import Scorer
from rlhf.rollout import SamplingParams
from rlhf.runtime.groups import BUCKETS_IN_FLIGHT, Groups, GroupSpec
from rlhf.trainers.forward import sharing_losses
from rlhf.trainers.handover import Apart
from rlhf.trainers.opponent import Opponent
from rlhf.trainers.process_reward import model_part
from rlhf.trainers.rewarding import RewardSum, judge_part
from rlhf.trainers.roles import Actor, Clock, Critic, JudgeModel, Reference, RewardModel, Sampler, Teacher

WORKER = "rlhf.trainers.worker:Worker"
REWARD_OUTPUT = "reward.log"  # in the run directory: what reward functions in their own process print

# What a method's rows are; the others sample from prompts.
LOADERS: dict[str, Callable[..., Any]] = {
    "sft": load_sft,
    "rm": load_preferences,
    "prm": load_steps,
    "dpo": load_preferences,
    "kto": load_labels,
    "distill": load_sft,
}


@dataclass(frozen=True)
class Objects:
    """What the Python API hands over as objects instead of names in a recipe."""

    model: Any = None
    tokenizer: Any = None
    train_rows: Sequence[Mapping[str, Any]] | None = None
    eval_rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    reward_functions: Mapping[str, Callable] = field(default_factory=dict)


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Datasets:
    """Every set of a stage, checked and in tokens."""

    train: Any
    eval_sets: Mapping[str, Any]  # prompts
    eval_pairs: Mapping[str, Any]  # preference pairs
    held_out: Mapping[str, Any]  # rows of the training data's kind
    ptx: Any = None  # texts to keep modelling
    prompts: Any = None  # distill: the prompts of the student's own responses
    gold: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # online_dpo: answers by prompt id
    context: int | None = None  # tokens that the model can read

    @property
    def named(self) -> dict[str, Any]:
        """All of them, by what a message calls them."""
        more = {"ptx set": self.ptx, "prompts": self.prompts if self.prompts is not self.train else None}
        sets = {
            "training data": self.train,
            **{f"evaluation set {n!r}": d for n, d in self.eval_sets.items()},
        }
        sets |= {f"evaluation set {n!r}": d for n, d in {**self.eval_pairs, **self.held_out}.items()}
        return sets | {name: dataset for name, dataset in more.items() if dataset is not None}


def load_datasets(recipe: Recipe, tokenizer: Any, objects: Objects) -> Datasets:
    """The training set and all others, every row checked."""
    context = _context(recipe, objects)

    def rows_of(
        config: DatasetConfig, name: str, load: Callable[..., Any], room: int, rows: Any = None
    ) -> Any:
        return load(config, tokenizer, name=name, max_context=room, rows=rows)

    longest = recipe.evaluation.max_response_tokens
    section = "rollout" if longest is None else "evaluation"
    eval_sets = {
        name: rows_of(
            config,
            name,
            load_prompts,
            _room(context, longest or recipe.rollout.max_response_tokens, section),
            objects.eval_rows.get(name),
        )
        for name, config in recipe.evaluation.sets.items()
    }
    eval_pairs = {
        name: rows_of(config, name, load_preferences, context, objects.eval_rows.get(name))
        for name, config in recipe.evaluation.pairs.items()
    }
    more: dict[str, Any] = {}
    if recipe.ptx is not None:
        more["ptx"] = rows_of(recipe.ptx.data, "ptx", load_sft, context)

    def training_set(load: Callable[..., Any], room: int) -> Any:
        sets = [rows_of(recipe.data, "train", load, room, objects.train_rows)]
        sets += [rows_of(config, f"{MIX}{name}", load, room) for name, config in recipe.mix.items()]
        return mixed(sets, list(recipe.training_weights.values()))

    load = LOADERS.get(recipe.method, load_prompts)
    if recipe.method == "distill" and recipe.distill.on_policy_frac == 1:
        load = load_prompts
    if load is load_prompts or recipe.method == "distill" and recipe.distill.on_policy_frac > 0:
        more["prompts"] = training_set(
            load_prompts, _room(context, recipe.rollout.max_response_tokens, "rollout")
        )
    train = more["prompts"] if load is load_prompts else training_set(load, context)
    if recipe.method == "online_dpo" and recipe.online.pairs == "gold":
        answers = training_set(load_sft, context)
        more["gold"] = {answers[i].id: answers[i].response_ids for i in range(len(answers))}
    held_out = {
        name: rows_of(config, name, load, context, objects.eval_rows.get(name))
        for name, config in recipe.evaluation.held_out.items()
    }
    sets = {"eval_sets": eval_sets, "eval_pairs": eval_pairs, "held_out": held_out}
    return Datasets(train=train, context=context, **sets, **more)


def _context(recipe: Recipe, objects: Objects) -> int:
    if objects.model is not None:
        return objects.model.config.get_text_config().max_position_embeddings
    return context_length(recipe.model)


def _room(context: int, response_tokens: int, section: str) -> int:
    if response_tokens >= context:
        raise ValueError(
            f"{section}.max_response_tokens={response_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it"
        )
    return context - response_tokens


def evaluated_before(recipe: Recipe, start: Recipe | None) -> frozenset[str]:
    """The evaluation sets whose values the stage `start` found at its end, for the model with which a stage of `recipe`
    starts: the same rows, sampled and rewarded alike."""
    if start is None or _how_evaluated(start) != _how_evaluated(recipe):
        return frozenset()
    before = start.evaluation.sets
    return frozenset(name for name, config in recipe.evaluation.sets.items() if before.get(name) == config)


def _how_evaluated(recipe: Recipe) -> tuple[Any, ...]:
    """Everything that an evaluation depends on, beside the rows and the model, whose tokenizer is handed on with it."""
    e, rollout = recipe.evaluation, recipe.rollout
    own = recipe.evaluation.reward
    rewards = (recipe.reward, recipe.reward_model, recipe.judge) if own is None else (own,)
    sampling = (e.samples, e.temperature, e.max_response_tokens or rollout.max_response_tokens, rollout.stop)
    return (sampling, rewards, e.ks, e.correct_above, recipe.model.dtype, recipe.run.seed)


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling_params(
    recipe: Recipe, tokenizer: Any, objects: Objects
) -> tuple[SamplingParams, SamplingParams]:
    """Sampling for training and for evaluation, with the stop texts of the recipe as token ids."""
    r, e = recipe.rollout, recipe.evaluation
    stop_ids = [tokenizer.eos_token_id, *generation_stop_ids(recipe.model, objects.model)]
    for text in r.stop:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"rollout.stop: {text!r} is {len(ids)} tokens; a stop must be one token of the vocabulary"
            )
        stop_ids.append(ids[0])
    unique = tuple(dict.fromkeys(stop_ids))
    train = SamplingParams(
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        max_tokens=r.max_response_tokens,
        stop_ids=unique,
    )
    evaluation = SamplingParams(
        temperature=e.temperature,
        max_tokens=e.max_response_tokens or r.max_response_tokens,
        stop_ids=unique,
    )
    return train, evaluation


# -- processes and roles ----------------------------------------------------------------------------------------------


def group_specs(recipe: Recipe, updates: int, objects: Objects) -> list[GroupSpec]:
    """The groups to launch; `updates` is the stage's number of optimiser steps."""
    groups = recipe.groups
    if (
        not recipe.placement and torch.cuda.is_available()
    ):  # one group with every role, on the GPU if there is one
        groups = {name: group.model_copy(update={"gpus": 1}) for name, group in groups.items()}
    processes = sum(g.num_processes for g in groups.values()) if recipe.runtime.backend == "ray" else 1
    threads = recipe.runtime.threads or max(1, (os.cpu_count() or 1) // processes)
    return [
        GroupSpec(
            name=name,
            roles=tuple(group.roles),
            num_processes=group.num_processes,
            gpus=group.gpus,
            worker=WORKER,
            kwargs={
                "recipe": recipe,
                "roles": tuple(group.roles),
                "threads": threads,
                "total_updates": updates,
                "model": objects.model,
                "tokenizer": objects.tokenizer,
            },
            threads=threads,
        )
        for name, group in groups.items()
    ]


def _apart(recipe: Recipe) -> Apart | None:
    r, runtime = recipe.rollout, recipe.runtime
    if not r.prefill_processes:
        return None
    return Apart(
        r.prefill_processes,
        batch_tokens=r.max_batch_tokens,
        in_flight_bytes=BUCKETS_IN_FLIGHT * runtime.bucket_mb << 20,
        timeout_s=runtime.call_timeout_s,
    )


def make_roles(
    recipe: Recipe, groups: Groups, clock: Clock, tokenizer: Any, objects: Objects
) -> dict[str, Any]:
    """The roles that the recipe has, by their names in `Stage`, and the scorers of its rewards."""
    micro, needed = recipe.trainer.micro_batch_tokens, recipe.roles

    def role(name: str, kind: Callable[..., Any]) -> Any:
        return kind(groups.for_role(name), clock, micro_batch_tokens=micro) if name in needed else None

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    sampler = opponent = None
    if "rollout" in needed:
        each = recipe.rollout.tensor_parallel
        sampler = Sampler(
            groups.for_role("rollout"),
            clock,
            seed=recipe.run.seed,
            decode=decode,
            apart=_apart(recipe),
            tensor_parallel=each,
        )
    if rules.reference_samples(recipe):
        opponent = Opponent(groups.for_role("reference"), clock, seed=recipe.run.seed, decode=decode)
    output = Path(recipe.run.output_dir) / recipe.run.name / REWARD_OUTPUT

    def rules_of(rewards: Sequence[RewardConfig] | None) -> Scorer | None:
        return Scorer(rewards, functions=objects.reward_functions, output=output) if rewards else None

    scorer = rules_of(recipe.reward)
    reward_model, judge = role("reward", RewardModel), role("judge", JudgeModel)
    parts = [] if reward_model is None else [model_part(recipe.reward_model, reward_model, tokenizer)]
    parts += [] if judge is None else [judge_part(recipe.judge, judge)]
    if parts:
        scorer = RewardSum(scorer, parts)
    return {
        "actor": role("actor", partial(Actor, sharing=sharing_losses(recipe))),
        "critic": role("critic", Critic),
        "reference": role("reference", Reference),
        "teacher": role("teacher", Teacher),
        "sampler": sampler,
        "opponent": opponent,
        "scorer": scorer,
        "eval_scorer": rules_of(recipe.evaluation.reward),
    }
