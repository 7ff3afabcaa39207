"""One model over several processes, each with a part of every large weight, in the very bits of the whole model.

Weights are split along their outputs only: a number is the sum that it was, in the order that it had, and what others need of
it is gathered. Nothing is added up across processes, where the usual way (Shoeybi et al. 2019, arXiv 1909.08053) splits
o_proj and down_proj along their inputs and adds partial sums, whose bits follow from the number of processes. Queries, keys
and values are split by key heads, so that attention and its cache are a process's own; gate and up by columns; o_proj and
down_proj read what all have gathered and give what is gathered again; embeddings and head are split over the vocabulary. Of
what a process sends for a layer's attention, the two gathers are together what one sum over all is; the MLP's are
(intermediate + hidden) / (2 hidden) times it.

Here: `TensorParallel`, what processes exchange, and `shard`, which takes a model's modules to a process's part in place.
Not here: who runs which step (`rlhf.rollout`), starting processes (torchrun, `rlhf.serving.parallel`, `rlhf.runtime`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from rlhf.kernels import gpu
from rlhf.kernels.linear import joined_linear, linear
from rlhf.models.linear import InvariantLinear
from rlhf.models.swap import GatedGeluMLP, GatedGeluTanhMLP, GatedMLP

_INNER = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkv]|mlp\.(gate|up))_proj")
_OUTER = re.compile(r"model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj")
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
_MLPS = (GatedMLP, GatedGeluTanhMLP, GatedGeluMLP)
_SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class ParallelError(RuntimeError):
    """The processes that run one model are apart: one has ended, hangs, or is at other work."""


class TensorParallel:
    """A process's place among those that run one model, and what they tell each other. All of them call every method, in the
    same order; one that fails is the group's end."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, numbers: dist.ProcessGroup | None = None
    ) -> None:
        """`group` is torch.distributed's, gloo for a CPU, nccl for GPUs (default: all processes). `numbers` is a gloo group of
        the same ones for what never leaves the host (default: `group` if it is gloo, else one that is made)."""
        if group is None:
            if not dist.is_initialized():
                raise ValueError(
                    "there is no process group; start the processes with torchrun and call torch.distributed.init_process_group"
                )
            group = dist.group.WORLD
        if numbers is None:
            numbers = group
            if dist.get_backend(group) != "gloo":
                ranks = dist.get_process_group_ranks(group)
                numbers = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.rank, self.size = group.rank(), group.size()
        self._group, self._numbers = group, numbers
        self._count = 0  # of the exchanges of numbers
        self._failure: ParallelError | None = None

    # tensors

    def gather(self, x: torch.Tensor, widths: list[int] | None = None) -> torch.Tensor:
        """x (..., c) of every process -> (..., sum of the c's), beside one another in the order of ranks. `widths` are the
        processes' c's, where they differ."""
        if widths is not None:
            x = F.pad(x, (0, max(widths) - x.shape[-1]))
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        self._wait(lambda: self._group._allgather_base(_bytes(parts), _bytes(x)), "outputs")
        if widths is not None:
            return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)
        return parts.movedim(0, -2).flatten(-2)

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., c), whose every row is 0 in all processes but one -> that one's bits. They are added as whole numbers, which
        rounds nothing."""
        x = x.contiguous()
        self._wait(lambda: self._group.allreduce([_bytes(x)]), "embeddings")
        return x

    # numbers

    def least(self, what: str, number: int) -> int:
        """The least of the processes' numbers. `what` says what it is about, to find out who is at other work."""
        return min(self._all(what, number))

    def same(self, what: str, *things: object) -> None:
        """Raises ParallelError, which names the rank, unless all have the same."""
        own = 0
        for thing in things:
            own = zlib.crc32(thing if isinstance(thing, (bytes, memoryview)) else repr(thing).encode(), own)
        found = self._all(what, own)
        usual = max(found, key=found.count)
        other = [rank for rank, value in enumerate(found) if value != usual]
        if other:
            raise self._failed(
                f"rank {other[0]} of {self.size} has another {what} than rank {found.index(usual)}: all processes of a model "
                "must be given the same calls with the same arguments, in the same order"
            )

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """Within it is one process at a time, in the order of ranks."""
        for _ in range(self.rank):
            self._all(what, 0)
        yield
        for _ in range(self.rank, self.size):
            self._all(what, 0)

    def _all(self, what: str, number: int) -> list[int]:
        """Every process's number, after a look whether all are at the same."""
        self._count += 1
        own = torch.tensor([self._count, zlib.crc32(what.encode()), number], dtype=torch.int64)
        table = own.new_empty(self.size * 3)
        self._wait(lambda: self._numbers._allgather_base(table, own), what)
        rows = table.view(self.size, 3).tolist()
        other = [rank for rank, row in enumerate(rows) if row[:2] != rows[0][:2]]
        if other:
            raise self._failed(
                f"rank {other[0]} of {self.size} is at other work than rank 0 (exchange {rows[other[0]][0]} and {rows[0][0]}; "
                f"this one, rank {self.rank}, at {what!r}): all processes of a model must be given the same calls, in the "
                "same order"
            )
        return [row[2] for row in rows]

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        if self._failure is not None:
            raise ParallelError(f"the processes came apart before: {self._failure}")
        try:
            start().wait()
        except RuntimeError as error:
            raise self._failed(
                f"rank {self.rank} of {self.size} waited for the others' {what} in vain, one of them has ended or hangs: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _failed(self, message: str) -> ParallelError:
        self._failure = ParallelError(message)
        return self._failure


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)


# -- modules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Which rows of a weight a process has."""

    first: int
    end: int
    whole: int  # rows of all processes together

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The process's rows of a whole tensor, which may be a bias."""
        assert len(x) == self.whole, f"{tuple(x.shape)} is not whole; {self}"
        return x[self.first : self.end]


class SplitLinear(InvariantLinear):
    """Some outputs of a linear, each in the bits of the whole one. Made by `shard`, as all classes here are."""

    rows: Rows
    parallel: TensorParallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., own outs), without gradient."""
        packed = self.packed_weight()
        if packed is None and gpu.serves(x, self.weight):
            return joined_linear(x, self.weight, self.bias, whole=self.rows.whole)
        return linear(x, self.weight, self.bias, packed)


class GatheredLinear(SplitLinear):
    """One whose outputs all processes want."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gathered(self.product(x))

    def gathered(self, out: torch.Tensor) -> torch.Tensor:
        """out (..., own outs) -> (..., outs)."""
        return self.parallel.gather(out, _widths(self.rows.whole, self.parallel.size))


class ExchangedLinear(GatheredLinear):
    """One of whose inputs a process has a part, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gathered(self.product(self.parallel.gather(x)))


class SplitEmbedding(nn.Embedding):
    """The rows of some tokens; every process gets all results."""

    rows: Rows
    parallel: TensorParallel

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        mine = (token_ids >= self.rows.first) & (token_ids < self.rows.end)
        own = F.embedding(torch.where(mine, token_ids - self.rows.first, 0), self.weight)
        return self.parallel.choose(own.masked_fill_(~mine[..., None], 0))


def whole_outputs(module: nn.Linear) -> int:
    """Outputs of a linear, those in other processes included."""
    return module.rows.whole if isinstance(module, SplitLinear) else module.out_features


def own_outputs(module: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Of rows for all of a linear's outputs, those that this process has."""
    return module.rows.of(rows).contiguous() if isinstance(module, SplitLinear) else rows


def parallel_of(model: nn.Module) -> TensorParallel | None:
    """Of a model that `shard` took to a part."""
    return next((m.parallel for m in model.modules() if isinstance(m, SplitLinear)), None)


def split_rows(model: nn.Module) -> dict[str, Rows]:
    """Which rows this process has of the split parameters, by all their names; the others it has whole."""
    split = [(path, m) for path, m in model.named_modules() if isinstance(m, (SplitLinear, SplitEmbedding))]
    return {f"{path}.{name}": m.rows for path, m in split for name, p in m._parameters.items() if p is not None}  # fmt: skip


# -- taking a model apart -----------------------------------------------------------------------------------------------


@torch.no_grad()
def shard(model: nn.Module, parallel: TensorParallel) -> nn.Module:
    """Take the model, whole and prepared by `rlhf.models.load`, to this process's part, in place and for sampling only. Raises
    ValueError as `check_split` does, and for linears that are not row-invariant."""
    if parallel.size == 1:
        return model
    check_split(model, parallel.size)
    plain = [path for path, m in _linears(model) if not isinstance(m, InvariantLinear)]
    if plain:
        raise ValueError(
            f"{plain[0]} is no row-invariant linear: a model that is split must be loaded with them (runtime.deterministic: true)"
        )
    mlps = {type(layer.mlp) for layer in model.model.layers if type(layer.mlp) not in _MLPS}
    if mlps:
        raise ValueError(
            f"layers with {mlps.pop().__name__} cannot be split: it is no gated MLP as Llama's or Gemma's"
        )
    head, embedding = model.lm_head, model.model.embed_tokens
    are_tied = head.weight is embedding.weight
    for path, module in list(_linears(model)):
        kind = SplitLinear if _INNER.fullmatch(path) else ExchangedLinear
        _cut(module, GatheredLinear if module is head else kind, parallel)
        module.out_features = len(module.weight)
        module._packed.clear()
    kind = type(embedding)  # Gemma 3's multiplies what it finds
    _cut(embedding, SplitEmbedding if kind is nn.Embedding else type(kind.__name__, (kind, SplitEmbedding), {}), parallel)  # fmt: skip
    if are_tied:
        embedding.weight = head.weight
    return model.requires_grad_(False)


def _cut(module: nn.Module, kind: type, parallel: TensorParallel) -> None:
    whole = len(module.weight)
    module.__class__, module.parallel = kind, parallel
    first, end = (whole * rank // parallel.size for rank in (parallel.rank, parallel.rank + 1))
    module.rows = Rows(first, end, whole)
    for name, p in list(module._parameters.items()):
        if p is not None:
            setattr(module, name, nn.Parameter(module.rows.of(p.detach()).clone()))


@torch.no_grad()
def load_whole(model: nn.Module, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write whole tensors' rows into a model that `shard` took to a part; then tell its engine by `Engine.set_version`. Raises
    KeyError for a name that the model has not."""
    own, rows = dict(model.named_parameters(remove_duplicate=False)), split_rows(model)
    for name, whole in named_weights:
        own[name].copy_(rows[name].of(whole) if name in rows else whole)


def check_split(model: nn.Module, size: int) -> None:
    """Raise ValueError unless `shard` can share the model out to `size` processes; its weights are not read."""
    config = model.config.get_text_config()
    for path, module in model.named_modules():
        if any(p is not None for p in module._parameters.values()) and not _is_known(path, module, config):
            raise ValueError(
                f"{type(model).__name__} cannot be split over {size} processes: {path or 'it'} is no part of a decoder of Llama's "
                "kind with plain linears (adapters are merged first); run it in one process"
            )
    check_sizes(config.to_dict(), size)


def check_sizes(config: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless heads and layers of a configuration can be shared out to `size` processes."""
    numbers = {name: config[name] for name in _SHARED_OUT if isinstance(config.get(name), int)}
    indivisible = [f"{name}={number}" for name, number in numbers.items() if number % size]
    if indivisible:
        possible = [
            n for n in range(1, min(numbers.values()) + 1) if not any(k % n for k in numbers.values())
        ]
        raise ValueError(
            f"{', '.join(indivisible)} cannot be shared out evenly to {size} processes; the model can be split over "
            f"{', '.join(map(str, possible))}"
        )


def _is_known(path: str, module: nn.Module, config: Any) -> bool:
    if _INNER.fullmatch(path) or _OUTER.fullmatch(path) or path == _HEAD:
        return isinstance(module, nn.Linear)
    if path == _EMBEDDING:
        return isinstance(module, nn.Embedding)
    if set(module._parameters) != {"weight"}:
        return False
    if ".self_attn." in path:  # a norm over one head
        return tuple(module.weight.shape) == (config.head_dim,)
    return tuple(module.weight.shape) == (config.hidden_size,)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))


def _widths(whole: int, size: int) -> list[int] | None:
    """Of the processes' parts, where they differ."""
    if whole % size == 0:
        return None
    return [whole * (r + 1) // size - whole * r // size for r in range(size)]
