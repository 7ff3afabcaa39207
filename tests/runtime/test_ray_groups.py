"""Groups of Ray actors. One cluster serves the whole file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")

from rlhf.recipe.schema import RuntimeConfig  # noqa: E402
from rlhf.runtime import ray_groups  # noqa: E402
from rlhf.runtime.groups import (  # noqa: E402
    CallTimeoutError,
    DeadWorkerError,
    GroupError,
    Groups,
    GroupSpec,
    LaunchError,
    PlacementError,
    RemoteTraceback,
    launch,
)
from rlhf.runtime.ray_groups import Cluster  # noqa: E402
from rlhf.runtime.ray_host import process_state  # noqa: E402
from rlhf.trainers.weights import publish  # noqa: E402

RUNTIME = RuntimeConfig(backend="ray", bucket_mb=1, launch_timeout_s=120)
WORKER = "runtime_workers:Recorder"


def spec(name: str, roles: tuple[str, ...], num_processes: int = 1, **kwargs) -> GroupSpec:
    return GroupSpec(name, roles, num_processes, 0, WORKER, kwargs)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Room for 7 processes. `launch` uses it, because this process is connected to it."""
    cluster = Cluster([spec("room", ("actor",), 7)], RUNTIME)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def groups(cluster) -> Iterator[Groups]:
    scale = 3.0
    handed_over = {"function": lambda x: scale * x, "model": torch.nn.Linear(2, 1)}
    plan = [
        spec("pair", ("actor",), 2, offset=100),
        GroupSpec("one", ("rollout",), 1, 0, WORKER, handed_over, threads=2),
    ]
    with launch(plan, RUNTIME) as groups:
        yield groups


def listening(pids: set[int]) -> set[str]:
    """Addresses, in /proc/net's hexadecimal, at which these processes listen."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].rpartition(":")[0])
    return found


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid}.union(*(descendants(int(child)) for child in children))


def test_calls_reach_every_rank_and_answers_come_in_rank_order(groups):
    assert groups["pair"].call("add", 1, b=2) == [103, 104]
    assert groups["pair"].call_each("add", [(1,), (50,)]) == [102, 152]
    first, second = groups["pair"].start("note", "x"), groups["pair"].start("note", "y")
    assert second.wait() == [["x", "y"]] * 2 and first.wait() == [["x"]] * 2
    with pytest.raises(ValueError, match="arguments for 1 ranks, it has 2"):
        groups["pair"].call_each("add", [(1,)])


def test_a_result_goes_to_another_group_without_passing_through_here(groups):
    assert groups["one"].call("double", groups["pair"].start("add", 1).handle(1)) == [206]


def test_one_rank_is_called_alone(groups):
    """Would catch: a result, a failure or a late answer under another rank's name."""
    pair = groups["pair"]
    assert groups["one"].start_on(0, "double", pair.start_on(1, "add", 1).handle()).wait() == [206]
    with pytest.raises(ValueError, match="a bad value") as caught:
        pair.start_on(1, "boom").wait()
    assert "in group 'pair', rank 1" in str(caught.value.__cause__)
    pending = pair.start_on(1, "sleep", 1)
    assert pair.start_on(0, "add", 1).wait() == [102], "rank 0 waits for rank 1"
    with pytest.raises(CallTimeoutError, match=r"sleep\(\) from rank 1 of 2 within 0 s"):
        pending.check(0.0)
    assert pending.wait() == [None]


def test_functions_and_modules_reach_the_worker(groups):
    """The Python API hands over a reward function and a model object, not paths."""
    assert groups["one"].call("apply", 2) == [6.0]
    assert groups["one"].call("forward", torch.zeros(4, 2))[0].shape == (4, 1)


def test_each_process_knows_its_place(groups):
    there = groups["pair"].call("where") + groups["one"].call("where")
    infos = [place["info"] for place in there]
    assert [(i.group, i.rank, i.world_size) for i in infos] == [("pair", 0, 2), ("pair", 1, 2), ("one", 0, 1)]
    assert infos[0].master_port == infos[1].master_port > 0
    assert {i.master_addr for i in infos} == {"127.0.0.1"} and {i.device for i in infos} == {"cpu"}
    assert len({place["pid"] for place in there} | {os.getpid()}) == 4
    threads = [place["env"]["OMP_NUM_THREADS"] for place in there]
    assert threads == ["1", "1", "2"], "torch reads its number of threads when it loads"
    for place in there:
        assert place["cwd"] == os.getcwd()
        assert place["env"]["CUDA_VISIBLE_DEVICES"] == "", "a process without GPUs sees some"


def test_our_kernels_folder_does_not_hide_the_package_of_that_name(groups):
    assert groups["one"].call("shadowed") == [False]


def test_every_server_listens_on_the_loopback_interface_only(groups):
    """Anybody who reaches a Ray port runs code: on a shared machine's network that is everybody."""
    addresses = listening(descendants(os.getpid()))
    assert addresses, "no listening socket found: the test looks in the wrong place"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses <= loopback, addresses - loopback


def test_nobody_else_reads_what_the_processes_write(cluster, groups):
    """Logs hold prompts and responses, and the sockets beside them take code."""
    ours = cluster.logs.parents[2]
    assert cluster.logs.is_dir() and ours.stat().st_mode & 0o077 == 0


def test_a_remote_exception_is_raised_here_with_its_place(groups):
    with pytest.raises(ValueError, match="a bad value") as caught:
        groups["pair"].call("boom")
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback) and (cause.group, cause.method) == ("pair", "boom")
    assert "runtime_workers.py" in str(cause) and "in group 'pair', rank" in str(cause)
    assert groups["pair"].call("add", 1) == [102, 103], "the group is unusable after an ordinary exception"


def test_an_exception_that_cannot_travel_arrives_as_text(groups):
    with pytest.raises(
        GroupError, match=r"group 'one': rank 0 .* raised in stubborn\(\): .*cannot be pickled"
    ):
        groups["one"].call("stubborn")


def test_warnings_of_a_worker_are_logged_here(groups, caplog):
    groups["pair"].call("warn")
    assert sorted(r.getMessage() for r in caplog.records if r.name == "rlhf.test") == [
        "[pair 0] take care",
        "[pair 1] take care",
    ]


def test_a_constructor_that_raises_is_reported_and_leaves_nothing():
    with pytest.raises(ValueError, match="the constructor refuses") as caught:
        launch([spec("bad", ("critic",), fail=True)], RUNTIME)
    assert "group 'bad', rank 0" in str(caught.value.__cause__)


def test_a_call_that_does_not_return_is_named_with_its_stacks(groups):
    pending = groups["one"].start("sleep", 3)
    with pytest.raises(CallTimeoutError) as caught:
        pending.wait(0.5)
    text = str(caught.value)
    assert "group 'one': no answer to sleep() from rank 0 of 1 within 0.5 s" in text
    assert "is running" in text and "in sleep" in text
    assert pending.wait(10) == [None]


def test_a_stopped_process_is_called_stopped(groups):
    pid = groups["pair"].call("where")[1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(CallTimeoutError, match=rf"from rank 1 of 2.*\n.*pid {pid} .* is stopped"):
            groups["pair"].start("add", 1).wait(0.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert groups["pair"].call("add", 1) == [102, 103]


def test_termination_of_a_rank_is_termination_of_the_run(groups):
    """A preempted machine tells its own processes only; the run must hear of it and save."""
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert groups["one"].call("terminate_self") == ["still here"]
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM]


def test_a_plan_that_the_cluster_cannot_hold_is_refused_at_once():
    start = time.monotonic()
    with pytest.raises(PlacementError, match="asked for 4 GPUs in group 'big', the cluster has 0"):
        launch([GroupSpec("big", ("critic",), 4, 4, WORKER)], RUNTIME)
    assert time.monotonic() - start < 5


def test_a_plan_that_others_keep_from_its_place_is_refused_at_the_deadline(groups):
    """A placement group waits for ever and in silence."""
    runtime = RUNTIME.model_copy(update={"launch_timeout_s": 1.0})
    with pytest.raises(LaunchError, match="groups 'late' within 1 s .* asked for 5 CPU of 7, 4 of them free"):
        launch([spec("late", ("critic",), 5)], runtime)


def test_a_dead_process_is_named_and_the_others_go_with_it():
    """Its peers fail too, of a reset connection, and often first: report the cause, not the consequence."""
    with pytest.raises(DeadWorkerError) as caught:
        with launch([spec("doomed", ("critic",), 2)], RUNTIME) as groups:
            processes = groups["doomed"].processes
            groups["doomed"].call("lose_a_peer")
    assert (caught.value.group, caught.value.rank) == ("doomed", 1)
    text = str(caught.value)
    assert f"rank 1 (pid {processes[1].pid}" in text and "during lose_a_peer()" in text
    assert "rank 0: ConnectionError" in text
    deadline = time.monotonic() + 10
    while any(process_state(p) != "gone" for p in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process_state(p) for p in processes] == ["gone", "gone"]


def test_workers_are_closed_when_a_run_ends_well(tmp_path):
    with launch([spec("brief", ("critic",), closed=str(tmp_path / "closed"))], RUNTIME):
        pass
    assert (tmp_path / "closed").read_text() == "closed"


def test_a_worker_that_closes_slowly_does_not_fail_a_good_run(monkeypatch, caplog):
    """Would catch: a finished stage that is reported as failed because an actor gives back its memory slowly."""
    monkeypatch.setattr(ray_groups, "_CLOSE_S", 0.5)
    with launch([spec("slow", ("critic",), close_s=60.0)], RUNTIME) as groups:
        (process,) = groups["slow"].processes
    assert "no answer to close() from rank 0 of 1 within 0.5 s (the limit for closing)" in caplog.text
    assert "had finished its work" in caplog.text
    deadline = time.monotonic() + 10
    while process_state(process) != "gone" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process_state(process) == "gone"
    with (
        pytest.raises(RuntimeError, match="the body fails"),
        launch([spec("bad", ("critic",), close_s=60.0)], RUNTIME),
    ):
        raise RuntimeError("the body fails")


@pytest.mark.parametrize("transport", ["object_store", "collective"])
def test_weights_reach_every_process_of_another_group(transport):
    """Two source ranks, two target ranks; the second publish uses the plan and the channel of the first."""
    runtime = RUNTIME.model_copy(update={"weight_transport": transport})
    plan = [
        GroupSpec("train", ("critic",), 2, 0, "weight_workers:Holder", {"seed": 0}),
        GroupSpec("sample", ("reference",), 2, 0, "weight_workers:Holder", {"seed": 1}),
    ]
    with launch(plan, runtime) as groups:
        train, sample = groups["train"], groups["sample"]
        for version in (1, 2):
            report = publish(train, sample, version=version, runtime=runtime)
            assert sample.call("fingerprint") == train.call("fingerprint"), f"version {version}"
            assert report.transport == transport and report.buckets == 3
            train.call("nudge")
        assert sample.call("versions") == [[1, 2]] * 2
        sample.call("generate")
        assert train.call("default_group") + sample.call("default_group") == [False] * 4
