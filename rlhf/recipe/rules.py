"""What the sections of a recipe must agree on, and which roles follow from them.

Each rule yields the keys that disagree, the one to change first, and what is wrong with the way out. Not here: the
fields and their own bounds (`rlhf.recipe.schema`), nor anything that needs files (the checks of the sources).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.recipe.schema import AlgorithmConfig, DatasetConfig, PreferenceConfig, Recipe, Role

# The keys that disagree, the one to change first, and what is wrong.
Inconsistency = tuple[tuple[str, ...], str]

ROLES: dict[str, tuple[Role, ...]] = {
    "sft": ("actor",),
    "rm": ("actor",),
    "prm": ("actor",),
    "ppo": ("actor", "critic", "rollout"),
    "grpo": ("actor", "rollout"),
    "dpo": ("actor",),
    "kto": ("actor", "reference"),
    "online_dpo": ("actor", "rollout"),
    "rejection": ("actor", "rollout"),
    "distill": ("actor", "teacher"),
}
SCORING_MODELS = ("rm", "prm")  # what is trained gives scores, not text
HELD_OUT = ("sft", "kto", "prm")  # methods with a measure of held-out rows of their own data's kind
# Kinds of preference losses, by their names in rlhf.preference.
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
SORTED = frozenset({"aot", "aot_unpaired"})
COUPLED = frozenset({"bco_pair", "aot", "aot_unpaired"})  # rows of the whole step
PER_TOKEN = frozenset(
    {"ipo", "sigmoid_norm", "simpo", "orpo", "sft"}
)  # means over tokens: ld_alpha has no meaning
OF_THE_GAP = frozenset(
    {"dpo", "robust", "hinge", "exo_pair", "discopop"}
)  # of score_w - score_l alone: f-divergences
SAMPLING = ("grpo", "ppo", "online_dpo", "rejection")  # methods that learn from rewarded samples
OF_A_GROUP = (
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp_baseline",
)  # advantages that compare a group's responses
OF_A_RESPONSE = ("gspo", "gmpo")  # objectives with one ratio, and so one advantage, for a whole response
WITHOUT_BETA = frozenset({"orpo", "sft"})
# What clips (below, above) and corrections (low, high) are where a recipe leaves them open. Papers: rlhf.objectives, and
# for cispo's upper bound 2510.13786; icepop's are its authors', sequence_mask's those that verl gives the same rejection by
# a sequence's geometric mean (Liu et al., "When speed kills stability", 2025).
CLIPS = {
    "ppo_clip": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "gspo_token": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "gmpo": (0.4, 0.4),
}
CORRECTION_BOUNDS = {"icepop": (0.5, 5.0), "sequence_mask": (0.999, 1.001)}
KL_IN_REWARD = ("rloo", "reinforce_pp")  # advantages whose papers take the KL off the reward
_STAGE = "stage:"


def stage_of(path: str | None) -> str | None:
    """The earlier stage that a path names (`stage:NAME`), None for a path of another kind."""
    return path.removeprefix(_STAGE) if path is not None and path.startswith(_STAGE) else None


def roles(recipe: Recipe) -> tuple[Role, ...]:
    """The roles that a recipe needs, in order."""
    needed = list(ROLES[recipe.method])
    if recipe.shares_trunk:
        needed.remove("critic")
    if _needs_reference(recipe):
        needed.append("reference")
    if recipe.reward_model is not None and "rollout" in needed:
        needed.append("reward")
    if recipe.judge is not None and "rollout" in needed:
        needed.append("judge")
    samples = recipe.evaluation.sets or (recipe.method == "distill" and recipe.distill.on_policy_frac > 0)
    if samples and "rollout" not in needed:
        needed.append("rollout")
    return tuple(dict.fromkeys(needed))


def kl_in_reward(recipe: Recipe) -> bool:
    """Whether the KL comes off the reward (True) or is added to the loss."""
    chosen = recipe.algorithm.kl_in_reward
    if chosen is not None:
        return chosen
    return recipe.method == "ppo" or recipe.algorithm.advantage in KL_IN_REWARD


def whitens(recipe: Recipe) -> bool:
    """Whether advantages are shifted and scaled over the whole step."""
    chosen = recipe.algorithm.whiten_advantages
    if chosen is not None:
        return chosen
    return recipe.method == "ppo" or recipe.algorithm.advantage in ("reinforce_pp", "reinforce_pp_baseline")


def kl_estimator(recipe: Recipe) -> str:
    """Name of the KL's estimator (`rlhf.kl`): where left open the one whose gradient is right where the KL is, or that of
    the advantage's paper."""
    chosen = recipe.algorithm.kl_estimator
    if chosen is not None:
        return chosen
    if kl_in_reward(recipe):
        return "k1"
    of_paper = recipe.method == "grpo" and recipe.algorithm.advantage == "reinforce_pp_baseline"
    return "k2" if of_paper else "k3"


def decided(recipe: Recipe) -> AlgorithmConfig:
    """The algorithm section with what depends on the method, the objective and the correction decided where left open:
    `kl_in_reward`, `kl_estimator`, `whiten_advantages` and the bounds of ratios and weights."""
    a = recipe.algorithm
    choices = {
        "kl_in_reward": kl_in_reward(recipe),
        "kl_estimator": kl_estimator(recipe),
        "whiten_advantages": whitens(recipe),
        **_bounds(a, ("clip_low", "clip_high"), CLIPS.get(a.objective)),
        **_bounds(a, ("correction_low", "correction_high"), CORRECTION_BOUNDS.get(a.correction)),
    }
    return a.model_copy(update=choices)


def _bounds(
    a: AlgorithmConfig, names: tuple[str, str], defaults: tuple[float, float] | None
) -> dict[str, float]:
    """The two bounds, each the default's where the section leaves it open; nothing where nothing reads them."""
    if defaults is None:
        return {}
    stated = [getattr(a, name) for name in names]
    return {
        name: default if chosen is None else chosen
        for name, chosen, default in zip(names, stated, defaults, strict=True)
    }


def decided_preference(recipe: Recipe) -> PreferenceConfig:
    """The preference section with `beta` and `nll_coef` as its losses want them where left open."""
    p = recipe.preference
    choices = {
        "beta": p.beta if p.beta is not None else (2.0 if _reads_beta(p) == {"simpo"} else 0.1),
        "nll_coef": p.nll_coef if p.nll_coef is not None else (1.0 if "cpo" in p.losses else 0.0),
    }
    return p.model_copy(update=choices)


def _reads_beta(p: PreferenceConfig) -> set[str]:
    return set(p.losses) - WITHOUT_BETA


def by_policy_gradient(recipe: Recipe) -> bool:
    """Whether an objective of `algorithm` is the loss: ppo, grpo, and distill's sampled_kl."""
    sampled = recipe.method == "distill" and recipe.distill.divergence == "sampled_kl"
    return sampled or recipe.method in ("ppo", "grpo")


def updates_per_step(recipe: Recipe) -> int:
    """Optimiser steps on one step's samples."""
    return recipe.trainer.minibatches_per_step * recipe.trainer.passes_per_step


def pretraining_updates(recipe: Recipe) -> int:
    """Optimiser steps at the stage's start that only the critic takes."""
    return recipe.critic.pretrain_steps * updates_per_step(recipe) if recipe.method == "ppo" else 0


def needs_reference_logprobs(recipe: Recipe) -> bool:
    """Whether the preference losses compare with a reference at all."""
    return any(name not in REFERENCE_FREE for name in recipe.preference.losses)


def reference_samples(recipe: Recipe) -> bool:
    """Whether training learns from responses of the reference: SPIN's opponent (arXiv 2401.01335). Losses that compare
    with no reference leave the policy itself."""
    return (
        recipe.method == "online_dpo" and recipe.online.pairs == "gold" and needs_reference_logprobs(recipe)
    )


def reference_is_cached(recipe: Recipe) -> bool:
    """Whether the reference scores the whole data once, before the first update, and is not needed again."""
    return recipe.method == "dpo" and recipe.reference.update_every is None


def _needs_reference(recipe: Recipe) -> bool:
    if recipe.method in ("ppo", "grpo"):
        return recipe.algorithm.kl_coef > 0
    if recipe.method == "online_dpo":
        return needs_reference_logprobs(recipe)
    if recipe.method == "dpo":  # otherwise the actor's own log-probs before step 1 are the reference's
        own = recipe.reference.path is not None or recipe.reference.update_every is not None
        return own and needs_reference_logprobs(recipe)
    return False


def problems(recipe: Recipe) -> Iterator[Inconsistency]:
    """Everything that does not fit together."""
    for rule in (
        _source,
        _evaluation,
        _reward,
        _judge,
        _groups_of_responses,
        _one_response,
        _columns,
        _curriculum,
        _objective,
        _replay,
        _critic,
        _kl,
        _preference,
        _distill,
        _steps,
        _warmup,
        _noise,
        _placement,
        _tensor_parallel,
    ):
        yield from rule(recipe)


def warnings(recipe: Recipe) -> Iterator[Inconsistency]:
    """What does less than it says, or something else, although the recipe can be run."""
    if by_policy_gradient(recipe):
        yield from _truncated_sampling(recipe)
        yield from _rounded_sampler(recipe)
        if updates_per_step(recipe) == 1:
            yield from _idle(recipe)


def _truncated_sampling(recipe: Recipe) -> Iterator[Inconsistency]:
    """Ratios and corrections are of the whole distribution: what top-k, top-p and min-p take away they do not see."""
    cut = {key: getattr(recipe.rollout, key) for key in ("top_k", "top_p", "min_p")}
    cut = {
        key: value for key, value in cut.items() if value != type(recipe.rollout).model_fields[key].default
    }
    if cut:
        named = ", ".join(f"{key}: {value:g}" for key, value in cut.items())
        message = (
            f"{named}: samples come from a truncated distribution, while log-probs, ratios and corrections are the whole "
            "one's, so that the gradient is biased; leave it out where the policy learns from its samples"
        )
        yield tuple(f"rollout.{key}" for key in cut), message


def _rounded_sampler(recipe: Recipe) -> Iterator[Inconsistency]:
    """Samples from rounded weights, keys or values are another policy's, near the trainer's."""
    what = {"kv_dtype": "keys and values", "weights": "weights"}
    rounded = [key for key in what if getattr(recipe.rollout, key) != "auto"]
    if rounded and recipe.algorithm.correction == "none":
        named = ", ".join(f"{key}: {getattr(recipe.rollout, key)}" for key in rounded)
        message = (
            f"{named} and no correction: samples come from rounded {' and '.join(what[key] for key in rounded)}, so that the "
            "sampler's log-probs are not the trainer's (mismatch/*) and the gradient is biased; set algorithm.correction, "
            "such as tis"
        )
        yield (*(f"rollout.{key}" for key in rounded), "algorithm.correction"), message


def _idle(recipe: Recipe) -> Iterator[Inconsistency]:
    """In the one update on a step's samples every ratio is 1, replayed samples' too, and every value where it was;
    clip_cov, which picks tokens by other things, is not among what does nothing then."""
    a, default_clip = recipe.algorithm, type(recipe.critic).model_fields["value_clip"].default
    idle = {
        "algorithm.objective": a.objective if a.objective not in ("ppo_clip", "reinforce") else None,
        "algorithm.clip_low": a.clip_low,
        "algorithm.clip_high": a.clip_high,
        "algorithm.dual_clip": a.dual_clip,
        "algorithm.covariance": a.covariance if a.covariance == "kl_cov" else None,
        "algorithm.early_stop_kl": a.early_stop_kl,
        "critic.value_clip": recipe.critic.value_clip if recipe.critic.value_clip != default_clip else None,
    }
    idle = {key: value for key, value in idle.items() if value is not None}
    if idle:
        named = ", ".join(f"{key.partition('.')[2]}: {value}" for key, value in idle.items())
        message = (
            f"no effect of {named}: with one update a step it starts from the policy that sampled; "
            "raise trainer.minibatches_per_step (or passes_per_step)"
        )
        yield (*idle, "trainer.minibatches_per_step", "trainer.passes_per_step"), message


def _source(r: Recipe) -> Iterator[Inconsistency]:
    if r.model.path is None and r.model.build is None:
        yield ("model.path", "model.build"), "set model.path (a folder or hub name) or model.build"
    if r.model.build is not None and r.tokenizer.path is None and r.tokenizer.build is None:
        keys = ("tokenizer.build", "tokenizer.path", "model.build")
        yield keys, "a built model has no tokenizer of its own; set tokenizer.build or tokenizer.path"
    if r.trainer.steps is None and r.trainer.epochs is None:
        yield ("trainer.steps", "trainer.epochs"), "set trainer.steps or trainer.epochs"
    if r.algorithm.ptx_coef and r.ptx is None:
        yield ("ptx", "algorithm.ptx_coef"), f"ptx_coef={r.algorithm.ptx_coef} needs texts: set ptx.data"


def _evaluation(r: Recipe) -> Iterator[Inconsistency]:
    best, sets = r.evaluation.keep_best, [*r.evaluation.sets, *r.evaluation.pairs, *r.evaluation.held_out]
    if best is not None and not any(best.startswith(f"eval/{name}/") for name in sets):
        known = ", ".join(f"eval/{name}/..." for name in sets) or "none: add evaluation.sets"
        yield (
            ("evaluation.keep_best", "evaluation.sets"),
            f"{best!r} is no metric of an evaluation set ({known})",
        )
    samples, ks = r.evaluation.samples, r.evaluation.ks or []
    if max(ks, default=1) > samples:
        message = f"pass@{max(ks)} needs {max(ks)} responses and there are {samples}; raise samples (two to four times k is usual)"
        yield ("evaluation.samples", "evaluation.ks"), message
    if samples > 1 and not r.evaluation.temperature:
        message = f"temperature=0 gives the same response {samples} times; set one above 0, or samples: 1"
        yield ("evaluation.temperature", "evaluation.samples"), message


def _reward(r: Recipe) -> Iterator[Inconsistency]:
    if r.method in ("ppo", "grpo", "rejection") and not r.scored:
        yield ("reward", "method"), f"{r.method} needs at least one reward function, reward_model or judge"
    elif r.method == "online_dpo" and r.online.pairs == "best_worst" and not r.scored:
        yield (
            ("reward", "method", "online.pairs"),
            "online_dpo needs a reward to tell the best response from the worst",
        )
    elif r.evaluation.sets and not r.eval_reward and "rollout" not in ROLES[r.method]:
        message = f"evaluation of {r.method} needs at least one reward function, which no reward_model or judge replaces"
        yield ("reward", "evaluation.sets"), message
    elif r.evaluation.sets and not r.eval_reward and not r.scored:
        message = "evaluation needs at least one reward function, reward_model or judge"
        yield ("reward", "evaluation.sets"), message
    if r.method in SCORING_MODELS and r.evaluation.sets:
        yield (
            ("evaluation.sets", "method"),
            f"{r.method} trains a model that gives scores, not text; use evaluation.pairs",
        )
    if r.evaluation.pairs and r.method not in ("rm", "dpo", "sft", "kto"):
        yield ("evaluation.pairs", "method"), f"{r.method} has no score for pairs; use evaluation.sets"
    if r.evaluation.held_out and r.method not in HELD_OUT:
        other = "pairs" if r.method in ("rm", "dpo") else "sets"
        message = f"{r.method} is not evaluated on rows like its own; use evaluation.{other}"
        yield ("evaluation.held_out", "method"), message


def _judge(r: Recipe) -> Iterator[Inconsistency]:
    if r.judge is None or not r.judge.compares or "judge" not in r.roles:
        return
    if r.rollout.group_size < 2 or r.algorithm.advantage == "remax" and r.method == "grpo":
        message = "the judge compares two responses to a prompt: use group_size >= 2 and not remax, or a template with {response}"
        yield ("judge.template", "rollout.group_size", "algorithm.advantage"), message
    if r.evaluation.sets and r.evaluation.reward is None and r.evaluation.samples < 2:
        message = "the judge compares two responses to a prompt: use evaluation.samples >= 2, or a template with {response}"
        yield ("judge.template", "evaluation.samples"), message


def _groups_of_responses(r: Recipe) -> Iterator[Inconsistency]:
    size, a = r.rollout.group_size, r.algorithm
    group_based = r.method == "grpo" and a.advantage in OF_A_GROUP
    if group_based and size < 2:
        message = f"group_size={size} gives every response zero advantage; use group_size >= 2"
        yield ("rollout.group_size", "method", "algorithm.advantage"), message
    if r.method == "online_dpo" and r.online.pairs == "best_worst" and size < 2:
        yield (
            ("rollout.group_size", "method"),
            f"group_size={size}: a pair needs two responses; use group_size >= 2",
        )
    if not r.online.train and r.method != "rejection":
        message = f"online.train: false only selects, which {r.method} does not; use method: rejection"
        yield ("online.train", "method"), message
    if r.method == "rejection" and r.online.keep_best > size:
        message = f"keep_best={r.online.keep_best} of group_size={size} responses; keep at most as many as there are"
        yield ("online.keep_best", "rollout.group_size"), message
    if a.dynamic_sampling and (r.method != "grpo" or size < 2):
        message = (
            "dynamic_sampling drops groups whose rewards are all equal: it needs grpo and group_size >= 2"
        )
        yield ("algorithm.dynamic_sampling", "method", "rollout.group_size"), message


def _one_response(r: Recipe) -> Iterator[Inconsistency]:
    """Where too few responses leave nothing to tell them apart by."""
    size, rows, keep = r.rollout.group_size, r.trainer.prompts_per_step, r.online.keep_best
    alone = r.method == "grpo" and r.algorithm.advantage in ("reinforce_pp", "remax") and rows * size == 1
    if alone and whitens(r):
        message = (
            f"prompts_per_step={rows} x group_size={size} is one response a step, and whitening subtracts the mean of its "
            "advantages, its reward with it; raise one of them, or set algorithm.whiten_advantages: false"
        )
        keys = ("trainer.prompts_per_step", "rollout.group_size", "algorithm.whiten_advantages")
        yield (*keys, "algorithm.advantage"), message
    if r.method == "rejection" and r.online.train and keep == size and r.online.min_reward is None:
        message = (
            f"keep_best={keep} of group_size={size} keeps every response, so that the policy imitates itself whatever the "
            "rewards; raise group_size, or set online.min_reward"
        )
        yield ("online.keep_best", "rollout.group_size", "online.min_reward", "online.train"), message


def _columns(r: Recipe) -> Iterator[Inconsistency]:
    held_out = {("evaluation", "held_out", name): data for name, data in r.evaluation.held_out.items()}
    for key, data in (r.training_data | held_out).items():
        if stage_of(data.path) is None:  # else its columns are known
            for (column, *others), message in _answer_columns(r, data):
                yield (".".join((*key, column)), *others), message


def _answer_columns(r: Recipe, data: DatasetConfig) -> Iterator[Inconsistency]:
    """The columns that the method needs and `data` does not name; the first key counts from its section."""
    answers = data.response_column is not None or data.messages_column is not None
    if r.method == "sft" and not answers:
        message = "sft needs the column with the answer to imitate, or messages_column"
        yield ("response_column", "method"), message
    if r.method == "sft" and data.response_column is not None and data.messages_column is not None:
        yield (
            ("messages_column",),
            f"both messages_column and response_column={data.response_column!r} are set; keep one",
        )
    if r.method == "kto" and data.response_column is None:
        yield ("response_column", "method"), "kto needs the column with the answer that label_column judges"
    if r.method == "distill" and r.distill.on_policy_frac < 1 and not answers:
        message = "distill imitates the teacher on the data's answers: set response_column, or distill.on_policy_frac: 1"
        yield ("response_column", "method", "distill.on_policy_frac"), message
    if r.method == "online_dpo" and r.online.pairs == "gold" and data.response_column is None:
        message = "pairs: gold compares the data's answers with responses; set the column they are in"
        yield ("response_column", "online.pairs"), message


def _curriculum(r: Recipe) -> Iterator[Inconsistency]:
    if r.curriculum is None:
        return
    if r.method not in SAMPLING:
        message = f"{r.method} samples no responses to the data's prompts, so that there are no pass rates; leave it out"
        yield ("curriculum", "method"), message
    if r.curriculum.low > r.curriculum.high:
        message = f"low={r.curriculum.low} is above high={r.curriculum.high}"
        yield ("curriculum.low", "curriculum.high"), message


def _objective(r: Recipe) -> Iterator[Inconsistency]:
    a = decided(r)
    keys = ("algorithm.objective", "method", "distill.divergence")
    if a.objective in OF_A_RESPONSE and a.aggregation == "token_mean" and r.method in ("grpo", "ppo"):
        message = f"{a.objective} has one value per response: use sequence_mean (or constant_length)"
        yield ("algorithm.aggregation", "algorithm.objective"), message
    if a.objective in OF_A_RESPONSE and by_policy_gradient(r) and r.method != "grpo":
        message = f"{a.objective} has one advantage per response, {r.method} one per token; use ppo_clip or gspo_token"
        yield keys, message
    if a.objective == "reinforce" and by_policy_gradient(r) and updates_per_step(r) > 1:
        message = (
            f"reinforce has no ratio, and the {updates_per_step(r)} updates of a step (minibatches_per_step x "
            "passes_per_step) leave the policy that sampled; use ppo_clip, or one update a step"
        )
        yield (*keys, "trainer.minibatches_per_step", "trainer.passes_per_step"), message
    if a.objective == "ppo_clip" and a.dual_clip is not None and a.dual_clip <= 1 + a.clip_high:
        message = f"dual_clip={a.dual_clip} is not above 1 + clip_high={1 + a.clip_high:g}; 3 is usual"
        yield ("algorithm.dual_clip", "algorithm.clip_high"), message
    if a.correction in CORRECTION_BOUNDS and a.correction_low > a.correction_high:
        message = f"correction_low={a.correction_low} is above correction_high={a.correction_high}"
        yield ("algorithm.correction_low", "algorithm.correction_high"), message
    if a.overlong_buffer >= r.rollout.max_response_tokens:
        message = f"overlong_buffer={a.overlong_buffer} is not shorter than max_response_tokens={r.rollout.max_response_tokens}"
        yield ("algorithm.overlong_buffer", "rollout.max_response_tokens"), message


def _critic(r: Recipe) -> Iterator[Inconsistency]:
    own = {
        name: field.default
        for name, field in type(r.critic).model_fields.items()
        if name in ("path", "lr", "pretrain_steps")
    }
    for name, default in own.items():
        value = getattr(r.critic, name)
        if r.shares_trunk and value != default:
            message = f"{name}={value} is a critic's of its own, which shared: true does not have; leave it out or set shared: false"
            yield (f"critic.{name}", "critic.shared"), message
    pretrain, steps = r.critic.pretrain_steps, r.trainer.steps
    if r.method == "ppo" and steps is not None and pretrain >= steps:
        message = (
            f"pretrain_steps={pretrain} of steps={steps} leaves none in which the policy learns; lower it, or raise "
            "trainer.steps"
        )
        yield ("critic.pretrain_steps", "trainer.steps"), message


def _replay(r: Recipe) -> Iterator[Inconsistency]:
    a = r.algorithm
    if a.replay is None:
        return
    if r.method != "grpo" or a.advantage == "remax":
        what = (
            "remax compares with the present policy's greedy answer"
            if r.method == "grpo"
            else f"{r.method} has no groups to replay"
        )
        yield ("algorithm.replay", "method", "algorithm.advantage"), f"{what}; leave it out"
    elif a.correction == "none":
        message = "replayed groups were sampled by earlier weights: set a correction, for example tis"
        yield ("algorithm.correction", "algorithm.replay"), message
    elif r.rollout.group_size < 2:
        message = (
            f"group_size={r.rollout.group_size}: replay keeps groups whose rewards differ, and one response differs from "
            "none; use group_size >= 2, or leave replay out"
        )
        yield ("rollout.group_size", "algorithm.replay"), message


def _kl(r: Recipe) -> Iterator[Inconsistency]:
    a, keys = r.algorithm, ("algorithm.kl_estimator", "algorithm.kl_in_reward")
    has_kl = a.kl_coef and r.method in ("grpo", "ppo")
    if has_kl and kl_in_reward(r) and kl_estimator(r) != "k1":
        message = (
            f"{a.kl_estimator} in the reward is no KL's gradient (k3 pushes away from the reference); leave it out or "
            "use k1, or set kl_in_reward: false"
        )
        yield keys, message
    if has_kl and not kl_in_reward(r) and kl_estimator(r) == "k1":
        message = "k1 in the loss has zero expected gradient; use k2, k3 or k3_k2, or set kl_in_reward: true"
        yield keys, message
    if a.kl_target is not None and not a.kl_coef:
        yield (
            ("algorithm.kl_coef", "algorithm.kl_target"),
            "kl_target adapts kl_coef, which is 0; start it above 0",
        )
    if r.reference.update_every is not None and "reference" not in roles(r):
        message = "there is no reference to update: this recipe compares with none"
        yield ("reference.update_every", "method", "algorithm.kl_coef", "preference.losses"), message


def _preference(r: Recipe) -> Iterator[Inconsistency]:
    p = r.preference
    names = set(p.losses) if r.method in ("dpo", "online_dpo") else set()
    others = ", ".join(sorted(names - OF_THE_GAP))
    if p.f_divergence != "reverse_kl" and others:
        message = (
            f"f_divergence={p.f_divergence} is defined for {', '.join(sorted(OF_THE_GAP))}, not for {others}"
        )
        yield ("preference.f_divergence", "preference.losses"), message
    per_token = ", ".join(sorted(names & PER_TOKEN))
    if p.ld_alpha < 1 and per_token:
        message = (
            f"ld_alpha={p.ld_alpha} weighs tokens of a sum; {per_token} average over tokens; use ld_alpha: 1"
        )
        yield ("preference.ld_alpha", "preference.losses"), message
    coupled = sorted(names & COUPLED)
    if len(coupled) > 1:
        yield (
            ("preference.losses",),
            f"{' and '.join(coupled)} both couple the pairs of a step; keep one of them",
        )
    if p.wpo and names & SORTED:
        message = f"wpo weighs each pair, and {' and '.join(sorted(names & SORTED))} matches pairs by rank; use wpo: false"
        yield ("preference.wpo", "preference.losses"), message
    if p.beta is None and names & {"simpo"} and _reads_beta(p) != {"simpo"}:
        message = "simpo's beta is about 2 and the other losses' about 0.1, and they share it; state it"
        yield ("preference.beta", "preference.losses"), message
    if "exo_pair" in names and not p.label_smoothing:
        message = (
            "exo_pair is infinite without smoothing; set label_smoothing, for example 1e-3 as in its paper"
        )
        yield ("preference.label_smoothing", "preference.losses"), message
    if (
        r.method in ("dpo", "online_dpo")
        and r.model.build is None
        and r.reference.path == r.model.path is not None
    ):
        yield (
            ("reference.path", "model.path"),
            "the reference is the actor's starting weights anyway; leave it out",
        )


def _distill(r: Recipe) -> Iterator[Inconsistency]:
    if r.method == "distill" and r.teacher is None:
        yield ("teacher", "method"), "distill needs the model to imitate: set teacher.path"
    if r.method == "distill" and r.distill.divergence == "sampled_kl" and r.distill.on_policy_frac < 1:
        message = (
            "sampled_kl is a policy gradient on the student's own responses: set distill.on_policy_frac: 1"
        )
        yield ("distill.on_policy_frac", "distill.divergence"), message
    together = any({"actor", "teacher"} <= set(group.roles) for group in r.groups.values())
    if r.method == "distill" and r.distill.top_k == "all" and not together:
        message = (
            "whole distributions stay in the process that made them: put teacher into actor's group, or keep a number "
            "(the vocabulary's size keeps everything)"
        )
        yield ("distill.top_k", "placement"), message
    if r.method == "distill" and by_policy_gradient(r):
        a = r.algorithm
        lacking = {"kl_coef": a.kl_coef, "positive_nll_coef": a.positive_nll_coef}
        lacking |= {"covariance": a.covariance} if a.covariance != "none" else {}
        for name, value in lacking.items():
            if value:
                message = (
                    f"{name}={value}: distill has no reference and no reward, only its teacher; leave it out"
                )
                yield (f"algorithm.{name}", "method", "distill.divergence"), message


def _steps(r: Recipe) -> Iterator[Inconsistency]:
    rows, updates = r.trainer.prompts_per_step, r.trainer.minibatches_per_step
    if rows % updates:
        message = f"minibatches_per_step={updates} does not divide prompts_per_step={rows}; choose a divisor"
        yield ("trainer.minibatches_per_step", "trainer.prompts_per_step"), message
    if r.method == "kto" and rows // updates < 2:
        message = f"kto compares each answer with another row's: {rows} rows in {updates} updates are too few; use at least 2 in each"
        yield ("trainer.prompts_per_step", "method"), message
    if r.trainer.optimizer in ("adafactor", "muon") and r.trainer.zero_stage:
        message = f"{r.trainer.optimizer} needs whole matrices, which ZeRO flattens; use zero_stage: 0"
        yield ("trainer.zero_stage", "trainer.optimizer"), message
    elif r.trainer.optimizer in ("adafactor", "muon") and r.model.dtype == "bfloat16":
        message = f"{r.trainer.optimizer} needs whole matrices, and bfloat16 always runs under ZeRO 1; use dtype: float32"
        yield ("model.dtype", "trainer.optimizer"), message


def _warmup(r: Recipe) -> Iterator[Inconsistency]:
    warmup, steps = r.trainer.warmup_steps, r.trainer.steps
    updates = None if steps is None else steps * updates_per_step(r) - pretraining_updates(r)
    if updates is not None and warmup >= updates > 0:
        message = (
            f"warmup_steps={warmup} of {updates} updates (steps x minibatches_per_step x passes_per_step, less the "
            f"critic's own) never leaves the warm-up; lower it below {updates}, or raise trainer.steps"
        )
        keys = ("trainer.warmup_steps", "trainer.steps", "trainer.minibatches_per_step")
        yield (*keys, "trainer.passes_per_step", "critic.pretrain_steps"), message


def _noise(r: Recipe) -> Iterator[Inconsistency]:
    if r.trainer.neftune_alpha is not None and by_policy_gradient(r):
        message = (
            f"neftune_alpha={r.trainer.neftune_alpha:g} puts noise on the trainer's log-probs and not on the sampler's, so "
            f"that every ratio of {r.method} is one to another policy; leave it out"
        )
        yield ("trainer.neftune_alpha", "method", "distill.divergence"), message


def _tensor_parallel(r: Recipe) -> Iterator[Inconsistency]:
    size = r.rollout.tensor_parallel
    if size == 1 or "rollout" not in r.roles:
        return
    key = "rollout.tensor_parallel"
    if r.model.lora is not None:
        yield (
            (key, "model.lora"),
            f"tensor_parallel={size}: a model with adapters cannot be split; leave one of them out",
        )
    if not r.runtime.deterministic:
        yield (
            (key, "runtime.deterministic"),
            (
                f"tensor_parallel={size} needs linears whose rows are their own; set runtime.deterministic: true"
            ),
        )
    for name, group in r.groups.items():
        if "rollout" not in group.roles:
            continue
        if "actor" in group.roles:
            yield (
                (key, "placement"),
                (
                    f"tensor_parallel={size}: the engine shares a group with the actor, whose weights it would run; give rollout a "
                    "group of its own"
                ),
            )
        elif group.num_processes % size:
            yield (
                (key, f"placement.{name}"),
                (
                    f"{group.num_processes} processes of group {name} are no multiple of tensor_parallel={size}"
                ),
            )


def _placement(r: Recipe) -> Iterator[Inconsistency]:
    home: dict[str, str] = {}
    for name, group in r.placement.items():
        for role in group.roles:
            if role in home:
                yield (f"placement.{name}.roles",), f"role {role} is in group {home[role]!r} too; keep one"
            home[role] = name
    missing = [role for role in r.roles if role not in home] if r.placement else []
    if missing:
        keys = ("placement", "method", "evaluation", "algorithm.kl_coef")
        yield keys, f"no group holds {', '.join(missing)}; add it to a group's roles"
    if r.runtime.backend == "local":
        if len(r.groups) > 1 and any(group.gpus for group in r.groups.values()):
            message = "one process drives one GPU: put every role into one group, or set runtime.backend: ray"
            yield ("placement", "runtime.backend"), message
        for name, group in r.groups.items():
            if group.num_processes > 1:
                message = f"{group.num_processes} processes need Ray; set runtime.backend: ray"
                yield (f"placement.{name}", "runtime.backend"), message
    yield from _prefill_processes(r)


def _prefill_processes(r: Recipe) -> Iterator[Inconsistency]:
    apart, each = r.rollout.prefill_processes, r.rollout.tensor_parallel
    if apart and each > 1:
        message = f"prefill_processes={apart} with tensor_parallel={each}: pages of a split model are not handed over; leave one out"
        yield ("rollout.prefill_processes", "rollout.tensor_parallel"), message
    for name, group in r.groups.items():
        if apart and "rollout" in group.roles and apart >= group.num_processes:
            message = (
                f"prefill_processes={apart} leaves no process of group {name!r}, which has {group.num_processes}, to decode; give it "
                "more by placement and runtime.backend: ray"
            )
            yield ("rollout.prefill_processes", "placement", "runtime.backend"), message
