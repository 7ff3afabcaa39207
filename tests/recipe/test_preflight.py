"""What a recipe names is looked up before anything loads: folders, files, columns, functions, lengths."""

from __future__ import annotations

import json
import struct

import pytest

from rlhf.data.datasets import HEAD_ROWS
from rlhf.recipe.load import RecipeError, load_plan, plan_from_dict
from rlhf.recipe.preflight import Given, look_up
from rlhf.recipe.tree import read_override

ROWS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A working directory with a training set, a model folder and a file of rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rewards.py").write_text(
        "import nothing_of_this_name\n"
        "def judge(prompts, responses, answer, *, strict=True):\n    return []\n"
        "def loose(prompts, responses, **columns):\n    return []\n"
        "_hidden = 3\n"
    )
    make_model(tmp_path / "model")


def make_model(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "max_position_embeddings": 64} | config)
    )
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")


NOTHING = Given()
GOOD = {
    "model": {"path": "model"},
    "data": {"path": "train.jsonl", "prompt_column": "question", "max_prompt_tokens": 40},
    "reward": [{"function": "exact_match"}],
    "rollout": {"max_response_tokens": 24},
    "trainer": {"steps": 1},
}


def said(*overrides, given=NOTHING, recipe=GOOD):
    """{key: "message; hint"} of a recipe with overrides."""
    data = json.loads(json.dumps(recipe))
    for override in overrides:
        path, node = read_override(override, [])
        at = data
        for part in path[:-1]:
            at = at[part] if isinstance(at, list) else at.setdefault(part, {})
        at[path[-1]] = node.plain()
    try:
        plan_from_dict(data, look_up=lambda checked: look_up(checked, given))
    except RecipeError as error:
        found = {p.key: f"{p.message}; {p.hint}" for p in error.problems}
        assert len(found) == len(error.problems), error
        return found
    return {}


def test_a_good_recipe_is_good_and_what_may_be_the_hubs_passes():
    assert said() == {}
    assert said("model.path=Qwen/Qwen3-0.6B", "data.path=openai/gsm8k", "data.subset=main") == {}
    assert said("model.path=gpt2", "data.path=gsm8k", "tokenizer.path=org/name.v1") == {}


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        # models and tokenizers
        ("model.path=./modle", "model.path", "there is no folder ./modle; did you mean model?"),
        (
            "model.path=a/b/c",
            "model.path",
            "there is no folder a/b/c, nor the one above it; give a folder, or a hub name",
        ),
        (
            "model.path=rewards.py",
            "model.path",
            "rewards.py is a file; give the folder that holds config.json",
        ),
        (
            "model.path=empty",
            "model.path",
            "empty has no config.json; it is not a Hugging Face model folder; it is empty",
        ),
        ("model.path=above", "model.path", "above has no config.json; .*did you mean above/model?"),
        ("model.path=adapter", "model.path", "adapter has no config.json; .*a LoRA adapter alone: merge it"),
        ("model.path=bare", "model.path", "weights (model.safetensors) are missing in bare; there is none"),
        ("model.path=cut", "model.path", "model.safetensors is damaged: "),
        ("model.path=code", "model.path", "brings Python code of its own (auto_map in config.json)"),
        (
            "model.path=mute",
            "model.path",
            "mute holds no tokenizer (tokenizer.json or the like); set tokenizer.path",
        ),
        ("tokenizer.path=./nowhere", "tokenizer.path", "there is no folder ./nowhere"),
        ("tokenizer.path=empty", "tokenizer.path", "empty holds no tokenizer"),
        (
            "tokenizer.build={kind: bpe}",
            "tokenizer.build.train_on",
            "kind: bpe needs it; name a text or JSON-lines",
        ),
        (
            "tokenizer.build={kind: bpe, train_on: no.txt}",
            "tokenizer.build.train_on",
            "there is no file no.txt; paths count",
        ),
        ("reference.path=./nowhere", "reference.path", "there is no folder ./nowhere"),
        ("critic.path=bare", "critic.path", "weights (model.safetensors) are missing"),
        # datasets
        (
            "data.path=trian.jsonl",
            "data.path",
            "'trian.jsonl' does not exist; did you mean 'train.jsonl'? looked in",
        ),
        (
            "data.path=data/train.jsonl",
            "data.path",
            "does not exist; nor does its folder 'data'; paths count from",
        ),
        ("data.path=org/train.jsnl", "data.path", "'org/train.jsnl' does not exist"),
        ("data.path=org/train.txt", "data.path", "'org/train.txt' does not exist"),
        (
            "data.path=rewards.py",
            "data.path",
            "'rewards.py' ends in '.py'; can read .jsonl, .json, .parquet, .csv",
        ),
        ("data.path=blank.jsonl", "data.path", "'blank.jsonl' holds no rows"),
        ("data.path=header.csv", "data.path", "'header.csv' holds no rows"),
        ("data.path=none.json", "data.path", "'none.json' holds no rows"),
        (
            "data.path=broken.jsonl",
            "data.path",
            "'broken.jsonl': line 2 is not valid JSON: .*mend it, or set bad_rows: skip",
        ),
        ("data.path=broken.json", "data.path", "'broken.json' is not valid JSON"),
        ("data.path=empty", "data.path", "'empty' is a folder, but not one written by datasets.save_to_disk"),
        (
            "data.split=test",
            "data.split",
            "'test' is set, but 'train.jsonl' is one file without parts; remove it",
        ),
        (
            "data.prompt_column=qestion",
            "data.prompt_column",
            "no column 'qestion'; did you mean 'question'? it has answer,",
        ),
        ("data.prompt_template=Q {q}", "data.prompt_template", "no column 'q'; it has answer, question"),
        (
            "data.prompt_template=Q {question.x}",
            "data.prompt_template",
            "may hold plain {column} fields only, found",
        ),
        ("data.prompt_template=Q {question", "data.prompt_template", "write a plain brace twice"),
        ("data.task_args={count: 3}", "data.task_args", "is for a built-in task, but path is set"),
        ("evaluation.sets={a: {path: x.csv}}", "evaluation.sets.a.path", "'x.csv' does not exist"),
        ("evaluation.sets={a: {path: train.jsonl}}", "evaluation.sets.a.prompt_column", "no column 'prompt'"),
        ("data={task: chain_arithmetic}", "data.task_args.count", "task chain_arithmetic needs it"),
        (
            "data={task: chain_arithmetic, task_args: {count: 99, trems: 2}}",
            "data.task_args.trems",
            "did you mean terms?",
        ),
        (
            "data={task: chain_arithmetic, task_args: {count: 99, split: evla}}",
            "data.task_args.split",
            "did you mean eval?",
        ),
        (
            "data={task: chain_arithmetic, task_args: {count: 999, terms: 2}}",
            "data.task_args.count",
            "make 162 chains at most",
        ),
        (
            "evaluation.sets={a: {task: chain_arithmetic, task_args: {count: 150, terms: 2, split: eval}}}",
            "evaluation.sets.a.task_args.count",
            "different chains",
        ),
        (
            'evaluation.sets={a: {task: chain_arithmetic, task_args: {count: 400, terms: 5, max_digit: 5, ops: "+", split: eval}}}',
            "evaluation.sets.a.task_args.count",
            "only 318 different chains .* split=eval; lower count or raise terms",
        ),
        (
            'data={task: chain_arithmetic, limit: 50, task_args: {count: 120, terms: 3, max_digit: 5, ops: "+"}}',
            "data.task_args.count",
            "only 113 different chains",
        ),
        # rewards
        (
            "reward.0.function=exact_mtch",
            "reward.0.function",
            "no reward function 'exact_mtch'; did you mean exact_match?",
        ),
        (
            "reward.0.function=frobnicate",
            "reward.0.function",
            "there are exact_match, format, gsm8k; or write",
        ),
        (
            "reward.0.function=reward.py:judge",
            "reward.0.function",
            "no file reward.py; did you mean rewards.py?",
        ),
        (
            "reward.0.function=rewards.py:jugde",
            "reward.0.function",
            "has no function 'jugde'; did you mean judge?",
        ),
        (
            "reward.0.function=rewards.py:zzz",
            "reward.0.function",
            "has no function 'zzz'; it has judge, loose",
        ),
        ("reward.0.function=broken.py:f", "reward.0.function", "broken.py is not valid Python: .*line 2"),
        (
            "reward.0.function=nothing.here:f",
            "reward.0.function",
            "there is no module nothing.here; put the folder",
        ),
        (
            "reward.0.function=json:laods",
            "reward.0.function",
            "json has no function 'laods'; did you mean loads?",
        ),
        (
            "reward.0.function=json:loads",
            "reward.0.function",
            "takes s by position; a reward function is called as",
        ),
        (
            "reward.0.args={reference: answer}",
            "reward.0.args.reference",
            "no argument 'reference'; it takes reference_column",
        ),
        (
            "reward.0.args={reference_column: anser}",
            "reward.0.args.reference_column",
            "'anser', which data has not; did you",
        ),
        (
            "reward.0={function: rewards.py:judge, args: {strickt: 1}}",
            "reward.0.args.strickt",
            "did you mean strict?",
        ),
        # lengths and numbers
        (
            "rollout.max_response_tokens=64",
            "rollout.max_response_tokens",
            "no room for a prompt in .* 64 tokens; lower it",
        ),
        (
            "data.max_prompt_tokens=41",
            "data.max_prompt_tokens",
            "max_prompt_tokens=41 and .* there is room for prompts of 40",
        ),
        (
            "trainer.prompts_per_step=41",
            "trainer.prompts_per_step",
            "more than the 40 rows of the training set; lower",
        ),
        ("data.limit=31", "trainer.prompts_per_step", "prompts_per_step=32 is more than the 31 rows"),
    ],
)
def test_each_mistake_is_named_once_with_a_way_out(tmp_path, override, key, message):
    """Catches: a mistake that is left to the run, one that is reported under another key, or twice."""
    make_model(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(
        (tmp_path / "cut" / "model.safetensors").read_bytes()[:-1]
    )
    make_model(tmp_path / "code", auto_map={"AutoModel": "x.Y"})
    for name, missing in (("bare", "model.safetensors"), ("mute", "tokenizer.json")):
        make_model(tmp_path / name)
        (tmp_path / name / missing).unlink()
    for name in ("empty", "above", "adapter"):
        (tmp_path / name).mkdir()
    make_model(tmp_path / "above" / "model")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n" + "\n".join(map(json.dumps, ROWS)))
    (tmp_path / "broken.json").write_text('[{"question": ')
    (tmp_path / "broken.py").write_text("def f(a, b):\nreturn 1\n")
    found = said(override)
    assert list(found) == [key], found
    for part in message.split(".*"):
        assert part in found[key]


def test_a_sample_of_formats_is_read_at_the_head(tmp_path):
    """Catches: a format whose columns are guessed, or that is read to the end."""
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet("rows.parquet")
    table.to_csv("rows.csv")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    table.save_to_disk("saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk("splits")
    for path in ("rows.parquet", "rows.csv", "rows.json", "saved", "splits"):
        assert said(f"data.path={path}") == {}, path
        assert (
            "did you mean 'question'?"
            in said(f"data.path={path}", "data.prompt_column=questoin")["data.prompt_column"]
        )
    assert said("data.path=splits", "data.split=test") == {}
    assert said("data.path=splits", "data.split=tset") == {
        "data.split": "'tset' is not in 'splits'; it has test, train"
    }
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "is not readable as parquet" in said("data.path=broken.parquet")["data.path"]


def test_the_rows_of_a_task_are_made_once_however_many_stages_read_them(monkeypatch):
    """Would catch: a check of a recipe of many stages that takes as long as if each had rows of its own; a stage whose
    rows are not counted."""
    from rlhf.data import tasks

    tasks._chains.cache_clear()
    held_out = {"task": "chain_arithmetic", "task_args": {"count": 60, "terms": 3, "split": "eval"}}
    task = {"task": "chain_arithmetic", "task_args": {"count": 300, "terms": 3}}
    recipe = GOOD | {"data": task, "evaluation": {"sets": {"sums": held_out}}}
    stages = {f"stage{i}": {"method": "grpo"} for i in range(25)}
    stages["last"] = {"method": "grpo", "evaluation": {"sets": {"sums": {"task_args": {"count": 2000}}}}}
    found = said(recipe=recipe | {"stages": stages})
    assert list(found) == ["stages.last.evaluation.sets.sums.task_args.count"]
    assert "only 178 different chains" in found["stages.last.evaluation.sets.sums.task_args.count"]
    assert tasks._chains.cache_info().misses == 3


def test_only_the_head_of_a_long_file_is_judged(tmp_path):
    """Catches: a column refused that a later row has, where such rows may be skipped; minutes over a large file."""
    rows = [{"other": 1}] * HEAD_ROWS + ROWS
    (tmp_path / "late.csv").write_text("question,answer\n" + "\n".join(f"{i},1" for i in range(50)))
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "no column 'question'" in said("data.path=late.jsonl")["data.prompt_column"]
    assert said("data.path=late.jsonl", "data.bad_rows=skip", "reward.0.function=format") == {}
    (tmp_path / "large.json").write_text(
        "[" + ",".join([json.dumps(ROWS[0] | {"x": "y" * 1000})] * 5000) + "]"
    )
    assert said("data.path=large.json") == {}
    assert "no column 'q'" in said("data.path=large.json", "data.prompt_column=q")["data.prompt_column"]


def test_what_is_judged_from_source_is_not_executed(tmp_path):
    """Catches: a user's module imported by a check."""
    (tmp_path / "acts.py").write_text("open('ran', 'w')\ndef f(prompts, responses, **columns): ...\n")
    assert said("reward.0.function=acts.py:f") == {}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "line",
    [
        "from json import *",
        "def __getattr__(name): ...",
        "import functools; f = functools.partial(print)",
        "from acts2 import f",
        "try:\n    from x import f\nexcept ImportError:\n    def f(a): ...",
        "@decorated\ndef f(): ...",
        "class f: ...",
    ],
)
def test_what_cannot_be_told_from_source_passes(tmp_path, line):
    """Catches: a working function refused because it is not a plain `def`."""
    (tmp_path / "acts.py").write_text(line + "\n")
    assert said("reward.0={function: acts.py:f, args: {anything: 1}}") == {}


def test_a_function_is_followed_to_where_it_is_defined(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "pack_of_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("raise ValueError('imported')")
    (package / "inner.py").write_text("def judge(prompts, responses, *, strict=True): ...")
    (package / "outer.py").write_text("from pack_of_rewards.inner import judge as f")
    assert said("reward.0.function=pack_of_rewards.outer:f") == {}
    found = said("reward.0={function: pack_of_rewards.outer:f, args: {strick: 1}}")
    assert "did you mean strict?" in found["reward.0.args.strick"]
    assert (
        "there is no module pack_of_rewards.oter"
        in said("reward.0.function=pack_of_rewards.oter:f")["reward.0.function"]
    )


def test_columns_that_a_reward_reads_are_looked_for_where_it_is_used():
    """Catches: a missing reference column found at the end of the first step."""
    assert said("reward.0.args={reference_column: question}") == {}
    found = said(
        "reward.0.args={reference_column: solution}",
        "evaluation.sets={held: {path: train.jsonl, prompt_column: question}}",
    )
    assert (
        "reads the column 'solution', which data and evaluation.sets.held have not"
        in found["reward.0.args.reference_column"]
    )
    sft = ["method=sft", "data.response_column=answer", "reward.0.args={reference_column: solution}"]
    assert said(*sft).keys() == {
        "reward",
        "rollout.max_response_tokens",
    }  # sft gives no reward for its own rows
    held = said(*sft, "evaluation.sets={held: {path: train.jsonl, prompt_column: question}}")
    assert "which evaluation.sets.held has not" in held["reward.0.args.reference_column"]


def test_rewards_of_evaluations_are_looked_up_apart():
    """Would catch: a missing function or column of evaluation.reward found at the first evaluation, or the training's
    reward asked for the columns of sets that it never sees."""
    sets = "evaluation.sets={held: {path: train.jsonl, prompt_column: question}}"
    own = "evaluation.reward=[{function: exact_match, args: {reference_column: answer}}]"
    assert said(sets, own) == {}
    wrong = said(sets, own.replace("answer", "solution"))
    assert "which evaluation.sets.held has not" in wrong["evaluation.reward.0.args.reference_column"]
    assert (
        "did you mean exact_match"
        in said(sets, own.replace("exact_", "exat_"))["evaluation.reward.0.function"]
    )
    train = said(sets, own, "reward.0.args={reference_column: solution}")
    assert "'solution', which data has not" in train["reward.0.args.reference_column"]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("method=dpo", "data.chosen_column"),
        ("method=rm", "data.rejected_column"),
        ("method=prm", "data.steps_column"),
        ("method=sft", "data.messages_column"),
    ],
)
def test_each_method_has_its_columns(method, key):
    found = said(method, "data.messages_column=talk" if "sft" in method else "rollout.group_size=2")
    assert key in found and "data.prompt_column" not in found


def test_an_answer_column_is_looked_for_where_it_is_read():
    """Catches: a column of the warm-up demanded of prompts, or missed where answers are imitated."""
    assert "is read by nothing" in said("data.response_column=anser")["data.response_column"]
    found = said("method=sft", "data.response_column=anser")
    assert "no column 'anser'; did you mean 'answer'?" in found["data.response_column"]


def test_lengths_come_from_a_built_model_too():
    build = {"model_type": "llama", "config": {"max_position_embeddings": 64}}
    recipe = {**GOOD, "model": {"build": build}, "tokenizer": {"build": {"alphabet": "0123456789+="}}}
    assert said(recipe=recipe) == {}
    assert said("rollout.max_response_tokens=64", recipe=recipe).keys() == {"rollout.max_response_tokens"}
    assert said("rollout.stop=['+', 'ab']", recipe=recipe).keys() == {"rollout.stop.1"}
    found = said(
        "evaluation={max_response_tokens: 99, sets: {a: {path: train.jsonl, prompt_column: question}}}",
        recipe=recipe,
    )
    assert found.keys() == {"evaluation.max_response_tokens"}


def test_a_recipe_with_every_default_written_out_stays_valid():
    """Catches: a default of 1024 prompt tokens taken for a wish that a small context cannot grant."""
    assert said("data.max_prompt_tokens=1024") == {}


def test_objects_are_not_looked_for():
    """Catches: a model object or rows in memory reported as missing files."""
    judge = {"in-memory:judge": lambda prompts, responses, solution: []}
    given = Given(model=True, tokenizer=True, rows={("data",): ROWS}, functions=judge)
    names = ["model.path=in-memory:x", "data.path=in-memory:y", "reward.0.function=in-memory:judge"]
    assert set(said(*names)) == {"model.path", "data.path", "reward.0.function"} - {"data.path"}
    found = said(*names, given=given)
    assert (
        found.keys() == {"reward.0.function"}
        and "'solution', which data has not" in found["reward.0.function"]
    )
    found = said(*names, "data.prompt_column=qestion", "reward.0.function=format", given=given)
    assert found.keys() == {"data.prompt_column"}
    assert (
        "holds no rows"
        in said(*names, given=Given(model=True, tokenizer=True, rows={("data",): []}))["data.path"]
    )


def test_one_mistake_does_not_hide_or_breed_others(tmp_path):
    """Catches: a wrong value in a section that is then reported as a missing file or column of a stand-in."""
    assert said("data={}").keys() == {"data"}
    assert said("data.path=[1]").keys() == {"data.path"}
    assert said("data.prompt_column=[1]").keys() == {"data.prompt_column"}
    assert said("data={path: train.jsonl, prompt_template: [1]}").keys() == {"data.prompt_template"}
    assert said("rollout.max_response_tokens=many").keys() == {"rollout.max_response_tokens"}
    assert said("trainer.stepz=3", "model.path=./nowhere", "rollout.group_size=1").keys() == {
        "trainer.stepz",
        "model.path",
        "rollout.group_size",
    }
    found = said("reward=[{weight: 1}, {function: gsm8kk}]")
    assert found.keys() == {"reward.0.function", "reward.1.function"}


def test_stages_and_overrides_are_named_as_written(tmp_path):
    """Catches: a fault placed on another line than the value, or told once for every stage."""
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: ./nowhere}\nreward: [{function: exact_match}]\ndata: {path: train.jsonl}\ntrainer: {steps: 1}\n"
        "stages:\n  one: {data: {prompt_column: question}}\n  two:\n    data:\n      prompt_column: qestion\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_plan("recipe.yaml", ["reward.0.function=gsm8kk"], look_up=look_up)
    assert [(p.file, p.line, p.key) for p in caught.value.problems] == [
        ("command line", None, "reward.0.function=gsm8kk"),
        ("recipe.yaml", 1, "model.path"),
        ("recipe.yaml", 9, "stages.two.data.prompt_column"),
    ]


def test_values_of_the_environment_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FILE", "hunter2.jsonl")
    (tmp_path / "recipe.yaml").write_text(json.dumps(GOOD).replace('"train.jsonl"', '"${oc.env:SOME_FILE}"'))
    with pytest.raises(RecipeError) as caught:
        load_plan("recipe.yaml", look_up=look_up)
    assert "hunter2" not in str(caught.value) and "${oc.env:SOME_FILE}" in str(caught.value)
