"""LoRA adapters beside one model, several in a batch: every row of a step has its own, or none.

y += (alpha / r) B A x for the rows of an adapter (Hu et al. 2021, arXiv 2106.09685; batches of several: Punica, Chen et
al. 2023, arXiv 2310.18547), with the roundings of peft's own forward, so that a sample's log-probs are those of the model that was
trained with the adapter. Here: what a folder that peft wrote holds, and the product. Not here: training (peft), and which
request wants which (`rlhf.rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf.kernels.linear import linear, pack
from rlhf.models.parallel import own_outputs, whole_outputs

_OTHER_KINDS = {  # what a peft configuration may have beside plain LoRA, and what it means to have none
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "lora_bias": False,
}


@dataclass(frozen=True)
class LowRank:
    """The change of one linear: scale B A."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    a_packed: torch.Tensor | None
    b_packed: torch.Tensor | None
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, in) -> (N, out)."""
        return linear(linear(x, self.a, None, self.a_packed), self.b, None, self.b_packed) * self.scale


@dataclass(frozen=True)
class Adapter:
    """Changes of linears, by their path in the model."""

    parts: Mapping[str, LowRank]

    @property
    def num_bytes(self) -> int:
        return sum(2 * (p.a.nbytes + p.b.nbytes) for p in self.parts.values())  # with the packs


AdapterRows = Sequence[tuple[Adapter, torch.Tensor | None]]  # adapters of a step, and whose rows; None: all


def read_adapter(folder: str | Path, linears: Mapping[str, nn.Linear], device: torch.device | str) -> Adapter:
    """The adapter of a folder that peft's `save_pretrained` wrote, for the model's linears by their path, in their dtype. Raises ValueError for a folder that is none, kinds of LoRA other than the plain one, and shapes that are not
    those of the model."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    weights_file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights_file.is_file():
        raise ValueError(
            f"{folder} has no adapter_config.json with adapter_model.safetensors; give a folder that peft wrote, such as "
            "a run's model/adapter"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(weights_file)
    except Exception as error:  # whatever a damaged file makes of the readers
        raise ValueError(f"{folder} cannot be read as a LoRA adapter: {error}") from error
    for name, none in _OTHER_KINDS.items():
        if getattr(config, name, none) not in (none, None):
            raise ValueError(
                f"{folder}: {name}={getattr(config, name)!r} is not supported; merge the adapter into the model"
            )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        path, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if path not in linears or kind not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{folder}: {name} changes no linear that requests can have their own of ({', '.join(sorted({p.rpartition('.')[2] for p in linears}))}); "
                "merge the adapter into the model"
            )
        pairs.setdefault(path, {})[kind] = weight
    parts = {
        path: _low_rank(folder, path, pair, config, linears[path], device) for path, pair in pairs.items()
    }
    if not parts:
        raise ValueError(f"{folder} holds no weights")
    return Adapter(parts)


def _low_rank(
    folder: Path,
    path: str,
    pair: dict[str, torch.Tensor],
    config: object,
    base: nn.Linear,
    device: torch.device | str,
) -> LowRank:
    shapes = {kind: tuple(weight.shape) for kind, weight in sorted(pair.items())}
    rank = config.r  # type: ignore[attr-defined]
    wanted = {"lora_A": (rank, base.in_features), "lora_B": (whole_outputs(base), rank)}
    if shapes != wanted:
        raise ValueError(f"{folder}: {path} has {shapes}; the model needs {wanted}")
    a, b = (pair[kind].to(device, base.weight.dtype).contiguous() for kind in wanted)
    b = own_outputs(base, b)
    alpha = config.lora_alpha  # type: ignore[attr-defined]
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank  # type: ignore[attr-defined]
    return LowRank(a, b, pack(a), pack(b), scale)


def add_changes(
    out: torch.Tensor, x: torch.Tensor, adapters: AdapterRows, paths: Sequence[tuple[str, int]]
) -> None:
    """out (N, sum of outs) += the adapters' changes for x (N, in); `paths` are those of the linears side by side in out,
    each with its outputs."""
    for adapter, rows in adapters:
        own, first = (x if rows is None else x[rows]), 0
        for path, outs in paths:
            part, columns = adapter.parts.get(path), slice(first, first + outs)
            first += outs
            if part is None:
                continue
            if rows is None:
                out[:, columns] += part(own)
            else:
                out[rows, columns] = out[rows, columns] + part(own)
