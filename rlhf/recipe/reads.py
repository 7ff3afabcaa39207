"""Which settings a recipe's method reads: one table, and what a recipe sets that nothing reads.

A field that is not in the table is read wherever its section is. Here: methods, objectives, losses, corrections,
schedules and what else decides whether a setting has any effect. Not here: whether values go together
(`rlhf.recipe.rules`), and where a recipe states them (`rlhf.recipe.check`). The formulas name what they read as
keyword-only parameters (`rlhf.settings`); tests/recipe/test_reads.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from rlhf.recipe import rules
from rlhf.recipe.schema import PreferenceLoss, Recipe

Key = tuple[str, ...]

SMOOTHED = ("dpo", "robust", "exo_pair", "aot", "aot_unpaired")
WITH_MOMENTS = ("adamw", "adam", "rmsprop", "muon")


@dataclass(frozen=True)
class Need:
    """What must hold for a setting to be read."""

    keys: tuple[str, ...]  # what decides
    holds: Callable[[Recipe], bool]
    lack: Callable[[Recipe], str]  # read by nothing ...: "with method: dpo"
    way: str  # the way out: "use method: grpo or ppo"
    values: tuple[str, ...] = ()  # of the one key that decides, where its value does


@dataclass(frozen=True)
class Unread:
    """A setting that differs from its default and that nothing reads."""

    key: Key
    needs: int  # of its needs, how many hold before the first that does not
    lack: str
    way: str
    keys: tuple[str, ...]  # what decided


def unread(recipe: Recipe) -> Iterator[Unread]:
    """Every value of the recipe that is not its field's default and has no effect."""
    for key, table_key, value, default in _values(recipe):
        if value == default:
            continue
        needs = _TABLE.get(table_key, ())
        for count, need in enumerate(needs):
            if not need.holds(recipe):
                yield Unread(key, count, need.lack(recipe), need.way, need.keys)
                break


def without_unread(recipe: Recipe) -> Recipe:
    """The recipe with its default in the place of whatever nothing reads."""
    for found in unread(recipe):
        recipe = _with_default(recipe, found.key)
    return recipe


def _with_default(model: Any, key: Key) -> Any:
    if isinstance(model, dict):
        return {**model, key[0]: _with_default(model[key[0]], key[1:])}
    field = type(model).model_fields[key[0]]
    if len(key) == 1:
        value = field.get_default(call_default_factory=True)
    else:
        value = _with_default(getattr(model, key[0]), key[1:])
    return model.model_copy(update={key[0]: value})


def _values(recipe: Recipe) -> Iterator[tuple[Key, str, Any, Any]]:
    """(key, key in the table, value, default) of all that the table may speak of."""
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name, None)
        sets = recipe.training_data if name == "data" else {}
        if isinstance(value, BaseModel) and field.default is not None and name != "data":
            for key, inner in type(value).model_fields.items():
                default = inner.get_default(call_default_factory=True)
                yield (name, key), f"{name}.{key}", getattr(value, key), default
        elif not sets:
            yield (name,), name, value, field.get_default(call_default_factory=True)
        for path, data in sets.items():
            for key, inner in type(data).model_fields.items():
                yield (*path, key), f"data.{key}", getattr(data, key), inner.get_default()


# -- needs --------------------------------------------------------------------------------------------------------------


def _one_of(key: str, *wanted: str) -> Need:
    """The value of `key`, or one of its names where it is a section, is one of these."""

    def names(recipe: Recipe) -> list[str]:
        value = _get(recipe, key)
        return list(value) if isinstance(value, dict) else [value]

    name = key.rpartition(".")[2]
    return Need(
        (key,),
        lambda recipe: any(value in wanted for value in names(recipe)),
        lambda recipe: f"with {name}: {', '.join(names(recipe))}",
        f"use {name}: {' or '.join([', '.join(wanted[:-1]), wanted[-1]] if wanted[1:] else wanted)}",
        wanted,
    )


def _on(key: str, way: str) -> Need:
    """`key` is switched on (set, true, above 0), or the recipe itself says that it is off, for one run without it."""

    def holds(recipe: Recipe) -> bool:
        return bool(_get(recipe, key)) or _stated(recipe, key)

    return Need((key,), holds, lambda recipe: f"without {key}", way)


def _where(keys: tuple[str, ...], holds: Callable[[Recipe], bool], lack: str, way: str) -> Need:
    return Need(keys, holds, lambda recipe: f"{lack} (method: {recipe.method})", way)


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _stated(recipe: Recipe, key: str) -> bool:
    *way, name = key.split(".")
    return name in (_get(recipe, way[0]) if way else recipe).model_fields_set


def _compares(recipe: Recipe) -> bool:
    """Whether anything is compared with a reference."""
    if recipe.method in ("ppo", "grpo"):
        return recipe.algorithm.kl_coef > 0 or _stated(recipe, "algorithm.kl_coef")
    of_pairs = recipe.method in ("dpo", "online_dpo") and rules.needs_reference_logprobs(recipe)
    return of_pairs or recipe.method == "kto"


def _samples_to_learn(recipe: Recipe) -> bool:
    return recipe.method in rules.SAMPLING or (
        recipe.method == "distill" and recipe.distill.on_policy_frac > 0
    )


def _discounts(recipe: Recipe) -> bool:
    return recipe.method == "ppo" or (
        recipe.method == "grpo" and recipe.algorithm.advantage == "reinforce_pp"
    )


def _reads_answers(recipe: Recipe) -> bool:
    gold = recipe.method == "online_dpo" and recipe.online.pairs == "gold"
    return gold or recipe.method in ("sft", "kto", "distill")


def _scores_pairs(recipe: Recipe) -> bool:
    return recipe.method in ("dpo", "online_dpo") or (
        recipe.method == "sft" and bool(recipe.evaluation.pairs)
    )


_POLICY = _where(
    ("method", "distill.divergence"),
    rules.by_policy_gradient,
    "where no policy gradient is taken",
    "use method: grpo or ppo",
)
_REWARDED_POLICY = _one_of("method", "grpo", "ppo")
_REWARDED = _one_of("method", *rules.SAMPLING)
_PPO = _one_of("method", "ppo")
_REFERENCE = _where(
    ("method", "algorithm.kl_coef", "preference.losses"),
    _compares,
    "where nothing compares with a reference",
    "set algorithm.kl_coef above 0 (grpo, ppo) or a loss with a reference (dpo)",
)
_SAMPLER = _where(
    ("method", "distill.on_policy_frac", "evaluation.sets"),
    lambda recipe: "rollout" in rules.roles(recipe),
    "where nothing is sampled",
    "add evaluation.sets or use a method that samples",
)
_TRAINING_SAMPLES = _where(
    ("method", "distill.on_policy_frac"),
    _samples_to_learn,
    "where no sample is learned from",
    f"use method: {', '.join(rules.SAMPLING)} (evaluation has settings of its own)",
)
_SCORES = _where(
    ("method", "evaluation.sets", "evaluation.reward"),
    lambda recipe: (
        recipe.method in rules.SAMPLING or bool(recipe.evaluation.sets) and recipe.evaluation.reward is None
    ),
    "where no response is scored",
    "add evaluation.sets or use a method that samples",
)
_EVALUATED_SETS = _on("evaluation.sets", "add evaluation.sets")
_EVALUATED = _where(
    ("evaluation.sets", "evaluation.pairs", "evaluation.held_out"),
    lambda recipe: any(getattr(recipe.evaluation, kind) for kind in ("sets", "pairs", "held_out")),
    "where nothing is evaluated",
    "add evaluation.sets, pairs or held_out",
)
_PAIR_LOSSES = _one_of("method", "dpo", "online_dpo")
_WITH_BETA = _one_of(
    "preference.losses", *(name for name in get_args(PreferenceLoss) if name not in rules.WITHOUT_BETA)
)
_DISTILL = _one_of("method", "distill")
_OF_DISTRIBUTIONS = _one_of("distill.divergence", "forward_kl", "reverse_kl", "jsd")
_IMITATES_DATA = _where(
    ("method", "distill.on_policy_frac"),
    lambda recipe: recipe.distill.on_policy_frac < 1,
    "where every step learns from the student's own responses",
    "set distill.on_policy_frac below 1",
)


# -- the table ----------------------------------------------------------------------------------------------------------


def _of(section: str, names: str, *needs: Need) -> dict[str, tuple[Need, ...]]:
    return {f"{section}.{name}": needs for name in names.split()}


_TABLE: dict[str, tuple[Need, ...]] = {
    "reward": (_SCORES,),
    "reward_model": (_REWARDED,),
    "judge": (_REWARDED,),
    "teacher": (_DISTILL,),
    "ptx": (_POLICY, _on("algorithm.ptx_coef", "set algorithm.ptx_coef above 0")),
    # data
    **_of(
        "data",
        "response_column",
        _where(
            ("method", "online.pairs"), _reads_answers, "where no answer is read", "use sft, kto or distill"
        ),
    ),
    **_of("data", "messages_column", _one_of("method", "sft", "distill")),
    **_of("data", "chosen_column rejected_column", _one_of("method", "rm", "dpo")),
    **_of("data", "margin_column", _one_of("method", "rm")),
    **_of("data", "label_column", _one_of("method", "kto")),
    **_of("data", "steps_column step_labels_column step_separator", _one_of("method", "prm")),
    # sampling
    **_of("rollout", "group_size temperature top_k top_p min_p", _TRAINING_SAMPLES),
    **_of(
        "rollout",
        "max_response_tokens stop page_tokens cache_tokens kv_dtype weights max_batch_tokens max_sequences prefix_cache order preemption draft_tokens cuda_graphs "
        "prefill_processes tensor_parallel",
        _SAMPLER,
    ),
    # policy gradients
    **_of("algorithm", "advantage", _one_of("method", "grpo")),
    **_of("algorithm", "objective aggregation entropy_coef correction ptx_coef", _POLICY),
    **_of("algorithm", "clip_low clip_high", _POLICY, _one_of("algorithm.objective", *rules.CLIPS)),
    **_of("algorithm", "dual_clip", _POLICY, _one_of("algorithm.objective", "ppo_clip")),
    **_of("algorithm", "sapo_tau_pos sapo_tau_neg", _POLICY, _one_of("algorithm.objective", "sapo")),
    **_of("algorithm", "correction_cap", _POLICY, _one_of("algorithm.correction", "tis", "sequence_tis")),
    **_of(
        "algorithm",
        "correction_low correction_high",
        _POLICY,
        _one_of("algorithm.correction", *rules.CORRECTION_BOUNDS),
    ),
    **_of("algorithm", "covariance kl_coef early_stop_kl mask_truncated replay", _REWARDED_POLICY),
    **_of("algorithm", "whiten_advantages reward_clip positive_nll_coef", _REWARDED_POLICY),
    **_of(
        "algorithm",
        "correct_above",
        _REWARDED_POLICY,
        _on("algorithm.positive_nll_coef", "set algorithm.positive_nll_coef above 0"),
    ),
    **_of("algorithm", "cov_frac", _REWARDED_POLICY, _one_of("algorithm.covariance", "clip_cov", "kl_cov")),
    **_of("algorithm", "cov_low cov_high", _REWARDED_POLICY, _one_of("algorithm.covariance", "clip_cov")),
    **_of("algorithm", "kl_cov_coef", _REWARDED_POLICY, _one_of("algorithm.covariance", "kl_cov")),
    **_of(
        "algorithm",
        "kl_in_reward kl_estimator",
        _REWARDED_POLICY,
        _on("algorithm.kl_coef", "set algorithm.kl_coef above 0"),
    ),
    **_of("algorithm", "kl_target", _REWARDED_POLICY),
    **_of("algorithm", "kl_horizon", _REWARDED_POLICY, _on("algorithm.kl_target", "set algorithm.kl_target")),
    **_of("algorithm", "overlong_buffer", _REWARDED),
    **_of(
        "algorithm",
        "overlong_penalty",
        _REWARDED,
        _on("algorithm.overlong_buffer", "set algorithm.overlong_buffer above 0"),
    ),
    **_of("algorithm", "dynamic_sampling", _one_of("method", "grpo")),
    **_of(
        "algorithm",
        "max_sampling_rounds",
        _one_of("method", "grpo"),
        _on("algorithm.dynamic_sampling", "set algorithm.dynamic_sampling: true"),
    ),
    **_of(
        "algorithm",
        "gamma",
        _where(
            ("method", "algorithm.advantage"),
            _discounts,
            "where rewards belong to whole responses",
            "use method: ppo or advantage: reinforce_pp",
        ),
    ),
    **_of(
        "algorithm",
        "lam",
        _PPO,
        _where(
            ("algorithm.critic_lam", "algorithm.length_adaptive_lam"),
            lambda recipe: None in (recipe.algorithm.critic_lam, recipe.algorithm.length_adaptive_lam),
            "where critic_lam and length_adaptive_lam take its place in returns and advantages",
            "leave one of them out",
        ),
    ),
    **_of("algorithm", "critic_lam length_adaptive_lam", _PPO),
    **_of("critic", "path lr value_clip pretrain_steps shared", _PPO),
    **_of("critic", "coef", _PPO, _on("critic.shared", "set critic.shared: true")),
    **_of("reference", "path update_every", _REFERENCE),
    **_of(
        "reference",
        "update_mix",
        _REFERENCE,
        _on("reference.update_every", "set reference.update_every"),
    ),
    **_of(
        "reference",
        "cache_dir",
        _one_of("method", "dpo"),
        _REFERENCE,
        _where(
            ("reference.update_every",),
            lambda recipe: recipe.reference.update_every is None,
            "where the reference moves",
            "leave reference.update_every out",
        ),
    ),
    # losses on pairs and labels
    **_of("preference", "losses nll_coef wpo ld_alpha f_divergence", _PAIR_LOSSES),
    **_of(
        "preference",
        "beta",
        _where(("method", "evaluation.pairs"), _scores_pairs, "where no pair is scored", "use method: dpo"),
        _WITH_BETA,
    ),
    **_of("preference", "label_smoothing", _PAIR_LOSSES, _one_of("preference.losses", *SMOOTHED)),
    **_of("preference", "simpo_gamma", _PAIR_LOSSES, _one_of("preference.losses", "simpo")),
    **_of("preference", "orpo_lambda", _PAIR_LOSSES, _one_of("preference.losses", "orpo")),
    **_of("preference", "discopop_tau", _PAIR_LOSSES, _one_of("preference.losses", "discopop")),
    **_of("preference", "f_alpha", _PAIR_LOSSES, _one_of("preference.f_divergence", "alpha")),
    **_of("kto", "loss beta desirable_weight undesirable_weight", _one_of("method", "kto")),
    **_of("reward_modeling", "center_coef", _one_of("method", "rm")),
    # samples made into data
    **_of("online", "pairs", _one_of("method", "online_dpo")),
    **_of("online", "min_gap", _one_of("method", "online_dpo"), _one_of("online.pairs", "best_worst")),
    **_of("online", "keep_best min_reward train", _one_of("method", "rejection")),
    # distillation
    **_of("distill", "divergence on_policy_frac", _DISTILL),
    **_of("distill", "temperature top_k", _DISTILL, _OF_DISTRIBUTIONS),
    **_of("distill", "nll_coef", _DISTILL, _OF_DISTRIBUTIONS, _IMITATES_DATA),
    **_of("distill", "jsd_beta", _DISTILL, _one_of("distill.divergence", "jsd")),
    # optimisers and schedules
    **_of("trainer", "momentum", _one_of("trainer.optimizer", "sgd", "rmsprop", "muon")),
    **_of("trainer", "betas", _one_of("trainer.optimizer", *WITH_MOMENTS)),
    **_of("trainer", "eps", _one_of("trainer.optimizer", *WITH_MOMENTS, "adagrad")),
    **_of(
        "trainer",
        "min_lr_ratio",
        _one_of(
            "trainer.schedule", "linear", "cosine", "polynomial", "inverse_sqrt", "wsd", "cosine_restarts"
        ),
    ),
    **_of("trainer", "decay_steps", _one_of("trainer.schedule", "wsd")),
    **_of("trainer", "cycles", _one_of("trainer.schedule", "cosine_restarts")),
    **_of("trainer", "poly_power", _one_of("trainer.schedule", "polynomial")),
    # evaluation
    **_of("evaluation", "every keep_best", _EVALUATED),
    **_of("evaluation", "samples ks temperature max_response_tokens correct_above reward", _EVALUATED_SETS),
}
