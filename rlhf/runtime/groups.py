"""Groups of worker processes, as the controller sees them.

Here: what a group is asked to be (`GroupSpec`), what can be asked of it (`Group`), what can go wrong
(`GroupError`), and `launch`, which brings groups up and guarantees that they go down. Not here: how they run
(`local.py`, `ray_groups.py`), whether a plan fits the machines (`placement.py`), what a worker does
(`rlhf.trainers.worker`).
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from rlhf.recipe.schema import RuntimeConfig

BUCKETS_IN_FLIGHT = 3  # of runtime.bucket_mb, that the object store has room for


@dataclass(frozen=True)
class GroupSpec:
    """A group to be launched. Each process makes one worker: `Worker(ProcessInfo(...), **kwargs)`."""

    name: str
    roles: tuple[str, ...]
    num_processes: int
    gpus: int  # 0 = on the CPU, otherwise one per process
    worker: str  # "package.module:Class"
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # may hold functions and torch modules
    threads: int = 1  # CPU threads of each process

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"group {self.name!r}: num_processes={self.num_processes}; use at least 1")
        if self.gpus not in (0, self.num_processes):
            raise ValueError(
                f"group {self.name!r}: gpus={self.gpus} with num_processes={self.num_processes}; "
                "a group has one process per GPU, or gpus=0"
            )
        if self.threads < 1:
            raise ValueError(f"group {self.name!r}: threads={self.threads}; use threads >= 1")
        module, _, name = self.worker.partition(":")
        if not module or not name:
            raise ValueError(f"group {self.name!r}: worker={self.worker!r}; want 'package.module:Class'")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


class GroupError(RuntimeError):
    """A group failed as a group. What a worker's own code raised arrives as the exception that it was."""


class PlacementError(GroupError):
    """The plan does not fit the machines."""


class LaunchError(GroupError):
    """A group did not come up."""


class DeadWorkerError(GroupError):
    """A process of a group ended in the middle of its work."""

    def __init__(self, message: str, *, group: str, rank: int) -> None:
        super().__init__(message)
        self.group, self.rank = group, rank


class CallTimeoutError(GroupError):
    """A group did not answer in time."""


class RemoteTraceback(Exception):
    """The cause of an exception that was raised in another process: where it happened there."""

    def __init__(self, text: str, *, group: str, rank: int, method: str) -> None:
        super().__init__(text)
        self.text, self.group, self.rank, self.method = text, group, rank, method

    def __str__(self) -> str:
        return f"in group {self.group!r}, rank {self.rank}, method {self.method}\n\n{self.text}"


class Pending(Protocol):
    """A call that is under way."""

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        """The results in rank order. Default deadline: runtime.call_timeout_s.

        Raises what the worker raised, with `RemoteTraceback` as its cause; DeadWorkerError; CallTimeoutError.
        """
        ...

    def check(self, timeout_s: float | None = None) -> None:
        """`wait` without fetching the results."""
        ...

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Whether `wait` would return or raise at once, after waiting for at most `timeout_s`."""
        ...

    def handle(self, rank: int = 0) -> Any:
        """One rank's result, as an argument for a call to another process without fetching it here; of `start_on`, rank 0
        is the one that was called."""
        ...


class Group(Protocol):
    """Processes that own some roles. Calls are carried out in the order in which they were made."""

    name: str
    roles: tuple[str, ...]
    size: int  # number of processes
    address: str  # of rank 0's machine, as the other groups reach it
    device: str  # "cpu" or "cuda"

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Every rank gets the same arguments; results in rank order."""
        ...

    def call_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Rank i gets args_per_rank[i]; results in rank order."""
        ...

    def start(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        """`call` without waiting. In a local group the work is done before this returns."""
        ...

    def start_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> Pending: ...

    def start_on(self, rank: int, method: str, *args: Any) -> Pending:
        """Call one rank only; what is pending has one result. Not for work in which ranks meet."""
        ...

    def close(self, *, graceful: bool = True) -> None:
        """End the group; graceful: let every worker's `close` run first, within a deadline."""
        ...


class Groups(Mapping[str, Group]):
    """The groups of a run by name, in order of launch. A context manager: leaving it ends them all."""

    def __init__(self, groups: Sequence[Group], shutdown: Callable[[], None] = lambda: None) -> None:
        self._groups = {group.name: group for group in groups}
        self._shutdown = shutdown
        self._closed = False

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def for_role(self, role: str) -> Group:
        """The group that hosts a role."""
        for group in self.values():
            if role in group.roles:
                return group
        hosted = ", ".join(f"{group.name}: {'+'.join(group.roles)}" for group in self.values())
        raise ValueError(f"no group hosts the role {role!r}; there are {hosted}")

    def close(self, *, graceful: bool = True) -> None:
        """End every group. Ctrl-C does not interrupt it: each part has a deadline of its own.

        All groups are closed even if one raises; the first exception is raised at the end, if graceful.
        """
        if self._closed:
            return
        self._closed = True
        with uninterrupted():
            failure = None
            for group in reversed(self._groups.values()):
                try:
                    group.close(graceful=graceful)
                except Exception as error:  # the others must still go down; raised below
                    failure = failure or error
            self._shutdown()
        if graceful and failure is not None:
            raise failure

    def __enter__(self) -> Groups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close(graceful=error is None)


def launch(specs: Sequence[GroupSpec], runtime: RuntimeConfig) -> Groups:
    """Bring up the groups, or raise and leave nothing behind.

    Use it as `with launch(...) as groups:`. Raises PlacementError at once if the machines cannot hold the
    plan, LaunchError if they do not within runtime.launch_timeout_s, and whatever a worker's constructor
    raises.
    """
    _check_names(specs)
    if runtime.backend == "local":
        from rlhf.runtime.local import launch_local

        return launch_local(specs)
    from rlhf.runtime.ray_groups import launch_ray

    return launch_ray(specs, runtime)


def _check_names(specs: Sequence[GroupSpec]) -> None:
    if not specs:
        raise ValueError("no group to launch")
    names = [spec.name for spec in specs]
    roles = [role for spec in specs for role in spec.roles]
    for kind, items in (("group name", names), ("role", roles)):
        twice = sorted({item for item in items if items.count(item) > 1})
        if twice:
            raise ValueError(f"{kind} {twice[0]!r} is used twice; every {kind} belongs to one group")


def load_worker_class(path: str) -> type:
    """The class named by 'package.module:Class'."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Answer Ctrl-C with one line instead of an exception, so that what is being closed gets closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, frame: object) -> None:
        print("closing the run's processes, a moment ...", file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
