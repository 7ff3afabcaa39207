"""Weights from the processes that train to the processes that sample, verified.

`publish` brings every process of one group to the weights of another. The weights travel as packed buckets of
bounded size, never one call per tensor; the receiver checks names, shapes and types before the first byte is
overwritten and a checksum over what it really holds after the last; in between it is marked dirty and refuses
to generate. Where both roles live in one group nothing travels and only the version moves.

A receiver may hold some rows of a tensor only, where its model is split over processes (`rlhf.models.parallel`): it takes
those from the buckets, and the sender makes a checksum for each such share.

What never changes (the base model under LoRA) travels once: a receiver that still holds it whole, by the checksum
of that publish, is sent the trained weights alone from then on. One that is dirty or new gets everything.

Here: the source, the sink, the transports, the checksum. Not here: how whole weights are gathered from their
shards (`rlhf.trainers.deepspeed_engine`), and what the engine forgets when its weights change
(`rlhf.rollout`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from rlhf.faults import fault_point
from rlhf.models.parallel import Rows
from rlhf.recipe.schema import RuntimeConfig

if TYPE_CHECKING:
    from rlhf.runtime.groups import Group, Pending

NamedWeights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
Share = Mapping[str, Rows]  # the tensors of which a process holds some rows only; {} = it holds all
Transport = Literal["shared", "object_store", "collective"]

_WORD = 1 << 64
_POLL_S = 0.02


class WeightSyncError(RuntimeError):
    """The receiver does not hold the sender's weights."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as its bytes lie in memory."""

    name: str
    dtype: str  # torch's name, for example "bfloat16"
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Piece:
    """A run of one tensor's bytes inside a bucket."""

    tensor: TensorSpec
    start: int  # byte within the tensor
    offset: int  # byte within the bucket
    num_bytes: int


@dataclass(frozen=True)
class BucketSpec:
    """A flat buffer of bytes and what lies in it. A tensor larger than a bucket goes on in the next one."""

    index: int
    pieces: tuple[Piece, ...]
    num_bytes: int


@dataclass(frozen=True)
class WeightPlan:
    """What one publish sends, in order."""

    buckets: tuple[BucketSpec, ...]
    base: int | None = None  # checksum of all weights, to be held already; None = sends all

    @property
    def num_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.buckets)


@dataclass(frozen=True)
class PublishReport:
    """What one publish moved."""

    bytes: int  # sent by the source; 0 where the tensors are shared
    seconds: float
    buckets: int
    checksum: int | None  # 64 bits over what was sent, equal on both sides; None where the tensors are shared
    transport: Transport


def plan_buckets(tensors: Sequence[TensorSpec], bucket_bytes: int) -> list[BucketSpec]:
    """Cut the tensors' bytes, in order, into buckets of at most `bucket_bytes`."""
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes={bucket_bytes}; use at least 1")
    buckets: list[BucketSpec] = []
    pieces: list[Piece] = []
    used = 0

    def finish() -> None:
        nonlocal pieces, used
        buckets.append(BucketSpec(len(buckets), tuple(pieces), used))
        pieces, used = [], 0

    for tensor in tensors:
        start = 0
        while start < tensor.num_bytes:
            size = min(bucket_bytes - used, tensor.num_bytes - start)
            pieces.append(Piece(tensor, start, used, size))
            start, used = start + size, used + size
            if used == bucket_bytes:
                finish()
    if pieces:
        finish()
    return buckets


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """(num_bytes,) uint8: the tensor's own memory, not a copy. The tensor must be contiguous."""
    assert tensor.is_contiguous(), (
        f"a {tuple(tensor.shape)} tensor with strides {tensor.stride()} has no flat bytes"
    )
    return tensor.detach().reshape(-1).view(torch.uint8)


def tensor_checksum(tensor: torch.Tensor) -> int:
    """64 bits that depend on every byte and its place; the same on a CPU and a GPU.

    h = sum_i mix(w_i xor i c) over the 8-byte words w_i, in wrapping integer arithmetic, whatever
    the order of summation. Not a defence against an adversary.
    """
    data = bytes_of(tensor)
    whole = data.numel() // 8 * 8
    total = data.numel()
    # a view of another type must start at a multiple of that type's size; a slice of a larger buffer may not
    words = data[:whole] if data.data_ptr() % 8 == 0 else data[:whole].clone()
    words = words.view(torch.int64)
    for first in range(0, words.numel(), _CHECKSUM_WORDS):
        part = words[first : first + _CHECKSUM_WORDS]
        total += _mix(part, first)
    if whole < data.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[: data.numel() - whole] = data[whole:]
        total += _mix(tail.view(torch.int64), whole // 8)
    return total % _WORD


_CHECKSUM_WORDS = 1 << 17  # 1 MiB at a time: the temporaries stay in the cache
_C1, _C2, _C3 = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB  # odd, positive as int64


def _mix(words: torch.Tensor, first: int) -> int:
    place = torch.arange(first, first + words.numel(), dtype=torch.int64, device=words.device)
    mixed = place.mul_(_C1).bitwise_xor_(words).mul_(_C2)
    mixed.bitwise_xor_(mixed >> 29).mul_(_C3)
    mixed.bitwise_xor_(mixed >> 32)
    return int(mixed.sum())


def combine_checksums(total: int, tensor: TensorSpec, value: int) -> int:
    """Fold one tensor's checksum into the running one; order matters."""
    return (total * _C2 + value + tensor.num_bytes) % _WORD


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


class WeightSource:
    """The sending side, on every process of the training group.

    `named_weights` yields (name, whole tensor) in the same order each time; `named_trained` those that change,
    None where all do. Where weights are sharded it is a collective: every process must go through it, and only
    rank 0's tensors are read.
    """

    def __init__(
        self, named_weights: NamedWeights, *, rank: int, named_trained: NamedWeights | None = None
    ) -> None:
        self._named_weights, self._named_trained = named_weights, named_trained
        self.rank = rank
        self.base: int | None = None  # checksum of all weights as last sent whole; None if nothing is frozen
        self._plan: WeightPlan | None = None
        self._known: dict[tuple[int, bool], tuple[BucketSpec, ...]] = {}  # by bucket size and "everything"
        self._stream: Iterator[torch.Tensor] | None = None
        self._next = 0
        self._checksum: int | None = None
        self._shares: tuple[Share, ...] = ()
        self._share_checksums: list[int] = []

    def export_plan(
        self, bucket_bytes: int, base: int | None = None, shares: Sequence[Share] = ()
    ) -> WeightPlan:
        """What the next round of buckets will hold: everything, or what may have changed since `base`, the
        checksum of a whole publish. Gathered once and kept: shapes do not change during a run. `shares` are those that
        want a checksum of their own."""
        self._shares = tuple(shares)
        key = (bucket_bytes, base is None)
        if key not in self._known:
            named = self._named_weights if base is None else self._named_trained
            self._known[key] = tuple(plan_buckets([_spec(name, t) for name, t in named()], bucket_bytes))
        self._plan = WeightPlan(self._known[key], base)
        return self._plan

    def export_bucket(self, index: int) -> torch.Tensor | None:
        """(num_bytes,) uint8 on the weights' device on rank 0, None elsewhere. In order, 0 first."""
        if index == 0:
            self._close_stream()
            self._stream, self._next = self._buckets(), 0
        if self._stream is None or index != self._next:
            raise ValueError(f"bucket {index} asked for, {self._next} is next; export them in order from 0")
        bucket = next(self._stream)
        self._next += 1
        if self._next == len(self._plan.buckets):
            next(
                self._stream, None
            )  # runs to the end: the last gathered tensor is released, the checksum is set
            self._close_stream()
        return bucket if self.rank == 0 else None

    def export_checksum(self) -> int:
        """The checksum of what the last complete round of `export_bucket` sent (rank 0)."""
        if self._checksum is None:
            raise ValueError("no complete export yet; call export_bucket for every bucket first")
        return self._checksum

    def export_share_checksums(self) -> list[int]:
        """Of the same round, what a receiver of each of the plan's shares then holds (rank 0)."""
        self.export_checksum()
        return self._share_checksums

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _buckets(self) -> Iterator[torch.Tensor | None]:
        """One flat buffer after another. Every rank consumes the weights; rank 0 copies them."""
        assert self._plan is not None, "export_plan comes before export_bucket"
        self._checksum = None
        whole = self._plan.base is None
        total, of_shares = 0, [0] * len(self._shares)
        weights = iter(self._named_weights() if whole else self._named_trained())
        spec, data = None, None
        for bucket in self._plan.buckets:
            flat = None
            for piece in bucket.pieces:
                if piece.start == 0:
                    spec, data = self._take(weights, piece.tensor)
                    if self.rank == 0:
                        value = tensor_checksum(data)
                        total = combine_checksums(total, spec, value)
                        of_shares = [
                            _with_share(so_far, share, spec, data, value)
                            for so_far, share in zip(of_shares, self._shares, strict=True)
                        ]
                if self.rank == 0:
                    if flat is None:
                        flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=data.device)
                    flat[piece.offset : piece.offset + piece.num_bytes] = bytes_of(data)[
                        piece.start : piece.start + piece.num_bytes
                    ]
            yield flat
        for name, tensor in weights:
            if tensor.numel():
                raise WeightSyncError(f"weight {name!r} came after the last one that was planned")
        self._checksum, self._share_checksums = total, of_shares
        if whole and self._named_trained is not None:
            self.base = total

    @staticmethod
    def _take(
        weights: Iterator[tuple[str, torch.Tensor]], planned: TensorSpec
    ) -> tuple[TensorSpec, torch.Tensor]:
        for name, tensor in weights:
            spec = _spec(name, tensor)
            if spec == planned:
                return spec, tensor.detach().contiguous()
            if spec.num_bytes:
                raise WeightSyncError(
                    f"planned {planned}, got {spec}: the weights changed since the first publish"
                )
        raise WeightSyncError(f"planned {planned}, but the weights ended before it")


def _with_share(total: int, share: Share, spec: TensorSpec, data: torch.Tensor, value: int) -> int:
    """The share's running checksum with one more tensor, whose whole one is `value`."""
    if spec.name not in share:
        return combine_checksums(total, spec, value)
    own = share[spec.name].of(data)
    return combine_checksums(total, _spec(spec.name, own), tensor_checksum(own))


class WeightSink:
    """The receiving side, on every process of the sampling group: the parameters of one model, in place.

    Storage never moves, so that whoever holds a view of a parameter sees the new weights. `target` may be tensors by
    name instead of a model. `share` says which of them are some rows of what is sent.
    """

    def __init__(
        self, target: torch.nn.Module | Mapping[str, torch.Tensor], share: Share | None = None
    ) -> None:
        if isinstance(target, torch.nn.Module):
            # tied weights have several names and one storage: any of their names may arrive
            target = dict(target.named_parameters(remove_duplicate=False))
        self._params = target
        self.share: Share = {} if share is None else share
        self._plan: WeightPlan | None = None
        self._pending: int | None = None
        self._base: int | None = None
        self._copied = False
        self.version: int | None = None  # None = as loaded, nothing published yet

    @property
    def base(self) -> int | None:
        """Checksum of the last weights that came whole and were verified; None while anything is half written."""
        return self._base if self._pending is None else None

    @property
    def has_copied(self) -> bool:
        """Whether all weights came by `copy_from`, and none is half written."""
        return self._copied and self._pending is None

    def check_clean(self) -> None:
        """Raise unless the weights are whole."""
        if self._pending is not None:
            raise WeightSyncError(
                f"weights of version {self._pending} are half written (last whole version: {self.version}); "
                "publish again before generating"
            )

    def begin_weights(self, version: int, plan: WeightPlan) -> None:
        """Check that the plan, with what is held already, covers this model exactly; then mark the weights dirty."""
        if plan.base is not None and plan.base != self.base:
            raise WeightSyncError(
                f"version {version} comes without the weights that do not change, which the receiver does not hold "
                "whole; publish everything first"
            )
        self._check_plan(plan)
        self._plan, self._pending = plan, version
        if plan.base is None:
            self._base = None

    def load_bucket(self, index: int, data: torch.Tensor | np.ndarray) -> None:
        """Copy one bucket's bytes into the parameters."""
        assert self._plan is not None and self._pending is not None, "begin_weights comes before load_bucket"
        bucket = self._plan.buckets[index]
        assert len(data) == bucket.num_bytes, (
            f"bucket {index} has {len(data)} bytes, planned {bucket.num_bytes}"
        )
        for piece in bucket.pieces:
            name = piece.tensor.name
            held = bytes_of(self._params[name].data)
            rows = self.share.get(name)  # None: all
            first = 0 if rows is None else piece.tensor.num_bytes // rows.whole * rows.first
            start = max(piece.start, first)
            end = min(piece.start + piece.num_bytes, first + len(held))
            if start < end:
                at = piece.offset - piece.start
                _copy_bytes(held[start - first : end - first], data[at + start : at + end])

    def end_weights(self, version: int, checksum: int, of_share: int | None = None) -> None:
        """Check what the parameters hold now against the sender's checksum, where they are a share of what was sent the
        share's; clean only if they are equal."""
        if version != self._pending:
            raise WeightSyncError(f"end of version {version}, but version {self._pending} was begun")
        held = self.held_checksum()
        sent = checksum if of_share is None else of_share
        if held != sent:
            raise WeightSyncError(
                f"version {version}: the receiver holds weights with checksum {held:016x}, "
                f"the sender sent {sent:016x}; nothing is generated from them"
            )
        self.version, self._pending = version, None
        if self._plan.base is None:
            self._base = checksum

    def copy_from(self, named_weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> int:
        """Take weights that are in this same process; returns the bytes copied. For a group that trains and
        samples while its trained weights are split over the processes. The first time, and after a copy that
        failed, they must be all of them."""
        whole, self._pending = not self.has_copied, version
        seen: set[int] = set()
        copied = 0
        for name, tensor in named_weights:
            self._check_tensor(_spec(name, tensor))
            own = self.share[name].of(tensor) if name in self.share else tensor
            self._params[name].data.copy_(own.detach())
            seen.add(self._params[name].data_ptr())
            copied += own.numel() * own.element_size()
        if whole:
            self._check_covered(seen)
        self.version, self._pending, self._copied = version, None, True
        return copied

    def held_checksum(self) -> int:
        """Checksum of the parameters as they are, in the plan's order."""
        total = 0
        for bucket in self._plan.buckets if self._plan is not None else ():
            for piece in bucket.pieces:
                if piece.start == 0:
                    name, held = piece.tensor.name, self._params[piece.tensor.name].data
                    total = combine_checksums(total, _spec(name, held), tensor_checksum(held))
        return total

    def _check_plan(self, plan: WeightPlan) -> None:
        tensors = {piece.tensor.name: piece.tensor for bucket in plan.buckets for piece in bucket.pieces}
        for tensor in tensors.values():
            self._check_tensor(tensor)
        if plan.base is None:
            self._check_covered({self._params[name].data_ptr() for name in tensors})

    def _check_tensor(self, sent: TensorSpec) -> None:
        if sent.name not in self._params:
            raise WeightSyncError(
                f"the sender has a weight {sent.name!r}, the receiver's model has none of that name"
            )
        held = self._whole_spec(sent.name)
        if held != sent:
            raise WeightSyncError(
                f"weight {sent.name!r} is {sent.dtype} {sent.shape} at the sender and "
                f"{held.dtype} {held.shape} at the receiver"
            )

    def _whole_spec(self, name: str) -> TensorSpec:
        held = _spec(name, self._params[name])
        if name not in self.share:
            return held
        rows = self.share[name]
        of_row = held.num_bytes // held.shape[0]
        return TensorSpec(name, held.dtype, (rows.whole, *held.shape[1:]), of_row * rows.whole)

    def _check_covered(self, storages: set[int]) -> None:
        missing = [name for name, p in self._params.items() if p.numel() and p.data_ptr() not in storages]
        if missing:
            raise WeightSyncError(
                f"the sender never sends {len(missing)} of the receiver's weights, first {missing[0]!r}"
            )


def _copy_bytes(target: torch.Tensor, data: torch.Tensor | np.ndarray) -> None:
    """Into `target`'s memory. Arrays from the object store are read-only, shared with other processes."""
    if isinstance(data, torch.Tensor):
        target.copy_(data)
    elif target.device.type == "cpu":
        np.copyto(target.numpy(), data)
    else:
        target.copy_(torch.from_numpy(np.array(data)))


class WeightChannel:
    """A process group of its own: rank 0 of the source sends (0), all ranks of the target receive (1 ..).

    It takes no part in torch's default group and does not change it. gloo between CPUs, nccl between GPUs.
    """

    def __init__(
        self, *, address: str, port: int, rank: int, size: int, device: str, timeout_s: float
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._address, self._timeout = address, timedelta(seconds=timeout_s)
        self._store: dist.Store | None = None
        self._group: Any = None
        self.port = port
        if rank == 0:
            self._listen()

    def _listen(self) -> None:
        # our own listening socket: bound to the one address that the others use, the port ours from the start
        listener = socket.create_server((self._address, 0))
        self.port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            self._address,
            self.port,
            self.size,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def join(self) -> None:
        """Meet the other processes; blocks until all are there."""
        if self._store is None:
            self._store = dist.TCPStore(
                self._address, self.port, self.size, timeout=self._timeout, wait_for_workers=False
            )
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group = dist.ProcessGroupNCCL(self._store, self.rank, self.size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = self._timeout
            options._devices = [self._gloo_device()]
            self._group = dist.ProcessGroupGloo(self._store, self.rank, self.size, options)

    def _gloo_device(self) -> Any:
        if self._address.startswith("127."):
            return dist.ProcessGroupGloo.create_device(hostname=self._address)
        return dist.ProcessGroupGloo.create_default_device()

    def broadcast(self, data: torch.Tensor) -> Any:
        """Start sending (rank 0) or filling (others) the buffer; `wait()` on what it returns."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([data], options)


class WeightMethods:
    """The methods that `publish` calls, for a worker with `_sources` (it trains) or `_sinks` (it holds copies).

    The worker supplies `set_version`: what else depends on the weights learns that they are new.
    """

    _sources: dict[str, WeightSource]  # by the role that they are for
    _sinks: dict[str, WeightSink]  # by the role whose weights they are
    _aimed: str = "rollout"  # the role that the publish in progress is for
    _channel: WeightChannel | None = None

    def set_version(self, version: int) -> None:
        raise NotImplementedError

    @property
    def _source(self) -> WeightSource:
        return self._sources[self._aimed]

    @property
    def _sink(self) -> WeightSink:
        return self._sinks[self._aimed]

    def aim_weights(self, role: str) -> None:
        """The next publish is for this role."""
        self._aimed = role

    def published_base(self) -> int | None:
        """Of the source: the checksum under which everything was last sent whole; None if nothing is frozen."""
        return self._source.base

    def held_base(self) -> int | None:
        """Of the target: the checksum under which everything last arrived whole; None if it is dirty or new."""
        return self._sink.base

    def held_share(self) -> Share:
        """Of the target: which rows of which weights it holds only; {} = it holds all."""
        return self._sink.share

    def export_plan(self, bucket_bytes: int, base: int | None, shares: Sequence[Share]) -> WeightPlan:
        return self._source.export_plan(bucket_bytes, base, shares)

    def export_bucket(self, index: int) -> np.ndarray | None:
        """Bytes on the host, or None on ranks other than 0."""
        bucket = self._source.export_bucket(index)
        return None if bucket is None else bucket.cpu().numpy()

    def export_checksum(self) -> int | None:
        return self._source.export_checksum() if self._source.rank == 0 else None

    def export_share_checksums(self) -> list[int]:
        return self._source.export_share_checksums() if self._source.rank == 0 else []

    def begin_weights(self, version: int, plan: WeightPlan) -> None:
        self._sink.begin_weights(version, plan)

    def load_bucket(self, index: int, data: np.ndarray) -> None:
        self._sink.load_bucket(index, data)

    def end_weights(self, version: int, checksum: int, of_share: int | None = None) -> None:
        self._sink.end_weights(version, checksum, of_share)
        if self._aimed == "rollout":
            self.set_version(version)

    # -- collective transport --------------------------------------------------------------------------------

    def has_channel(self) -> bool:
        return self._channel is not None

    def open_channel(self, address: str, size: int, device: str, timeout_s: float) -> int:
        """Rank 0 of the source starts to listen and returns its port; the others take no part, and return
        0.
        """
        if self._source.rank > 0:
            return 0
        place = dict(address=address, size=size, device=device, timeout_s=timeout_s)
        self._channel = WeightChannel(port=0, rank=0, **place)
        return self._channel.port

    def enter_channel(self) -> None:
        """The source's side of `join_channel`."""
        if self._source.rank == 0:
            self._channel.join()

    def join_channel(
        self, port: int, rank: int, address: str, size: int, device: str, timeout_s: float
    ) -> None:
        place = dict(address=address, size=size, device=device, timeout_s=timeout_s)
        self._channel = WeightChannel(port=port, rank=rank, **place)
        self._channel.join()

    def send_weights(self, num_buckets: int) -> None:
        """All ranks go through the weights; rank 0 sends bucket i while it packs bucket i + 1."""
        sending = None
        for index in range(num_buckets):
            bucket = self._source.export_bucket(index)
            if sending is not None:
                sending.wait()
            if bucket is not None:
                sending = self._channel.broadcast(bucket)
        if sending is not None:
            sending.wait()

    def receive_weights(self, plan: WeightPlan) -> None:
        """Bucket i is copied into the parameters while bucket i + 1 arrives."""
        arriving: list[tuple[int, torch.Tensor, Any]] = []
        for bucket in plan.buckets:
            data = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._channel.device)
            arriving.append((bucket.index, data, self._channel.broadcast(data)))
            if len(arriving) == 2:
                self._finish(arriving.pop(0))
        for item in arriving:
            self._finish(item)

    def _finish(self, item: tuple[int, torch.Tensor, Any]) -> None:
        index, data, work = item
        work.wait()
        self._sink.load_bucket(index, data)


def publish(
    source: Group, target: Group, *, version: int, runtime: RuntimeConfig, role: str = "rollout"
) -> PublishReport:
    """Bring the weights of the target's `role` to the source's, as `version`, on every process of the target.

    Returns when the target has verified them. If it raises, the target is dirty and refuses to generate until
    a later publish, of everything, succeeds. Transports: shared (one group: nothing moves), object_store (through calls; the
    controller never touches the bytes), collective (a broadcast between the processes).
    """
    start = time.perf_counter()
    # A channel joins the trainer with the engines only; what is sent to another role is sent rarely.
    transport = choose_transport(source, target, runtime) if role == "rollout" else "object_store"
    if transport == "shared":
        fault_point("publish.mid")
        target.call("set_version", version)
        return PublishReport(0, time.perf_counter() - start, 0, None, transport)
    source.call("aim_weights", role)
    target.call("aim_weights", role)
    held = target.call("held_share")
    shares = [share for i, share in enumerate(held) if share and share not in held[:i]]
    plan = source.call("export_plan", runtime.bucket_mb << 20, _common_base(source, target), shares)[0]
    target.call("begin_weights", version, plan)
    move = _through_calls if transport == "object_store" else _through_broadcast
    move(source, target, plan, runtime)
    total = source.call("export_checksum")[0]
    own = source.call("export_share_checksums")[0]
    ends = [(version, total, own[shares.index(share)] if share else None) for share in held]
    target.call_each("end_weights", ends)
    return PublishReport(plan.num_bytes, time.perf_counter() - start, len(plan.buckets), total, transport)


def _common_base(source: Group, target: Group) -> int | None:
    """The checksum of whole weights that the source has sent and every process of the target still holds."""
    sent = source.call("published_base")[0]
    return sent if sent is not None and set(target.call("held_base")) == {sent} else None


def choose_transport(source: Group, target: Group, runtime: RuntimeConfig) -> Transport:
    """auto: shared in one group, collective between GPUs, else the object store."""
    if source is target:
        return "shared"
    if runtime.backend == "local":
        return "object_store"  # plain calls within the process
    if runtime.weight_transport != "auto":
        return runtime.weight_transport
    return "collective" if source.device == target.device == "cuda" else "object_store"


def _through_calls(source: Group, target: Group, plan: WeightPlan, runtime: RuntimeConfig) -> None:
    """Bucket i is loaded while bucket i + 1 is packed; at most two exist at a time."""
    exported = source.start("export_bucket", 0)
    loading: Pending | None = None
    for bucket in plan.buckets:
        exported.check()
        if loading is not None:
            loading.wait()
        if bucket.index == len(plan.buckets) // 2:
            fault_point("publish.mid")
        loading = target.start("load_bucket", bucket.index, exported.handle(0))
        if bucket.index + 1 < len(plan.buckets):
            exported = source.start("export_bucket", bucket.index + 1)
    loading.wait()


def _through_broadcast(source: Group, target: Group, plan: WeightPlan, runtime: RuntimeConfig) -> None:
    if not (source.call("has_channel")[0] and target.call("has_channel")[0]):
        _connect(source, target, runtime)
    sent = source.start("send_weights", len(plan.buckets))
    received = target.start("receive_weights", plan)
    fault_point("publish.mid")
    _wait_together([received, sent], runtime.call_timeout_s)


def _connect(source: Group, target: Group, runtime: RuntimeConfig) -> None:
    device = "cuda" if source.device == target.device == "cuda" else "cpu"
    place = (source.address, 1 + target.size, device, runtime.call_timeout_s)
    port = source.call("open_channel", *place)[0]
    joining = target.start_each("join_channel", [(port, 1 + rank, *place) for rank in range(target.size)])
    _wait_together([joining, source.start("enter_channel")], runtime.call_timeout_s)


def _wait_together(calls: Sequence[Pending], timeout_s: float) -> None:
    """Wait for calls that wait for each other: the first failure among them is raised, whichever it is in."""
    deadline = time.monotonic() + timeout_s
    waiting = list(calls)
    while waiting:
        for call in list(waiting):
            if call.poll(_POLL_S):
                call.wait()
                waiting.remove(call)
            elif time.monotonic() > deadline:
                call.wait(0.0)  # raises, and says who is late
