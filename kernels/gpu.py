"""Triton forms of operations, for CUDA tensors.

Here: `serves`, which tensors they take, `holds_tiles`, whether a GPU has room for those with products, `launch`, through
which every kernel starts, and how a table of rows is cut into programs. Each form lies beside its operation, as
`<operation>_triton.py`, and is imported when the first CUDA tensor comes. Without triton, or where RLHF_TRITON=0, there
is none and the torch operations run. Not here: what the kernels compute.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096  # numbers of one program, about
LARGEST_HEAD = 256  # numbers of a head that attention and what writes its pages take
_ALIGNED = 16  # bytes of an address, numbers of a stride
_SHARED_BYTES = (
    101_376  # of a program, in the smallest GPUs that tiles of products are made for: sm_86, sm_89
)
_WIDE_SHARED_BYTES = 160 << 10  # for heads of more than _WIDE_HEAD numbers: A100, H100 and larger
_WIDE_HEAD = 128
_MOST = 1 << 16  # numbers of the longest row that a program can hold


@functools.cache
def available() -> bool:
    """Whether there is triton, and it is not turned off."""
    return os.environ.get("RLHF_TRITON") != "0" and importlib.util.find_spec("triton") is not None


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the Triton forms take the tensors: fp32, bf16 or fp16, alike, on one CUDA device. Those with products ask
    `holds_tiles` too."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in _DTYPES
        and all(x.dtype == first.dtype and x.device == first.device for x in tensors)
        and available()
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    first: torch.Tensor,
    *args: Any,
    enable_fp_fusion: bool,
    **options: Any,
) -> None:
    """kernel[grid](first, *args, **options) on the device that `first` is on: Triton launches on the current one, which
    need not be it. Whether the compiler may fuse products and sums, which changes bits, is said and left to no version's
    default."""
    options["enable_fp_fusion"] = enable_fp_fusion
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](first, *args, **options)
    else:
        kernel[grid](first, *args, **options)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, from whose rows a kernel reads as many numbers at once as from all others of their width. Triton
    compiles a kernel for the divisibility by 16 of addresses and strides, and in which order a row's sum is taken follows
    from that; tensors whose rows' sums are bits to rely on go through here."""
    steps = x.is_contiguous() or x.stride(0) % _ALIGNED == x.shape[-1] % _ALIGNED == 0
    return x if steps and x.data_ptr() % _ALIGNED == 0 else x.clone(memory_format=torch.contiguous_format)


def token_step(x: torch.Tensor) -> int:
    """Numbers between a token's first of x (N, ...) and the next one's: of one token too those that it would be of many."""
    return x.stride(0) if len(x) > 1 else x[0].numel()


def holds_tiles(x: torch.Tensor, head_dim: int = 0) -> bool:
    """Whether a multiprocessor of the device that x is on has the shared memory for tiles of products, or of an attention
    whose heads have so many numbers. Rows of numbers want next to none (benchmarks/results/kernel_resources-*.md)."""
    return not x.is_cuda or _has_shared(
        x.device.index or 0, _WIDE_SHARED_BYTES if head_dim > _WIDE_HEAD else _SHARED_BYTES
    )


@functools.cache
def _has_shared(index: int, wanted: int) -> bool:
    about = torch.cuda.get_device_properties(index)
    if about.shared_memory_per_block_optin >= wanted:
        return True
    what = "products" if wanted == _SHARED_BYTES else f"attention of heads of more than {_WIDE_HEAD} numbers"
    warnings.warn(
        f"{about.name} has {about.shared_memory_per_block_optin} bytes of shared memory for a program, the Triton kernels "
        f"of {what} want {wanted}: torch's operations run, and log-probs of sampler and trainer agree to rounding only",
        stacklevel=2,
    )
    return False


def row_tile(width: int) -> tuple[int, int, int]:
    """(rows of one program, power of 2 that holds a row, warps) for rows of `width` numbers: a function of the width
    alone, so that a row's bits do not depend on how many there are. Raises ValueError for rows too long for a program."""
    if width > _MOST:
        raise ValueError(f"rows of {width} numbers: a Triton program holds {_MOST}; set RLHF_TRITON=0")
    block = 1 << max(width - 1, 15).bit_length()
    rows = max(1, _TILE // block // 4) if block < _TILE else 1
    return rows, block, min(max(rows * block // 512, 1), 16)
