"""A rollout whose prompts are prefilled by some processes of its group and decoded by the others.

Prefilling is bound by arithmetic and decoding by memory, and a pass that does both makes the samples that decode wait for
somebody else's prompt. Here the first `prefill_processes` of the rollout's group run nothing but prompts and the others,
but for each prompt's last token, nothing but responses, at the same time: a prompt's keys and values go over as soon as
they are there (DistServe, Zhong et al. 2024, arXiv 2401.09670; Splitwise, Patel et al. 2023, arXiv 2311.18677). Samples
are those of engines that do both, to the bit.

Here: what travels, the worker's methods, and who is called when (`generate_apart`). Keys and values travel in buckets of
bounded size through the runtime's object store, from a GPU by way of the host's memory; the controller does not fetch
them. A process that dies ends the rollout with an error that names it. Not here: what is handed over and how it comes
into the cache (`rlhf.rollout.handover`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf.faults import fault_point
from rlhf.rollout import Completion, Engine, PromptPages, Request
from rlhf.trainers.weights import BucketSpec, TensorSpec, plan_buckets

if TYPE_CHECKING:
    from rlhf.runtime.groups import Group, Pending

_SLICE_S = 0.1  # of decoding, until a process can take more prompts
_POLL_S = 0.005
_ON_THE_WAY = 3  # buckets of one prefilling process: being made, ready, or being taken in
_BATCHES = 4  # at least, of prompts for each decoding process, where there are as many prompts


@dataclass(frozen=True)
class Apart:
    """How a group is split, and what bounds its batches of prompts."""

    prefill_processes: int  # the first of the group; the others decode
    batch_tokens: int  # of prompts prefilled in one call; a longer prompt is one by itself
    in_flight_bytes: int  # most keys and values on their way at one time
    timeout_s: float  # longest single call


@dataclass(frozen=True)
class Shipment:
    """One bucket of what was prefilled for a batch of requests."""

    batch: int  # its number in the rollout
    requests: tuple[Request, ...]  # of the whole batch
    pages: tuple[PromptPages, ...]  # without their data
    num_bytes: tuple[int, ...]  # of each one's data
    bucket: BucketSpec  # which bytes of whose data come; a tensor's name is its place in `pages`
    parts: tuple[np.ndarray, ...]  # (bytes,) uint8 for each piece of the bucket
    is_last: bool


@dataclass(frozen=True)
class Decoded:
    """What one slice of decoding brought."""

    finished: tuple[tuple[str, tuple[Completion, ...]], ...]  # by request id
    num_waiting: int  # samples that there was no room for


class _Outbox:
    """A batch that was prefilled, until its last bucket has left."""

    def __init__(
        self, number: int, requests: Sequence[Request], pages: Sequence[PromptPages], bucket_bytes: int
    ) -> None:
        self._number, self._requests, self._pages = number, tuple(requests), tuple(pages)
        specs = [TensorSpec(str(i), "uint8", (len(p.data),), len(p.data)) for i, p in enumerate(pages)]
        self._buckets = plan_buckets(specs, bucket_bytes) or [BucketSpec(0, (), 0)]

    def shipment(self, index: int) -> Shipment:
        bucket, nothing = self._buckets[index], torch.empty(0, dtype=torch.uint8)
        return Shipment(
            batch=self._number,
            requests=self._requests,
            pages=tuple(replace(p, data=nothing) for p in self._pages),
            num_bytes=tuple(len(p.data) for p in self._pages),
            bucket=bucket,
            parts=tuple(
                self._pages[int(piece.tensor.name)].data[piece.start : piece.start + piece.num_bytes].numpy()
                for piece in bucket.pieces
            ),
            is_last=index + 1 == len(self._buckets),
        )


class _Inbox:
    """Batches of which not all buckets have come."""

    def __init__(self) -> None:
        self._data: dict[int, list[torch.Tensor]] = {}  # by number

    def take(self, shipment: Shipment) -> list[PromptPages] | None:
        """The batch's pages once all have come. Bytes are copied: the object store's memory is for what is on its way."""
        if shipment.batch not in self._data:
            self._data[shipment.batch] = [torch.empty(n, dtype=torch.uint8) for n in shipment.num_bytes]
        data = self._data[shipment.batch]
        for piece, part in zip(shipment.bucket.pieces, shipment.parts, strict=True):
            target = data[int(piece.tensor.name)][piece.start : piece.start + piece.num_bytes]
            np.copyto(target.numpy(), part)
        if not shipment.is_last:
            return None
        del self._data[shipment.batch]
        return [replace(pages, data=own) for pages, own in zip(shipment.pages, data, strict=True)]


class HandoverMethods:
    """The methods that `generate_apart` calls, for a worker with an engine.

    The worker supplies what comes before and after sampling of any kind.
    """

    engine: Engine | None
    _outbox: _Outbox | None = None
    _inbox: _Inbox
    _is_before_mid: bool

    def _begin_sampling(self, role: str) -> Engine:
        raise NotImplementedError

    def _end_sampling(self, engine: Engine) -> None:
        raise NotImplementedError

    def begin_apart(self, share: Sequence[Request]) -> int:
        """Get ready, with room for the requests that this process will probably decode. Bytes of one token in the cache."""
        engine = self._begin_sampling("rollout")
        engine.count_anew()
        engine.reserve(share)
        self._outbox, self._inbox, self._is_before_mid = None, _Inbox(), True
        return engine.token_bytes

    def prefill(self, batch: int, requests: Sequence[Request], bucket_bytes: int) -> Shipment:
        """Prefill a batch; its first bucket. `ship` gives the others, before the next batch."""
        self._outbox = _Outbox(batch, requests, self.engine.prefill(requests), bucket_bytes)
        return self.ship(0)

    def ship(self, index: int) -> Shipment:
        shipment = self._outbox.shipment(index)
        if shipment.is_last:
            self._outbox = None
        return shipment

    def decode(self, seconds: float, *shipments: Shipment) -> Decoded:
        """Take in what was prefilled elsewhere, and decode for about as long, or until there is no work."""
        engine, end, finished = self.engine, time.monotonic() + seconds, []
        for shipment in shipments:
            pages = self._inbox.take(shipment)
            if pages is not None:
                engine.add(shipment.requests, pages=pages)
        while engine.has_work:
            finished += [(u.request_id, u.completions) for u in engine.step() if u.completions is not None]
            if finished and self._is_before_mid:
                self._is_before_mid = False
                fault_point("rollout.mid")
            if time.monotonic() >= end:
                break
        return Decoded(tuple(finished), engine.num_waiting)

    def end_apart(self) -> None:
        self.engine.measure()
        self._end_sampling(self.engine)


# -- the controller's side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    number: int
    requests: tuple[Request, ...]
    num_buckets: int

    @property
    def num_samples(self) -> int:
        return sum(len(r.seeds) for r in self.requests)


@dataclass(frozen=True)
class _Bucket:
    """One that is ready."""

    maker: _Prefiller
    batch: _Batch
    index: int
    handle: Any  # of its Shipment

    @property
    def is_last(self) -> bool:
        return self.index + 1 == self.batch.num_buckets


class _Process:
    """One process of a group, with at most one call under way."""

    def __init__(self, group: Group, rank: int, timeout_s: float) -> None:
        self._group, self._rank, self._timeout_s = group, rank, timeout_s
        self.call: Pending | None = None
        self._deadline = 0.0

    def start(self, method: str, *args: Any) -> None:
        self.call = self._group.start_on(self._rank, method, *args)
        self._deadline = time.monotonic() + self._timeout_s

    def finished_call(self) -> Pending | None:
        """The call that is over now, with success. Raises what it raised, and CallTimeoutError where it takes too long."""
        call = self.call
        if call is None:
            return None
        if not call.poll():
            if time.monotonic() > self._deadline:
                call.check(0.0)  # raises, and says where the process is
            return None
        call.check()
        self.call = None
        return call


class _Prefiller(_Process):
    """Prefills batch after batch while its buckets are taken in."""

    def __init__(self, group: Group, rank: int, timeout_s: float, batches: deque[_Batch], bucket_bytes: int):
        super().__init__(group, rank, timeout_s)
        self.ready: deque[_Bucket] = deque()
        self.num_on_the_way = 0  # buckets
        self._batches, self._bucket_bytes = batches, bucket_bytes
        self._batch: _Batch | None = None
        self._index = 0  # of the bucket that is being made

    def go_on(self) -> bool:
        """Whether anything happened."""
        call = self.finished_call()
        if call is not None:
            self.ready.append(_Bucket(self, self._batch, self._index, call.handle()))
        if self.call is None and self.num_on_the_way < _ON_THE_WAY:
            return self._begin() or call is not None
        return call is not None

    def _begin(self) -> bool:
        if self._batch is not None and self._index + 1 < self._batch.num_buckets:
            self._index += 1
            self.start("ship", self._index)
        elif self._batches:
            self._batch, self._index = self._batches.popleft(), 0
            self.start("prefill", self._batch.number, self._batch.requests, self._bucket_bytes)
        else:
            return False
        self.num_on_the_way += 1
        return True


class _Decoder(_Process):
    """Decodes slice after slice."""

    def __init__(self, group: Group, rank: int, timeout_s: float) -> None:
        super().__init__(group, rank, timeout_s)
        self.num_in_work = 0  # samples
        self.num_waiting = 0  # of them, without room there
        self._arriving: set[int] = set()  # batches of which more will come
        self._taking_in: list[_Bucket] = []

    def collect(self) -> tuple[tuple[str, tuple[Completion, ...]], ...]:
        """What is finished since the last time."""
        call = self.finished_call()
        if call is None:
            return ()
        for bucket in self._taking_in:
            bucket.maker.num_on_the_way -= 1
        self._taking_in = []  # and with it the object store's memory
        (decoded,) = call.wait()
        self.num_waiting = decoded.num_waiting
        self.num_in_work -= sum(len(completions) for _, completions in decoded.finished)
        return decoded.finished

    def go_on(self, prefillers: Sequence[_Prefiller]) -> bool:
        """Begin the next slice, with what is ready; whether there is anything to do."""
        self._taking_in = [bucket for prefiller in prefillers for bucket in self._taken(prefiller)]
        if not self._taking_in and not self.num_in_work:
            return False
        self.start("decode", _SLICE_S, *(bucket.handle for bucket in self._taking_in))
        return True

    def _taken(self, prefiller: _Prefiller) -> Iterator[_Bucket]:
        """More prompts only where none waits for room; what is left of a batch in any case."""
        while prefiller.ready:
            bucket = prefiller.ready[0]
            number = bucket.batch.number
            may_come = number in self._arriving if bucket.index else not self.num_waiting
            if not may_come:
                return
            if bucket.is_last:
                self._arriving.discard(number)
                self.num_in_work += bucket.batch.num_samples
            else:
                self._arriving.add(number)
            yield prefiller.ready.popleft()


def generate_apart(group: Group, requests: Sequence[Request], apart: Apart) -> list[list[Completion]]:
    """Completions as [request][sample], in the order given; what `Engine.generate` of one engine gives. Raises what a
    worker raised, DeadWorkerError and CallTimeoutError."""
    prefill, ranks = apart.prefill_processes, range(group.size)
    num_decoders = group.size - prefill
    shares = [() if rank < prefill else (requests[rank - prefill :: num_decoders]) for rank in ranks]
    token_bytes = group.call_each("begin_apart", [(share,) for share in shares])[0]
    bucket_bytes = max(apart.in_flight_bytes // (_ON_THE_WAY * prefill), token_bytes)
    batches = deque(_batches(requests, apart.batch_tokens, num_decoders, token_bytes, bucket_bytes))
    prefillers = [_Prefiller(group, r, apart.timeout_s, batches, bucket_bytes) for r in ranks[:prefill]]
    decoders = [_Decoder(group, r, apart.timeout_s) for r in ranks[prefill:]]
    found: dict[str, tuple[Completion, ...]] = {}
    while len(found) < len(requests):
        news = [prefiller.go_on() for prefiller in prefillers]
        for decoder in decoders:
            found |= decoder.collect()
        idle = [decoder for decoder in decoders if decoder.call is None]
        news += [d.go_on(prefillers) for d in sorted(idle, key=lambda d: d.num_in_work)]
        busy = [p.call for p in (*prefillers, *decoders) if p.call is not None]
        assert any(news) or busy or len(found) == len(requests), (
            "nothing is under way although requests are left"
        )
        if busy and not any(news):
            busy[0].poll(_POLL_S)
    group.call("end_apart")
    return [list(found[request.id]) for request in requests]


def _batches(
    requests: Sequence[Request], batch_tokens: int, num_decoders: int, token_bytes: int, bucket_bytes: int
) -> Iterator[_Batch]:
    """Requests in order, as many as one call prefills and one bucket holds, so few that every decoder gets some soon."""
    most = -(-len(requests) // (_BATCHES * num_decoders))
    limit = min(batch_tokens, bucket_bytes // token_bytes)
    start, tokens, number = 0, 0, 0
    for end, request in enumerate([*requests, None]):
        num_tokens = len(request.prompt_ids) - 1 if request is not None else 0
        if end > start and (request is None or end - start == most or tokens + num_tokens > limit):
            yield _Batch(number, tuple(requests[start:end]), max(-(-tokens * token_bytes // bucket_bytes), 1))
            start, tokens, number = end, 0, number + 1
        tokens += num_tokens
