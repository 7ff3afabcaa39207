"""Groups in the controller's own process: no daemon, real tracebacks, a debugger that works.

The same worker classes as under Ray. Not here: deadlines (a call that runs in this thread cannot be timed
out) and the number of threads (one process has one; the workers set it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.process import ProcessInfo
from rlhf.runtime.groups import Groups, GroupSpec, PlacementError, load_worker_class


class LocalPending:
    """A call that is over: its result, or what it raised."""

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self._result, self._error = result, error

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        self.check()
        return [self._result]

    def check(self, timeout_s: float | None = None) -> None:
        if self._error is not None:
            raise self._error

    def poll(self, timeout_s: float = 0.0) -> bool:
        return True

    def handle(self, rank: int = 0) -> Any:
        self.check()
        return self._result


class LocalGroup:
    """One worker object in this process."""

    size = 1
    address = "127.0.0.1"

    def __init__(self, spec: GroupSpec) -> None:
        self.name, self.roles, self.device = spec.name, spec.roles, spec.device
        info = ProcessInfo(spec.name, 0, 1, 0, self.address, 0, spec.device)
        self._worker = load_worker_class(spec.worker)(info, **spec.kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self._worker, method)(*args, **kwargs)]

    def call_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        (args,) = args_per_rank
        return self.call(method, *args)

    def start(self, method: str, *args: Any, **kwargs: Any) -> LocalPending:
        try:
            return LocalPending(getattr(self._worker, method)(*args, **kwargs))
        except Exception as error:  # raised again, traceback and all, by wait()
            return LocalPending(error=error)

    def start_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> LocalPending:
        (args,) = args_per_rank
        return self.start(method, *args)

    def start_on(self, rank: int, method: str, *args: Any) -> LocalPending:
        if rank != 0:
            raise ValueError(f"group {self.name!r}: rank {rank} of 1")
        return self.start(method, *args)

    def close(self, *, graceful: bool = True) -> None:
        worker, self._worker = self._worker, None
        if hasattr(worker, "close"):
            worker.close()


def launch_local(specs: Sequence[GroupSpec]) -> Groups:
    """Make every group's worker in this process, in order; if one fails, the ones made before are closed."""
    for spec in specs:
        if spec.num_processes > 1:
            raise PlacementError(
                f"group {spec.name!r} has {spec.num_processes} processes, which runtime.backend=local cannot "
                "host; set runtime.backend: ray"
            )
        if spec.gpus:
            _check_gpu(spec)
    made: list[LocalGroup] = []
    try:
        for spec in specs:
            made.append(LocalGroup(spec))
    except BaseException:
        Groups(made).close(graceful=False)
        raise
    return Groups(made)


def _check_gpu(spec: GroupSpec) -> None:
    import torch

    if not torch.cuda.is_available():
        raise PlacementError(
            f"group {spec.name!r} asks for {spec.gpus} GPU, this machine has none that torch can use; "
            f"set placement.{spec.name}.gpus: 0"
        )
