"""How kernels are started: on which device, from where, and compiled how often."""

import ast
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import interpreter
from rlhf.kernels import gpu, native
from rlhf.kernels.activation import swiglu
from rlhf.kernels.attention import Plan, attend_packed, attend_paged
from rlhf.kernels.kv import kv_rows, norm_rotate_write, write_rows
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.rotary import rotate

KERNELS = Path(gpu.__file__).parent


@pytest.mark.parametrize(("index", "wanted"), [(0, []), (1, [1])])
def test_a_kernel_starts_where_its_tensors_are(index, wanted, monkeypatch):
    """Would catch: a launch on the current device with another one's memory; a guard that costs where it is not needed."""
    entered, started = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *error):
            entered.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append((grid, args, options, list(entered)))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    gpu.launch(Kernel(), (3,), x, 5, enable_fp_fusion=False, num_warps=4)
    assert started == [((3,), (x, 5), {"num_warps": 4, "enable_fp_fusion": False}, wanted)]
    assert entered == wanted + ["left"] * len(wanted)


def test_every_kernel_starts_through_one_function():
    """Would catch: a launch without a guard of the device, or whose fusing of products and sums is a version's default."""
    files = sorted(KERNELS.glob("*_triton.py"))
    assert len(files) >= 9
    for file in files:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        past = [c.lineno for c in calls if isinstance(c.func, ast.Subscript)]
        assert not past, f"{file.name}:{past}: kernels start through gpu.launch"
        assert any(isinstance(c.func, ast.Name) and c.func.id == "launch" for c in calls), file.name


def step(queries, contexts, width, stored):
    """What a layer of an engine's step asks for: q, k and v beside each other, as the model's product gives them."""
    num, heads, kv_heads, dim, page = sum(queries), 4, 2, 64, 16
    table = np.arange(len(queries) * width).reshape(len(queries), width)
    dtype = torch.bfloat16
    x, fused = torch.zeros(num, 256, dtype=dtype), torch.zeros(num, 512, dtype=dtype).view(num, 8, dim)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    weight, head_weights, cos = (
        torch.zeros(*n, dtype=dtype) for n in ((256,), (heads + kv_heads, dim), (num, dim))
    )
    pages = [torch.zeros(table.size, kv_heads, page, dim, dtype=stored) for _ in "kv"]
    scales = None
    if stored != dtype:
        scales = tuple(torch.zeros(table.size, kv_heads, page) for _ in "kv")
    rows, plan = (
        kv_rows(torch.arange(num), kv_heads, page),
        Plan(queries, contexts, page_table=table, page_tokens=page),
    )
    angles = {"cos": cos, "sin": cos, "eps": 1e-6, "norm_weights": head_weights}
    rms_norm(x, weight, 1e-6)
    add_rms_norm(x, x.clone(), weight, 1e-6)
    norm_rotate_write(q, k, v, *pages, rows, kv_scales=scales, **angles)
    rms_norm(fused[:, : heads + kv_heads], head_weights, 1e-6)
    rotate(q, cos, cos)
    write_rows(*pages, k, v, rows, kv_scales=scales)
    attend_paged(q, *pages, plan, scale=0.1, kv_scales=scales)
    attend_packed(q, k, v, Plan(queries, queries), scale=0.1)
    swiglu(*torch.zeros(num, 1024, dtype=dtype).split(512, 1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_an_engine_that_runs_compiles_nothing_more(stored, monkeypatch):
    """Would catch: a count of tokens, rows, sequences or pages that Triton compiles a kernel for, in the midst of a run."""
    pytest.importorskip("triton")
    from benchmarks.kernel_resources import caught

    monkeypatch.setattr(native, "library", lambda name: None)
    monkeypatch.setattr(gpu, "serves", interpreter.serves)
    steps = [  # queries, contexts, pages of a sequence
        ([1, 1], [700, 30], 44),  # decoding of long contexts, and of short ones
        ([1, 1], [70, 30], 5),
        ([200, 30], [200, 30], 13),  # prompts
    ]
    with caught() as launches:
        for given in steps:
            step(*given, stored)
    known = {launch.key for launch in launches}
    by_kernel = sorted(key.split(" ")[0].removeprefix("rlhf.kernels.") for key in known)
    attention = ["attention_triton._forward"] * 5 + ["attention_triton._join"]
    writes = ["kv_triton._norm_rotate_write"] + ["kv_triton._write"] * (stored != torch.bfloat16)
    norms = ["norm_triton._forward"] * 3
    assert by_kernel == sorted(
        [*attention, *writes, *norms, "activation_triton._forward", "rotary_triton._rotary"]
    )
    generator = np.random.default_rng(0)
    with caught() as launches:
        step([1], [1], 1, stored)
        step([16], [16], 1, stored)
        for num in range(1, 40):
            queries = generator.choice([1, 1, 1, 3, 16, 300], num)
            contexts = queries + generator.integers(0, 900, num)
            step(queries.tolist(), contexts, int(contexts.max()) // 16 + num, stored)
    assert {launch.key for launch in launches} <= known
    assert len(launches) > 300


@pytest.mark.parametrize(
    ("shared", "holds"),
    [(65_536, (False, False, False)), (101_376, (True, True, False)), (166_912, (True,) * 3)],
)
def test_a_small_gpu_runs_what_it_has_room_for(shared, holds, monkeypatch):
    """Would catch: a GPU without room for the widest heads that runs no kernel at all, or one that it has no room for."""
    about = SimpleNamespace(name="small", shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(gpu, "available", lambda: True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    gpu._has_shared.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert gpu.serves(x) and tuple(gpu.holds_tiles(x, dim) for dim in (0, 128, 256)) == holds
        assert len(said) == holds[1:].count(False)
        assert all(f"small has {shared} bytes of shared memory" in str(w.message) for w in said)
    finally:
        gpu._has_shared.cache_clear()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is launched there")
@pytest.mark.parametrize(("queries", "rows"), [([1, 1], 4), ([3, 1], 12), ([1, 600], 32)])
def test_parts_of_a_context_are_of_the_rows_there_are(queries, rows, monkeypatch):
    """Would catch: room for 64 rows of each part of a long context where a sequence has one query."""
    pytest.importorskip("triton")
    from rlhf.kernels import attention_triton

    shapes = []
    monkeypatch.setattr(
        attention_triton,
        "launch",
        lambda kernel, grid, *args, **options: (
            shapes.append((grid, args[12].shape)) if options.get("SPLIT") else None
        ),
    )
    contexts = [2000, 700]
    plan = Plan(queries, contexts, page_table=np.zeros((2, 32), int), page_tokens=64)
    q, pages = torch.zeros(sum(queries), 8, 128).bfloat16(), torch.zeros(1, 2, 64, 128).bfloat16()
    options = {"scale": 0.1, "window": None, "softcap": None, "sinks": None}
    attention_triton.forward(q, pages, pages, plan, share_out=True, **options)
    parts = sum(-(-c // attention_triton.SEGMENT) for c, n in zip(contexts, queries) if n <= 8)
    assert shapes == [((parts, 2), (parts, 2, rows, 128))]


@pytest.mark.parametrize("width", [24, 64])
def test_rows_are_read_alike_wherever_they_lie(width):
    """Would catch: a row that is added up in another order because of where in a tensor it begins."""
    whole = torch.arange(40.0 * 3 * width).view(40, 3, width)
    apart = torch.empty(1 + whole.numel())[1:].view_as(whole).copy_(whole)  # begins 4 bytes late
    for x in (whole, whole[7:], whole[:, 1:], whole[:, :1], whole[5:6, 1:2], apart, whole[..., :20]):
        got = gpu.aligned(x)
        assert torch.equal(got, x) and got.data_ptr() % 16 == 0
        assert got.is_contiguous() or got.stride(0) % 16 == x.shape[-1] % 16 == 0
        assert gpu.token_step(got) == (got.stride(0) if len(x) > 1 else x.shape[1] * x.shape[2])
    assert gpu.aligned(whole) is whole and (gpu.aligned(whole[:, :1]).data_ptr() == whole.data_ptr()) == (
        width == 64
    )
