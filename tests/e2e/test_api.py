"""The Python API: the same run, from objects."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf import GRPOTrainer, SFTTrainer
from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from tests.e2e.running import TINY, records

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(5)]


def shorter_is_better(prompts, responses, **columns):
    return [1.0 / (1 + len(response)) for response in responses]


def never(prompts, responses):
    return [-3.0] * len(responses)


@pytest.fixture
def model_and_tokenizer():
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    return build_model(
        BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=0
    ), tokenizer


SETTINGS = dict(
    group_size=4,
    steps=2,
    prompts_per_step=4,
    max_response_tokens=8,
    lr=1e-3,
    threads=1,
    wandb="off",
    console_samples=0,
    zero_stage=0,
)


def test_grpo_in_eight_lines_from_objects(model_and_tokenizer, tmp_path):
    """Would catch: an API that takes another path than the recipe, or that needs files."""
    model, tokenizer = model_and_tokenizer
    trainer = GRPOTrainer(
        model, tokenizer=tokenizer, train_dataset=ROWS, reward=shorter_is_better, eval_dataset=ROWS[:4], eval_reward=never,
        output_dir=str(tmp_path), name="objects", **SETTINGS,
    )  # fmt: skip
    folder = trainer.train()
    assert (folder / "model.safetensors").is_file()
    last = records(tmp_path / "objects")[-1]
    assert last["step"] == 2 and "reward/shorter_is_better/mean" in last
    assert last["eval/eval/pass@1"] == 0.0 and last["eval/eval/reward_mean"] == -3.0


def test_same_run_from_a_folder(model_and_tokenizer, tmp_path):
    """Would catch: a model object that is trained differently from the same model on disk."""
    model, tokenizer = model_and_tokenizer
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    common = dict(
        train_dataset=ROWS, reward=shorter_is_better, output_dir=str(tmp_path), dtype="float32", **SETTINGS
    )
    GRPOTrainer(str(tmp_path / "start"), name="folder", **common).train()
    GRPOTrainer(model, tokenizer=tokenizer, name="object", **common).train()
    assert records(tmp_path / "folder") == records(tmp_path / "object")


def test_unknown_setting_names_the_nearest(tmp_path):
    """Would catch: a misspelt setting that is silently ignored."""
    with pytest.raises(ValueError, match="unknown setting 'grup_size'; did you mean 'group_size'"):
        GRPOTrainer("x", train_dataset=ROWS, reward=shorter_is_better, grup_size=4)


def test_all_problems_of_the_settings_at_once():
    """Would catch: one error at a time."""
    from rlhf.recipe.load import RecipeError

    with pytest.raises(RecipeError) as caught:
        GRPOTrainer("x", train_dataset=ROWS, reward=shorter_is_better, steps=-1, group_size=1)
    assert "trainer.steps" in str(caught.value) and "group_size" in str(caught.value)


def test_sft_from_rows(model_and_tokenizer, tmp_path):
    """Would catch: an SFT trainer that does not learn a constant answer."""
    model, tokenizer = model_and_tokenizer
    rows = [{"prompt": r["prompt"], "response": "7"} for r in ROWS]
    SFTTrainer(
        model, tokenizer=tokenizer, train_dataset=rows, response_column="response", output_dir=str(tmp_path), name="sft",
        steps=30, prompts_per_step=16, lr=1e-2, threads=1, wandb="off", zero_stage=0,
    ).train()  # fmt: skip
    losses = [
        json.loads(line)["sft/loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.1 < losses[0]


def another(prompts, responses, **columns):
    return [0.0 for _ in responses]


def test_the_default_run_is_found_again(model_and_tokenizer, tmp_path, capfd):
    """Would catch: a name that is new on every call, so that nothing is ever resumed; or an old model returned for other
    rows, weights or rewards."""
    model, tokenizer = model_and_tokenizer
    common = dict(tokenizer=tokenizer, output_dir=str(tmp_path), **SETTINGS)

    def trainer(rows=ROWS, reward=shorter_is_better, **settings):
        return GRPOTrainer(model, train_dataset=rows, reward=reward, **(common | settings))

    first = trainer()
    assert first.run_dir == tmp_path / "grpo"
    folder = first.train()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert trainer().train() == folder and "already finished" in capfd.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    for changed, said in (
        ({"rows": ROWS[1:]}, "data.path"),
        ({"reward": another}, "reward"),
        ({"lr": 2e-3}, "trainer.lr: 0.001 -> 0.002"),
    ):
        with pytest.raises(ValueError, match=rf"holds a run of another recipe \(.*{said}.*name=.*fresh=True"):
            trainer(**changed).train()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="model.path"):
        trainer().train()
    assert trainer().train(fresh=True) == folder
    assert (tmp_path / "grpo.old-1" / "model").is_dir()
    assert records(tmp_path / "grpo")[-1]["step"] == 2


def test_what_the_objects_lack_is_told_before_anything_loads(tmp_path):
    """Would catch: a column that the reward needs missed at the end of the first step, one mistake at a time."""
    from rlhf.recipe.load import RecipeError

    def needs_solution(prompts, responses, solution):
        return [0.0] * len(responses)

    with pytest.raises(RecipeError) as caught:
        GRPOTrainer(
            "./nowhere",
            train_dataset=ROWS,
            reward=needs_solution,
            eval_dataset="tset.jsonl",
            prompt_column="prmpt",
            steps=1,
        )
    for said in ("./nowhere", "tset.jsonl", "did you mean 'prompt'?", "'solution', which data has not"):
        assert said in str(caught.value)


def test_objects_of_another_kind_are_one_clear_error(model_and_tokenizer):
    """Would catch: the splits of a DatasetDict read as one row of no columns, a data frame read as its column names, an
    AttributeError from inside for what is no model."""
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:4]))
    given = {"model": "./model", "train_dataset": ROWS, "reward": "gsm8k", **SETTINGS}
    for changed, said in [
        ({"train_dataset": splits}, r"train_dataset is a DatasetDict of 'train', 'test': .*\['train'\]"),
        ({"eval_dataset": splits}, "eval_dataset is a DatasetDict of 'train', 'test'"),
        ({"train_dataset": {"prompt": ["1+1="], "answer": ["2"]}}, "a dict of 'prompt', 'answer': give rows"),
        ({"train_dataset": ["1+1="]}, "a list whose first entry is '1\\+1='"),
        ({"model": object()}, "model is of type object"),
        ({"model": model_and_tokenizer[0]}, "pass tokenizer="),
        ({"model": model_and_tokenizer[0], "tokenizer": "./model"}, "tokenizer is of type str"),
    ]:
        with pytest.raises(ValueError, match=said):
            GRPOTrainer(**{**given, **changed})
