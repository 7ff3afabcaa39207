"""Groups of Ray actors: one placement group per group, one actor per process.

Here: the cluster (ours for the run, or one that is there already), the actors, calls and their failures, and
taking everything down. Not here: what happens inside an actor (`ray_host.py`), and whether the plan fits
(`placement.py`).

A cluster of our own listens on the loopback interface only and keeps its files in a folder that goes with it;
a watchdog (`watchdog.py`) ends its processes even when the controller is killed.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: no usage reports
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # we hide the GPUs from actors without any

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray.exceptions import RayActorError, RayError  # noqa: E402
from ray.util import get_node_ip_address, placement_group, remove_placement_group  # noqa: E402
from ray.util.placement_group import PlacementGroup  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

import rlhf  # noqa: E402
from rlhf.process import ProcessInfo  # noqa: E402
from rlhf.recipe.schema import RuntimeConfig  # noqa: E402
from rlhf.runtime import placement, watchdog  # noqa: E402
from rlhf.runtime.groups import (  # noqa: E402
    BUCKETS_IN_FLIGHT,
    CallTimeoutError,
    DeadWorkerError,
    GroupError,
    Groups,
    GroupSpec,
    LaunchError,
    RemoteTraceback,
)
from rlhf.runtime.ray_host import (  # noqa: E402
    Failed,
    Host,
    Identity,
    Status,
    process_state,
    read_stacks,
)

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once
_CLOSE_S = 10.0  # for the workers' own `close` when a run ends well, before they are killed
_GRACE_S = 3.0  # after a rank failed, for the others: a process that dies makes its peers fail too
_LONGEST_ROOT = 20  # characters; the path of a Unix socket in a Ray session has 107 at most
_SHUTDOWN_S = 20.0  # for ray.shutdown, before its processes are killed
_END_S = 5.0  # for the watchdog, beside its sweep
_SLICE_S = 0.5  # of a wait that cannot be interrupted
_STORE_MB = 256  # object store, beside the weights in flight
_STDERR_LINES = 20

# What an actor takes over from the controller's environment. Nothing that may hold a secret: Ray writes it to
# its logs.
_PASSED_ON = (
    "RLHF_FAULTS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "DS_ACCELERATOR",
    "TRITON_INTERPRET",
    "OMP_WAIT_POLICY",
)


def launch_ray(specs: Sequence[GroupSpec], runtime: RuntimeConfig) -> Groups:
    """See `rlhf.runtime.groups.launch`. All groups come up at the same time, under one deadline."""
    deadline = time.monotonic() + runtime.launch_timeout_s
    cluster = Cluster(specs, runtime)
    groups: list[RayGroup] = []
    try:
        placement.check(specs, ray.cluster_resources())
        for spec in specs:
            groups.append(RayGroup(spec, runtime, cluster.logs))
        _wait_for_places(groups, deadline, runtime)
        for group in groups:
            group.start_actors(cluster.address)
        for group in groups:
            group.introduce(deadline)
        for pending in [group.build() for group in groups]:
            pending.check(max(0.0, deadline - time.monotonic()))
    except BaseException:
        Groups(groups, cluster.stop).close(graceful=False)
        raise
    return Groups(groups, cluster.stop)


def _wait_for_places(groups: Sequence[RayGroup], deadline: float, runtime: RuntimeConfig) -> None:
    for group in groups:
        while not group.place.wait(_SLICE_S):  # in slices: it does not hear Ctrl-C while it waits
            if time.monotonic() > deadline:
                late = [g.spec for g in groups if not g.place.wait(0)]
                total, free = ray.cluster_resources(), ray.available_resources()
                raise LaunchError(placement.shortage(late, total, free, runtime.launch_timeout_s))


class Cluster:
    """The cluster of this run: the one this process is connected to, one at an address, or our own."""

    def __init__(self, specs: Sequence[GroupSpec], runtime: RuntimeConfig) -> None:
        self.address: str | None = None  # of rank 0 of every group; None = ask the actor
        self.logs: Path | None = None  # what the processes write, where it can be read from here
        self._folder: _Folder | None = None
        self._connected = not ray.is_initialized()
        if not self._connected:
            return
        try:
            if runtime.ray_address is not None:
                self._connect(runtime.ray_address)
            else:
                self._start(specs, runtime)
        except BaseException:
            self.stop()
            raise

    def _connect(self, address: str) -> None:
        with _own_signals():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RayError, ValueError) as error:
                raise LaunchError(
                    f"no Ray cluster at runtime.ray_address={address!r} ({error}); start one with "
                    "`ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or leave ray_address "
                    "out to get one for this run"
                ) from error

    def _start(self, specs: Sequence[GroupSpec], runtime: RuntimeConfig) -> None:
        self.address = _LOOPBACK
        self._folder = _Folder()
        self.logs = self._folder.sessions / "session_latest" / "logs"
        with _own_signals(), _loopback_only(), _own_token(), self._folder.marking():
            ray.init(
                address="local",
                # what the plan reserves, however many cores there are: Ray counts, it does not bind
                num_cpus=int(placement.needed(specs)["CPU"]),
                object_store_memory=(_STORE_MB + BUCKETS_IN_FLIGHT * runtime.bucket_mb) << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=_LOOPBACK,
                _temp_dir=str(self._folder.sessions),
            )

    def stop(self) -> None:
        """Leave the cluster; end it, and wait for its end, if it is ours."""
        if self._folder is None:
            if self._connected:
                ray.shutdown()
            return
        late = threading.Timer(_SHUTDOWN_S, self._folder.end)  # ends what ray.shutdown waits for
        late.start()
        ray.shutdown()
        late.cancel()
        self._folder.end()
        self._folder.wait_until_gone()


class _Folder:
    """A folder for Ray's sockets and logs, and the watchdog that ends the processes which use it."""

    def __init__(self) -> None:
        root = tempfile.gettempdir()
        root = root if len(root) <= _LONGEST_ROOT else "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="rlhf-ray-", dir=os.path.realpath(root)))
        self.sessions = self.path / "s"  # Ray opens this one to every user; `path` is ours alone
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", watchdog.__file__, str(self.path), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Processes started in here, and all that they start, belong to this folder."""
        os.environ[watchdog.MARK_NAME] = str(self.path)
        try:
            yield
        finally:
            del os.environ[watchdog.MARK_NAME]

    def end(self) -> None:
        """Tell the watchdog to end the processes and to remove the folder."""
        self._watchdog.stdin.close()

    def wait_until_gone(self) -> None:
        try:
            self._watchdog.wait(watchdog.SWEEP_S + _END_S)
        except subprocess.TimeoutExpired:
            log.warning("processes of %s are still there; see `ps -ef`", self.path)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Around ray.init, which replaces the SIGTERM handler and must not be cut short by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    interrupt = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
    if interrupts:
        raise KeyboardInterrupt


@contextmanager
def _own_token() -> Iterator[None]:
    """Around ray.init: a new cluster's servers want a token, by Ray's default; it is a random one of ours.

    Without it Ray makes one for every cluster of this user and writes it to the home folder. A token in the
    environment is respected.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]  # what this process starts later has no business with it


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Around ray.init: keeps every server on the loopback interface, by a constant that Ray sets on macOS.

    Without it Ray replaces 127.0.0.1 by the address of the network card and listens on every interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


class RayGroup:
    """The processes of one group."""

    def __init__(self, spec: GroupSpec, runtime: RuntimeConfig, logs: Path | None) -> None:
        self.spec, self.logs = spec, logs
        self.name, self.roles, self.size, self.device = spec.name, spec.roles, spec.num_processes, spec.device
        self.address = ""
        self.processes: list[Identity] = []
        bundles = [placement.bundle(spec)] * spec.num_processes
        self.place: PlacementGroup = placement_group(bundles, strategy="PACK")
        self._timeout_s = runtime.call_timeout_s
        self._actors: list[Any] = []

    # -- coming up -------------------------------------------------------------------------------------------

    def start_actors(self, address: str | None) -> None:
        """Ask for the processes; `address` = None lets rank 0 say where it is."""
        self.address = address or ""
        reserved = placement.bundle(self.spec)
        host = ray.remote(Host)
        self._actors = [
            host.options(
                num_cpus=reserved["CPU"],
                num_gpus=reserved.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, rank),
                runtime_env={"env_vars": actor_environment(self.spec)},
            ).remote(os.getcwd(), [os.path.abspath(entry) for entry in sys.path])
            for rank in range(self.size)
        ]

    def introduce(self, deadline: float) -> None:
        """Wait for the processes and learn who they are."""
        refs = [actor.identity.remote() for actor in self._actors]
        late = refs
        while late:
            done, late = _first_done(late, deadline)
            if not done:
                break
        if late:
            ranks = ", ".join(str(refs.index(ref)) for ref in late)
            raise LaunchError(
                f"group {self.name!r}: no process for rank {ranks} within runtime.launch_timeout_s"
            )
        try:
            self.processes = ray.get(refs)
            if not self.address:
                where = self._actors[0].__ray_call__.remote(lambda host: get_node_ip_address())
                self.address = ray.get(where)
        except RayError as error:
            raise LaunchError(f"group {self.name!r}: a process did not start: {error}") from error

    def build(self) -> RayPending:
        """Make the workers, all ranks at once: their constructors may meet."""
        port = self._free_port() if self.size > 1 else 0
        kwargs = ray.put(dict(self.spec.kwargs))
        refs = [
            actor.build.options(num_returns=2).remote(self.spec.worker, self._info(rank, port), kwargs)
            for rank, actor in enumerate(self._actors)
        ]
        return RayPending(self, "__init__", refs, self._timeout_s, "runtime.launch_timeout_s")

    def _free_port(self) -> int:
        try:
            return ray.get(self._actors[0].free_port.remote(self.address), timeout=self._timeout_s)
        except RayError as error:
            raise LaunchError(f"{self.describe(0)} found no port for its group: {error}") from error

    def _info(self, rank: int, port: int) -> ProcessInfo:
        # a process sees only the GPU that Ray gave it, so the index of its device is 0
        return ProcessInfo(self.name, rank, self.size, 0, self.address, port, self.device)

    # -- calls -----------------------------------------------------------------------------------------------

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self.start(method, *args, **kwargs).wait()

    def call_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self.start_each(method, args_per_rank).wait()

    def start(self, method: str, *args: Any, **kwargs: Any) -> RayPending:
        if self.size > 1:  # serialised once, not once per process
            args = tuple(_shared(value) for value in args)
            kwargs = {name: _shared(value) for name, value in kwargs.items()}
        return self._start(method, [args] * self.size, kwargs)

    def start_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> RayPending:
        if len(args_per_rank) != self.size:
            raise ValueError(
                f"group {self.name!r}: arguments for {len(args_per_rank)} ranks, it has {self.size}"
            )
        return self._start(method, args_per_rank, {})

    def start_on(self, rank: int, method: str, *args: Any) -> RayPending:
        return self._start(method, [args], {}, ranks=(rank,))

    def _start(
        self,
        method: str,
        args: Sequence[tuple[Any, ...]],
        kwargs: Mapping[str, Any],
        ranks: Sequence[int] | None = None,
    ) -> RayPending:
        ranks = range(self.size) if ranks is None else ranks
        refs = [
            self._actors[rank].run.options(num_returns=2).remote(method, *own, **kwargs)
            for rank, own in zip(ranks, args, strict=True)
        ]
        return RayPending(self, method, refs, self._timeout_s, "runtime.call_timeout_s", ranks)

    def describe(self, rank: int) -> str:
        process = self.processes[rank]
        return f"group {self.name!r}: rank {rank} (pid {process.pid} on {process.hostname})"

    # -- going down ------------------------------------------------------------------------------------------

    def close(self, *, graceful: bool = True) -> None:
        try:
            if graceful and self._actors:
                self._close_workers()
        finally:
            actors, self._actors = self._actors, []
            for actor in actors:
                ray.kill(actor)
            for process in self.processes:
                if process_state(process) == "stopped":  # it cannot hear Ray
                    os.kill(process.pid, signal.SIGKILL)
            remove_placement_group(self.place)

    def _close_workers(self) -> None:
        """Let every worker close. One that is slow, or dies of it, has done its work: its run is not failed for it."""
        refs = [actor.close_worker.options(num_returns=2).remote() for actor in self._actors]
        try:
            RayPending(self, "close", refs, _CLOSE_S, "the limit for closing").check()
        except (CallTimeoutError, DeadWorkerError) as error:
            log.warning("%s\nthe group had finished its work; its processes are killed", error)


def _shared(value: Any) -> Any:
    return value if isinstance(value, (ray.ObjectRef, int, float, str, bool, type(None))) else ray.put(value)


def actor_environment(spec: GroupSpec) -> dict[str, str]:
    """Variables that must be set before the actor's Python starts."""
    variables = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith(("NCCL_", "GLOO_"))}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        variables[name] = str(spec.threads)
    variables["TOKENIZERS_PARALLELISM"] = "false"
    variables["PYTHONPATH"] = os.pathsep.join(_python_path())
    if not spec.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def _python_path() -> list[str]:
    """The controller's, and the repository's root when rlhf runs from a source checkout.

    kernels/ in that root has no __init__.py, so that it does not hide Hugging Face's package of that name. An
    installed rlhf is found anyway; its site-packages folder must not come before the standard library.
    """
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = Path(rlhf.__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        path = [str(root), *(entry for entry in path if entry != str(root))]
    return path


def _first_done(
    refs: Sequence[ray.ObjectRef], deadline: float
) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
    """(the first that is done, the others), or ([], all) at the deadline."""
    try:
        return ray.wait(refs, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
    except SystemError as error:  # what Ray makes of an exception that a signal's handler raises
        raise (error.__cause__ or error.__context__ or error) from None


class RayPending:
    """One call, on its way on every rank."""

    def __init__(
        self,
        group: RayGroup,
        method: str,
        refs: Sequence[Sequence[ray.ObjectRef]],
        timeout_s: float,
        limit: str,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """`ranks` are those that were called; None = all."""
        self._group, self._method, self._timeout_s, self._limit = group, method, timeout_s, limit
        self._ranks = range(group.size) if ranks is None else ranks
        self._statuses = [status for status, _ in refs]
        self._values = [value for _, value in refs]
        self._checked = False

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        self.check(timeout_s)
        try:
            return ray.get(self._values)
        except RayError as error:
            raise GroupError(
                f"group {self._group.name!r}: the result of {self._method}() is lost: {error}"
            ) from error

    def handle(self, rank: int = 0) -> ray.ObjectRef:
        return self._values[rank]

    def poll(self, timeout_s: float = 0.0) -> bool:
        waiting = list(self._statuses)
        deadline = time.monotonic() + timeout_s
        while waiting:
            done, waiting = _first_done(waiting, deadline)
            if not done:
                return False
            if isinstance(self._look(self._statuses.index(done[0]), relay=False), _Failure):
                return True
        return True

    def check(self, timeout_s: float | None = None) -> None:
        if self._checked:
            return
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        waiting, failures = list(self._statuses), []
        while waiting:
            done, waiting = _first_done(waiting, deadline)
            if not done:
                break
            outcome = self._look(self._statuses.index(done[0]), relay=True)
            if isinstance(outcome, _Failure):
                failures.append(outcome)
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            self._raise(failures)
        if waiting:
            self._raise_late([self._ranks[self._statuses.index(ref)] for ref in waiting], limit_s)
        self._checked = True

    def _look(self, at: int, *, relay: bool) -> Status | _Failure:
        rank = self._ranks[at]
        try:
            status: Status = ray.get(self._statuses[at])
        except RayActorError as error:
            return _Failure(rank, died=error)
        except RayError as error:
            return _Failure(rank, broken=error)
        if relay:
            for name, level, message in status.logs:
                logging.getLogger(name).log(level, "[%s %d] %s", self._group.name, rank, message)
            if status.terminated:  # SIGTERM to one rank is SIGTERM to the run
                os.kill(os.getpid(), signal.SIGTERM)
        return _Failure(rank, failed=status.failed) if status.failed else status

    def _raise(self, failures: Sequence[_Failure]) -> NoReturn:
        """The dead before the living, then the earliest: the others' failures are its consequences."""
        worst = min(failures, key=lambda f: (f.died is None, f.failed.time_s if f.failed else 0.0))
        others = [f"rank {f.rank}: {f.failed.summary}" for f in failures if f is not worst and f.failed]
        name = self._group.name
        if worst.died is not None:
            raise DeadWorkerError(self._obituary(worst, others), group=name, rank=worst.rank) from None
        if worst.broken is not None:
            raise GroupError(f"{self._group.describe(worst.rank)} failed in {self._method}(): {worst.broken}")
        cause = RemoteTraceback(worst.failed.text, group=name, rank=worst.rank, method=self._method)
        if worst.failed.error is None:
            raise GroupError(
                f"{self._group.describe(worst.rank)} raised in {self._method}(): {worst.failed.summary}"
            ) from cause
        raise worst.failed.error from cause

    def _obituary(self, dead: _Failure, others: Sequence[str]) -> str:
        parts = [f"{self._group.describe(dead.rank)} died during {self._method}(): {_reason(dead.died)}"]
        if others:
            parts.append("then " + "; ".join(others))
        last = _last_words(self._group.processes[dead.rank], self._group.logs)
        if last:
            parts.append(f"last lines of its stderr:\n{last}")
        return "\n".join(parts)

    def _raise_late(self, ranks: Sequence[int], limit_s: float) -> NoReturn:
        parts = [
            f"group {self._group.name!r}: no answer to {self._method}() from rank "
            f"{', '.join(map(str, ranks))} of {self._group.size} within {limit_s:g} s ({self._limit})"
        ]
        for rank in ranks:
            process = self._group.processes[rank]
            parts.append(f"rank {rank} (pid {process.pid} on {process.hostname}) is {process_state(process)}")
            stacks = read_stacks(process)
            if stacks:
                parts.append(stacks)
        raise CallTimeoutError("\n".join(parts))


class _Failure:
    """How one rank failed: its worker raised, its process died, or Ray could not carry the call out."""

    def __init__(
        self,
        rank: int,
        *,
        failed: Failed | None = None,
        died: RayActorError | None = None,
        broken: RayError | None = None,
    ) -> None:
        self.rank, self.failed, self.died, self.broken = rank, failed, died, broken


def _reason(error: RayActorError) -> str:
    """What Ray knows about the end of a process; of a sudden end it knows the closed connection only."""
    detail = str(error).rpartition("Worker exit detail:")[2] or str(error)
    if "connection error code" in detail:
        return "its process ended suddenly: killed, out of memory, or crashed"
    return detail.partition(" Some common causes")[0].strip()


def _last_words(process: Identity, logs: Path | None) -> str:
    """The end of what a dead process wrote to stderr, if it can be read from here."""
    files = list(logs.glob(f"worker-*-{process.pid}.err")) if logs is not None else []
    lines = files[0].read_text(errors="replace").splitlines() if files else []
    said = [line for line in lines if line.strip() and not line.startswith((":job_id:", ":actor_name:"))]
    return "\n".join(said[-_STDERR_LINES:])
