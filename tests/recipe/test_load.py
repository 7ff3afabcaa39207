"""Reading recipes: right types, every mistake on its line, overrides, stages, interpolation."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlhf.recipe.load import RecipeError, load_plan, plan_from_dict
from rlhf.recipe.suggest import schema
from rlhf.recipe.tree import read_scalar

VALID = """\
method: grpo
model:
  path: some/model
data:
  path: train.jsonl
reward:
  - function: exact_match
trainer:
  steps: 10
"""

STAGED = """\
model: {path: some/model}
data: {path: train.jsonl, limit: 5}
reward: [{function: exact_match}]
rollout: {group_size: 4}
stages:
  warmup:
    method: sft
    data: {response_column: answer}
    trainer: {steps: 3, lr: 1e-3}
  grpo:
    trainer: {steps: 7}
"""


@pytest.fixture
def write(tmp_path):
    def _write(text: str | bytes):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_plan(path, overrides)
    return caught.value.problems


def found(path, *overrides):
    """{(line, key): message} of a refused recipe."""
    return {(p.line, p.key): p.message for p in problems(path, *overrides)}


def recipe(path, *overrides):
    (stage,) = load_plan(path, overrides).stages
    return stage.recipe


# ---------------------------------------------------------------------------------------------------------------- types


WORDS = (
    "1 -1 +1 0 007 0o7 0x1f 1_000 1:30 5e-5 5E5 1e3 1.e3 1.5 .5 -.5 1e 1e+ -5e-3 .inf -.inf +.inf .nan . .. e5 0b11 on off "
    "On yes No true False TRUE y n null ~ Null 2026-11-21 2026-11-21T10:00:00 1.2.3 abc 1_0.5 _1 1_e5 12e03 -0 1e5_0 +.5 "
    "1__0e3 1_0e3"
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(WORDS.split()) | st.text("0123_.eE+-:xn", min_size=1, max_size=8))
def test_a_scalar_means_what_it_means_to_omegaconf(text):
    """Catches: 5e-5 read as text, a date object, another idea of a number than the rest of the ecosystem."""
    try:
        want = OmegaConf.to_container(OmegaConf.create(f"key: {text}"))["key"]
    except (yaml.YAMLError, ValueError):
        assume(False)  # no scalar by itself: "- x", "x: y"
    got = read_scalar(text)
    if isinstance(want, float) and math.isnan(want):
        assert math.isnan(got)
    else:
        assert (type(got), got) == (type(want), want)


def test_numbers_in_a_file(write):
    got = recipe(write(VALID + "  lr: 5e-5\n  prompts_per_step: 1_000\n  warmup_steps: 9e0\n"))
    assert (got.trainer.lr, got.trainer.prompts_per_step, got.trainer.warmup_steps) == (5e-5, 1000, 9)


def test_a_word_that_yaml_takes_for_a_bool_or_number_stays_a_word_where_text_is_wanted(write):
    """Catches: `wandb: off` refused because YAML made it false; a commit of digits or a run named 2026 refused."""
    text = VALID.replace("path: some/model", "path: some/model\n  revision: 0123456")
    got = recipe(write(text + "tracking: {wandb: off}\nrun: {name: 2026}\nrollout: {stop: [on, 7]}\n"))
    assert got.tracking.wandb == "off"
    assert got.run.name == "2026"
    assert got.model.revision == "0123456"
    assert got.rollout.stop == ["on", "7"]


def test_free_arguments_keep_yamls_booleans(write):
    text = VALID.replace("exact_match", "exact_match\n    args: {strict: off, word: 'off', n: 3}")
    assert recipe(write(text)).reward[0].args == {"strict": False, "word": "off", "n": 3}


def test_true_is_not_the_number_one(write):
    """Catches: `steps: on` trained for one step."""
    assert found(write(VALID.replace("steps: 10", "steps: on"))) == {
        (9, "trainer.steps"): "true is not a number"
    }


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["lr", "betas", "eps"])
def test_numbers_that_are_none_are_refused(write, key, value):
    text = f"[0.9, {value}]" if key == "betas" else value
    (problem,) = problems(write(VALID + f"  {key}: {text}\n"))
    assert problem.line == 10 and "not a finite number" in problem.message


def test_a_non_finite_number_is_refused_where_the_schema_has_no_bound(write):
    assert found(write(VALID + "evaluation: {correct_above: .nan}\n")) == {
        (10, "evaluation.correct_above"): "nan is not a finite number"
    }


def test_byte_order_mark_and_windows_lines(write):
    assert recipe(write(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())).trainer.steps == 10


# ------------------------------------------------------------------------------------------------- files that are none


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the file is empty"),
        ("# only a comment\n", 1, "the file is empty"),
        ("just words\n", 1, "holds no keys"),
        ("- a\n- b\n", 1, "holds no keys"),
        ("model:\n\tpath: x\n", 2, "a tab"),
        ("a: 1\n b: 2\n", 2, "wrong indent"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "a second ':'"),
        ("a: 1\n---\nb: 2\n", 2, "several documents"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "YAML tag"),
        ("a: !!str 1\n", 1, "YAML tag"),
        ("a: !include x\n", 1, "YAML tag"),
        ("a: &x {b: 1}\nc: *x\n", 2, "YAML alias"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        (b"a: 1\nb: \xff\xfe\n", 2, "not UTF-8"),
        ("a: " + "[" * 5000 + "]" * 5000, 1, "nested too deeply"),
        (b"#" * 1_000_001, None, "1,000,001 bytes"),
    ],
)
def test_an_unreadable_file_is_one_plain_sentence(write, text, line, said):
    (problem,) = problems(write(text))
    assert said in problem.message, problem
    assert line is None or problem.line == line


def test_a_missing_file_and_a_folder(tmp_path):
    assert "no such file" in str(problems(tmp_path / "x.yaml")[0])
    assert "is a folder" in str(problems(tmp_path)[0])


def test_every_duplicate_key_is_reported(write):
    """Catches: the last of two values silently winning."""
    text = VALID + "  steps: 11\nrollout:\n  top_k: 1\n  top_k: 2\nmethod: sft\n"
    assert found(write(text)) == {
        (10, "trainer.steps"): "is given twice (first on line 9)",
        (13, "rollout.top_k"): "is given twice (first on line 12)",
        (14, "method"): "is given twice (first on line 1)",
    }


# --------------------------------------------------------------------------------------------------- one whole report

BAD = """\
run:
  name: ../../x
  seed: -1
trianer:
  lrr: 5e-5
  steps: ten
model:
  dtype: bfloat61
  build: {model_type: qwen3}
rollout:
  group_size: 1
  kl_coef: 0.1
data:
  path: x
  task: chain_arithmetic
reward:
  - function: exact_match
    wieght: 2
  - weight: 1
trainer.epochs: 1
runtime:
"""


def test_all_mistakes_are_in_one_report_with_their_lines(write):
    """Catches: fixing one mistake a run. Structure, values, misspelt sections' contents and cross-checks together."""
    assert found(write(BAD), "trainer.minibatches_per_step=7", "nonsense") == {
        (
            1,
            "tokenizer.build",
        ): "a built model has no tokenizer of its own; set tokenizer.build or tokenizer.path",
        (2, "run.name"): "'../../x' is not of the form ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        (3, "run.seed"): "-1 is not at least 0",
        (4, "trianer"): "unknown key",
        (5, "trianer.lrr"): "unknown key",
        (6, "trianer.steps"): "'ten' is not a whole number",
        (8, "model.dtype"): "'bfloat61' is not one of float32, bfloat16",
        (11, "rollout.group_size"): "group_size=1 gives every response zero advantage; use group_size >= 2",
        (12, "rollout.kl_coef"): "unknown key",
        (13, "data"): "set exactly one of path and task (null takes out what a stage or a file inherits)",
        (18, "reward.0.wieght"): "unknown key",
        (19, "reward.1.function"): "is missing",
        (20, "trainer.epochs"): "unknown key",
        (21, "runtime"): "is empty",
        (None, "nonsense"): "is not key=value",
        (None, "trainer.minibatches_per_step=7"): (
            "minibatches_per_step=7 does not divide prompts_per_step=32; choose a divisor"
        ),
    }


def test_the_report_reads_like_a_compilers(write):
    path = write(VALID + "  lrr: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_plan(path)
    assert str(caught.value).splitlines()[1:] == [
        f"  {path}:10: trainer.lrr: unknown key; did you mean trainer.lr?"
    ]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_mistake_does_not_breed_others(write):
    """Catches: `trainer.steps: ten` also reported as "set trainer.steps"; a wrong dataset as a missing one."""
    assert set(found(write(VALID.replace("steps: 10", "steps: ten")))) == {(9, "trainer.steps")}
    assert set(found(write(VALID.replace("path: train.jsonl", "path: [1]")))) == {(5, "data.path")}
    assert set(found(write(VALID.replace("path: some/model", "pth: some/model")))) == {(3, "model.pth")}
    wrong_item = VALID.replace("- function: exact_match", "- function: [1]")
    assert set(found(write(wrong_item))) == {(7, "reward.0.function")}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trainer: {steps: 1, lr: 0}", "0 is not above 0"),
        ("trainer: {steps: 1.5}", "1.5 is not a whole number"),
        ("trainer: {steps: '1x'}", "'1x' is not a whole number"),
        ("trainer: {steps: 1, betas: [0.9]}", "has too few entries: number 2 is missing"),
        ("trainer: {steps: 1, betas: [0.9, 2]}", "2 is not at most 1"),
        ("trainer: {steps: 1, betas: 0.9}", "0.9 is not a list"),
        ("trainer: {steps: 1, zero_stage: 4}", "4 is not one of 0, 1, 2, 3"),
        ("trainer: {steps: 1, offload_optimizer: 7}", "7 is not true or false"),
        ("trainer: 5", "5 is not a section of `key: value` lines"),
        ("trainer: {steps: 1, lr:}", "is empty"),
        ("placement: {a: {roles: []}}", "[] is not a list of at least 1 entry"),
        (
            "placement: {a: {roles: [actr, rollout]}}",
            "'actr' is not one of actor, critic, reference, reward, judge, rollout, teacher",
        ),
        ("placement: {a: {roles: [actor]}}", "no group holds rollout; add it to a group's roles"),
        (
            "placement: {a: {roles: [actor, rollout]}, b: {roles: [actor]}}",
            "role actor is in group 'a' too; keep one",
        ),
        (
            "placement: {a: {roles: [actor, rollout], gpus: 2}}",
            "2 processes need Ray; set runtime.backend: ray",
        ),
        (
            "rollout: {prefill_processes: 1}",
            "prefill_processes=1 leaves no process of group 'all', which has 1, to decode; give it more by placement and "
            "runtime.backend: ray",
        ),
        (
            "rollout: {prefill_processes: 2}\nruntime: {backend: ray}\n"
            "placement: {a: {roles: [actor]}, b: {roles: [rollout], processes: 2}}",
            "prefill_processes=2 leaves no process of group 'b', which has 2, to decode; give it more by placement and "
            "runtime.backend: ray",
        ),
        (
            "rollout: {prefill_processes: 1, tensor_parallel: 2}\nruntime: {backend: ray}\n"
            "placement: {a: {roles: [actor]}, b: {roles: [rollout], processes: 4}}",
            "prefill_processes=1 with tensor_parallel=2: pages of a split model are not handed over; leave one out",
        ),
        ("model: {lora: {target_modules: 5}, path: x}", "5 is not a list or one of all-linear"),
        ("rollout: {page_tokens: 65}", "65 is not one of 16, 32, 64, 128, 256"),
        ("rollout: {top_p: 0}", "0 is not above 0"),
        ("rollout: {min_p: 1.5}", "1.5 is not at most 1"),
        ("data: {path: x, prompt_column: {a: 1}}", "this section is not text"),
    ],
)
def test_messages_name_the_value_and_the_rule(write, line, said):
    """Catches: pydantic's words, or a type of error without any of ours."""
    key = line.partition(":")[0]
    kept = yaml.safe_load(VALID)
    kept.pop(key, None)
    (problem,) = problems(write(yaml.safe_dump(kept, sort_keys=False) + line + "\n"))
    assert problem.message == said
    assert "pydantic" not in str(problem) and "Input should" not in str(problem)


def test_a_method_that_is_near_is_suggested(write):
    (problem,) = problems(write(VALID.replace("method: grpo", "method: grop")))
    assert problem.hint == "did you mean grpo?"


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_keys_at_any_depth(write):
    got = recipe(
        write(VALID),
        "trainer.lr=2e-6",
        "model.lora.rank=4",
        "rollout.stop=[a, 'b=c']",
        "reward.0.weight=0.5",
        "run.name=2026",
        "data.prompt_template=a {x}: b # c",
        "tracking.wandb=off",
        "evaluation.sets={held_out: {path: test.jsonl}}",
        "rollout.cache_tokens=",
    )
    assert got.trainer.lr == 2e-6 and got.model.lora.rank == 4 and got.rollout.stop == ["a", "b=c"]
    assert got.reward[0].weight == 0.5 and got.run.name == "2026" and got.tracking.wandb == "off"
    assert got.data.prompt_template == "a {x}: b # c"
    assert got.evaluation.sets["held_out"].path == "test.jsonl" and got.rollout.cache_tokens is None


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("trainer.lrr=1", "unknown key", "did you mean trainer.lr?"),
        ("trainer.lr=-1", "-1 is not above 0", "Peak learning rate (default 1e-06)"),
        ("trainer.lr", "is not key=value", "for example trainer.lr=2e-6"),
        ("=3", "is not key=value", "for example trainer.lr=2e-6"),
        ("trainer..lr=3", "is not key=value", "for example trainer.lr=2e-6"),
        ("--trainer.lr=3", "no such option", "a recipe's keys are given without dashes, as key=value"),
        ("method.x=3", "leads into a value that has no keys", "shorten the path"),
        ("reward.3.weight=3", "leads into a value that has no keys", "shorten the path"),
        ("trainer.lr=!!python/name:os.system", "'!!python/name:os.system' is not a number", None),
        (
            "rollout.stop=[!!python/name:os.system ]",
            "the YAML tag 'tag:yaml.org,2002:python/name:os.system' is refused",
            None,
        ),
        ("rollout.stop=[a", "not valid YAML: a bracket is not closed", ""),
        ("data={path: x, path: y}", "is given twice", "keep one"),
        ("stages.x.trainer.lr=3", "the recipe has no stages", "leave `stages.NAME.` out"),
    ],
)
def test_a_wrong_override_is_named_as_typed(write, argument, message, hint):
    (problem,) = problems(write(VALID), argument)
    assert (problem.file, problem.line, problem.key, problem.message) == (
        "command line",
        None,
        argument,
        message,
    )
    assert hint is None or problem.hint == hint


# -------------------------------------------------------------------------------------------------------------- stages


def test_a_stage_is_the_top_level_merged_with_its_own_keys(write):
    plan = load_plan(write(STAGED))
    assert [s.name for s in plan.stages] == ["warmup", "grpo"]
    warmup, grpo = (s.recipe for s in plan.stages)
    assert (warmup.method, grpo.method) == ("sft", "grpo")
    assert (
        warmup.data.response_column == "answer"
        and warmup.data.limit == 5
        and grpo.data.response_column is None
    )
    assert (warmup.trainer.steps, warmup.trainer.lr, grpo.trainer.steps) == (3, 1e-3, 7)


def test_without_stages_the_stage_has_the_methods_name(write):
    assert [s.name for s in load_plan(write(VALID)).stages] == ["grpo"]


def test_lists_are_replaced_not_joined(write):
    text = STAGED.replace("trainer: {steps: 7}", "trainer: {steps: 7}\n    reward: [{function: format}]")
    text += "  again:\n    trainer: {steps: 1}\n"
    assert [r.function for r in load_plan(write(text)).stages[1].recipe.reward] == ["format"]


def test_overrides_of_staged_recipes(write):
    plan = load_plan(write(STAGED), ["rollout.group_size=6", "stages.grpo.trainer.lr=2e-6", "data.limit=9"])
    warmup, grpo = (s.recipe for s in plan.stages)
    assert grpo.rollout.group_size == 6 and grpo.trainer.lr == 2e-6 and warmup.trainer.lr == 1e-3
    assert grpo.data.limit == warmup.data.limit == 9


def test_an_override_that_no_stage_would_use_names_the_keys_that_work(write):
    """Catches: trainer.steps=50 accepted and without effect."""
    (problem,) = problems(write(STAGED), "trainer.steps=50")
    assert problem.hint == "give stages.warmup.trainer.steps=... or stages.grpo.trainer.steps=..."


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("stages.grop.trainer.lr=1", "there is no stage 'grop'", "did you mean grpo?"),
        ("stages.zzzzzzzz.trainer.lr=1", "there is no stage 'zzzzzzzz'", "stages: warmup, grpo"),
        ("stages.grpo=1", "names no key of a stage", "for example stages.warmup.trainer.lr=2e-6"),
        ("stages.grpo.trainer.lrr=1", "unknown key", "did you mean stages.grpo.trainer.lr?"),
    ],
)
def test_wrong_stage_overrides(write, argument, message, hint):
    (problem,) = problems(write(STAGED), argument)
    assert (problem.message, problem.hint) == (message, hint)


def test_problems_of_stages_name_the_stage_and_shared_ones_appear_once(write):
    text = (
        STAGED.replace("limit: 5", "limt: 5")
        .replace("lr: 1e-3", "lrr: 1e-3")
        .replace("group_size: 4", "group_size: 1")
    )
    text = text.replace("trainer: {steps: 7}", "trainer: {}")
    got = {(p.line, p.key): (p.message, p.hint) for p in problems(write(text))}
    assert got == {
        (2, "data.limt"): ("unknown key", "did you mean data.limit?"),
        (4, "rollout.group_size"): (
            "group_size=1 gives every response zero advantage; use group_size >= 2 (in stage grpo)",
            "",
        ),
        (9, "stages.warmup.trainer.lrr"): ("unknown key", "did you mean stages.warmup.trainer.lr?"),
        (11, "trainer.steps"): ("set trainer.steps or trainer.epochs (in stage grpo)", ""),
    }


def test_stages_that_are_none(write):
    for bad in ("stages:\n", "stages: {}\n", "stages: [a]\n"):
        assert found(write(VALID + bad)) == {(10, "stages"): "names no stage"}
    assert (11, "stages.a b") in found(write(VALID + "stages:\n  a b: {}\n"))
    assert found(write(VALID + "stages:\n  a: 5\n  b:\n")) == {
        (11, "stages.a"): "is not a section of `key: value` lines"
    }


def test_an_empty_stage_is_the_top_level(write):
    plan = load_plan(write(VALID + "stages:\n  a:\n  b: {trainer: {steps: 3}}\n"))
    assert [s.recipe.trainer.steps for s in plan.stages] == [10, 3]


def test_stages_share_where_they_run(write):
    """Catches: two stages of one run with different seeds or placements."""
    text = STAGED.replace("    trainer: {steps: 7}", "    trainer: {steps: 7}\n    run: {seed: 5}")
    (problem,) = problems(write(text))
    assert (problem.line, problem.key, problem.hint) == (12, "stages.grpo.run", "move run to the top level")


# ------------------------------------------------------------------------------------------------------- interpolation


def test_keys_and_the_environment_are_filled_in(write, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data/x")
    monkeypatch.setenv("SOME_STEPS", "3")
    text = VALID.replace(
        "steps: 10", "steps: ${oc.env:SOME_STEPS}\n  zero_stage: '${oc.env:NOT_SET_ANYWHERE,1}'"
    )
    text += "run: {output_dir: '${oc.env:SOME_FOLDER}/runs', name: 'a-${method}'}\nrollout: {top_k: '${trainer.steps}'}\n"
    got = recipe(write(text), "rollout.max_response_tokens=${rollout.group_size}", "rollout.group_size=12")
    assert got.run.output_dir == "/data/x/runs" and got.run.name == "a-grpo"
    assert got.trainer.steps == got.rollout.top_k == 3 and got.trainer.zero_stage == 1
    assert got.rollout.max_response_tokens == 12


def test_references_are_resolved_in_each_stage(write):
    text = STAGED.replace("rollout: {group_size: 4}", "rollout: {group_size: '${trainer.steps}'}")
    assert [s.recipe.rollout.group_size for s in load_plan(write(text)).stages] == [3, 7]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("${oc.env:NOT_SET_ANYWHERE}", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("${nothing.here}", "refers to a key that the recipe does not set"),
        ("${run.name}", "cannot be resolved|refers to itself"),
        ("${oc.decode:abc}", "only ${key} and ${oc.env:NAME} may be used"),
        ("${oc.create:abc}", "only ${key} and ${oc.env:NAME} may be used"),
        ("${env:HOME}", "only ${key} and ${oc.env:NAME} may be used"),
        ("${${method}:x}", "only ${key} and ${oc.env:NAME} may be used"),
        ("${oc.env:${method}}", "only ${key} and ${oc.env:NAME} may be used"),
        ("a ${", "only ${key} and ${oc.env:NAME} may be used"),
    ],
)
def test_interpolations_that_are_refused(write, value, said):
    (problem,) = problems(write(VALID + f"run:\n  name: '{value}'\n"))
    assert (problem.line, problem.key) == (11, "run.name")
    assert any(part in problem.message for part in said.split("|")), problem


def test_values_of_the_environment_are_not_in_error_messages(write, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    (problem,) = problems(write(VALID + "  lr: ${oc.env:A_SECRET}\nrun: {name: r}\n"))
    assert "hunter2" not in str(problem) and "${oc.env:A_SECRET}" in problem.message


# ---------------------------------------------------------------------------------------------------------- dictionary


def test_a_dictionary_follows_the_same_rules(tmp_path):
    data = yaml.safe_load(VALID)
    data["trainer"] = {"steps": np.int64(3), "lr": np.float32(0.5), "betas": (0.8, 0.9)}
    data["model"] = {"path": tmp_path}
    plan = plan_from_dict(data)
    assert plan.source is None
    got = plan.stages[0].recipe
    assert got.trainer.steps == 3 and got.trainer.lr == 0.5 and got.model.path == str(tmp_path)
    with pytest.raises(
        RecipeError, match=r"recipe: trainer\.stps: unknown key; did you mean trainer\.steps\?"
    ):
        plan_from_dict({**data, "trainer": {"stps": 3}})


# -------------------------------------------------------------------------------------------------------------- rubbish

JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1.5,
        10**400,
        "x",
        "",
        [],
        {},
        [1, "a"],
        {"a": 1},
        [{"function": 1}],
        {"steps": "x"},
        [[[]]],
    ]
)
JUNK_KEYS = st.sampled_from(
    sorted({name for path in schema() for name in path})
    + ["stages", "lrr", "1", "a.b", "train", "steps", "grpo"]
)
JUNK_TREES = st.recursive(JUNK, lambda child: st.dictionaries(JUNK_KEYS, child, max_size=4), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(JUNK_KEYS, JUNK_TREES, max_size=6))
def test_rubbish_is_refused_in_words(data):
    """Catches: a crash or an endless loop of the checker, a pydantic sentence that nobody reworded."""
    try:
        plan_from_dict(data)
    except RecipeError as error:
        assert error.problems
        assert not [p for p in error.problems if "should be" in p.message or not p.message]


def test_every_problem_is_one_line(write):
    # Catches: a schema text that is wrapped in its source, and so a report in which a line is not a problem.
    found = problems(write(VALID), "algorithm.advantage=bogus", "judge.path=some/judge")
    assert len(found) == 2 and not any("\n" in str(p) for p in found)
    assert any("mean of the others (2402.14740), none but whitening" in str(p) for p in found)


def test_an_override_that_no_stage_would_use_is_checked_too(write):
    # Catches: `trainer.lr=abc` refused for its place alone, so that the next attempt fails again; an expression, which
    # is filled in later, read as a value.
    staged = STAGED.replace("{steps: 7}", "{steps: 7, lr: 1e-4}")
    first, second = problems(write(staged), "trainer.lr=abc")
    assert "every stage sets this key itself" in str(first) and "'abc' is not a number" in str(second)
    assert len(problems(write(staged), "trainer.lr=1e-3")) == 1
    assert len(problems(write(staged), "trainer.lr=${trainer.eps}")) == 1


def test_a_stage_that_is_not_there_is_reported_with_the_rest(write):
    # Catches: a second round of mistakes after the first is mended; a complaint about a value that was taken out.
    wrong = STAGED.replace("trainer: {steps: 7}", "trainer: {steps: x}\n    model: {path: 'stage:warmupp'}")
    assert found(write(wrong)) == {
        (11, "stages.grpo.trainer.steps"): "'x' is not a whole number",
        (12, "stages.grpo.model.path"): "there is no earlier stage 'warmupp'",
    }
    wrong = wrong.replace("method: sft", "method: sfft").replace("warmupp", "warmup")
    assert [key for _, key in found(write(wrong))] == ["stages.warmup.method", "stages.grpo.trainer.steps"]


def test_a_typo_beside_the_key_it_may_have_meant_hides_nothing(write):
    # Catches: a stated value taken for unknown because a misspelt neighbour is near it.
    wrong = STAGED.replace("{group_size: 4}", "{group_sise: 4, group_size: 1}")
    assert {p.key for p in problems(write(wrong))} == {"rollout.group_sise", "rollout.group_size"}


def test_a_stage_that_is_not_there_and_sections_that_differ_are_one_report(write):
    # Catches: one of the two checks between stages hiding the other.
    wrong = STAGED + "    run: {seed: 5}\n    model: {path: 'stage:warmupp'}\n"
    messages = " ".join(p.message for p in problems(write(wrong)))
    assert "share `run`" in messages and "no earlier stage 'warmupp'" in messages


def test_a_misspelt_key_of_a_choice_is_named(write):
    """Would catch: a value blamed for the name of the loss beside it."""
    (found,) = [
        p for p in problems(write(VALID), "method=dpo", "preference.losses={dop: 1}") if "losses" in str(p)
    ]
    assert "dop is not one of dpo, robust" in str(found) and "did you mean dpo?" in str(found)
