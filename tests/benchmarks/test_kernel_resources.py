"""What is said of kernels that spill, without compiling any."""

import pytest

pytest.importorskip("triton")
from benchmarks import gpu_check, kernel_resources
from benchmarks.gpu_check import FAMILIES


def row(operation, spilled, target="sm_90", kernel="_forward", shared=0):
    found = {"operation": operation, "kernel": kernel, "dtype": "bf16", "target": target}
    return found | {"spilled_bytes": spilled, "shared_bytes": shared}


def test_a_new_spill_and_an_old_allowance_are_wrong(monkeypatch):
    """Would catch: an allowance for one kernel that covers another of a like name, target or operation, the second of two
    launches that hides the first's spill, and allowances that outlive their kernels or are for more than they spill."""
    monkeypatch.setattr(kernel_resources, "MAY_SPILL", {"wide rows": {"sum 64: _forward bf16 sm_90": 8}})
    assert kernel_resources.unlike_promised([row("sum 64", 8), row("sum 64", 0), row("sum 640", 0)]) == []
    others = row("sum 64, pages", 8), row("sum 64", 8, "sm_80"), row("sum 64", 8, kernel="_add")
    assert kernel_resources.unlike_promised([row("sum 64", 16), row("sum 64", 0), *others]) == [
        "sum 64: _forward bf16 sm_90 spills 16 bytes, 8 allowed",
        "sum 64, pages: _forward bf16 sm_90 spills 8 bytes, 0 allowed",
        "sum 64: _forward bf16 sm_80 spills 8 bytes, 0 allowed",
        "sum 64: _add bf16 sm_90 spills 8 bytes, 0 allowed",
    ]
    assert kernel_resources.unlike_promised([row("sum 64", 0)]) == [
        "sum 64: _forward bf16 sm_90 spills 0 bytes, 8 allowed"
    ]
    assert kernel_resources.unlike_promised([]) == ["sum 64: _forward bf16 sm_90 may spill and is no kernel"]


def test_shared_memory_that_no_program_has_is_wrong(monkeypatch):
    """Would catch: a kernel that is compiled, and that no GPU of the target starts."""
    monkeypatch.setattr(kernel_resources, "MAY_SPILL", {})
    fits = row("sum 64", 0, "sm_80", shared=166_912), row("sum 64", 0, shared=232_448)
    assert kernel_resources.unlike_promised(fits) == []
    assert kernel_resources.unlike_promised([row("sum 64", 0, "sm_80", shared=166_913)]) == [
        "sum 64: _forward bf16 sm_80 takes 166913 bytes of shared memory, of 166912"
    ]


def test_a_call_has_a_name_of_its_own_and_allowances_are_of_calls():
    """Would catch: two operations of one name, whose spills are allowed together, and an allowance for what is not compiled."""
    calls = {
        name: [operation for family in FAMILIES for operation, _ in gpu_check.family(family).calls(dtype)]
        for name, dtype in kernel_resources.DTYPES.items()
    }
    for name, operations in calls.items():
        assert len(set(operations)) == len(operations), name
    allowed = [key for kernels in kernel_resources.MAY_SPILL.values() for key in kernels]
    assert len(set(allowed)) == len(allowed)
    for key in allowed:
        operation, _, kernel = key.rpartition(": ")
        assert operation in calls[kernel.split()[1]], key


def test_the_attentions_that_models_have_are_compiled():
    """Would catch: a form of the kernels that is first compiled, and first seen to spill, at a user's: windows and soft caps
    of wide heads, sinks, one and many query heads of a key head, windows over quantised pages, shared prefixes."""
    options = []
    for _, call in gpu_check.family("attention").calls(kernel_resources.DTYPES["bf16"]):
        with kernel_resources.caught() as launches:
            call()
        options += [
            {launch.kernel.arg_names[at[0]]: value for at, value in launch.constants.items()}
            for launch in launches
            if launch.kernel.fn.__name__ == "_forward"
        ]
    for wanted in (
        {"DIM": 256, "WINDOW": 2, "SOFTCAP": True, "PAGED": True},
        {"DIM": 256, "WINDOW": 2, "SOFTCAP": True, "PAGED": False},
        {"SINKS": True, "WINDOW": 2, "PAGED": True},
        *({"GROUP": group, "PAGED": paged} for group in (1, 64) for paged in (False, True)),
        {"SCALED": True, "WINDOW": 2, "SPLIT": False},
        {"LISTED": True},
    ):
        assert any(wanted.items() <= found.items() for found in options), wanted
