"""The files of a model's folder in Hugging Face's format, checked without loading any: configuration, weights,
tokenizer.

Everything here raises ValueError for the first thing that is wrong, in a sentence that does not name the recipe's key:
the caller knows it. Not here: the hub, and loading (`rlhf.models.load`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlhf.recipe.suggest import closest, did_you_mean

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_HUB_WAY_OUT = "give a folder, or a hub name of the form org/name"
# Any of these makes a folder a tokenizer's.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


def local_folder(path: str) -> Path | None:
    """The folder of this name; None where there is none, and the name may be the hub's. Raises ValueError for a file,
    and for a folder that does not exist."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ValueError(f"{path} is a file; give the folder that holds config.json")
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "~")):
        return None
    parent = local.parent
    if not parent.is_dir():
        raise ValueError(f"there is no folder {path}, nor the one above it; {_HUB_WAY_OUT}")
    near = closest(local.name, sorted(p.name for p in parent.iterdir() if p.is_dir()))
    raise ValueError(f"there is no folder {path}; {did_you_mean(near and str(parent / near), _HUB_WAY_OUT)}")


def read_config_json(folder: Path, *, trusted: bool) -> dict[str, Any]:
    """config.json as it stands. With `trusted` the folder may bring Python code of its own."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no config.json; it is not a Hugging Face model folder; {_what_else(folder)}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}; copy or download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds no object; copy or download it again")
    if "auto_map" in config and not trusted:
        raise ValueError(
            f"{folder} brings Python code of its own (auto_map in config.json), which is not run; review it and name "
            "model and commit in model.trust_code"
        )
    return config


def _what_else(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it holds a LoRA adapter alone: merge it into its model and give that folder"
    inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if inside:
        return f"did you mean {folder / inside[0]}?"
    names = sorted(p.name for p in folder.iterdir())
    return f"it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, all present and whole, none outside the folder."""
    index = folder / "model.safetensors.index.json"
    names = _indexed(index) if index.is_file() else ["model.safetensors"]
    if not index.is_file() and not (folder / names[0]).is_file():
        pickles = sorted(f.name for f in folder.glob("*.bin"))
        reason = (
            f"only {pickles[0]}, a pickle, which is not read; save it as safetensors" if pickles else "none"
        )
        raise ValueError(f"weights (model.safetensors) are missing in {folder}; there is {reason}")
    outside = [n for n in names if Path(n).name != n]
    if outside:
        raise ValueError(f"{index} points outside its folder: {outside[0]}")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"{folder} misses {len(missing)} of {len(names)} weight files, {missing[0]} first; copy or download them again"
        )
    files = [folder / n for n in names]
    for file in files:
        _check_safetensors(file)
    return files


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None


def _check_safetensors(file: Path) -> None:
    """The size that a safetensors header promises: 8 bytes of header length, a JSON header, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is cut off: {size} bytes, its header alone needs {8 + length}")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"the header of {file} is damaged: {error!r}") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file} is damaged: {size} bytes instead of {expected}; copy or download it again")


def check_tokenizer(folder: Path) -> None:
    """Is there a tokenizer at all? Whether it loads is seen when it is loaded."""
    if not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds no tokenizer (tokenizer.json or the like); set tokenizer.path to a folder or hub name "
            "with one, or tokenizer.build"
        )
