"""Whether a changed model, tokenizer or dataset is noticed when a run goes on, and an unchanged one is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.checkpoint import Checkpoint, CheckpointError
from rlhf.models import build_tokenizer
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, ModelConfig, RewardConfig
from rlhf.runtime.identity import (
    check_identity,
    model_identity,
    rewards_identity,
    tokenizer_identity,
)


def of_folder(folder: Path) -> dict[str, str]:
    return model_identity(ModelConfig(path=str(folder)), seed=0, model=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small and a large weight file; only a sample of the large one is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    save_file({"a": torch.arange(100.0)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(1 << 20)}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_the_same_files_elsewhere_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Would catch: a hash of the path or of the times, which differ after every copy or download."""
    copied = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    assert of_folder(copied) == of_folder(folder)
    assert len(of_folder(folder)) == 3


def test_every_change_of_a_model_folder_is_seen(folder: Path) -> None:
    """Would catch: a hash of sizes, or of the first bytes only; a header left out of it; a file that came or went."""
    whole = of_folder(folder)
    large = folder / "model-00002-of-00002.safetensors"
    seen = [whole]
    (folder / "config.json").write_text('{"hidden_size": 9}')
    seen.append(of_folder(folder))
    for place in (-1, 8 + 400, 12):  # a value, a value, a name in the header
        small = folder / "model-00001-of-00002.safetensors"
        content = bytearray(small.read_bytes())
        content[place] ^= 1
        small.write_bytes(content)
        seen.append(of_folder(folder))
    for value in (1.0, 2.0):  # training moves every weight: two versions of one size
        save_file({"b": torch.full((1 << 20,), value)}, large)
        seen.append(of_folder(folder))
    save_file({"b": torch.cat([torch.zeros(1 << 19), torch.ones(1 << 19)])}, large)  # the second half only
    seen.append(of_folder(folder))
    save_file({"c": torch.zeros(1 << 20)}, large)
    seen.append(of_folder(folder))
    large.unlink()
    seen.append(of_folder(folder))
    assert len({tuple(sorted(i.items())) for i in seen}) == len(seen) == 10


def test_built_models_and_model_objects() -> None:
    build = ModelConfig(build=BuildModelConfig(config={"hidden_size": 8}))
    other = ModelConfig(build=BuildModelConfig(config={"hidden_size": 16}))
    found = [model_identity(c, seed=s, model=None)["build"] for c, s in ((build, 0), (build, 1), (other, 0))]
    assert len(set(found)) == 3 and model_identity(build, seed=0, model=None)["build"] == found[0]

    class Model(torch.nn.Linear):
        class config:
            @staticmethod
            def to_dict() -> dict:
                return {"layers": 1, "_name_or_path": object()}

    torch.manual_seed(0)
    model = Model(300, 300)
    before = model_identity(ModelConfig(path="in-memory"), seed=0, model=model)
    assert model_identity(ModelConfig(path="in-memory"), seed=0, model=model) == before
    with torch.no_grad():
        model.weight += 1e-3
    after = model_identity(ModelConfig(path="in-memory"), seed=0, model=model)
    assert after["config"] == before["config"] and after["weights"] != before["weights"]


def test_a_tokenizer_is_what_it_does_to_text() -> None:
    """Would catch: a hash that changes when a text is padded or cut, or that does not see the chat template."""
    tokenizer = build_tokenizer(BuildTokenizerConfig(kind="characters", alphabet="0123"))
    before = tokenizer_identity(tokenizer)
    tokenizer(["0", "012"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == before
    other = tokenizer_identity(build_tokenizer(BuildTokenizerConfig(kind="characters", alphabet="0132")))
    assert [k for k in before if other[k] != before[k]] == ["vocabulary"]
    tokenizer.chat_template = "{{ messages }}"
    assert [k for k, v in tokenizer_identity(tokenizer).items() if v != before[k]] == ["chat template"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert tokenizer_identity(tokenizer)["vocabulary"] != before["vocabulary"]


def test_a_reward_function_is_the_file_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: rewards that are 100 times as large after a resume; a hash that names the built-in rules, which move
    with the package, or executes the file."""
    file = tmp_path / "scale_of_the_user.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [f"{file}:f", "scale_of_the_user:f", "gsm8k", "rlhf.reward.functions:exact_match", "memory:g"]
    configs = [RewardConfig(function=name) for name in names]

    def now(text: str) -> dict:
        file.write_text(text + "\nraise SystemExit('executed')")
        return rewards_identity(configs, {"memory:g": len})

    before, after = now("def f(p, r): return [1.0] * len(r)"), now("def f(p, r): return [100.0] * len(r)")
    assert list(before) == [f"reward function {name!r}" for name in names[:2]]
    assert all(before[name]["source"] != after[name]["source"] for name in before)
    assert now("def f(p, r): return [1.0] * len(r)") == before


def test_a_change_is_an_error_that_names_the_difference() -> None:
    """Would catch: a run that goes on with another model, or an evaluation set whose curve is of two sets."""
    before = {"model": {"config.json": "a", "x": "b"}, "evaluation set 'sums'": {"rows": "c"}}
    checkpoint = Checkpoint(Path("step-00000004"), 4, {"identity": before})
    check_identity(checkpoint, dict(before))
    now = {"model": {"config.json": "a", "x": "z"}, "evaluation set 'more'": {"rows": "d"}}
    with pytest.raises(CheckpointError) as error:
        check_identity(checkpoint, now)
    for part in (
        "step-00000004 was saved in a run with another",
        "model: x b -> z",
        "evaluation set 'sums': rows c -> not there",
        "evaluation set 'more': rows not there -> d",
        "--fresh (in Python train(fresh=True)), or another run.name",
    ):
        assert part in str(error.value)
