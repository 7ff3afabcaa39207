"""What the benchmarks share: training a recipe as a user does, reading what it wrote, and what machine it was on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def train(recipe: Path, output_dir: Path, *overrides: str, env: Mapping[str, str] | None = None) -> None:
    """`rlhf train` with this checkout's code in a process of its own; a finished run is left as it is. Raises
    CalledProcessError where it fails."""
    command = [sys.executable, "-m", "rlhf.cli", "train", str(recipe), f"run.output_dir={output_dir}"]
    subprocess.run(
        [*command, "tracking.wandb=off", *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        cwd=ROOT,
        check=True,
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; unlike a run's own reader it wants the file whole."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def machine() -> dict[str, Any]:
    """What a result is of, and how busy the machine is now (load averages over 1, 5 and 15 minutes)."""
    import torch
    import transformers

    from rlhf.kernels import native

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_end": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": native.form("cpu"),
        "commit": commit(),
    }


def commit() -> str:
    """Of the code here, with a + where it was changed since; empty without git."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
