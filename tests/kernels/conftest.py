import os

import pytest
import torch

from rlhf.kernels import gpu, native, threads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs its kernels on the CPU


@pytest.fixture(params=["triton"] if INTERPRETED else ["native", "torch"])
def form(request, monkeypatch):
    """Every promise of an operation with several forms is of all that there are here."""
    if request.param == "native" and native.library("attention") is None:
        pytest.skip("no C++ compiler")
    if request.param != "native":
        monkeypatch.setattr(native, "library", lambda name: None)
    if request.param == "triton":
        monkeypatch.setattr(gpu, "serves", interpreted)
    return request.param


@pytest.fixture
def interpreting(monkeypatch):
    """The Triton forms, where their interpreter runs; elsewhere nothing is changed."""
    if INTERPRETED:
        monkeypatch.setattr(native, "library", lambda name: None)
        monkeypatch.setattr(gpu, "serves", interpreted)
    return INTERPRETED


if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    stock_conversion = interpreter._convert_float

    def convert(values, given, wanted, rounding):
        """The interpreter cuts off bits where a GPU rounds fp32 to the nearest bf16."""
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return stock_conversion(values, given, wanted, rounding)
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        return wide.bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    interpreter._convert_float = convert
    stock_cast = interpreter.InterpreterBuilder.cast_impl

    def cast(builder, source, wanted):
        """The interpreter takes whole numbers for the 16 bits of bf16."""
        if wanted.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = stock_cast(builder, source, tl.float32)
        return stock_cast(builder, source, wanted)

    interpreter.InterpreterBuilder.cast_impl = cast
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def dot(builder, a, b, *rest):
        """The interpreter multiplies the 16 bits of bf16 as they are."""
        return stock_dot(
            builder,
            *(builder.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)),
            *rest,
        )

    interpreter.InterpreterBuilder.create_dot = dot


def interpreted(*tensors):
    """What `gpu.serves` says of CUDA tensors, of any."""
    first = tensors[0].dtype
    return first in (torch.float32, torch.bfloat16, torch.float16) and all(x.dtype == first for x in tensors)


@pytest.fixture(params=[1, 2])
def shared_out(request, monkeypatch):
    """That many threads, for work of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_SMALL", 0)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
