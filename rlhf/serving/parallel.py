"""A model served by several processes of this machine: this one leads, the others follow.

The leader starts the followers, loads with them, and tells them of every call of its engine before it makes it, so that all
engines do the same steps (`rlhf.models.parallel`). What one process refuses (ValueError, KeyError), all refuse; any other
failure of a call, in any process, is the group's end: followers end with the leader, however it ended, and a leader
without followers fails every call. Here too: what runs in a follower. Not here: what is asked of the engine.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from rlhf.models.parallel import ParallelError, TensorParallel
from rlhf.rollout import Completion, Engine, Request, Update
from rlhf.serving.model import Served, load_alone
from rlhf.serving.settings import EngineSettings

_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(minutes=30)  # for one that hangs; one that has ended is noticed at once
_SEEN_S = 1.0  # for one whose end was noticed to have a code
_END_S = 5.0  # for a process to end that was told to
_REFUSALS = (ValueError, KeyError)


def load_parallel(settings: EngineSettings, name: str, *, cache_responses: bool = False) -> Served:
    """`load_served` where settings.tensor_parallel > 1."""
    followers = Followers(settings, cache_responses=cache_responses)
    parallel = _join(0, settings, followers.store)
    make = partial(LeadingEngine, followers=followers)
    try:
        with followers.watched("loading"):
            return load_alone(
                settings, name, cache_responses=cache_responses, parallel=parallel, make_engine=make
            )
    except BaseException:
        followers.end()
        raise


class Followers:
    """The other processes, as the leader sees them. They end with it, or with this object."""

    def __init__(self, settings: EngineSettings, *, cache_responses: bool) -> None:
        size = settings.tensor_parallel
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        listener = socket.create_server((_LOOPBACK, 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            _LOOPBACK,
            port,
            size,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._running: list[tuple[subprocess.Popen, Connection]] = []
        self.failure: ParallelError | None = None
        self.end = weakref.finalize(self, _end_all, self._running)  # also to be called
        for rank in range(1, size):
            self._running.append(_start())
            self._running[-1][1].send((rank, settings, cache_responses, port, torch.get_num_threads()))

    def tell(self, method: str, args: Sequence[Any]) -> None:
        if self.failure is not None:
            raise ParallelError(f"the engine has ended before: {self.failure}") from self.failure
        with self.watched(method):
            for _, connection in self._running:
                connection.send((method, args))

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Any failure within, but a refusal, ends the followers; it is raised with the name of one that has ended."""
        try:
            yield
        except _REFUSALS:
            raise
        except BaseException as error:
            message = f"{what}: {type(error).__name__}: {error}"
            self.failure = ParallelError(f"{self._ended() or 'rank 0 failed'} ({message}); start again")
            self.end()
            if isinstance(error, Exception):
                raise self.failure from error
            raise

    def _ended(self) -> str:
        """Which of them has ended by itself; a connection is closed a little before its process has ended."""
        deadline = time.monotonic() + _SEEN_S
        while time.monotonic() < deadline:
            for rank, (process, _) in enumerate(self._running, 1):
                if process.poll() is not None:
                    return f"the process of rank {rank} has ended with code {process.returncode}"
            time.sleep(0.01)
        return ""


def _end_all(running: list[tuple[subprocess.Popen, Connection]]) -> None:
    """Let them go, and see that they do."""
    for _, connection in running:
        connection.close()
    for process, _ in running:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    running.clear()


class LeadingEngine(Engine):
    """An engine whose calls the followers' engines make, too. Its weights do not change."""

    def __init__(self, *args: Any, followers: Followers, **kwargs: Any) -> None:
        self._followers, self._is_telling = followers, False
        super().__init__(*args, **kwargs)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        enough: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        own = partial(super().generate, enough=enough, on_progress=on_progress)
        return self._all("generate", requests, own=own, told=(requests, enough))

    def add(self, requests: Sequence[Request]) -> None:
        self._all("add", requests, own=super().add)

    def step(self) -> list[Update]:
        return self._all("step", own=super().step)

    def abort(self, request_id: str) -> list[Completion]:
        return self._all("abort", request_id, own=super().abort)

    def add_adapter(self, name: str, folder: str | Path) -> None:
        self._all("add_adapter", name, folder, own=super().add_adapter)

    def remove_adapter(self, name: str) -> None:
        self._all("remove_adapter", name, own=super().remove_adapter)

    def sleep(self) -> None:
        self._all("sleep", own=super().sleep)

    def wake(self) -> None:
        self._all("wake", own=super().wake)

    def set_version(self, version: int) -> None:
        raise ValueError(
            f"set_version({version}): the weights of a model that several processes serve do not change; start them under "
            "torchrun with engines of your own (docs/serving.md)"
        )

    def _all(
        self, method: str, *args: Any, own: Callable[..., Any], told: Sequence[Any] | None = None
    ) -> Any:
        if self._is_telling:  # the engine calls itself: so do the others
            return own(*args)
        self._followers.tell(method, args if told is None else told)
        self._is_telling = True
        try:
            with self._followers.watched(method):
                return own(*args)
        finally:
            self._is_telling = False


def _start() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # signals are the leader's to answer
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    theirs.close()
    return process, ours


def _join(rank: int, settings: EngineSettings, store: dist.Store) -> TensorParallel:
    """The group, all of whose sockets are on loopback."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = _TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    size = settings.tensor_parallel
    host = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, options)
    if settings.device == "cpu":
        return TensorParallel(host, host)
    torch.cuda.set_device(rank)
    of_device = dist.ProcessGroupNCCL.Options()
    of_device._timeout = _TIMEOUT
    store = dist.PrefixStore("device", store)
    return TensorParallel(dist.ProcessGroupNCCL(store, rank, size, of_device), host)


# -- in a follower -------------------------------------------------------------------------------------------------------


def follow(calls: queue.SimpleQueue[Any]) -> None:
    """Do what the leader does."""
    rank, settings, cache_responses, port, threads = calls.get()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    store = dist.TCPStore(_LOOPBACK, port, settings.tensor_parallel, timeout=_TIMEOUT, wait_for_workers=False)
    parallel = _join(rank, settings, store)
    try:
        engine = load_alone(settings, "", cache_responses=cache_responses, parallel=parallel).engine
    except ValueError as error:  # the leader says it
        logging.getLogger(__name__).info("rank %d: %s", rank, error)
        return
    while True:
        method, args = calls.get()
        with contextlib.suppress(*_REFUSALS):
            if method == "generate":
                requests, enough = args
                engine.generate(requests, enough=enough)
            else:
                getattr(engine, method)(*args)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listening = threading.Thread(target=_listen, args=(Connection(int(sys.argv[1])), calls), daemon=True)
    listening.start()
    try:
        follow(calls)
    except ParallelError:  # the leader's end, or what the leader tells of
        sys.exit(1)


def _listen(connection: Connection, calls: queue.SimpleQueue[Any]) -> None:
    """Calls in their order, and an end at once when the leader is gone: an exchange would wait for it."""
    while True:
        try:
            calls.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
