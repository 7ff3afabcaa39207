"""`rlhf serve`, `rlhf generate` and `rlhf chat`, as a person uses them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.rollout.policies import ORDERS
from rlhf.serving import settings, terminal

REPO = Path(__file__).resolve().parents[2]
SMALL = ["--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]


def command(*args, **options):
    return CliRunner().invoke(app, [*map(str, args)], **options)


@pytest.fixture
def serving(folder, tmp_path):
    """serving(*options) -> the process and the line that it printed."""
    processes = []

    def start(*options, **environment):
        variables = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | environment
        words = [sys.executable, "-m", "rlhf.cli", "serve", folder, "--port", "0", "--name", "tiny", *SMALL, *options]  # fmt: skip
        process = subprocess.Popen(
            [*map(str, words)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, process.stdout.readline()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_serve_until_sigterm(serving):
    """Catches: a server that does not come up, that SIGTERM kills in the middle of an answer, and a key in what it prints."""
    process, line = serving("--host", "0.0.0.0", RLHF_API_KEY="s3cret-key")
    assert line.startswith("serving tiny on http://0.0.0.0:") and line.endswith("/v1 (Ctrl-C ends it)\n")
    url = line.split(" on ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
    environment = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert b"s3cret" not in environment
    client = openai.OpenAI(base_url=url, api_key="s3cret-key", max_retries=0)
    wishes = dict(model="tiny", prompt="x", max_tokens=300, extra_body={"ignore_eos": True})
    chunks = iter(client.completions.create(stream=True, stream_options={"include_usage": True}, **wishes))
    next(chunks)
    process.send_signal(signal.SIGTERM)
    assert list(chunks)[-1].usage.completion_tokens == 300
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "s3cret" not in out + err and "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/folder"], "there is no folder no/such/folder"),
        (["FOLDER", "--host", "0.0.0.0"], "there is no key; set RLHF_API_KEY"),
        (["FOLDER", "--policy", "random"], "--policy random: Input should be 'fcfs'"),
        (["FOLDER", "--dtype", "int3"], "--dtype int3"),
        (["FOLDER", "--max-sequences", "0"], "--max-sequences 0"),
        (["FOLDER", "--port", "99999"], "--port 99999"),
        (["FOLDER", "--adapter", "x"], "--adapter 'x' is no NAME=FOLDER"),
        (
            ["FOLDER", "--offload-layers", "4", "--weights", "int8"],
            "--offload-layers 4 with --weights int8: rounded",
        ),
        (["FOLDER", "--adapter", "x=no/such"], "there is no no/such/adapter_config.json"),
    ],
)
def test_mistakes_are_told_before_a_model_loads(folder, args, message, monkeypatch):
    """Catches: a minute of loading before a typo is told, and tracebacks."""
    monkeypatch.setattr("rlhf.serving.model.load_served", lambda *a: pytest.fail("a model was loaded"))
    done = command("serve", *(folder if a == "FOLDER" else a for a in args))
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_layers_in_host_memory_beside_a_cpu_are_refused(folder):
    """Catches: an option that costs copies and saves nothing."""
    done = command("generate", folder, "--prompt", "x", "--device", "cpu", "--offload-layers", "3")
    assert done.exit_code == 2 and "the weights are in host memory as it is; leave it out" in done.output


def test_a_taken_port_is_told(folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command("serve", folder, "--port", taken.getsockname()[1])
    assert done.exit_code == 2 and "choose another --port" in done.output


def test_policies_are_the_engines():
    assert set(settings.Policy.__args__) == set(ORDERS)


def test_generate(folder, tmp_path):
    """Catches: answers under the wrong row, and a seed without effect."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "a", "id": 7}, {"messages": [{"role": "user", "content": "é"}]}, {"prompt": "a"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = ["--n", 2, "--max-tokens", 12, "--seed", 3, *SMALL]
    done = command("generate", folder, "--file", file, "--out", out, *options)
    assert done.exit_code == 0 and done.stdout == ""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: r[k] for k in row} for r, row in zip(found, rows, strict=True)] == rows
    assert all(len(r["responses"]) == 2 == len(r["finish_reasons"]) for r in found)
    assert found[0]["responses"] != found[2]["responses"]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    again = command("generate", folder, "--file", file, *options)
    assert again.stdout == out.read_text()
    one = command("generate", folder, "--prompt", "a", "--max-tokens", 12, "--seed", 3, *SMALL)
    assert one.stdout == found[0]["responses"][0] + "\n"


def test_generate_with_adapters(folder, adapter_folder, tmp_path):
    """Catches: an adapter that no answer comes from, or all do, and one whose name nobody knows."""
    file = tmp_path / "in.jsonl"

    def written(rows, *args):
        file.write_text("\n".join(map(json.dumps, rows)))
        done = command(
            "generate", folder, "--file", file, "--temperature", 0, "--max-tokens", 12, *args, *SMALL
        )
        return (
            done.output
            if done.exit_code
            else [json.loads(row)["responses"] for row in done.stdout.splitlines()]
        )

    given = ["--adapter", f"tuned={adapter_folder}", "--adapter", f"twin={adapter_folder}"]
    ((plain,),) = written([{"prompt": "ab"}])
    tuned, none, twin = written(
        [{"prompt": "ab"} | a for a in ({}, {"adapter": ""}, {"adapter": "twin"})], *given
    )
    assert none == [plain] != tuned == twin
    message = "prompt 2: the adapter 'x' is not here (--adapter NAME=FOLDER); there are: "
    rows = [{"prompt": "a"}, {"prompt": "a", "adapter": "x"}]
    assert message + "tuned, twin" in written(rows, *given) and message + "none" in written(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('{"text": "x"}', "line 2: want an object with either"),
        (json.dumps({"messages": [{"role": "king", "content": "x"}]}), "prompt 2: messages.0.role"),
        (json.dumps({"prompt": "x" * 1100}), "prompt 2: there is room for 1024 tokens"),
    ],
)
def test_a_bad_row_is_named(folder, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    done = command("generate", folder, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 2 and message in done.output and not (tmp_path / "out").exists()


def chat(folder, monkeypatch, *lines, args=()):
    """What is shown when these lines are typed; one that is an exception is raised instead."""
    typed = iter(lines)

    def line(prompt):
        given = next(typed, EOFError())
        if isinstance(given, BaseException):
            raise given
        return given

    monkeypatch.setattr("builtins.input", line)
    return command("chat", folder, "--max-tokens", 20, "--seed", 1, *SMALL, *args)


def test_chat(folder, monkeypatch):
    """Catches: a conversation that forgets, or that /reset does not forget, and Ctrl-C at the prompt that ends it."""
    seen = []
    prompt = terminal.chat_prompt
    monkeypatch.setattr(
        terminal, "chat_prompt", lambda t, m: seen.append([(x.role, x.text) for x in m]) or prompt(t, m)
    )
    done = chat(folder, monkeypatch, "hi", KeyboardInterrupt(), "REFUSE", "more", "/reset", "/system be kind", "again", "/what", "/exit", args=["--system", "s"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "refuses the messages: not this" in done.output and "/what is no command" in done.output
    assert "\x1b" not in done.output
    first, refused, more, again = seen
    assert first == [("system", "s"), ("user", "hi")] and refused[-1] == ("user", "REFUSE")
    assert [role for role, _ in more] == ["system", "user", "assistant", "user"] and more[-1] == (
        "user",
        "more",
    )
    assert again == [("system", "be kind"), ("user", "again")]


def test_chat_with_adapters(folder, adapter_folder, monkeypatch):
    """Catches: an adapter that does not answer, or goes on to."""
    asked, new_request = [], terminal.new_request
    monkeypatch.setattr(terminal, "new_request", lambda *a: asked.append(a[-1]) or new_request(*a))
    lines = ["hi", "/adapter twin", "hi", "/adapter x", "hi", "/adapter", "hi"]
    given = ["--adapter", f"tuned={adapter_folder}", "--adapter", f"twin={adapter_folder}"]
    done = chat(folder, monkeypatch, *lines, args=given)
    assert done.exit_code == 0 and asked == ["tuned", "twin", "twin", ""]
    assert "there is no adapter x; there are: tuned, twin" in done.output
    asked.clear()
    assert chat(folder, monkeypatch, "hi", "/exit").exit_code == 0 and asked == [""]


def test_ctrl_c_stops_the_answer_alone(folder, monkeypatch):
    """Catches: Ctrl-C that ends the program, or loses what was said."""
    from rlhf.rollout import Engine

    step, count = Engine.step, []

    def interrupted(self):
        count.append(1)
        if len(count) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    done = chat(folder, monkeypatch, "hi", "more", args=["--max-tokens", 200])
    assert done.exit_code == 0 and done.output.count("[stopped]") == 1 and len(count) > 6


def test_help_and_start_are_quick():
    """Catches: torch at the top of a command."""
    code = "import sys, rlhf.cli; assert not {'torch', 'transformers', 'starlette', 'uvicorn'} & set(sys.modules)"
    began = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.process_time() - began < 5
