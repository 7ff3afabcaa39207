"""The engine behind asyncio: one thread steps it, any number of tasks wait for what they asked for.

Here: who may submit, what reaches whom, pause, new weights, failures, the end. Every accepted request ends exactly once:
with its last delta, or with an error. Not here: text (`rlhf.serving.text`), HTTP (`rlhf.serving.app`), sampling
(`rlhf.rollout`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.models.parallel import ParallelError
from rlhf.rollout import Delta, Engine, Request, Update
from rlhf.serving.metrics import Metrics

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 3  # of the engine's steps, after which it counts as broken
T = TypeVar("T")


class Overloaded(RuntimeError):
    """There is no room to wait; the client may try again."""


class Stopping(RuntimeError):
    """The engine takes no more, or has given up what was in work, because it is being shut down."""


class EngineFailed(RuntimeError):
    """The engine failed while the request was in work. It goes on with new ones."""


@dataclass(frozen=True)
class Load:
    """What the engine is at, as of its last step."""

    num_running: int = 0  # samples
    num_waiting: int = 0  # samples
    pages_in_use: int = 0
    num_pages: int = 0
    prefill_tokens: int = 0
    hit_tokens: int = 0
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    version: int = 0  # optimiser steps in the weights


class Stream:
    """One request's news, for one task. Iterating yields lists of deltas: all that came since the last look, so that a
    slow reader gets fewer and larger ones. It ends after the last sample's end, or raises what ended it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began_s = time.monotonic()
        self.newest_s: dict[int, float] = {}  # when each sample's last token came
        self._news: list[Delta] = []
        self._error: Exception | None = None
        self._is_over = False
        self._there = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether no more news will come."""
        return self._is_over

    def put(self, deltas: tuple[Delta, ...], is_over: bool) -> None:
        assert not self._is_over, f"news of request {self.request.id!r} after its end"
        self._news += deltas
        self._is_over = is_over
        self._there.set()

    def fail(self, error: Exception) -> None:
        assert not self._is_over, f"an error of request {self.request.id!r} after its end"
        self._error, self._is_over = error, True
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # it may be that nobody waits any more
        self._there.set()

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._all()

    async def _all(self) -> AsyncIterator[list[Delta]]:
        while True:
            await self._there.wait()
            self._there.clear()
            news, self._news = self._news, []
            if news:
                yield news
            if self._is_over and not self._news:
                if self._error is not None:
                    raise self._error
                return


class AsyncEngine:
    """Owns `engine`, which nobody else may touch from then on. All methods are for one event loop's tasks.

    `max_waiting`: samples that may wait beside `max_sequences` that run; more are refused with Overloaded.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.load, self.metrics = Load(), Metrics()
        self.is_paused = False
        self._engine = engine
        self.most_samples = engine.config.max_sequences + max_waiting
        self._streams: dict[str, Stream] = {}  # of this side: requests that have not ended
        self._num_samples = 0  # of these
        self._is_closing = False
        self._num_failures = 0  # in a row
        self._ready = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()  # for the thread, in order
        self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="rlhf-engine", daemon=True)

    # for tasks

    def start(self) -> None:
        """Start the thread. Call it once, in the event loop."""
        self._loop = asyncio.get_running_loop()
        if self._engine.config.cache_tokens is not None:
            self._engine.wake()  # the cache's memory is taken before anybody asks
        self._measure()
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and its last steps did not all fail."""
        return self._thread.is_alive() and self._num_failures < _FAILURES_IN_A_ROW

    @property
    def num_open(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._streams)

    async def submit(self, request: Request) -> Stream:
        """Let the engine take the request, which must have `stream` set. Raises ValueError as `Engine.add` does,
        Overloaded, and Stopping. Whoever has a stream reads it to its end or calls `abort`."""
        if not request.stream:
            raise ValueError(f"request {request.id!r} does not stream; set stream=True")
        if request.id in self._streams:
            raise ValueError(f"request {request.id!r} is in work; give every request an id of its own")
        if self._is_closing:
            raise Stopping("the server is shutting down")
        if self._streams and self._num_samples + len(request.seeds) > self.most_samples:
            raise Overloaded(
                f"{self._num_samples} samples run or wait and {len(request.seeds)} more were asked for; there is room for "
                f"{self.most_samples}; try again later"
            )
        stream = Stream(request)
        self._streams[request.id] = stream
        self._num_samples += len(request.seeds)
        self._tell(lambda: self._add(stream))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            self.abort(stream)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """Take the request out of work; what came of it so far is dropped. Nothing happens for one that has ended."""
        if self._close_stream(stream, "aborted"):
            self._tell(lambda: self._drop(stream.request.id))

    async def generate(self, request: Request) -> AsyncIterator[list[Delta]]:
        """Submit, and yield the news; whoever stops listening, or is cancelled, aborts the request."""
        stream = await self.submit(request)
        try:
            async for news in stream:
                yield news
        finally:
            self.abort(stream)

    async def pause(self) -> None:
        """Hold all work: on return no step runs, and none begins before `resume`. Requests are still accepted."""
        await self._between_steps(lambda: self._set_paused(True))

    async def resume(self) -> None:
        await self._between_steps(lambda: self._set_paused(False))

    async def update_weights(self, change: Callable[[], T], version: int) -> T:
        """Run `change` in the engine's thread between two steps; the weights are those of `version` from then on, also
        where it raises. Requests in work go on under them. Whoever is cancelled before `change` began has changed nothing."""

        def update() -> T:
            try:
                return change()
            finally:
                self._engine.set_version(version)

        return await self._between_steps(update)

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, wait for those in work as long as the grace lasts, end the others with Stopping, and
        stop the thread."""
        self._is_closing = True
        ends = asyncio.get_running_loop().time() + grace_s
        while self._streams and asyncio.get_running_loop().time() < ends and self._thread.is_alive():
            await asyncio.sleep(0.02)
        for stream in list(self._streams.values()):
            if self._close_stream(stream, "aborted"):
                stream.fail(Stopping("the server is shutting down"))
                self._tell(lambda name=stream.request.id: self._drop(name))
        self._tell(self._stop)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _close_stream(self, stream: Stream, outcome: str) -> bool:
        """Forget it; whether it was open."""
        if self._streams.get(stream.request.id) is not stream:
            return False
        del self._streams[stream.request.id]
        self._num_samples -= len(stream.request.seeds)
        self.metrics.requests[outcome] += 1
        self.metrics.request.observe(time.monotonic() - stream.began_s)
        return True

    async def _between_steps(self, do: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():  # nobody waits any more
                return
            try:
                done.set_result(do())
            except Exception as error:  # the caller's
                done.set_exception(error)

        if not self._thread.is_alive():
            raise Stopping("the engine does not run")
        self._tell(command)
        return await asyncio.wrap_future(done)

    def _tell(self, command: Callable[[], None]) -> None:
        with self._ready:
            self._commands.append(command)
            self._ready.notify()

    def _deliver(self, news: list[Update], error: Exception | None = None) -> None:
        """In the event loop: hand out what a step brought, or end with `error` what the engine has lost."""
        for update in news:
            stream = self._streams.get(update.request_id)
            if stream is None:  # aborted meanwhile
                continue
            is_over = update.completions is not None
            self._count(stream, update.deltas)
            if is_over:
                self._close_stream(stream, "finished")
            stream.put(update.deltas, is_over)
        if error is not None:
            for stream in [s for s in self._streams.values() if s.accepted.done()]:
                self._close_stream(stream, "failed")
                stream.fail(error)

    def _count(self, stream: Stream, deltas: tuple[Delta, ...]) -> None:
        metrics, now, newest = self.metrics, time.monotonic(), stream.newest_s
        if deltas and not newest:
            metrics.time_to_first_token.observe(now - stream.began_s)
        for delta in deltas:
            metrics.generated_tokens += len(delta.token_ids)
            if delta.index in newest:
                metrics.inter_token.observe(now - newest[delta.index])
            newest[delta.index] = now
            if delta.finish_reason is not None:
                metrics.samples[delta.finish_reason] += 1

    def _answer(self, stream: Stream, error: Exception | None) -> None:
        """In the event loop: accept or refuse."""
        if self._streams.get(stream.request.id) is not stream:  # aborted meanwhile
            return
        if error is None:
            self.metrics.prompt_tokens += len(stream.request.prompt_ids)
            stream.accepted.set_result(None)
        else:
            self._close_stream(stream, "refused" if isinstance(error, ValueError) else "failed")
            stream.fail(error)

    # in the thread

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._commands and (self.is_paused or not self._engine.has_work):
                    if self._is_stopped:
                        return
                    self._ready.wait()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if self._is_stopped:
                return
            if self._engine.has_work and not self.is_paused:
                self._step()

    def _step(self) -> None:
        try:
            news = self._engine.step()
        except Exception as error:  # the engine has dropped all its work; it goes on with what is added next
            _log.exception("a step of the engine failed")
            self._num_failures += 1
            self._measure()
            self._post(self._deliver, [], self._failure(error))
            return
        self._num_failures = 0
        self._measure()
        if news:
            self._post(self._deliver, news)

    def _add(self, stream: Stream) -> None:
        try:
            self._engine.add([stream.request])
        except ValueError as error:
            self._post(self._answer, stream, error)
        except Exception as error:  # such as memory that is not there; the others' work is whole
            _log.exception("request %s could not be taken in", stream.request.id)
            self._drop(stream.request.id)
            self._post(self._answer, stream, self._failure(error))
        else:
            self._measure()
            self._post(self._answer, stream, None)

    def _failure(self, error: Exception) -> EngineFailed:
        if isinstance(error, ParallelError):  # which nothing mends
            self._num_failures = _FAILURES_IN_A_ROW
        failure = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _drop(self, request_id: str) -> None:
        try:
            self._engine.abort(request_id)
        except (KeyError, ParallelError):  # it has ended meanwhile, or was never taken in
            return
        self._measure()

    def _set_paused(self, value: bool) -> None:
        self.is_paused = value

    def _stop(self) -> None:
        self._is_stopped = True

    def _measure(self) -> None:
        engine = self._engine
        self.load = Load(
            engine.num_running,
            engine.num_waiting,
            engine.pages_in_use,
            engine.num_pages,
            version=engine.version,
            **engine.counts,
        )

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None, "start() was not called"
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed, and with it everybody who could have listened
            self._is_stopped = True
