"""What is said of kernels that spill, without compiling any."""

import pytest

pytest.importorskip("triton")
from benchmarks import kernel_resources


def row(operation, spilled, target="sm_90", kernel="_forward"):
    found = {"operation": operation, "kernel": kernel, "dtype": "bf16", "target": target}
    return found | {"spilled_bytes": spilled}


def test_a_new_spill_and_an_old_allowance_are_wrong(monkeypatch):
    """Would catch: an allowance for one kernel that covers another of a like name, target or operation, the second of two
    launches that hides the first's spill, and allowances that outlive their kernels."""
    monkeypatch.setattr(kernel_resources, "MAY_SPILL", {"wide rows": {"sum 64: _forward bf16 sm_90": 8}})
    assert kernel_resources.spill_more([row("sum 64", 8), row("sum 64", 0), row("sum 640", 0)]) == []
    others = row("sum 64, pages", 8), row("sum 64", 8, "sm_80"), row("sum 64", 8, kernel="_add")
    assert kernel_resources.spill_more([row("sum 64", 16), row("sum 64", 0), *others]) == [
        "sum 64: _forward bf16 sm_90 spills 16 bytes, 8 allowed",
        "sum 64, pages: _forward bf16 sm_90 spills 8 bytes, 0 allowed",
        "sum 64: _forward bf16 sm_80 spills 8 bytes, 0 allowed",
        "sum 64: _add bf16 sm_90 spills 8 bytes, 0 allowed",
    ]
    assert kernel_resources.spill_more([]) == ["sum 64: _forward bf16 sm_90 may spill and is no kernel"]
