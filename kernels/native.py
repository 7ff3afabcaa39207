"""C++ forms of operations, compiled on the machine at hand.

Here: `library`, which compiles a source of this folder with the C++ compiler that is there, once for each source,
compiler and CPU, and loads it. Without a compiler, or where RLHF_NATIVE=0, there is none and the torch operations run.
Not here: what the functions compute; each lies beside the operation that calls it.
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
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
_COMPILERS = ("g++", "c++")  # the sources use GCC's vector extensions
_TIMEOUT_S = 120.0


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp of this folder; None where it cannot be had. Takes seconds the first time on a machine."""
    if os.environ.get("RLHF_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    built = _cache_folder() / f"{name}-{_fingerprint(source, compiler)}.so"
    if not built.is_file() and not _compile(compiler, source, built):
        return None
    return ctypes.CDLL(str(built))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf" / "native"


def _fingerprint(source: Path, compiler: str) -> str:
    """Of what the machine code depends on: a home folder may be shared by different machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = (source.read_text(), " ".join(_FLAGS), version, platform.machine(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Model and abilities of the CPU, which -march=native looks at."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)}))


def _compile(compiler: str, source: Path, target: Path) -> bool:
    """Whether it could be done; processes that do it at the same time get in nobody's way."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(draft)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode == 0:
                os.replace(draft, target)
                return True
            reason = done.stderr.strip().splitlines()[:1]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = [str(error)]
    print(f"rlhf: {source.name} was not compiled, torch runs instead: {''.join(reason)}", file=sys.stderr)
    return False
