"""Groups in this process, the rules of a plan, and what `launch` guarantees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from rlhf.recipe.schema import RuntimeConfig
from rlhf.runtime import placement
from rlhf.runtime.groups import Groups, GroupSpec, PlacementError, launch, uninterrupted
from rlhf.runtime.ports import free_port, is_free

LOCAL = RuntimeConfig(backend="local")
WORKER = "runtime_workers:Recorder"
ROOT = Path(__file__).resolve().parent.parent.parent


def spec(name="g", roles=("actor",), num_processes=1, gpus=0, **kwargs) -> GroupSpec:
    return GroupSpec(name, tuple(roles), num_processes, gpus, WORKER, kwargs)


# -- local groups --------------------------------------------------------------------------------------------


def test_calls_reach_the_worker_and_keep_their_order():
    with launch([spec("a", offset=10), spec("b", roles=("rollout",))], LOCAL) as groups:
        assert groups["a"].call("add", 1, b=2) == [13]
        assert groups.for_role("rollout").call_each("add", [(5,)]) == [6]
        first, second = groups["a"].start("note", "x"), groups["a"].start_each("note", [("y",)])
        assert second.wait() == [["x", "y"]] and first.wait() == [["x"]]
        assert groups["b"].call("double", groups["a"].start("add", 1).handle(0)) == [24]
        assert groups["b"].start_on(0, "double", groups["a"].start_on(0, "add", 1).handle()).wait() == [24]


def test_a_local_exception_keeps_its_real_traceback():
    """A debugger and a reader need the worker's own frame, from `call` and from `start(...).wait()` alike."""
    with launch([spec()], LOCAL) as groups:
        for attempt in (lambda: groups["g"].call("boom"), lambda: groups["g"].start("boom").wait()):
            with pytest.raises(ValueError, match="a bad value") as caught:
                attempt()
            assert any(frame.name == "boom" for frame in traceback.extract_tb(caught.value.__traceback__))


def test_every_worker_is_closed_after_success_and_after_an_error():
    closed: list[str] = []
    with launch([spec("a", closed=closed), spec("b", roles=("rollout",), closed=closed)], LOCAL):
        assert closed == []
    assert closed == ["b", "a"]
    with pytest.raises(RuntimeError, match="in the body"):
        with launch([spec("c", closed=closed)], LOCAL):
            raise RuntimeError("in the body")
    assert closed == ["b", "a", "c"]


def test_workers_made_before_a_failing_one_are_closed():
    closed: list[str] = []
    with pytest.raises(ValueError, match="the constructor refuses"):
        launch([spec("a", closed=closed), spec("b", roles=("rollout",), fail=True)], LOCAL)
    assert closed == ["a"]


def test_one_failing_close_does_not_keep_the_others_open():
    order: list[str] = []

    class Part:
        roles = ()

        def __init__(self, name, fails):
            self.name, self.fails = name, fails

        def close(self, *, graceful=True):
            order.append(self.name)
            if self.fails:
                raise OSError(f"{self.name} does not close")

    groups = Groups([Part("a", False), Part("b", True)], shutdown=lambda: order.append("cluster"))
    with pytest.raises(OSError, match="b does not close"):
        groups.close()
    assert order == ["b", "a", "cluster"]


def test_an_error_in_close_does_not_hide_the_error_that_ended_the_run():
    class Part:
        name, roles = "a", ()

        def close(self, *, graceful=True):
            raise OSError("close failed too")

    with pytest.raises(ZeroDivisionError):
        with Groups([Part()]):
            raise ZeroDivisionError


def test_ctrl_c_does_not_interrupt_closing(capsys):
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
    assert "closing" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_role_that_nobody_hosts_is_named_with_those_there_are():
    with launch([spec("a", roles=("actor", "reference"))], LOCAL) as groups:
        with pytest.raises(ValueError, match=r"role 'critic'.*a: actor\+reference"):
            groups.for_role("critic")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no group"),
        (lambda: [spec("a"), spec("a", roles=("rollout",))], "group name 'a' is used twice"),
        (lambda: [spec("a"), spec("b")], "role 'actor' is used twice"),
    ],
)
def test_a_plan_with_a_name_or_role_twice_is_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        launch(specs() if callable(specs) else specs, LOCAL)


def test_local_cannot_host_several_processes():
    with pytest.raises(PlacementError, match="2 processes.*runtime.backend: ray"):
        launch([spec("train", num_processes=2)], LOCAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 0}, "num_processes=0"),
        ({"gpus": 2, "num_processes": 4}, "one process per GPU"),
        ({"threads": 0}, "threads=0"),
        ({"worker": "module.Class"}, "package.module:Class"),
    ],
)
def test_a_group_that_cannot_be_is_refused(changes, message):
    fields = {"name": "g", "roles": ("actor",), "num_processes": 1, "gpus": 0, "worker": WORKER} | changes
    with pytest.raises(ValueError, match=message):
        GroupSpec(**fields)


def test_groups_load_neither_ray_nor_torch():
    """`rlhf train` imports this before the recipe's placement is known to need either."""
    code = (
        "import sys, rlhf.runtime.groups, rlhf.runtime.placement, rlhf.runtime.local, rlhf.runtime.ports;"
        "print([name for name in ('ray', 'torch', 'deepspeed') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


# -- placement -----------------------------------------------------------------------------------------------


def test_one_group_larger_than_the_cluster_is_named():
    with pytest.raises(PlacementError, match="asked for 8 GPUs in group 'train', the cluster has 4"):
        placement.check([spec("train", num_processes=8, gpus=8)], {"CPU": 64, "GPU": 4})


def test_groups_that_fit_alone_but_not_together_are_refused():
    """Groups live at the same time: two of 3 on 4 GPUs would wait for ever."""
    plan = [
        spec("train", num_processes=3, gpus=3),
        spec("sample", roles=("rollout",), num_processes=3, gpus=3),
    ]
    with pytest.raises(PlacementError, match=r"asked for 6 GPUs \(train 3, sample 3\), the cluster has 4"):
        placement.check(plan, {"CPU": 64, "GPU": 4})
    placement.check(plan, {"CPU": 64, "GPU": 6})


def test_processes_without_gpus_need_cpus():
    with pytest.raises(PlacementError, match="asked for 3 CPUs in group 'train', the cluster has 2"):
        placement.check([spec("train", num_processes=3)], {"CPU": 2})


# -- ports ---------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_not_free():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_free(server.getsockname()[1])
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
