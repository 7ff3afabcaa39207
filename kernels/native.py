"""C++ forms of operations, compiled on the machine at hand.

Here: `library`, which compiles a source of this folder with the C++ compiler that is there, once for each source,
compiler and CPU, and loads it; `function`, one of its functions; `serves`, which tensors the functions over rows take;
`form`, what the models of this machine get. Without a compiler, or where RLHF_NATIVE=0, there is none and the torch
operations run. Not here: what the functions compute; each lies beside the operation that calls it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhf.kernels import gpu

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
_COMPILERS = ("g++", "c++")  # the sources use GCC's vector extensions
_TIMEOUT_S = 120.0
_LANES = 16  # numbers that a function over rows takes at once: widths are multiples of it
_DTYPES = (torch.float32, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)  # classes with numbers where `address` says; FakeTensor has none
_builtin = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("PyCFunction_NewEx", ctypes.pythonapi)
)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp of this folder; None where it cannot be had. Takes seconds the first time on a machine."""
    if os.environ.get("RLHF_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        built = _cache_folder() / f"{name}-{_fingerprint(source, compiler)}.so"
        if not built.is_file():
            _compile(compiler, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[:1]
        print(f"rlhf: {source.name} was not compiled, torch runs instead: {''.join(reason)}", file=sys.stderr)
        return None


@functools.cache
def function(name: str, symbol: str) -> Callable[..., None]:
    """A function of the library `name`, which there must be, over addresses, integers and floats (builtin.h)."""
    method = ctypes.c_char.in_dll(library(name), f"{symbol}_method")
    return _builtin(ctypes.addressof(method), None, None)


def address(x: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin, as a function takes it; null for none. Raises RuntimeError for a tensor of another class
    than torch's own, which may have none."""
    if x is None:
        return None
    if type(x) not in PLAIN:
        raise RuntimeError(
            f"a {type(x).__name__} {tuple(x.shape)} has no address, and what it belongs to has"
        )
    return x.data_ptr()


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether functions may be given the addresses of the tensors, which lie on a CPU: all are of torch's own classes."""
    for x in tensors:  # plain code: this is asked before every operation
        if x is not None and type(x) not in PLAIN:
            return False
    return True


def hollow(*tensors: torch.Tensor | None) -> torch.Tensor | None:
    """The first that has a shape and no numbers, as those of a FakeTensorMode and on the device "meta"; None where none is."""
    return next((x for x in tensors if isinstance(x, FakeTensor) or x is not None and x.is_meta), None)


def serves(name: str, width: int, *tensors: torch.Tensor) -> bool:
    """Whether the functions of `name` over rows of `width` numbers take the tensors: fp32 or bf16, alike, on a CPU, and
    of no other class than torch's own."""
    dtype = tensors[0].dtype
    if width % _LANES or dtype not in _DTYPES:
        return False
    for x in tensors:  # plain code: this is asked before every operation
        if x.dtype is not dtype or not x.is_cpu or type(x) not in PLAIN:
            return False
    return library(name) is not None


def form(device: torch.device | str) -> str:
    """ "C++" or "torch", or both, or "Triton and torch": what serves models on this device, for people and to compare
    machines."""
    if torch.device(device).type != "cpu":
        return "Triton and torch" if gpu.available() else "torch"
    sources = [path.stem for path in Path(__file__).parent.glob("*.cpp")]
    return " and ".join(sorted({"torch" if library(name) is None else "C++" for name in sources}))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf" / "native"


def _fingerprint(source: Path, compiler: str) -> str:
    """Of what the machine code depends on: a home folder may be shared by different machines."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    parts = (source.read_text(), *headers, " ".join(_FLAGS), asked.stdout, platform.machine(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Model and abilities of the CPU, which -march=native looks at."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)}))


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Processes that do it at the same time get in nobody's way. Raises RuntimeError with what the compiler said."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        command = [compiler, *_FLAGS, str(source), "-o", str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(done.stderr)
        os.replace(draft, target)
