"""Triton's interpreter in place of a GPU: which tensors the kernels then take, and what it gets wrong of bf16 (triton 3.6 to
3.9), mended. Without TRITON_INTERPRET=1 in the environment none of this is to be used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def serves(*tensors: torch.Tensor) -> bool:
    """What `rlhf.kernels.gpu.serves` says of CUDA tensors, of any."""
    first = tensors[0].dtype
    return first in (torch.float32, torch.bfloat16, torch.float16) and all(x.dtype == first for x in tensors)


def mend() -> None:
    """Let bf16 be numbers: conversions round, and products are of values."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder_type = interpreter.InterpreterBuilder
    stock_conversion, stock_cast = interpreter._convert_float, builder_type.cast_impl
    stock_dot = builder_type.create_dot

    def convert(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        """The interpreter cuts off bits where a GPU rounds fp32 to the nearest bf16."""
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return stock_conversion(values, given, wanted, rounding)
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        return wide.bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    def cast(builder: Any, source: Any, wanted: Any) -> Any:
        """The interpreter takes whole numbers for the 16 bits of bf16."""
        if wanted.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = stock_cast(builder, source, tl.float32)
        return stock_cast(builder, source, wanted)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter multiplies the 16 bits of bf16 as they are."""
        wide = (builder.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return stock_dot(builder, *wide, *rest)

    interpreter._convert_float = convert
    builder_type.cast_impl = cast
    builder_type.create_dot = dot
