"""Rules between sections: each bad pair of settings is refused by name, with the way out."""

from __future__ import annotations

import copy

import pytest

from rlhf.recipe import rules
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.problems import RecipeError
from rlhf.recipe.schema import Recipe
from tests.e2e.running import TINY, of_method

REFUSED = {
    "pass@k of fewer responses": (
        {"evaluation": {"samples": 2, "ks": [4], "temperature": 1.0}},
        "pass@4 needs 4 responses",
    ),
    "greedy copies": ({"evaluation": {"samples": 2}}, "gives the same response 2 times"),
    "pairs of one response": (
        {"judge": {"path": "org/judge", "template": "{prompt} {first} {second}"}},
        "use evaluation.samples >= 2",
    ),
    "pairs of a group of one": (
        {
            "method": "ppo",
            "rollout": {"group_size": 1},
            "judge": {"path": "org/judge", "template": "{prompt} {first} {second}"},
        },
        "compares two responses to a prompt: use group_size >= 2",
    ),
    "replay as if it were fresh": ({"algorithm": {"replay": {}}}, "set a correction, for example tis"),
    "replay without groups": (
        {"method": "ppo", "algorithm": {"replay": {}, "correction": "tis"}},
        "ppo has no groups to replay",
    ),
    "rates of texts": ({"method": "dpo", "curriculum": {}}, "dpo samples no responses"),
    "empty window": ({"curriculum": {"low": 0.9, "high": 0.1}}, "low=0.9 is above high=0.1"),
    "a critic of its own, shared": (
        {"method": "ppo", "critic": {"shared": True, "pretrain_steps": 3}},
        "pretrain_steps=3 is a critic's of its own",
    ),
}
# What would run, and do nothing or something else than it says.
SENSELESS = {
    "a policy that never learns": (
        {"method": "ppo", "critic": {"pretrain_steps": 4}},
        "pretrain_steps=4 of steps=4 leaves none in which the policy learns; lower it, or raise trainer.steps",
    ),
    "replay of groups of one": (
        {
            "algorithm": {"advantage": "reinforce_pp", "replay": {}, "correction": "tis"},
            "rollout": {"group_size": 1},
        },
        "group_size=1: replay keeps groups whose rewards differ",
    ),
    "a policy that imitates its one response": (
        {"method": "rejection", "rollout": {"group_size": 1}},
        "keep_best=1 of group_size=1 keeps every response, .* set online.min_reward",
    ),
    "a policy that imitates all of its responses": (
        {"method": "rejection", "online": {"keep_best": 4}},
        "keep_best=4 of group_size=4 keeps every response, .* raise group_size",
    ),
    "one response, whitened": (
        {
            "algorithm": {"advantage": "reinforce_pp"},
            "rollout": {"group_size": 1},
            "trainer": {"prompts_per_step": 1},
        },
        "prompts_per_step=1 x group_size=1 is one response a step, .* set algorithm.whiten_advantages: false",
    ),
    "one response and the greedy one, whitened": (
        {
            "algorithm": {"advantage": "remax", "whiten_advantages": True},
            "rollout": {"group_size": 1},
            "trainer": {"prompts_per_step": 1},
        },
        "is one response a step",
    ),
    "a warm-up without an end": (
        {"trainer": {"warmup_steps": 8, "minibatches_per_step": 2}},
        "warmup_steps=8 of 8 updates .* lower it below 8, or raise trainer.steps",
    ),
    "a warm-up of the critic's updates": (
        {"method": "ppo", "critic": {"pretrain_steps": 2}, "trainer": {"warmup_steps": 2}},
        "warmup_steps=2 of 2 updates",
    ),
    "noise in ratios": ({"trainer": {"neftune_alpha": 5.0}}, "every ratio of grpo is one to another policy"),
    "noise in ppo's ratios": (
        {"method": "ppo", "trainer": {"neftune_alpha": 5.0}},
        "neftune_alpha=5 puts noise on the trainer's log-probs and not on the sampler's",
    ),
}


@pytest.mark.parametrize("name", [*REFUSED, *SENSELESS])
def test_refused(name):
    """Would catch: a setting that is taken and then has no effect, or fails hours later; two reports of one mistake."""
    changes, said = (REFUSED | SENSELESS)[name]
    recipe = copy.deepcopy(TINY)
    recipe.pop("stages")
    recipe["trainer"] = {"steps": 4, "prompts_per_step": 8}
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(recipe.get(section), dict) else values
    recipe["data"].pop("response_column")
    with pytest.raises(RecipeError, match=said) as refusal:
        plan_from_dict(recipe)
    assert len(refusal.value.problems) == 1 or name in REFUSED


# What stands next to what is refused.
TAKEN = {
    "pretraining to the last step but one": {"method": "ppo", "critic": {"pretrain_steps": 3}},
    "the best of one that pass": {
        "method": "rejection",
        "rollout": {"group_size": 1},
        "online": {"min_reward": 0.5},
    },
    "all that is sampled, for a later stage": {
        "method": "rejection",
        "online": {"keep_best": 4, "train": False},
    },
    "one response of a prompt": {
        "algorithm": {"advantage": "reinforce_pp"},
        "rollout": {"group_size": 1},
        "trainer": {"prompts_per_step": 2},
    },
    "one response as it is": {
        "algorithm": {"advantage": "reinforce_pp", "whiten_advantages": False},
        "rollout": {"group_size": 1},
        "trainer": {"prompts_per_step": 1},
    },
    "a warm-up that ends": {"trainer": {"warmup_steps": 3}},
    "a warm-up of a length not known yet": {"trainer": {"steps": None, "epochs": 1, "warmup_steps": 30}},
    "noise on texts": {
        "method": "sft",
        "data": {"response_column": "response"},
        "trainer": {"neftune_alpha": 5.0},
    },
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name):
    """Would catch: a rule that refuses what it does not speak of."""
    base = {section: values for section, values in TINY.items() if section != "stages"}
    base["trainer"] = {"steps": 4, "prompts_per_step": 8}
    recipe = of_method(base, TAKEN[name])
    assert plan_from_dict(recipe).stages


def whole(changes: dict) -> dict:
    """A valid recipe with the changes."""
    recipe = {
        "model": {"path": "org/model"},
        "data": {"path": "a.jsonl"},
        "reward": [{"function": "gsm8k"}],
        "trainer": {"steps": 4, "prompts_per_step": 8, "minibatches_per_step": 2},
    }
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(recipe.get(section), dict) else values
    if recipe.get("method") in ("dpo", "distill"):
        recipe.pop("reward")
    return recipe


def recipe_of(changes: dict) -> Recipe:
    return plan_from_dict(whole(changes)).stages[0].recipe


ON_POLICY = {"divergence": "sampled_kl", "on_policy_frac": 1.0}
MEANINGLESS = {
    "sampled_kl has no reference": (
        {"method": "distill", "distill": ON_POLICY, "algorithm": {"kl_coef": 0.1}},
        "kl_coef=0.1: distill has no reference",
    ),
    "sampled_kl has no covariance": (
        {"method": "distill", "distill": ON_POLICY, "algorithm": {"covariance": "clip_cov"}},
        "covariance=clip_cov: distill has no reference",
    ),
    "gmpo by token": (
        {"method": "ppo", "algorithm": {"objective": "gmpo", "aggregation": "sequence_mean"}},
        "gmpo has one advantage per response, ppo one per token",
    ),
    "gspo of a teacher": (
        {"method": "distill", "distill": ON_POLICY, "algorithm": {"objective": "gspo"}},
        "gspo has one advantage per response, distill one per token",
    ),
    "reinforce off policy": (
        {"algorithm": {"objective": "reinforce"}, "trainer": {"passes_per_step": 3}},
        "the 6 updates of a step .* leave the policy that sampled; use ppo_clip, or one update a step",
    ),
    "a warm-up scored by a role that it has not": (
        {
            "method": "dpo",
            "reward_model": {"path": "org/rm"},
            "evaluation": {"sets": {"a": {"path": "b.jsonl"}}},
        },
        "evaluation of dpo needs at least one reward function",
    ),
    "wpo of ranks": (
        {"method": "dpo", "preference": {"losses": {"aot": 1.0}, "wpo": True}},
        "aot matches pairs by rank; use wpo: false",
    ),
    "one beta for two scales": (
        {"method": "dpo", "preference": {"losses": {"simpo": 1.0, "dpo": 1.0}}},
        "they share it; state it",
    ),
    "a dual clip below the paper's clip": (
        {"algorithm": {"dual_clip": 1.1}},
        "dual_clip=1.1 is not above 1 . clip_high=1.2",
    ),
    "bounds that cross the default": (
        {"algorithm": {"correction": "sequence_mask", "correction_low": 1.1}},
        "correction_low=1.1 is above correction_high=1.001",
    ),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_meaningless_settings_are_refused(name):
    """Would catch: a formula used where it is not defined; a crash at step 1."""
    changes, said = MEANINGLESS[name]
    if changes.get("method") == "distill":
        changes = changes | {"teacher": {"path": "org/teacher"}}
    with pytest.raises(RecipeError, match=said):
        plan_from_dict(whole(changes))


@pytest.mark.parametrize(
    ("algorithm", "want"),
    [
        ({}, {"clip_low": 0.2, "clip_high": 0.2}),
        ({"clip_high": 0.28}, {"clip_low": 0.2, "clip_high": 0.28}),
        ({"clip_low": 0.0}, {"clip_low": 0.0, "clip_high": 0.2}),
        ({"objective": "gspo", "aggregation": "sequence_mean"}, {"clip_low": 3e-4, "clip_high": 4e-4}),
        ({"objective": "gspo_token"}, {"clip_low": 3e-4, "clip_high": 4e-4}),
        ({"objective": "gmpo", "aggregation": "sequence_mean"}, {"clip_low": 0.4, "clip_high": 0.4}),
        ({"objective": "cispo"}, {"clip_low": 1.0, "clip_high": 4.0}),  # weights in [0, 5]
        ({"correction": "icepop"}, {"correction_low": 0.5, "correction_high": 5.0}),
        ({"correction": "sequence_mask"}, {"correction_low": 0.999, "correction_high": 1.001}),
        ({"correction": "icepop", "correction_low": 0.0}, {"correction_low": 0.0, "correction_high": 5.0}),
    ],
)
def test_bounds_are_the_paper_s_where_left_open(algorithm, want):
    """Would catch: PPO's clip on a sequence's ratio, which never reaches it."""
    settings = rules.decided(recipe_of({"algorithm": algorithm}))
    assert {name: getattr(settings, name) for name in want} == want


@pytest.mark.parametrize(
    ("preference", "want"),
    [
        ({}, (0.1, 0.0)),
        ({"losses": {"simpo": 1.0}}, (2.0, 0.0)),
        ({"losses": {"simpo": 1.0, "sft": 0.5}}, (2.0, 0.0)),
        ({"losses": {"simpo": 1.0}, "beta": 0.5}, (0.5, 0.0)),
        ({"losses": {"cpo": 1.0}}, (0.1, 1.0)),
        ({"losses": {"cpo": 1.0}, "nll_coef": 0.0}, (0.1, 0.0)),
    ],
)
def test_beta_and_nll_are_the_loss_s_where_left_open(preference, want):
    """Would catch: SimPO with DPO's beta; CPO without its NLL."""
    settings = rules.decided_preference(recipe_of({"method": "dpo", "preference": preference}))
    assert (settings.beta, settings.nll_coef) == want


IDLE = {
    "objective: gspo": {"algorithm": {"objective": "gspo", "aggregation": "sequence_mean"}},
    "objective: cispo": {"algorithm": {"objective": "cispo"}},
    "clip_low: 0.1, clip_high: 0.3": {"algorithm": {"clip_low": 0.1, "clip_high": 0.3}},
    "dual_clip: 3.0": {"algorithm": {"dual_clip": 3.0}},
    "covariance: kl_cov": {"algorithm": {"covariance": "kl_cov"}},
    "early_stop_kl: 0.1": {"algorithm": {"early_stop_kl": 0.1}},
    "value_clip: 0.5": {"method": "ppo", "critic": {"value_clip": 0.5}},
}


@pytest.mark.parametrize("name", IDLE)
def test_what_one_update_a_step_makes_idle_is_a_warning(name):
    """Would catch: an ablation of clips in which no ratio ever leaves 1."""
    one = {"trainer": {"minibatches_per_step": 1}}
    (warning,) = plan_from_dict(whole(IDLE[name] | one)).warnings
    assert f"no effect of {name}:" in warning.message and "trainer.minibatches_per_step" in warning.message
    assert not plan_from_dict(whole(IDLE[name])).warnings
    assert not plan_from_dict(
        whole(IDLE[name] | {"trainer": {"minibatches_per_step": 1, "passes_per_step": 2}})
    ).warnings


@pytest.mark.parametrize(
    "algorithm", [{}, {"objective": "reinforce"}, {"covariance": "clip_cov"}, {"entropy_coef": 0.1}]
)
def test_what_one_update_a_step_leaves_in_force_is_no_warning(algorithm):
    assert not plan_from_dict(
        whole({"algorithm": algorithm, "trainer": {"minibatches_per_step": 1}})
    ).warnings


@pytest.mark.parametrize(("key", "value"), [("kv_dtype", "int8"), ("weights", "int4")])
def test_samples_from_rounded_numbers_are_warned_of(key, value):
    """Would catch: ratios against log-probs that the trainer's arithmetic never gave, in silence."""
    rounded = {"rollout": {key: value}}
    (warning,) = plan_from_dict(whole(rounded)).warnings
    assert f"{key}: {value} and no correction" in warning.message
    assert not plan_from_dict(whole(rounded | {"algorithm": {"correction": "tis"}})).warnings
    assert not plan_from_dict(whole(rounded | {"method": "online_dpo"})).warnings


def test_truncated_samples_are_warned_of():
    """Would catch: a gradient that is biased in silence, or a warning where nothing is learned from the samples."""
    cut = {"rollout": {"top_p": 0.9, "top_k": 5, "min_p": 0.1}}
    (warning,) = plan_from_dict(whole(cut)).warnings
    assert "top_k: 5, top_p: 0.9, min_p: 0.1: samples come from a truncated distribution" in warning.message
    assert not plan_from_dict(whole(cut | {"method": "online_dpo"})).warnings


SPLIT = {
    "placement": {"train": {"roles": ["actor"]}, "sample": {"roles": ["rollout"], "processes": 4}},
    "runtime": {"backend": "ray"},
    "rollout": {"tensor_parallel": 2},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": {"all": {"roles": ["actor", "rollout"]}}}, "tensor_parallel=2: the engine shares a group with the actor"),
        ({"rollout": {"tensor_parallel": 3}}, "4 processes of group sample are no multiple of tensor_parallel=3"),
        ({"runtime": {"backend": "ray", "deterministic": False}}, "set runtime.deterministic: true"),
        ({"model": {"path": "org/model", "lora": {"rank": 4}}}, "a model with adapters cannot be split"),
        ({"placement": {}, "runtime": {}}, "give rollout a group of its own"),
    ],
)  # fmt: skip
def test_an_engine_over_processes_that_cannot_be(changes, message):
    """Would catch: a run that finds out while it loads."""
    with pytest.raises(RecipeError, match=message):
        plan_from_dict(whole(SPLIT | changes))


def test_an_engine_over_processes():
    assert plan_from_dict(whole(SPLIT)).stages[0].recipe.rollout.tensor_parallel == 2
