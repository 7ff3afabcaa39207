"""Settings that nothing reads: each is refused by name, and the table of who reads what agrees with the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from rlhf.advantages import ADVANTAGES
from rlhf.corrections import CORRECTIONS
from rlhf.divergence import DIVERGENCES
from rlhf.objectives import CLIPPED_SIDES, OBJECTIVES
from rlhf.preference import PREFERENCE_LOSSES
from rlhf.recipe import reads
from rlhf.recipe.load import RecipeError, dump_plan, load_plan, plan_from_dict
from rlhf.recipe.schema import Recipe
from rlhf.settings import setting_names

GIVEN = {  # what each method needs to be valid
    "sft": {"data": {"response_column": "answer"}},
    "grpo": {"reward": [{"function": "gsm8k"}]},
    "ppo": {"reward": [{"function": "gsm8k"}]},
    "online_dpo": {"reward": [{"function": "gsm8k"}]},
    "rejection": {"reward": [{"function": "gsm8k"}]},
    "dpo": {},
    "rm": {},
    "prm": {},
    "kto": {"data": {"response_column": "answer"}},
    "distill": {"data": {"response_column": "answer"}, "teacher": {"path": "org/teacher"}},
}


def recipe_of(method: str, changes: str = "") -> dict:
    """A valid recipe of the method with `changes`, written as YAML."""
    recipe = {
        "method": method,
        "model": {"path": "org/model"},
        "data": {"path": "a.jsonl"},
        "trainer": {"steps": 1},
    }
    for part in (GIVEN[method], yaml.safe_load(changes) or {}):
        for key, value in part.items():
            recipe[key] = recipe.get(key, {}) | value if isinstance(value, dict) else value
    return recipe


def refused(recipe: dict) -> dict[str, str]:
    try:
        plan_from_dict(recipe)
    except RecipeError as error:
        return {problem.key: f"{problem.message}; {problem.hint}" for problem in error.problems}
    return {}


# method, what is stated, the key that nothing reads, what decides
IGNORED = """\
dpo | preference: {losses: {ipo: 1}, label_smoothing: 0.1} | preference.label_smoothing | losses: ipo
dpo | preference: {losses: {hinge: 1}, simpo_gamma: 2} | preference.simpo_gamma | use losses: simpo
dpo | preference: {orpo_lambda: 0.5} | preference.orpo_lambda | use losses: orpo
dpo | preference: {discopop_tau: 0.5} | preference.discopop_tau | use losses: discopop
dpo | preference: {losses: {orpo: 1}, beta: 0.5} | preference.beta | losses: orpo
dpo | preference: {f_alpha: 0.3} | preference.f_alpha | use f_divergence: alpha
grpo | preference: {f_divergence: js} | preference.f_divergence | method: grpo
rm | preference: {ld_alpha: 0.5} | preference.ld_alpha | method: rm
dpo | data: {margin_column: gap} | data.margin_column | use method: rm
grpo | data: {response_column: answer} | data.response_column | no answer is read
ppo | algorithm: {advantage: rloo} | algorithm.advantage | use method: grpo
grpo | algorithm: {lam: 0.9} | algorithm.lam | use method: ppo
grpo | algorithm: {gamma: 0.9} | algorithm.gamma | reinforce_pp
grpo | algorithm: {critic_lam: 1} | algorithm.critic_lam | use method: ppo
ppo | algorithm: {lam: 0.9, critic_lam: 1, length_adaptive_lam: 0.05} | algorithm.lam | leave one of them out
grpo | critic: {lr: 1} | critic.lr | use method: ppo
dpo | critic: {pretrain_steps: 1} | critic.pretrain_steps | use method: ppo
ppo | critic: {coef: 0.5} | critic.coef | critic.shared
grpo | algorithm: {objective: gspo, aggregation: sequence_mean, dual_clip: 3} | algorithm.dual_clip | use objective: ppo_clip
grpo | algorithm: {objective: sapo, clip_low: 0.1} | algorithm.clip_low | objective: sapo
grpo | algorithm: {sapo_tau_neg: 2} | algorithm.sapo_tau_neg | use objective: sapo
grpo | algorithm: {correction_cap: 3} | algorithm.correction_cap | tis or sequence_tis
grpo | algorithm: {correction: tis, correction_low: 0.1} | algorithm.correction_low | icepop or sequence_mask
grpo | algorithm: {cov_frac: 0.1} | algorithm.cov_frac | clip_cov or kl_cov
grpo | algorithm: {covariance: kl_cov, cov_high: 3} | algorithm.cov_high | use covariance: clip_cov
grpo | algorithm: {covariance: clip_cov, kl_cov_coef: 2} | algorithm.kl_cov_coef | use covariance: kl_cov
grpo | algorithm: {overlong_penalty: 2} | algorithm.overlong_penalty | overlong_buffer above 0
grpo | algorithm: {max_sampling_rounds: 2} | algorithm.max_sampling_rounds | dynamic_sampling: true
grpo | algorithm: {kl_estimator: k2} | algorithm.kl_estimator | kl_coef above 0
ppo | algorithm: {kl_coef: 0.1, kl_horizon: 5} | algorithm.kl_horizon | set algorithm.kl_target
grpo | reference: {path: ./nowhere} | reference.path | compares with a reference
dpo | "{reference: {path: org/x}, preference: {losses: {simpo: 1}}}" | reference.path | compares with a reference
ppo | "{algorithm: {kl_coef: 0.1}, reference: {update_mix: 0.5}}" | reference.update_mix | update_every
dpo | algorithm: {entropy_coef: 0.1} | algorithm.entropy_coef | method: dpo
kto | algorithm: {mask_truncated: true} | algorithm.mask_truncated | use method: grpo or ppo
online_dpo | algorithm: {mask_truncated: true} | algorithm.mask_truncated | use method: grpo or ppo
online_dpo | algorithm: {kl_coef: 0.1} | algorithm.kl_coef | use method: grpo or ppo
distill | algorithm: {objective: cispo} | algorithm.objective | no policy gradient
sft | ptx: {data: {path: b.jsonl, response_column: r}} | ptx | no policy gradient
grpo | ptx: {data: {path: b.jsonl, response_column: r}} | ptx | ptx_coef above 0
dpo | judge: {path: org/judge, template: "{prompt} {response}"} | judge | method: dpo
sft | reward_model: {path: org/rm} | reward_model | method: sft
sft | "{reward: [{function: gsm8k}]}" | reward | no response is scored
dpo | kto: {beta: 0.3} | kto.beta | use method: kto
kto | reward_modeling: {center_coef: 0.01} | reward_modeling.center_coef | use method: rm
sft | online: {min_gap: 0.5} | online.min_gap | use method: online_dpo
online_dpo | online: {keep_best: 2} | online.keep_best | use method: rejection
dpo | teacher: {path: org/teacher} | teacher | use method: distill
distill | distill: {jsd_beta: 0.3} | distill.jsd_beta | use divergence: jsd
distill | distill: {divergence: sampled_kl, on_policy_frac: 1, temperature: 2} | distill.temperature | sampled_kl
distill | distill: {divergence: sampled_kl, on_policy_frac: 1, top_k: 9} | distill.top_k | sampled_kl
distill | distill: {divergence: sampled_kl, on_policy_frac: 1, nll_coef: 1} | distill.nll_coef | sampled_kl
distill | distill: {on_policy_frac: 1, nll_coef: 1} | distill.nll_coef | set distill.on_policy_frac below 1
distill | rollout: {group_size: 2} | rollout.group_size | no sample is learned from
sft | rollout: {max_response_tokens: 9} | rollout.max_response_tokens | nothing is sampled
sft | trainer: {steps: 1, momentum: 0.9} | trainer.momentum | optimizer: adamw
sft | "trainer: {steps: 1, optimizer: sgd, betas: [0.9, 0.9]}" | trainer.betas | optimizer: sgd
sft | trainer: {steps: 1, schedule: linear, poly_power: 3} | trainer.poly_power | use schedule: polynomial
sft | trainer: {steps: 1, schedule: cosine, cycles: 3} | trainer.cycles | use schedule: cosine_restarts
sft | trainer: {steps: 1, min_lr_ratio: 0.1} | trainer.min_lr_ratio | schedule: constant
sft | evaluation: {every: 3} | evaluation.every | nothing is evaluated
sft | evaluation: {reward: [{function: gsm8k}]} | evaluation.reward | add evaluation.sets
sft | evaluation: {temperature: 1} | evaluation.temperature | evaluation.sets
"""


@pytest.mark.parametrize("line", IGNORED.splitlines())
def test_what_nothing_reads_is_refused(line: str) -> None:
    """Would catch: a setting that is accepted and has no effect."""
    method, changes, key, said = (part.strip() for part in line.split(" | "))
    found = refused(recipe_of(method, changes.strip('"')))
    assert list(found) == [key] and said in found[key], found


@pytest.mark.parametrize("method", GIVEN)
def test_what_is_at_its_default_is_no_wish(method: str) -> None:
    """Would catch: a dumped recipe, which states every default, refused for it."""
    plan = plan_from_dict(recipe_of(method))
    assert plan_from_dict(yaml.safe_load(dump_plan(plan))).stages == plan.stages


def readers(section: str, name: str, key: str) -> set[str]:
    """The values of `key` with which the table lets a setting be read."""
    (need,) = [need for need in reads._TABLE[f"{section}.{name}"] if need.keys == (key,)]
    return set(need.values)


@pytest.mark.parametrize(
    ("functions", "section", "key"),
    [
        (PREFERENCE_LOSSES, "preference", "preference.losses"),
        (OBJECTIVES, "algorithm", "algorithm.objective"),
        (CLIPPED_SIDES, "algorithm", "algorithm.objective"),
        (CORRECTIONS, "algorithm", "algorithm.correction"),
        (DIVERGENCES, "distill", "distill.divergence"),
    ],
)
def test_the_table_agrees_with_the_formulas(functions: dict[str, Callable], section: str, key: str) -> None:
    """Would catch: a formula that reads one more setting, or one less, than the recipe's report believes."""
    named = {setting for function in functions.values() for setting in setting_names(function)}
    for setting in named:
        using = {name for name, function in functions.items() if setting in setting_names(function)}
        if functions is CLIPPED_SIDES:  # sapo has a gate instead
            assert using <= readers(section, setting, key), setting
        else:
            assert using == readers(section, setting, key), setting


def test_only_reinforce_pp_discounts() -> None:
    assert {name for name, function in ADVANTAGES.items() if "gamma" in setting_names(function)} == {
        "reinforce_pp"
    }


def test_every_field_of_a_method_s_section_is_in_the_table() -> None:
    """Would catch: a new field that every method accepts."""
    for section in (
        "algorithm",
        "critic",
        "reference",
        "preference",
        "kto",
        "reward_modeling",
        "online",
        "distill",
    ):
        fields = Recipe.model_fields[section].annotation.model_fields
        assert {f"{section}.{name}" for name in fields} <= reads._TABLE.keys(), section
    known = {(name,) for name in Recipe.model_fields} | {
        (name, inner)
        for name, field in Recipe.model_fields.items()
        for inner in getattr(field.annotation, "model_fields", {})
    }
    assert {tuple(key.split(".")) for key in reads._TABLE} <= known


STAGED = """\
model: {path: org/model}
data: {path: a.jsonl}
reward: [{function: gsm8k}]
algorithm: {kl_coef: 0.1, lam: 0.9}
trainer: {steps: 1}
stages:
  warmup: {method: sft, data: {response_column: answer}}
  grpo:
    algorithm: {clip_high: 0.3, gamma: 0.9}
"""


def test_a_shared_line_is_read_if_one_stage_reads_it(tmp_path) -> None:
    """Would catch: a warm-up refused for the algorithm of the stage after it; a line that no stage reads let through."""
    path = tmp_path / "recipe.yaml"
    path.write_text(STAGED)
    with pytest.raises(RecipeError) as caught:
        load_plan(path)
    assert [(p.line, p.key) for p in caught.value.problems] == [
        (4, "algorithm.lam"),
        (9, "stages.grpo.algorithm.gamma"),
    ]
    assert "and no other stage reads it" in caught.value.problems[0].message
    path.write_text(STAGED.replace(", lam: 0.9", "").replace(", gamma: 0.9", ""))
    plan = load_plan(path)
    again = plan_from_dict(yaml.safe_load(dump_plan(plan)))
    assert dump_plan(again) == dump_plan(plan)
    assert again.stages[0].recipe.algorithm.kl_coef == 0.0 and again.stages[1] == plan.stages[1]


def test_what_a_base_states_is_its_own_affair(tmp_path) -> None:
    """Would catch: a recipe that cannot start from another one because it leaves a part of it unused."""
    (tmp_path / "base.yaml").write_text(STAGED.replace(", lam: 0.9", "").replace(", gamma: 0.9", ""))
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nstages: {grpo: {method: rejection}}\n")
    load_plan(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="algorithm.lam=0.8: 0.8 is read by nothing"):
        load_plan(tmp_path / "recipe.yaml", ["algorithm.lam=0.8"])


def test_a_switch_that_is_turned_off_leaves_the_rest_in_place() -> None:
    """Would catch: `algorithm.kl_coef=0` on the command line refused for the estimator in the file."""
    assert not refused(recipe_of("grpo", "algorithm: {kl_coef: 0.0, kl_estimator: k2}"))


def test_a_wrong_method_breeds_no_complaints() -> None:
    """Would catch: a typo in the method reported as a setting that grpo, the default, does not read."""
    recipe = recipe_of("dpo", "preference: {label_smoothing: 0.1}") | {"method": "dpoo"}
    assert "preference.label_smoothing" not in refused(recipe)
