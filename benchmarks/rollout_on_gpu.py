"""The engine on one GPU: the workload "nano-256" against what the GPU allows, launch by launch, and Hugging Face's batching.

    python benchmarks/rollout_on_gpu.py [--shapes 0.6b 1.7b 8b] [--engines graphs launches hf] [--rounds 2] [--out benchmarks/results]

256 requests of 100 to 1,024 random tokens, 100 to 1,024 new ones each, temperature 0.6, no stop token, 16,384 tokens in a pass:
the workload that nano-vllm and mini-sglang publish. Models have Qwen3's shapes and random weights in bf16. The engines take
turns; the first round warms up and is left out. The ceiling is the sum of the least times of a run without any waste: prompts at
the rate of a large bf16 product, every decoding step at the bandwidth of a copy for the weights and the running requests' keys and
values, both measured here beforehand. Peak memory is torch's. On a CPU it runs the shape "tiny" for a test, and means nothing.
Writes files only with --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from benchmarks.gpu_check import ceilings
from benchmarks.running import machine
from rlhf.models.build import build_tokenizer
from rlhf.models.load import prepare
from rlhf.recipe.schema import BuildTokenizerConfig, ModelConfig
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

SHAPES = {  # layers, width, MLP, query heads, key heads, tied embeddings
    "tiny": (2, 64, 128, 4, 2, True),
    "0.6b": (28, 1024, 3072, 16, 8, True),
    "1.7b": (28, 2048, 6144, 16, 8, True),
    "8b": (36, 4096, 12288, 32, 8, False),
    "14b": (40, 5120, 17408, 40, 8, False),
}
_HEAD, _VOCAB, _CONTEXT = 128, 151936, 2304
_GOAL = 0.60  # of the ceiling


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    length: int  # of the response


def nano(count: int, longest: int, vocab: int) -> list[Job]:
    """The workload, from seed 0."""
    draw = random.Random(0)
    least = min(100, longest // 4)
    prompts = [
        tuple(draw.randrange(vocab) for _ in range(draw.randint(least, longest))) for _ in range(count)
    ]
    return [Job(prompt, draw.randint(least, longest)) for prompt in prompts]


def make_model(shape: str) -> torch.nn.Module:
    layers, width, inner, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=16 if shape == "tiny" else _HEAD, tie_word_embeddings=tied,
        vocab_size=512 if shape == "tiny" else _VOCAB, max_position_embeddings=_CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def ceiling_s(model: torch.nn.Module, jobs: Sequence[Job], top: dict[str, float]) -> float:
    """Seconds that the GPU takes at least; `top` as `benchmarks.gpu_check.ceilings` measures it, per ms."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    layers = weights - embeddings * (1 if config.tie_word_embeddings else 2)
    prompts = sum(len(job.prompt) for job in jobs)
    of_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes
    ms = 2 * layers * prompts / top["matmul"]
    for step in range(1, max(job.length for job in jobs)):
        running = [job for job in jobs if job.length > step]
        read = 2 * (layers + embeddings) + of_token * sum(len(job.prompt) + step for job in running)
        work = 2 * (layers + embeddings) * len(running)
        ms += max(read / top["copy"], work / top["matmul"])
    return ms / 1e3


# -- the engines -----------------------------------------------------------------------------------------------------------


def ours(model: torch.nn.Module, jobs: Sequence[Job], *, graphs: bool) -> Callable[[int], int]:
    """A run by its number -> the tokens that it wrote."""
    config = EngineConfig(
        page_tokens=64, max_batch_tokens=16384, max_sequences=256, prefix_cache=False, cuda_graphs=graphs
    )
    engine = Engine(model, config)

    def run(number: int) -> int:
        asked = [
            Request(
                id=str(i),
                prompt_ids=job.prompt,
                params=SamplingParams(max_tokens=job.length, temperature=0.6),
                seeds=(key(number, "nano", i),),
            )
            for i, job in enumerate(jobs)
        ]
        return sum(len(c.token_ids) for found in engine.generate(asked) for c in found)

    return run


def hugging_face(model: Any, jobs: Sequence[Job]) -> Callable[[int], int]:
    """transformers' continuous batching, as `generate_batch` runs it."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(
        max_batch_tokens=16384,
        max_requests_per_batch=256,
        num_blocks=len(jobs) * 2304 // 256 + 64,
        page_size=256,
        seed=0,
    )
    asked = GenerationConfig(
        max_new_tokens=max(job.length for job in jobs), eos_token_id=-1, pad_token_id=0, do_sample=True, temperature=0.6,
        top_k=0, top_p=1.0,
    )  # fmt: skip

    def run(number: int) -> int:
        written = done = 0
        with model.continuous_batching_context_manager(
            generation_config=asked, continuous_batching_config=config, block=True, timeout=30, warmup=False
        ) as manager:
            for i, job in enumerate(jobs):
                manager.add_request(
                    list(job.prompt), request_id=str(i), max_new_tokens=job.length, eos_token_id=-1
                )
            while done < len(jobs):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError(f"the manager stopped after {done} of {len(jobs)} requests")
                if result is not None and result.is_finished():
                    written, done = written + len(result.generated_tokens), done + 1
        return written

    return run


def prepared(model: torch.nn.Module) -> torch.nn.Module:
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    return prepare(
        model, ModelConfig(), tokenizer, seed=0, device=device(), trainable=False, invariant=True
    )  # fmt: skip


def measure(
    shape: str, engines: Sequence[str], rounds: int, count: int, top: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each engine; Hugging Face's has a model of its own, after ours has gone."""
    rows: list[dict[str, Any]] = []
    families = ([e for e in engines if e != "hf"], [e for e in engines if e == "hf"])
    for family in families:
        if not family:
            continue
        model = make_model(shape)
        jobs = nano(count, 1024 if shape != "tiny" else 24, model.config.vocab_size)
        least = ceiling_s(model, jobs, top)
        if "hf" in family:
            runs = {"hf": hugging_face(model, jobs)}
        else:
            model = prepared(model)
            runs = {engine: ours(model, jobs, graphs=engine == "graphs") for engine in family}
        rows += [{"shape": shape, "ceiling_s": least} | row for row in in_turn(runs, rounds)]
        del model, runs
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def in_turn(runs: dict[str, Callable[[int], int]], rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, float] = dict.fromkeys(runs, 0.0)
    failed: dict[str, str] = {}
    written = 0
    for number in range(rounds + 1):
        for name, run in runs.items():
            if name in failed:
                continue
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            try:
                written = run(number)
            except Exception as error:  # a peer's failure is a row of the table, with its reason
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            if number:
                seconds[name].append(time.perf_counter() - started)
            if torch.cuda.is_available():
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 1e9)
    return [
        {"engine": name, "failed": failed[name]} if name in failed else
        {"engine": name, "tokens": written, "seconds": seconds[name], "peak_gb": peak[name]}
        for name in runs
    ]  # fmt: skip


# -- what is printed ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| shape | engine | tokens/s | s | of the ceiling | peak memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['shape']} | {row['engine']} | failed: {row['failed']} | | | |")
            continue
        median = statistics.median(row["seconds"])
        share = row["ceiling_s"] / median
        reached = "" if row["engine"] != "graphs" or share >= _GOAL else f" (goal {_GOAL:.0%} not reached)"
        lines.append(
            f"| {row['shape']} | {row['engine']} | {row['tokens'] / median:,.0f} | {median:.1f} | {share:.0%}{reached} | "
            f"{row['peak_gb']:.1f} GB |"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "1.7b", "8b"])
    parser.add_argument(
        "--engines", nargs="+", choices=("graphs", "launches", "hf"), default=["graphs", "launches", "hf"]
    )
    parser.add_argument("--rounds", type=int, default=2, help="measured, after one that is not")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and args.shapes != ["tiny"]:
        parser.error("there is no GPU; only --shapes tiny runs without one, as a test of this script")
    top = ceilings() if on_gpu else {"copy": 2e7, "matmul": 1e8}
    rows = [
        row for shape in args.shapes for row in measure(shape, args.engines, args.rounds, args.requests, top)
    ]
    about = machine() | {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "top": top}
    print(
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}"
    )
    print(table(rows))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"rollout_on_gpu-{time.strftime('%Y-%m-%d')}.json"
        file.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(rows) + "\n")
    return rows


if __name__ == "__main__":
    main()
