"""The dump: everything resolved, nothing secret, and it loads back."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.recipe.load import dump_plan, load_plan, plan_from_dict

BASE = {
    "model": {"path": "some/model"},
    "data": {"path": "train.jsonl"},
    "reward": [{"function": "exact_match"}],
    "trainer": {"steps": 10},
}


def reloaded(plan, tmp_path):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_plan(plan))
    return load_plan(path)


def test_one_stage_loads_back_with_every_default(tmp_path):
    plan = plan_from_dict(BASE)
    data = yaml.safe_load(dump_plan(plan))
    assert data["trainer"]["lr"] == 1e-6 and data["rollout"]["group_size"] == 8 and "stages" not in data
    assert reloaded(plan, tmp_path).stages == plan.stages


def test_several_stages_load_back(tmp_path):
    stages = {
        "warmup": {"method": "sft", "data": {"response_column": "answer"}, "tokenizer": {"path": "x"}},
        "grpo": {"evaluation": {"sets": {"a": {"path": "b"}}}, "rollout": {"stop": []}},
    }
    plan = plan_from_dict({**BASE, "stages": stages, "run": {"seed": 3}, "tracking": {"wandb": "off"}})
    again = reloaded(plan, tmp_path)
    assert again.stages[1] == plan.stages[1]
    warmup = plan.stages[0].recipe  # has no use for the reward that the other stage shares with it
    assert again.stages[0].recipe == warmup.model_copy(update={"reward": []})
    assert dump_plan(again) == dump_plan(plan)


def test_a_single_named_stage_keeps_its_name(tmp_path):
    plan = plan_from_dict({**BASE, "stages": {"second": {}}})
    assert [s.name for s in reloaded(plan, tmp_path).stages] == ["second"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*"a \\}[]:,#'\"\n\té.-0", "${", "\\${", "${a}", "1e5"]), max_size=8).map(
        "".join
    )
)
def test_any_text_loads_back(tmp_path_factory, text):
    """Catches: `${` in a prompt template taken for an interpolation, a number-like text that comes back as a number."""
    plan = plan_from_dict({**BASE, "reward": [{"function": "f", "args": {"text": _literal(text)}}]})
    assert plan.stages[0].recipe.reward[0].args["text"] == text
    assert reloaded(plan, tmp_path_factory.mktemp("dump")).stages == plan.stages


def _literal(text):
    from rlhf.recipe.interpolate import escape

    return escape(text)


def test_nothing_from_the_environment_is_in_the_dump(tmp_path, monkeypatch):
    """Catches: a key in a run directory; also one that travels through a second key, or inside a longer text."""
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    args = {
        "api_key": "${oc.env:JUDGE_KEY}",
        "header": "Bearer ${oc.env:JUDGE_KEY}",
        "again": "${reward.0.args.api_key}",
        "copy": "${reward.0.args.nested}",
        "nested": {"x": "${oc.env:JUDGE_KEY}"},
    }
    plan = plan_from_dict({**BASE, "reward": [{"function": "f", "args": args}]})
    got = plan.stages[0].recipe.reward[0].args
    assert (
        got["again"] == got["api_key"] == got["copy"]["x"] == "hunter2" and got["header"] == "Bearer hunter2"
    )
    text = dump_plan(plan)
    assert "hunter2" not in text and "${oc.env:JUDGE_KEY}" in text
    assert "hunter2" not in repr(plan.stages[0].expressions)
    assert reloaded(plan, tmp_path).stages == plan.stages


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("password", "x1"),
        ("api_key", "short"),
        ("apiKey", "short"),
        ("hf_token", "whatever"),
        ("client-secret", "whatever"),
        ("access_key", "whatever"),
        ("token", "a8f5f167f44f4964e6c998dee827110c"),
        ("anything", "hf_abcdefghijklmnopqrstuv"),
        ("anything", "sk-proj-abcdefghijkl0123"),
        ("url", "https://user:pass@host/path"),
        ("header", "Bearer abc.def"),
    ],
)
def test_credentials_written_into_a_recipe_are_hidden(tmp_path, key, value):
    plan = plan_from_dict({**BASE, "reward": [{"function": "f", "args": {"nested": {key: value}, "n": 1}}]})
    text = dump_plan(plan)
    assert value not in text and "<hidden>" in text
    assert reloaded(plan, tmp_path).stages[0].recipe.reward[0].args == {"nested": {key: "<hidden>"}, "n": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stop_token", "<|im_end|>"),
        ("tokenizer", "Qwen/Qwen3-0.6B"),
        ("answer_key", "solution"),
        ("sort_key", "column_2"),
        ("max_tokens", 5),
        ("revision", "a8f5f167f44f4964e6c998dee827110c12345678"),
        ("url", "http://127.0.0.1:8000/v1"),
        ("keyword", "the-quick-brown-fox-2000"),
    ],
)
def test_harmless_values_stay(key, value):
    """Catches: a dump that comes back as another recipe."""
    plan = plan_from_dict({**BASE, "reward": [{"function": "f", "args": {key: value}}]})
    assert yaml.safe_load(dump_plan(plan))["reward"][0]["args"][key] == value
