"""Rollouts in which some processes prefill and the others decode: to the bit what one engine does alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from apart_workers import VOCAB, Sampling, make_engine

from rlhf.recipe.schema import RuntimeConfig
from rlhf.rng import key
from rlhf.rollout import PagesError, Request, SamplingParams
from rlhf.runtime.groups import CallTimeoutError, DeadWorkerError, GroupSpec, launch
from rlhf.runtime.local import LocalPending
from rlhf.trainers import handover
from rlhf.trainers.handover import Apart, Shipment, generate_apart

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, fp32
APART = Apart(prefill_processes=1, batch_tokens=512, in_flight_bytes=1 << 30, timeout_s=60.0)


def make_requests(count=14, n=3) -> list[Request]:
    choose = random.Random(1)
    shared = tuple(choose.randrange(VOCAB) for _ in range(20))
    return [
        Request(
            f"0/{i}",
            (shared if i % 3 == 0 else ())
            + tuple(choose.randrange(VOCAB) for _ in range(choose.randint(1, 60))),
            SamplingParams(
                max_tokens=choose.randint(1, 12), stop_ids=(3,), prompt_logprobs=0 if i % 4 == 0 else None
            ),
            tuple(key(0, "apart", i, j) for j in range(n)),
        )
        for i in range(count)
    ]


class _Late:
    """A call whose end is seen only when it was asked for some times."""

    def __init__(self, done: LocalPending, times: int, on_end: Any) -> None:
        self._done, self._times, self._on_end = done, times, on_end

    def poll(self, timeout_s: float = 0.0) -> bool:
        self._times -= 1
        if self._times == 0:
            self._on_end()
        return self._times <= 0

    def check(self, timeout_s: float | None = None) -> None:
        self._done.check()

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        return self._done.wait()

    def handle(self, rank: int = 0) -> Any:
        return self._done.handle()


class Together:
    """A group whose processes are objects here, and whose calls end in an order of chance."""

    def __init__(self, size: int, *, seed: int = 0, **sizes: Any) -> None:
        self.size = size
        self.workers = [Sampling(None, **sizes) for _ in range(size)]
        self.calls: list[tuple[int, str]] = []
        self.in_flight = self.most_in_flight = self.most_waiting = 0
        self._chance = random.Random(seed)

    def call(self, method: str) -> list[Any]:
        return [getattr(worker, method)() for worker in self.workers]

    def call_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(w, method)(*args) for w, args in zip(self.workers, args_per_rank, strict=True)]

    def start_on(self, rank: int, method: str, *args: Any) -> _Late:
        self.calls.append((rank, method))
        try:
            done = LocalPending(getattr(self.workers[rank], method)(*args))
        except Exception as error:
            done = LocalPending(error=error)
        taken = sum(part.nbytes for arg in args if isinstance(arg, Shipment) for part in arg.parts)
        if method == "decode" and rank == self.size - 1:
            self.most_waiting = max(self.most_waiting, self.workers[rank].engine.num_waiting)
        made = 0 if method == "decode" else sum(part.nbytes for part in done.handle().parts)
        self.in_flight += made
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def end() -> None:
            self.in_flight -= taken

        return _Late(done, self._chance.randint(1, 6), end)


@pytest.fixture(scope="module")
def expected() -> list:
    return make_engine().generate(make_requests())


@pytest.fixture
def one_pass_a_call(monkeypatch):
    monkeypatch.setattr(handover, "_SLICE_S", 0.0)


@pytest.mark.parametrize(
    ("size", "changes", "sizes"),
    [
        (2, {}, {}),
        (2, {"in_flight_bytes": 3 * 20 * TOKEN_BYTES}, {}),  # prompts in several buckets
        (5, {"prefill_processes": 2, "in_flight_bytes": 6 * 33 * TOKEN_BYTES}, {}),
        (4, {"prefill_processes": 3, "batch_tokens": 30}, {}),
        (3, {}, {"cache_tokens": 112, "max_batch_tokens": 40}),
        (3, {"in_flight_bytes": 1}, {"max_sequences": 3}),
    ],
    ids=str,
)
def test_however_it_is_split_it_is_what_one_engine_does(expected, one_pass_a_call, size, changes, sizes):
    """Would catch: a prompt that is lost, doubled or put together from pieces of two; pages left behind; more on its way
    than was allowed; a second rollout that finds the first one's rest."""
    group, apart = Together(size, **sizes), Apart(**{**vars(APART), **changes})
    for _ in range(2):
        assert generate_apart(group, make_requests(), apart) == expected
        assert group.in_flight == 0
    assert group.most_in_flight <= max(apart.in_flight_bytes, 3 * TOKEN_BYTES)
    decoding = [worker.rollout_stats() for worker in group.workers[apart.prefill_processes :]]
    assert sum(stats["rollout/handed_tokens"] for stats in decoding) > 0


def test_prompts_are_prefilled_while_others_are_decoded(expected, one_pass_a_call):
    """Would catch: all prompts first and all responses afterwards; a process that gets no share."""
    group = Together(3)
    assert generate_apart(group, make_requests(), APART) == expected
    prefills = [i for i, (_, method) in enumerate(group.calls) if method == "prefill"]
    for rank in (1, 2):
        assert group.calls.index((rank, "decode")) < prefills[-1]
    assert {rank for rank, method in group.calls if method == "prefill"} == {0}


def test_prompts_wait_where_they_cost_no_memory(expected, one_pass_a_call):
    """Would catch: keys of all prompts piled up in the host memory of a process that has no room to decode them."""
    waiting = {}
    for room in (3, 64):
        group = Together(2, max_sequences=room)
        assert (
            generate_apart(group, make_requests(), Apart(**{**vars(APART), "batch_tokens": 30})) == expected
        )
        waiting[room] = group.most_waiting
    assert 0 < waiting[3] <= 12 and waiting[64] == 0


def test_pages_of_other_weights_are_refused():
    """Would catch: a process that missed an update and whose keys are used all the same."""
    group = Together(2)
    group.workers[1].engine.set_version(4)
    with pytest.raises(PagesError, match="weight version 0 in an engine of weight version 4"):
        generate_apart(group, make_requests(), APART)


def test_a_call_that_does_not_end_ends_the_rollout():
    """Would catch: a rollout that waits for ever for a process that hangs."""
    group = Together(2)
    start_on = group.start_on
    group.start_on = lambda rank, method, *args: start_on(rank, method, *args) if rank else _Stuck()
    with pytest.raises(CallTimeoutError, match="rank 0 is stuck"):
        generate_apart(group, make_requests(), Apart(**{**vars(APART), "timeout_s": 0.1}))


class _Stuck:
    def poll(self, timeout_s: float = 0.0) -> bool:
        return False

    def check(self, timeout_s: float | None = None) -> None:
        assert timeout_s == 0.0
        raise CallTimeoutError("rank 0 is stuck")


@pytest.mark.ray
@pytest.mark.slow
def test_two_processes(expected):
    """Would catch: what only processes of their own show: arrays that cannot be written to, results that went away with the
    call, calls that wait for each other; and a rollout that waits for ever for a process that died, or does without it."""
    pytest.importorskip("ray")
    spec = GroupSpec("sample", ("rollout",), 2, 0, "apart_workers:Sampling")
    with launch([spec], RuntimeConfig(backend="ray", bucket_mb=1, launch_timeout_s=120)) as groups:
        group = groups["sample"]
        for in_flight_bytes in (1 << 20, 3 * 20 * TOKEN_BYTES):
            apart = Apart(1, 512, in_flight_bytes, timeout_s=60.0)
            assert generate_apart(group, make_requests(), apart) == expected
            prefilling, decoding = group.call("rollout_stats")
            assert prefilling["rollout/handed_tokens"] == 0 < decoding["rollout/handed_tokens"]
        group.call("die_in", 2)
        with pytest.raises(
            DeadWorkerError, match=r"'sample': rank 0 \(pid \d+ on .*\) died during prefill\(\)"
        ):
            generate_apart(group, make_requests(), APART)
