"""The engine against Hugging Face `generate` on the quickstart's workload: same weights, prompts and
sampling.

Both sides get the whole batch at once. `generate` runs the stock model with sdpa attention on left-padded
prompts, each repeated once per sample; the engine runs the prepared model. Runs are interleaved, the first of
each is a warm-up, and medians are reported. Tokens per second count response tokens up to and including the
stop token on both sides. The engine's time includes log-probs, which `generate` is not asked for.

    python benchmarks/rollout_vs_hf.py [--run runs/quickstart] [--runs 5] [--threads 2] [--out benchmarks/results]

With --run, the models are those of the finished quickstart's GRPO stage, before its first step and after its last, the
prompts are those of the first and the settings the recipe's. Before, some responses are a few tokens long and some thirty,
so that `generate` pads much; after, nearly all are thirty and it pads nothing. Without --run, weights and prompts are random
and about one token in 13 is a stop.

Prints one JSON object and one line for people; writes a file only with --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.running import machine
from rlhf.data import load_prompts, rows_from
from rlhf.models.swap import swap_modules
from rlhf.recipe.load import load_plan
from rlhf.rng import generator, key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB = 64


@dataclass(frozen=True)
class Workload:
    """What both sides are asked for."""

    name: str
    stock: torch.nn.Module
    prompts: list[list[int]]
    samples: int  # of each prompt
    stop_ids: tuple[int, ...]
    min_tokens: int
    max_tokens: int


def random_workload(num_prompts: int, samples: int) -> Workload:
    """The quickstart's architecture with random weights; responses of 8 to 32 tokens, 20 on average."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return Workload(
        "random weights",
        stock,
        make_prompts(num_prompts),
        samples,
        stop_ids=tuple(range(8, 13)),
        min_tokens=8,
        max_tokens=32,
    )


def quickstart_workloads(run_dir: Path) -> list[Workload]:
    """The first step of a finished quickstart's GRPO stage, and the same prompts to the policy that the stage made."""
    plan = load_plan(run_dir / "recipe.yaml")
    warmup, grpo = plan.stages
    folder = run_dir / "stages" / warmup.name / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    recipe, rows = grpo.recipe, load_prompts(grpo.recipe.data, tokenizer, name="train", max_context=None)
    first = rows_from(len(rows), seed=recipe.run.seed, position=0, count=recipe.trainer.prompts_per_step)

    def workload(name: str, folder: Path) -> Workload:
        load = transformers.AutoModelForCausalLM.from_pretrained
        return Workload(
            name,
            load(folder, attn_implementation="sdpa").eval(),
            [list(rows[i].token_ids) for i in first],
            recipe.rollout.group_size,
            stop_ids=(tokenizer.eos_token_id,),
            min_tokens=0,
            max_tokens=recipe.rollout.max_response_tokens,
        )

    return [
        workload("quickstart, first GRPO step", folder),
        workload("quickstart, after GRPO", run_dir / "model"),
    ]


def prepared_copy(stock: torch.nn.Module) -> torch.nn.Module:
    """The same weights as the engine runs them."""
    prepared = copy.deepcopy(stock)
    prepared.set_attn_implementation("rlhf")
    swap_modules(prepared)
    return prepared


def make_prompts(count: int) -> list[list[int]]:
    """Prompts of 8 to 12 tokens."""
    source = generator(0, "benchmark prompts")
    return [source.integers(12, VOCAB, source.integers(8, 13)).tolist() for _ in range(count)]


def engine_run(engine: Engine, work: Workload) -> Callable[[int], int]:
    """A function of the run's number that generates once and returns the number of response tokens."""
    params = SamplingParams(max_tokens=work.max_tokens, min_tokens=work.min_tokens, stop_ids=work.stop_ids)

    def run(number: int) -> int:
        engine.set_version(number)  # as after an update: nothing cached, weights packed anew
        requests = [
            Request(
                str(i), tuple(p), params, tuple(key(number, "benchmark", i, j) for j in range(work.samples))
            )
            for i, p in enumerate(work.prompts)
        ]
        return sum(len(c.token_ids) for group in engine.generate(requests) for c in group)

    return run


def generate_run(work: Workload) -> Callable[[int], int]:
    width = max(map(len, work.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])

    def run(number: int) -> int:
        torch.manual_seed(number)
        out = work.stock.generate(
            ids,
            attention_mask=mask,
            num_return_sequences=work.samples,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=work.min_tokens or None,
            max_new_tokens=work.max_tokens,
            eos_token_id=list(work.stop_ids),
            pad_token_id=0,
        )[:, width:].numpy()
        stopped = np.isin(out, work.stop_ids)
        lengths = np.where(stopped.any(1), stopped.argmax(1) + 1, out.shape[1])
        return int(lengths.sum())

    return run


def compare(sides: dict[str, Callable[[int], int]], runs: int) -> dict[str, dict[str, float]]:
    """Interleaved timings; the first run of each side is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {name: [] for name in sides}
    for number in range(runs + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            count = run(number)
            if number:
                seconds[name].append(time.perf_counter() - started)
                tokens[name].append(count)
    return {
        name: {
            "tokens_per_s": statistics.median(
                t / s for t, s in zip(tokens[name], seconds[name], strict=True)
            ),
            "seconds": statistics.median(seconds[name]),
            "tokens": statistics.median(tokens[name]),
        }
        for name in sides
    }


def measure(work: Workload, runs: int) -> dict[str, Any]:
    config = EngineConfig(page_tokens=64, max_batch_tokens=8192, max_sequences=512, prefix_cache=True)
    sides = {
        "engine": engine_run(Engine(prepared_copy(work.stock), config), work),
        "generate": generate_run(work),
    }
    results = compare(sides, runs)
    return {
        "workload": work.name,
        "parameters": sum(p.numel() for p in work.stock.parameters()),
        "prompts": len(work.prompts),
        "samples": work.samples,
        **results,
        "ratio": results["engine"]["tokens_per_s"] / results["generate"]["tokens_per_s"],
    }


def together(found: list[dict[str, Any]]) -> dict[str, float]:
    """One batch of each workload, one after another: tokens per second of both sides and their ratio."""
    rates = {
        side: sum(one[side]["tokens"] for one in found) / sum(one[side]["seconds"] for one in found)
        for side in ("engine", "generate")
    }
    return rates | {"ratio": rates["engine"] / rates["generate"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="directory of a finished quickstart")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    works = (
        [random_workload(args.prompts, args.samples)] if args.run is None else quickstart_workloads(args.run)
    )
    found = [measure(work, args.runs) for work in works]
    report = {
        "benchmark": "rollout_vs_hf",
        "date": time.strftime("%Y-%m-%d"),
        "runs": args.runs,
        "workloads": found,
        "together": together(found),
        "machine": machine(),
    }
    print(json.dumps(report, indent=2))
    for one in found:
        print(
            f"{one['workload']}: engine {one['engine']['tokens_per_s']:,.0f} tok/s, generate "
            f"{one['generate']['tokens_per_s']:,.0f} tok/s: {one['ratio']:.2f}x (median of {args.runs}, "
            f"{torch.get_num_threads()} threads)"
        )
    if len(found) > 1:
        print(f"one batch of each: {report['together']['ratio']:.2f}x")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        kind = "random" if args.run is None else "quickstart"
        name = f"rollout_vs_hf-{kind}-{report['date']}-{torch.get_num_threads()}-threads.json"
        (args.out / name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
