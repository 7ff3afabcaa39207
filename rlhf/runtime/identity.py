"""What a run was started with, in a few short hashes: kept in its checkpoints, compared when it goes on.

A recipe names a model, a tokenizer, data and reward functions by path, and what is at the path may change between two
starts of the same command. Not here: the recipe itself (`rlhf.runtime.run`), and the hashes of datasets (`rlhf.data`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import Checkpoint, CheckpointError
from rlhf.recipe.functions import built_in
from rlhf.recipe.outputs import MODEL_SECTIONS
from rlhf.recipe.schema import ModelConfig, Recipe, RewardConfig
from rlhf.recipe.source_code import Opaque, module_file

Identity = Mapping[str, Mapping[str, str]]  # {what: {part: hash}}

_SAMPLES, _BLOCK_BYTES = (
    64,
    4096,
)  # read of each weight file, evenly spaced, beside its header: 100 GB take seconds
_VALUES = 1024  # of each parameter of a model object


def stage_identity(
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
    model: torch.nn.Module | None,
    reward_functions: Mapping[str, Callable],
) -> dict[str, dict[str, str]]:
    """Of everything that a stage names and that is not in its recipe. `datasets` by what a message calls them; `model`
    and `reward_functions` are what the Python API was handed."""
    seed, others = recipe.run.seed, {}
    for name in MODEL_SECTIONS:
        section = getattr(recipe, name)
        if name != "model" and section is not None and section.path is not None:
            others[name.replace("_", " ")] = model_identity(
                ModelConfig(path=section.path), seed=seed, model=None
            )
    return {
        "model": model_identity(recipe.model, seed=seed, model=model),
        **others,
        "tokenizer": tokenizer_identity(tokenizer),
        **{name: {"rows": dataset.fingerprint} for name, dataset in datasets.items()},
        **rewards_identity([*recipe.reward, *recipe.eval_reward], reward_functions),
    }


def model_identity(config: ModelConfig, *, seed: int, model: torch.nn.Module | None) -> dict[str, str]:
    """Hashes of the weights that a stage starts from, by file or source.

    A folder: config.json, and of every safetensors file its size, its header and a sample of its bytes. A hub name:
    the commit. A built model: its section and the seed. A model object: its configuration and a sample of its weights.
    """
    if model is not None:
        return {"config": _text_hash(_own_settings(model)), "weights": _sampled_parameters(model)}
    if config.build is not None:
        return {"build": _text_hash([config.build.model_dump(), seed])}
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        wanted = config.trust_code.revision if config.trust_code is not None else config.revision
        cached = try_to_load_from_cache(config.path, "config.json", revision=wanted)
        return {"commit": Path(cached).parent.name if isinstance(cached, str) else "unknown"}
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return {file.name: _sampled_file(file) for file in files}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of what decides how text becomes tokens: vocabulary and rules, special tokens, chat template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # of the last call
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": _text_hash(rules),
        "special tokens": _text_hash(special),
        "chat template": _text_hash(tokenizer.chat_template),
    }


def rewards_identity(
    rewards: Sequence[RewardConfig], handed_over: Mapping[str, Callable]
) -> dict[str, dict[str, str]]:
    """{"reward function NAME": {"source": hash}} of the files that hold the recipe's own functions.

    What such a file imports is not seen. Built-in rules are this package's; the Python API has the hash of a function
    that was handed over in its name. A module without Python source has no entry.
    """
    found = {}
    for name in dict.fromkeys(config.function for config in rewards):
        file = None if name in handed_over or name in built_in() else _file_of(name)
        if file is not None:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            found[f"reward function {name!r}"] = {"source": digest}
    return found


def _file_of(function: str) -> Path | None:
    where = function.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where).expanduser()
    try:
        return None if where.split(".")[0] == "rlhf" else module_file(where)
    except Opaque:
        return None


def check_identity(checkpoint: Checkpoint, now: Identity) -> None:
    """Raise CheckpointError, naming every difference, unless the checkpoint was saved in a run of this identity."""
    before: Identity = checkpoint.meta.get("identity", {})  # a checkpoint of an early version has none
    changed = {
        what: parts
        for what in sorted({*before, *now})
        if (parts := _difference(before.get(what), now.get(what)))
    }
    if changed:
        lines = "".join(f"\n  {what}: {', '.join(parts)}" for what, parts in changed.items())
        names = " and ".join(changed)
        raise CheckpointError(
            f"{checkpoint.path} was saved in a run with another {names} (hash then -> hash now):{lines}\n"
            f"Its weights, optimiser state and curves belong to that one. Put the {names} back as it was, or start a new "
            "run: --fresh (in Python train(fresh=True)), or another run.name"
        )


def _difference(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> list[str]:
    before, now = before or {}, now or {}
    return [
        f"{part} {before.get(part, 'not there')} -> {now.get(part, 'not there')}"
        for part in sorted({*before, *now})
        if before.get(part) != now.get(part)
    ]


def _own_settings(model: Any) -> dict[str, Any]:
    settings = model.config.to_dict()
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version", "dtype")}


def _sampled_parameters(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)}".encode())
        flat = p.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // _VALUES)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled_file(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        if file.suffix == ".safetensors":  # 8 bytes say how long the header is
            length = stream.read(8)
            digest.update(length + stream.read(min(int.from_bytes(length, "little"), size)))
        start = stream.tell() if size > _SAMPLES * _BLOCK_BYTES else 0
        stride = max(_BLOCK_BYTES, (size - start) // _SAMPLES)
        for place in range(start, size, stride):
            stream.seek(place)
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _text_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
