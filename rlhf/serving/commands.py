"""`rlhf serve`, `rlhf generate` and `rlhf chat`: their options, and mistakes told before a model loads.

Here: no torch before everything that can be wrong without it was looked at. Not here: what they do
(`rlhf.serving.server`, `rlhf.serving.batch`, `rlhf.serving.terminal`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from rlhf.serving.settings import EngineSettings, NotStarted, ServeSettings, listen

_INVALID = 2  # exit code
_KEY_VARIABLE = "RLHF_API_KEY"
_ENGINE, _SERVER = EngineSettings.model_fields, ServeSettings.model_fields

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, such as a run's, or a hub name.")]  # fmt: skip
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the model's own), float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel", help="Processes, each on a GPU of its own (or sharing the CPU), over which the model is split; it changes no answer.")]  # fmt: skip
CacheTokens = Annotated[int | None, typer.Option("--cache-tokens", help="Size of the key/value cache; default: within half of the free memory.")]  # fmt: skip
MaxSequences = Annotated[int, typer.Option("--max-sequences", help="Sequences decoded at the same time.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="Numbers of the cache: auto (the model's), int8 or fp8.")]  # fmt: skip
Weights = Annotated[str, typer.Option("--weights", help="Weights that the engine runs from: auto (the model's), int8 or int4.")]  # fmt: skip
OffloadLayers = Annotated[int, typer.Option("--offload-layers", help="Layers whose weights stay in host memory and come to the GPU as they run, for a model that does not fit.")]  # fmt: skip
DraftTokens = Annotated[int, typer.Option("--draft-tokens", help="Most tokens guessed at and checked in one pass, which changes no answer; 0 = none.")]  # fmt: skip
Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help="A LoRA adapter and its name; may be given several times.")]  # fmt: skip
Temperature = Annotated[float, typer.Option("--temperature", help="0 = always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens that together hold this probability.")]  # fmt: skip
TopK = Annotated[int, typer.Option("--top-k", help="Sample among the k likeliest tokens; 0 = all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Sample among tokens with this share of the likeliest one's probability.")]  # fmt: skip
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answers; default: a random one.")]  # fmt: skip
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest answer; default: what the context leaves.")]  # fmt: skip


def serve(
    model: Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback need a key.")] = _SERVER["host"].default,
    port: Annotated[int, typer.Option("--port", help="0 = one that is free.")] = _SERVER["port"].default,
    api_key: Annotated[str | None, typer.Option("--api-key", help=f"What clients must send; others on this machine can see it here, so set {_KEY_VARIABLE} instead.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model; default: MODEL.")] = None,
    dtype: Dtype = _ENGINE["dtype"].default,
    device: Device = _ENGINE["device"].default,
    tensor_parallel: TensorParallel = _ENGINE["tensor_parallel"].default,
    policy: Annotated[str, typer.Option("--policy", help="Who waits least: fcfs, priority, shortest_first, longest_first, fair.")] = _ENGINE["policy"].default,
    cache_tokens: CacheTokens = None,
    max_sequences: MaxSequences = _ENGINE["max_sequences"].default,
    max_batch_tokens: Annotated[int, typer.Option("--max-batch-tokens", help="Tokens in one forward pass.")] = _ENGINE["max_batch_tokens"].default,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help="Samples that may wait; more are answered 503.")] = _SERVER["max_waiting"].default,
    kv_dtype: KvDtype = _ENGINE["kv_dtype"].default,
    weights: Weights = _ENGINE["weights"].default,
    offload_layers: OffloadLayers = _ENGINE["offload_layers"].default,
    draft_tokens: DraftTokens = _ENGINE["draft_tokens"].default,
    adapter: Adapters = None,
    grace: Annotated[float, typer.Option("--grace", help="Seconds that answers in work have to finish after SIGTERM.")] = _SERVER["grace_s"].default,
) -> None:  # fmt: skip
    """Answer OpenAI's HTTP API (completions, chat) with a model. Ctrl-C or SIGTERM ends it."""
    with _mistakes():
        _needs("uvicorn", "starlette")
        engine = EngineSettings.model_validate(
            dict(model=model, dtype=dtype, device=device, tensor_parallel=tensor_parallel, policy=policy, cache_tokens=cache_tokens, kv_dtype=kv_dtype,
                 max_sequences=max_sequences, max_batch_tokens=max_batch_tokens, weights=weights, offload_layers=offload_layers, draft_tokens=draft_tokens,
                 adapters=_adapters(adapter or [], name or model))
        )  # fmt: skip
        key = os.environ.pop(_KEY_VARIABLE, None) if api_key is None else api_key
        settings = ServeSettings(
            host=host, port=port, api_key=key, name=name or model, max_waiting=max_waiting, grace_s=grace
        )
        _check_folder(model)
        bound = listen(settings)
        from rlhf.serving.model import load_served
        from rlhf.serving.server import serve

        served = load_served(engine, settings.name)
    shown, number = bound.getsockname()[:2]
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{number}/v1"

    def on_start() -> None:
        typer.echo(f"serving {settings.name} on {address} (Ctrl-C ends it)")
        sys.stdout.flush()

    asyncio.run(serve(served, settings, bound, on_start=on_start))


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Prompts, a JSON object a line, with `prompt` (text) or `messages`.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take each text prompt as a user's message.")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 1,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends an answer and is not part of it; may be given several times.")] = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the answers, a JSON object a line; default: the terminal.")] = None,
    dtype: Dtype = _ENGINE["dtype"].default,
    device: Device = _ENGINE["device"].default,
    tensor_parallel: TensorParallel = _ENGINE["tensor_parallel"].default,
    cache_tokens: CacheTokens = None,
    max_sequences: MaxSequences = _ENGINE["max_sequences"].default,
    kv_dtype: KvDtype = _ENGINE["kv_dtype"].default,
    weights: Weights = _ENGINE["weights"].default,
    offload_layers: OffloadLayers = _ENGINE["offload_layers"].default,
    draft_tokens: DraftTokens = _ENGINE["draft_tokens"].default,
    adapter: Adapters = None,
) -> None:  # fmt: skip
    """Sample answers to prompts, all at once. Of adapters the first answers, or the one that a row of --file names."""
    with _mistakes():
        from rlhf.serving.rows import read_rows, write_rows

        if (prompt is None) == (file is None):
            raise NotStarted("give either --prompt or --file")
        rows = read_rows(file) if file is not None else [{"prompt": text} for text in prompt or ()]
        if out is not None and not out.parent.is_dir():
            raise NotStarted(f"--out {out}: there is no folder {out.parent}")
        engine = EngineSettings.model_validate(
            dict(model=model, dtype=dtype, device=device, tensor_parallel=tensor_parallel, cache_tokens=cache_tokens, kv_dtype=kv_dtype,
                 max_sequences=max_sequences, weights=weights, offload_layers=offload_layers, draft_tokens=draft_tokens,
                 adapters=_adapters(adapter or [], ""))
        )  # fmt: skip
        _check_folder(model)
        from rlhf.serving.batch import answers
        from rlhf.serving.terminal import printable

        wishes: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        wishes |= dict(n=n, max_tokens=max_tokens, stop=stop or [], seed=seed)
        answered = answers(engine, rows, chat=chat, wishes=wishes)
        if out is not None or file is not None:
            write_rows(answered, out)
            return
    texts = [text for row in answered for text in row["responses"]]
    for i, text in enumerate(texts):
        if len(texts) > 1:
            typer.echo(f"--- {i + 1}")
        typer.echo(printable(text) if sys.stdout.isatty() else text)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system's message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    dtype: Dtype = _ENGINE["dtype"].default,
    device: Device = _ENGINE["device"].default,
    tensor_parallel: TensorParallel = _ENGINE["tensor_parallel"].default,
    cache_tokens: CacheTokens = None,
    kv_dtype: KvDtype = _ENGINE["kv_dtype"].default,
    weights: Weights = _ENGINE["weights"].default,
    offload_layers: OffloadLayers = _ENGINE["offload_layers"].default,
    draft_tokens: DraftTokens = _ENGINE["draft_tokens"].default,
    adapter: Adapters = None,
) -> None:
    """Talk to a model in the terminal. /help says what else there is; Ctrl-C stops an answer."""
    with _mistakes():
        engine = EngineSettings.model_validate(
            dict(model=model, dtype=dtype, device=device, tensor_parallel=tensor_parallel, cache_tokens=cache_tokens, kv_dtype=kv_dtype,
                 max_sequences=1, weights=weights, offload_layers=offload_layers, draft_tokens=draft_tokens,
                 adapters=_adapters(adapter or [], ""))
        )  # fmt: skip
        _check_folder(model)
        from rlhf.serving.terminal import talk

        wishes: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        talk(engine, system=system, wishes=wishes | dict(max_tokens=max_tokens, seed=seed))


@contextmanager
def _mistakes() -> Iterator[None]:
    """A mistake in what was asked is one line, not a traceback."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        where = f"{option} {first['input']}: " if first["loc"] else ""
        _give_up(where + first["msg"].removeprefix("Value error, "))
    except ValueError as error:
        _give_up(str(error))


def _give_up(message: str) -> NoReturn:
    typer.echo(message.replace("model.path: ", ""), err=True)
    raise typer.Exit(_INVALID)


def _needs(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise NotStarted(f"this needs {' and '.join(missing)}; pip install 'rlhf[serve]'")


def _check_folder(model: str) -> None:
    """Raises ValueError for a folder without a model, before torch is there."""
    from rlhf.model_files import local_folder, read_config_json, weight_files

    folder = local_folder(model)
    if folder is not None:
        read_config_json(folder, trusted=False)
        weight_files(folder)


def _adapters(given: Sequence[str], model: str) -> dict[str, str]:
    """NAME=FOLDER, by name. Raises NotStarted for what is no such pair, and a name that is taken."""
    found: dict[str, str] = {}
    for pair in given:
        name, _, folder = pair.partition("=")
        if not (name and folder):
            raise NotStarted(f"--adapter {pair!r} is no NAME=FOLDER, such as sums=runs/sums/model/adapter")
        if name == model or name in found:
            raise NotStarted(f"--adapter {pair!r}: the name {name!r} is taken; choose another")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise NotStarted(
                f"--adapter {pair!r}: there is no {folder}/adapter_config.json; give a folder that peft wrote, such as a run's model/adapter"
            )
        found[name] = folder
    return found
