"""`rlhf serve` and `rlhf generate` with a model that is split over two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from rlhf.cli import app

REPO = Path(__file__).resolve().parents[2]
SMALL = ["--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]


def generate(folder, *options):
    return CliRunner().invoke(app, [*map(str, ["generate", folder, *SMALL, *options])])


def test_generate(folder):
    """Would catch: answers of a part of the model."""
    wishes = ["--prompt", "a", "--prompt", "bcd", "--n", 2, "--max-tokens", 12, "--seed", 3]
    expected = generate(folder, *wishes)
    found = generate(folder, *wishes, "--tensor-parallel", 2)
    assert expected.exit_code == found.exit_code == 0
    assert expected.stdout == found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel", 3], "num_key_value_heads=2, intermediate_size=64 cannot be shared out evenly to 3 processes; the model can be split over 1, 2"),
        (["--tensor-parallel", 0], "--tensor-parallel 0: Input should be greater than 0"),
        (["--tensor-parallel", 2, "--device", "cuda:0"], "--device cuda:0"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_process_starts(folder, options, message, monkeypatch):
    """Would catch: a minute of loading in every process before a wrong number is told, and as many tracebacks."""
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    done = generate(folder, "--prompt", "a", *options)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_a_server_until_a_follower_dies(start, client):
    """Would catch: answers that are not the whole model's, a server that waits for ever for a process that is gone, and one
    that calls itself healthy then."""
    server = start({"tensor_parallel": 2})
    split = server.client(timeout=20)
    wishes = dict(model="tiny", max_tokens=20, seed=5, logprobs=1)
    for more in ({}, {"guided_regex": "[0-9]{3}(ab)+!"}, {"min_tokens": 5, "repetition_penalty": 1.2}):
        asked = dict(prompt=["hello", "x"], n=2, extra_body=more) | wishes
        expected, found = (c.completions.create(**asked) for c in (client, split))
        assert found.choices == expected.choices
    ((process, _),) = server.served.engine._followers._running
    os.kill(process.pid, signal.SIGKILL)
    for message in ("rank 1 has ended with code -9", "has ended before: the process of rank 1 has ended"):
        with pytest.raises(openai.InternalServerError, match=message):
            split.completions.create(prompt="hello", **wishes)
    assert httpx.get(server.url + "/health").status_code == 503


def test_followers_end_with_the_leader(folder):
    """Would catch: processes that keep a GPU when the server was killed."""
    variables = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "rlhf.cli", "serve", folder, "--port", "0", *SMALL, "--tensor-parallel", "2"]  # fmt: skip
    with subprocess.Popen([*map(str, words)], env=variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("serving ")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
    assert len(children) == 1
    deadline = time.monotonic() + 20
    while _runs(children[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
