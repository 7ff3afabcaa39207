"""Compiling at the first use: once, into the cache, and never in the way of a run that could do without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from rlhf.kernels import gpu, native
from rlhf.kernels.activation import swiglu
from rlhf.kernels.attention import Plan, attend_packed, attend_paged, packed_attention
from rlhf.kernels.kv import write_rows
from rlhf.kernels.linear import linear, pack
from rlhf.kernels.linear_logprob import linear_logprobs
from rlhf.kernels.logprob import token_logprobs
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.quantized import quantize, quantized_linear
from rlhf.kernels.rotary import rotate
from rlhf.kernels.sampling import sample

PROGRAM = "from rlhf.kernels import native; print(native.library('activation') is not None)"


def has_library(cache: Path, **env: str) -> tuple[bool, str]:
    """What a fresh process finds, and what it says."""
    env = {**os.environ, "PYTHONPATH": ".", "XDG_CACHE_HOME": str(cache), **env}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True", done.stderr


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_compiled_once_and_found_again(tmp_path):
    """Would catch: a compilation in every process, or drafts left behind."""
    if native.library("attention") is None:
        pytest.skip("no C++ compiler")
    assert has_library(tmp_path)[0]
    (built,) = files(tmp_path)
    made = built.stat().st_mtime_ns
    assert has_library(tmp_path)[0]
    assert files(tmp_path) == [built] and built.stat().st_mtime_ns == made


@pytest.mark.parametrize("env", [{"RLHF_NATIVE": "0"}, {"PATH": "/nowhere"}], ids=str)
def test_without_a_compiler_torch_runs_and_nothing_is_said(tmp_path, env):
    """Would catch: a machine without a compiler, or a user who wants none, being refused or pestered."""
    assert has_library(tmp_path, **env) == (False, "")
    assert not files(tmp_path)


def test_a_compiler_that_fails_is_named_once_and_not_fatal(tmp_path):
    """Would catch: a broken tool chain that ends a run."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'cc1plus: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    found, said = has_library(tmp_path / "cache", PATH=f"{compiler.parent}:/usr/bin:/bin")
    assert not found and not files(tmp_path / "cache")
    assert said.strip() == "rlhf: activation.cpp was not compiled, torch runs instead: cc1plus: no such thing"


def test_a_library_that_cannot_be_loaded_is_not_fatal(tmp_path):
    """Would catch: a file in the cache that another tool put there, or a cache that may hold no programs, that ends every run."""
    if native.library("attention") is None:
        pytest.skip("no C++ compiler")
    has_library(tmp_path)
    (built,) = files(tmp_path)
    built.write_bytes(b"not a library")
    found, said = has_library(tmp_path)
    assert not found and "activation.cpp was not compiled, torch runs instead" in said


def calls(grad: bool) -> list[torch.Tensor]:
    """One result of each operation over rows."""
    x, other, weight = (torch.ones(s, requires_grad=grad) for s in ((4, 64), (4, 64), (48, 64)))
    heads, angles, norm = torch.ones(4, 2, 32, requires_grad=grad), torch.ones(4, 32), torch.ones(64)
    out = [swiglu(x, other), rms_norm(x, norm, 1e-6), rotate(heads, angles, angles)]
    out += [linear(x, weight, None, pack(weight))]
    out += [packed_attention(heads, heads[:, :1], heads[:, 1:], [0, 1, 4], scale=1.0)]
    targets = torch.zeros(4, dtype=torch.int64)
    out += [token_logprobs(x, targets)[0], linear_logprobs(x, weight, targets)[0]]
    if grad:
        return out
    for dtype in (torch.float32, torch.int8):
        pages, scales = torch.zeros(3, 1, 16, 32, dtype=dtype), torch.zeros(3, 1, 16)
        given = {} if dtype == torch.float32 else {"kv_scales": (scales, scales.clone())}
        write_rows(pages, pages.clone(), heads[:, :1], heads[:, 1:], torch.arange(4), **given)
        out.append(pages)
    return [*out, add_rms_norm(x, other, norm, 1e-6)]


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_memory_have_shapes(grad):
    """Would catch: a process that ends at address 0 where someone asks what a model would take."""
    with FakeTensorMode():
        got = calls(grad)
        for out in got if grad else ():
            out.sum().backward()
    assert [tuple(x.shape) for x in got] == [tuple(x.shape) for x in calls(grad)]
    assert all("Fake" in type(x).__name__ for x in got)


def attend(plan, **given):
    return attend_paged(plan=plan, scale=1.0, **given)


def attend_quantised(plan, k_scales, v_scales, **given):
    return attend_paged(plan=plan, scale=1.0, kv_scales=(k_scales, v_scales), **given)


def operations():
    """Operations, their results, and the tensors of which each may be one without memory."""
    x, pages, weight = torch.ones(4, 64), torch.zeros(3, 2, 16, 32), quantize(torch.randn(48, 64), 8)
    heads, whole = torch.ones(4, 2, 32), torch.arange(4)
    paged = Plan([4], [4], page_table=[[1]], page_tokens=16)
    paged_tensors = {"q": heads, "k_pages": pages, "v_pages": pages.clone(), "sinks": torch.zeros(2)}
    packed_weight = torch.randn(48, 64)
    pack_of = pack(packed_weight)
    rows = {"keys": whole, "positions": whole, "temperature": torch.ones(4)}
    return {
        "packed attention": (
            lambda **given: attend_packed(plan=Plan([4], [4]), scale=1.0, **given),
            {"q": heads, "k": heads, "v": heads.clone(), "sinks": torch.zeros(2)},
        ),
        "paged attention": (lambda **given: attend(paged, **given), paged_tensors),
        "attention over int8": (
            lambda **given: attend_quantised(paged, **given),
            {"q": heads, "k_pages": pages.to(torch.int8), "v_pages": pages.to(torch.int8)}
            | {"k_scales": torch.ones(3, 2, 16), "v_scales": torch.ones(3, 2, 16)},
        ),
        "writes": (
            write_rows,
            {"k_pages": pages, "v_pages": pages.clone(), "k": heads, "v": heads, "rows": torch.arange(8)},
        ),
        "linear": (
            lambda **given: linear(weight=packed_weight, packed=pack_of, **given),
            {"x": x, "bias": torch.ones(48)},
        ),
        "quantized linear": (
            lambda **given: quantized_linear(q=weight, **given),
            {"x": x, "bias": torch.ones(48)},
        ),
        "log-probs": (
            lambda **given: token_logprobs(**given)[0],
            {"logits": x, "targets": whole, "temperature": torch.ones(4)},
        ),
        "sampling": (lambda **given: sample(**given).logprobs, {"logits": x} | rows),
    }


@pytest.mark.parametrize("operation", operations())
def test_one_tensor_without_memory(operation):
    """Would catch: a process that ends at address 0 for one of several tensors, or a result of whatever lay in memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    call, tensors = operations()[operation]
    for name, x in tensors.items():
        try:
            got = call(**tensors | {name: mode.from_tensor(x)})
        except DataDependentOutputException:  # numbers that are looked at
            continue
        assert got is None or "Fake" in type(got).__name__, name


def test_a_gradient_without_memory_is_refused():
    """Would catch: the same, on the way back."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = torch.ones(4, 64, requires_grad=True)
    for out in (rms_norm(x, torch.ones(64), 1e-6), swiglu(x, x)):
        if out.grad_fn is not None and native.library("norm") is not None:
            with pytest.raises(RuntimeError, match=r"a FakeTensor \(4, 64\) has no address"):
                (out + mode.from_tensor(torch.ones(4, 64))).sum().backward()


def test_shapes_on_the_meta_device():
    """Would catch: a model whose shapes are looked at, refused by its attention alone."""
    q, k = torch.zeros(8, 4, 16, device="meta"), torch.zeros(8, 2, 16, device="meta")
    out = packed_attention(q, k, k, [0, 8], scale=1.0)
    assert out.is_meta and out.shape == q.shape


def test_a_traced_model_has_the_same_numbers():
    """Would catch: tracing that takes a tensor's stand-in for the tensor."""
    gate, up, norm = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64)

    def layer(gate, up):
        return rms_norm(swiglu(gate, up), norm, 1e-6)

    assert torch.equal(torch.compile(layer, backend="eager")(gate, up), layer(gate, up))


def test_an_argument_that_is_no_number_is_named():
    """Would catch: a tensor given where its address is meant, and a dozen arguments to guess among."""
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    run = native.function("linear", "linear_forward")
    for place, wrong in ((1, torch.ones(2)), (0, 0.5), (11, "1")):
        given = [0] * 12
        given[place] = wrong
        with pytest.raises(TypeError, match=f"argument {place} must be a number.*{type(wrong).__name__}"):
            run(*given)


WANTS_MEMORY = """
import resource, sys
import numpy as np, torch
from rlhf.kernels import native
from rlhf.kernels.attention import Plan, attend_packed, attend_paged
from rlhf.kernels.sampling import sample
torch.set_num_threads(int(sys.argv[2]))
def limited(call):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    try:
        call()
    except MemoryError as error:
        print("MemoryError", error)
if sys.argv[1] == "attention":
    pages, contexts = torch.zeros(1, 1, 16, 16), [20_000_000] * 2
    plan = Plan([1, 1], contexts, page_table=np.zeros((2, 1_250_000), np.int64), page_tokens=16)
    plan.page_range
    limited(lambda: attend_paged(torch.zeros(2, 1, 16), pages, pages, plan, scale=1.0))
if sys.argv[1] == "backward":  # as many queries as nobody has memory for
    from rlhf.kernels import attention
    plan = Plan([1], [1])
    call = attention.of_plan(plan, torch.zeros(1, 1, 16), 1, 16, scale=1.0)
    lens = np.array([10_000_000])
    call.query_lens = call.context_lens = lens.ctypes.data
    limited(lambda: attention._run("attention_backward", call))
if sys.argv[1] == "sampling":
    logits, whole = torch.zeros(2, 20_000_000), torch.arange(2)
    given = {"keys": whole, "positions": whole, "temperature": torch.ones(2), "top_k": whole + 1}
    limited(lambda: sample(logits, **given))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", ["attention", "backward", "sampling"])
def test_want_of_memory_is_an_error(operation, threads):
    """Would catch: a process that ends where one of a function's threads gets no memory."""
    if native.library("attention") is None or not sys.platform.startswith("linux"):
        pytest.skip("no C++ compiler, or no limit of memory")
    env = {**os.environ, "PYTHONPATH": "."}
    command = [sys.executable, "-c", WANTS_MEMORY, operation, str(threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("MemoryError"), (done.stdout, done.stderr[-2000:])


def test_form_names_what_runs(monkeypatch):
    """Would catch: machines with and without a compiler, or a GPU, that a run takes for alike."""
    for there, form in ((True, "Triton and torch"), (False, "torch")):
        monkeypatch.setattr(gpu, "available", lambda there=there: there)
        assert native.form("cuda") == form
    monkeypatch.setattr(native, "library", lambda name: None)
    assert native.form("cpu") == "torch"
    monkeypatch.setattr(native, "library", lambda name: object() if name == "norm" else None)
    assert native.form("cpu") == "C++ and torch"
