"""The rollout engine against Hugging Face `generate`, padded and paged, vLLM, OpenVINO-GenAI and llama.cpp on a CPU.

The same random weights, prompts, lengths and precision, on the same cores with a thread for each. Workloads: 1, 16 and 64
prompts of 128 tokens with 64 new ones each; and groups, 64 prompts of 64 to 256 tokens with 8 samples of 32 to 256 tokens
each, where every round begins with new weights from a folder, so that a round is what a step of RL asks for. Every engine is
a process of its own that keeps its model (rollout_engines.py); rounds are taken in turn, after others that warm up, and
medians are compared. Rounds differ in prompts, so that no cache helps from one to the next. Every response is counted and
has the length asked for; greedy tokens, before and after an update, are compared with `generate`'s. Ours computes log-probs,
the others are not asked for them.

    PYTHONPATH=. python benchmarks/rollout_vs_peers.py [--sizes 5m 30m 120m] [--families qwen3 llama] [--dtypes float32 bfloat16]
        [--works 1 16 64 group] [--engines ours hf ...] [--python vllm=venv/bin/python ...] [--cores 0] [--rounds 5]
        [--row-s 300] [--prompts 64] [--cache runs/rollout_vs_peers] [--out benchmarks/results] [--quick]

An engine runs in the Python that --python names for it, else in this one; one whose package is not there is shown as not
installed. --row-s limits the time of one row of the table: where it does not suffice for all 64 prompts, a row has as many as
the slowest engine leaves time for, and another row all of them for the engines that are fast enough. Prints the table; writes
rollout_vs_peers-DATE.json and .md after every row, with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.rollout_engines import ENGINES, Ids, Job
from benchmarks.running import ROOT, machine

SHAPES = {  # hidden, layers, heads, key/value heads, head, mlp, vocabulary
    "tiny": (64, 2, 4, 2, 32, 128, 512),
    "5m": (256, 5, 8, 4, 32, 768, 4096),
    "30m": (512, 8, 8, 4, 64, 1536, 8192),
    "120m": (768, 16, 12, 4, 64, 2304, 16384),
}
SIZES = ("5m", "30m", "120m")
FAMILIES = ("qwen3", "llama")
DTYPES = ("float32", "bfloat16")
WORKS = ("1", "16", "64", "group")
WEIGHTS = ("a", "b")  # of every model: loaded, and updated to in turn
PROMPT, NEW = 128, 64  # tokens, of the workloads that are no groups
SAMPLES, PROMPTS, LENGTHS = 8, (64, 256), (32, 256)  # of the groups
SUBSETS = (64, 32, 16, 8, 4, 2, 1)  # prompts of a group workload that is too much
CONTEXT = PROMPTS[1] + LENGTHS[1]
FIRST_ID = 3  # below are special tokens
GREEDY = 8  # tokens that must agree
OURS, REFERENCE = "ours", "hf"
PATIENCE_S = 600.0  # for loading, and for any command beyond what it was expected to take
NAMES = {
    "ours": "ours",
    "hf": "HF generate",
    "hf-batch": "HF generate_batch",
    "vllm": "vLLM",
    "openvino": "OpenVINO-GenAI",
    "llamacpp": "llama.cpp",
}


# -- what they work on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A workload."""

    name: str
    num_prompts: int
    vocabulary: int
    short: bool = False  # a warm-up of two prompts and short responses

    @property
    def updates(self) -> bool:
        """Whether every round begins with new weights."""
        return self.name == "group"

    def jobs(self, round_number: int) -> list[Job]:
        """Prompts of their own for every round, of the same lengths."""
        lengths, ids = random.Random(0), random.Random(round_number)
        return [self._job(lengths, ids) for _ in range(self.num_prompts)]

    def _job(self, lengths: random.Random, ids: random.Random) -> Job:
        size, samples = PROMPT, [NEW]
        if self.updates:
            size, samples = lengths.randint(*PROMPTS), [lengths.randint(*LENGTHS) for _ in range(SAMPLES)]
        if self.short:
            samples = [length // 4 for length in samples]
        return [ids.randrange(FIRST_ID, self.vocabulary) for _ in range(size)], samples


def num_tokens(jobs: Sequence[Job]) -> int:
    """Of the responses."""
    return sum(sum(lengths) for _, lengths in jobs)


def make_model(folder: Path, family: str, size: str, dtype: str, seed: int) -> None:
    """Random weights, large enough that the next token depends on more than the last, and a tokenizer for those who look
    for one. A folder that is there is left as it is."""
    if (folder / "model.safetensors").is_file():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary = SHAPES[size]
    tokens = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"t{i}": i for i in range(FIRST_ID, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config, model = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    made = model(
        config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=2048,
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for name, weight in made.named_parameters():
        if "norm" in name:  # at 1 an exporter would leave it out
            torch.nn.init.uniform_(weight, 0.8, 1.2)
    made.to(getattr(torch, dtype)).save_pretrained(folder)


# -- the processes -----------------------------------------------------------------------------------------------------


class Side:
    """One engine's process, seen from outside. What goes wrong in it stands in `fault`, and then it is asked no more."""

    def __init__(self, engine: str, python: str, cores: Sequence[int], log: Path) -> None:
        self.engine, self.fault, self.about = engine, "", dict[str, Any]()
        self.rate = 0.0  # tokens per second, the most seen: one sample says little about a batch
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(len(cores))}
        environment.pop("PYTHONPATH", None)
        if engine == OURS:
            environment["PYTHONPATH"] = str(ROOT)
        self._log: TextIO = log.open("w")
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("rollout_engines.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=log.parent,
        )
        os.sched_setaffinity(self._process.pid, cores)

    def ask(self, do: str, *, within_s: float = PATIENCE_S, **asked: Any) -> dict[str, Any] | None:
        """The answer; None, and a fault, where there is none."""
        if self.fault:
            return None
        try:
            print(json.dumps({"do": do, **asked}), file=self._process.stdin, flush=True)
            answer = self._hear(within_s)
        except (BrokenPipeError, EOFError):
            return self._fail(f"its process ended with status {self._process.wait()} at {do}")
        except TimeoutError:
            return self._fail(f"no answer to {do} within {within_s:.0f} s")
        if "missing" in answer:
            return self._fail(f"not installed: no module {answer['missing']}")
        if "failed" in answer:
            return self._fail(f"{do}: {answer['failed']}")
        return answer

    def _hear(self, within_s: float) -> dict[str, Any]:
        """Raises TimeoutError, and EOFError where the process has ended."""
        heard = self._process.stdout
        if not select.select([heard], [], [], within_s)[0]:
            raise TimeoutError
        line = heard.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _fail(self, fault: str) -> None:
        self.fault = fault.splitlines()[0][:200]
        print(f"  {NAMES[self.engine]}: {self.fault} ({self._log.name})", flush=True)
        self._process.kill()
        self._process.wait()

    def run(self, work: Work, round_number: int) -> dict[str, Any] | None:
        """One round without its update; None where it fails, or where a response has another length than asked for."""
        jobs = work.jobs(round_number)
        expected = num_tokens(jobs) / self.rate if self.rate else 0.0
        answer = self.ask("run", jobs=jobs, seed=round_number, within_s=PATIENCE_S + 4 * expected)
        if answer is None:
            return None
        if answer["lengths"] != [lengths for _, lengths in jobs]:
            return self._fail(f"made {answer['lengths']} tokens where {[n for _, n in jobs]} were asked for")
        self.rate = max(self.rate, num_tokens(jobs) / answer["seconds"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENVINO_TELEMETRY_OPT_OUT": "1",
}


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of the whole run."""

    engines: Sequence[str]
    pythons: Mapping[str, str]
    cores: Sequence[int]
    rounds: int
    row_s: float
    prompts: int
    cache: Path


class Model:
    """One architecture, size and precision, loaded in every engine."""

    def __init__(self, family: str, size: str, dtype: str, settings: Settings) -> None:
        self.family, self.size, self.dtype, self._settings = family, size, dtype, settings
        self.vocabulary = SHAPES[size][-1]
        name = f"{family}-{size}-{dtype}"
        self.folders = [settings.cache / f"{name}-{weights}" for weights in WEIGHTS]
        for seed, folder in enumerate(self.folders):
            make_model(folder, family, size, dtype, seed)
        self._updates = 0
        self.sides = [self._side(engine, name) for engine in settings.engines]

    def _side(self, engine: str, name: str) -> Side:
        log = self._settings.cache / f"{name}-{engine}.log"
        side = Side(
            engine, self._settings.pythons.get(engine, sys.executable), self._settings.cores, log.resolve()
        )
        folder = str(self.folders[0].resolve())
        about = side.ask("load", engine=engine, folder=folder, dtype=self.dtype, context=CONTEXT)
        if about is not None:
            side.about = {k: about[k] for k in ("package", "version", "threads")} | {
                "load_s": about["seconds"],
                "load_mb": about["peak_mb"],
            }
            print(f"  {NAMES[engine]}: loaded in {about['seconds']:.1f} s", flush=True)
        return side

    @property
    def working(self) -> list[Side]:
        return [side for side in self.sides if not side.fault]

    def update(self, side: Side, number: int) -> dict[str, Any] | None:
        """To the weights of that number, which go round."""
        folder = self.folders[number % len(self.folders)]
        prompt = [FIRST_ID + number] * 8
        return side.ask("update", folder=str(folder.resolve()), prompt=prompt)

    def check(self) -> None:
        """Whether they write the reference's greedy tokens, and after an update those of the other weights."""
        ids = random.Random("greedy")
        prompt = [ids.randrange(FIRST_ID, self.vocabulary) for _ in range(40)]
        found: dict[str, list[Ids]] = {side.engine: [] for side in self.working}
        for number in range(len(WEIGHTS)):
            for side in self.working:
                if number and self.update(side, number) is None:
                    continue
                answer = side.ask("greedy", prompt=prompt, count=GREEDY)
                if answer is not None:
                    found[side.engine].append(answer["token_ids"])
        expected = found.get(REFERENCE)
        for side in self.working:
            if expected:
                each = [agreeing(a, b) for a, b in zip(found[side.engine], expected, strict=True)]
                side.about["greedy_agreeing"] = each

    def warm_up(self) -> None:
        """What is built or measured at the first call, and a first idea of how fast they are."""
        for number in (1001, 1002):  # unlike those of the rounds
            for side in self.working:
                side.run(Work("group", 2, self.vocabulary, short=True), number)

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Of the table, for a workload."""
        row_s, ours = self._settings.row_s, [s for s in self.working if s.engine == OURS]
        if name != "group":
            yield self._row(Work(name, int(name), self.vocabulary), self.working, {})
            return
        whole = Work("group", self._settings.prompts, self.vocabulary)
        tokens = num_tokens(whole.jobs(0))
        whole_s = {side.engine: tokens / side.rate for side in self.working}
        subset = subset_within(sum(whole_s.values()), whole.num_prompts, row_s)
        yield self._row(Work("group", subset, self.vocabulary), self.working, {})
        if subset == whole.num_prompts:
            return
        fast = fast_enough(whole_s, row_s)
        if ours and len(fast) > 1:
            left_out = {e: f"about {s:.0f} s a round" for e, s in whole_s.items() if e not in fast}
            yield self._row(whole, [s for s in self.working if s.engine in fast], left_out)

    def _row(self, work: Work, sides: Sequence[Side], left_out: Mapping[str, str]) -> dict[str, Any]:
        """Rounds in turn, within the time for a row; at least one. What is no group begins with one that does not count."""
        seen: dict[str, list[dict[str, float]]] = {side.engine: [] for side in sides}
        start = time.perf_counter()
        number, round_s = (1 if work.updates else 0), 0.0
        while number <= 1 or (
            number <= self._settings.rounds and time.perf_counter() - start + round_s < self._settings.row_s
        ):
            round_start = time.perf_counter()
            for side in sides:
                taken = self._round(side, work, number)
                if taken is not None and number:
                    seen[side.engine].append(taken)
            number, round_s = number + 1, time.perf_counter() - round_start
        return {
            "family": self.family,
            "size": self.size,
            "dtype": self.dtype,
            "work": work.name,
            "prompts": work.num_prompts,
            "tokens": num_tokens(work.jobs(0)),
            "rounds": number - 1,
            "left_out": {side.engine: side.fault for side in self.sides if side.fault} | dict(left_out),
            "engines": {
                side.engine: summary(seen[side.engine], work, len(self._settings.cores)) | side.about
                for side in sides
                if seen[side.engine] and not side.fault
            },
        }

    def _round(self, side: Side, work: Work, number: int) -> dict[str, float] | None:
        update_s, update_mb = 0.0, 0.0
        if work.updates:
            updated = self.update(side, number)
            if updated is None:
                return None
            update_s, update_mb = updated["seconds"], updated["peak_mb"]
        ran = side.run(work, number)
        if ran is None:
            return None
        return {
            "seconds": ran["seconds"],
            "cpu_s": ran["cpu_s"],
            "update_s": update_s,
            "update_mb": update_mb,
            "peak_mb": ran["peak_mb"],
        }

    def close(self) -> None:
        for side in self.sides:
            side.close()


def agreeing(found: Ids, expected: Ids) -> int:
    """How many tokens from the first on."""
    return next(
        (i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected))
    )


def subset_within(whole_s: float, prompts: int, limit_s: float) -> int:
    """As many of the prompts as leave time for two rounds, where all take `whole_s`; at least one."""
    return next((n for n in (prompts, *SUBSETS) if n <= prompts and 2 * whole_s * n / prompts <= limit_s), 1)


def fast_enough(whole_s: Mapping[str, float], limit_s: float) -> set[str]:
    """Those that together leave time for two rounds: ours, and the fastest others."""
    chosen, total = set(), 0.0
    for engine in sorted(whole_s, key=lambda e: (e != OURS, whole_s[e])):
        total += whole_s[engine]
        if 2 * total > limit_s:
            break
        chosen.add(engine)
    return chosen


def summary(taken: Sequence[Mapping[str, float]], work: Work, num_cores: int) -> dict[str, Any]:
    """Medians over the rounds, and how much of its cores the engine had."""
    tokens = num_tokens(work.jobs(0))
    seconds = statistics.median(t["seconds"] for t in taken)
    with_update = statistics.median(t["seconds"] + t["update_s"] for t in taken)
    return {
        "seconds": seconds,
        "with_update_s": with_update,
        "update_s": statistics.median(t["update_s"] for t in taken),
        "tokens_per_s": tokens / seconds,
        "with_update_tokens_per_s": tokens / with_update,
        "ms_per_token": 1e3 * seconds / tokens,
        "peak_mb": max(t["peak_mb"] for t in taken),
        "update_mb": max(t["update_mb"] for t in taken),
        "core_share": statistics.median(t["cpu_s"] / t["seconds"] for t in taken) / num_cores,
        "rounds_s": [round(t["seconds"], 4) for t in taken],
    }


# -- the table ---------------------------------------------------------------------------------------------------------


def ratio(row: Mapping[str, Any], engine: str, figure: str = "with_update_s") -> float | None:
    """Its time over ours, updates included unless `figure` is "seconds"; None where one of them has none."""
    engines = row["engines"]
    if OURS not in engines or engine not in engines:
        return None
    return engines[engine][figure] / engines[OURS][figure]


GOALS = {  # workload, the other engine, the smallest ratio
    "4x HF generate, padded, on groups": ("group", "hf", 4.0),
    "vLLM on groups": ("group", "vllm", 1.0),
    "llama.cpp's latency": ("1", "llamacpp", 1.0),
}


def markdown(report: Mapping[str, Any]) -> str:
    """The table for people."""
    about, rows = report["machine"], report["rows"]
    engines = [e for e in ENGINES if any(e in row["engines"] or e in row["left_out"] for row in rows)]
    lines = [
        f"# Rollout engines on a CPU, {report['date']}",
        "",
        f"{about['cpu']}, {len(report['cores'])} of {about['cores']} cores, a thread on each; torch {about['torch']}, "
        f"transformers {about['transformers']}, Python {about['python']}, commit {about['commit']}. "
        + "; ".join(f"{NAMES[e]} is {v}" for e, v in versions(rows).items())
        + ".",
        "",
        "Each cell: response tokens per second (or ms per token), in parentheses its time over ours, and the process's peak "
        "resident memory. Medians of interleaved rounds. Groups count the update to new weights, read from a folder, in "
        "every round; the second number in parentheses leaves it out. Only ours computes log-probs. llama.cpp "
        "keeps keys and values in fp16 where the rest is bfloat16; vLLM's head is packed again after its reload, which leaves "
        "the old one where it is tied to the embeddings.",
        "",
        *goal_lines(rows),
    ]
    for name in WORKS:
        of_work = [row for row in rows if row["work"] == name]
        if of_work:
            lines += ["", f"## {title(name)}", "", *section(of_work, name, engines)]
    groups = [row for row in rows if row["work"] == "group"]
    if groups:
        lines += [
            "",
            "## Update to new weights: s, and the process's peak memory in it",
            "",
            *update_section(groups, engines),
        ]
    return "\n".join([*lines, "", *notes(rows)]) + "\n"


def versions(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for row in rows:
        for engine, of in row["engines"].items():
            if engine not in (OURS, REFERENCE, "hf-batch"):
                found[engine] = f"{of['package']} {of['version']}"
    return found


def goal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for goal, (work, engine, least) in GOALS.items():
        each = [(row, ratio(row, engine)) for row in rows if row["work"] == work]
        seen = [(value, row) for row, value in each if value is not None]
        if not seen:
            lines.append(f"- {goal}: not measured")
            continue
        met = sum(value >= least for value, _ in seen)
        lowest, row = min(seen, key=lambda pair: pair[0])
        lines.append(
            f"- {goal}: {met} of {len(seen)} rows at {least:g}x or more; lowest {lowest:.2f}x ({model_of(row)})"
        )
    return lines


def title(work: str) -> str:
    if work == "group":
        low, high = LENGTHS
        return f"Groups: prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, {SAMPLES} samples of {low} to {high}; tokens/s"
    unit = "ms per token" if work == "1" else "tokens/s"
    return f"n = {work}: prompts of {PROMPT} tokens, {NEW} new ones; {unit}"


def model_of(row: Mapping[str, Any]) -> str:
    return f"{row['family']} {row['size']} {row['dtype']}"


def section(rows: Sequence[Mapping[str, Any]], work: str, engines: Sequence[str]) -> list[str]:
    figure = "ms_per_token" if work == "1" else "with_update_tokens_per_s"

    def cell(row: Mapping[str, Any], engine: str) -> str:
        of = row["engines"].get(engine)
        if of is None:
            return "-"
        value = f"{of[figure]:.2f}" if work == "1" else f"{of[figure]:,.0f}"
        over = ratio(row, engine)
        if over is None or engine == OURS:
            over = ""
        elif work == "group":
            over = f" ({over:.2f}x; {ratio(row, engine, 'seconds'):.2f}x)"
        else:
            over = f" ({over:.2f}x)"
        return f"{value}{over}, {of['peak_mb'] / 1024:.1f} GB"

    return table(
        ["model", "prompts", "rounds", *(NAMES[e] for e in engines)],
        [[model_of(row), row["prompts"], row["rounds"], *(cell(row, e) for e in engines)] for row in rows],
    )


def update_section(rows: Sequence[Mapping[str, Any]], engines: Sequence[str]) -> list[str]:
    def cell(row: Mapping[str, Any], engine: str) -> str:
        of = row["engines"].get(engine)
        return "-" if of is None else f"{of['update_s']:.3f}, {of['update_mb'] / 1024:.1f} GB"

    return table(
        ["model", *(NAMES[e] for e in engines)],
        [[model_of(row), *(cell(row, e) for e in engines)] for row in rows],
    )


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is not in a row and why, whose greedy tokens differ, and rounds in which others had the cores."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for engine, reason in row["left_out"].items():
            found.setdefault(f"{NAMES[engine]} left out: {reason}", []).append(place(row))
        for engine, of in row["engines"].items():
            differing = [n for n in of.get("greedy_agreeing", ()) if n < GREEDY]
            if differing:
                what = f"{NAMES[engine]}: greedy tokens agree with HF generate's for {min(differing)} of {GREEDY}"
                found.setdefault(what, []).append(model_of(row))
            if of["core_share"] < 0.9:
                found.setdefault(f"{NAMES[engine]} had {of['core_share']:.0%} of its cores", []).append(
                    place(row)
                )
    return [f"- {what}: {', '.join(dict.fromkeys(where))}" for what, where in found.items()]


def place(row: Mapping[str, Any]) -> str:
    return f"{model_of(row)} {'group of ' + str(row['prompts']) if row['work'] == 'group' else 'n=' + row['work']}"


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed when it is done."""
    cells = []
    for engine, of in row["engines"].items():
        over = ratio(row, engine)
        over = "" if over is None or engine == OURS else f" {over:.2f}x"
        cells.append(f"{engine} {of['with_update_tokens_per_s']:,.0f}/s{over} {of['peak_mb']:,.0f} MB")
    return f"{place(row)}, {row['rounds']} rounds: {'; '.join(cells)}"


# -- the run -----------------------------------------------------------------------------------------------------------


def compare(
    models: Sequence[tuple[str, str, str]], works: Sequence[str], settings: Settings
) -> Iterator[dict[str, Any]]:
    """Row by row."""
    for family, size, dtype in models:
        print(f"{family} {size} {dtype}", flush=True)
        model = Model(family, size, dtype, settings)
        try:
            model.check()
            model.warm_up()
            for name in works:
                yield from model.rows(name)
        finally:
            model.close()


def write(out: Path, report: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"rollout_vs_peers-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=SIZES)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--cores", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row-s", type=float, default=300.0, help="time for one row of the table")
    parser.add_argument("--prompts", type=int, default=64, help="most prompts of the groups")
    parser.add_argument("--cache", type=Path, default=Path("runs/rollout_vs_peers"))
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and two prompts, to see that it works"
    )
    args = parser.parse_args(given)
    if args.quick:
        args.sizes, args.dtypes, args.works, args.prompts, args.rounds = (
            ["tiny"],
            ["float32"],
            ["1", "group"],
            2,
            1,
        )
    return args


def pythons(named: Sequence[str]) -> dict[str, str]:
    """Raises SystemExit for an engine or a file that there is not."""
    found = {}
    for one in named:
        engine, _, path = one.partition("=")
        if engine not in ENGINES or not Path(path).is_file():
            raise SystemExit(
                f"--python {one} is not ENGINE=PATH with an engine of {', '.join(ENGINES)} and a file"
            )
        found[engine] = str(
            Path(path).absolute()
        )  # a link to another Python knows its packages by its own place
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(given)
    args.cache.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        engines=args.engines,
        pythons=pythons(args.python),
        cores=args.cores,
        rounds=args.rounds,
        row_s=args.row_s,
        prompts=args.prompts,
        cache=args.cache,
    )
    report: dict[str, Any] = {
        "benchmark": "rollout_vs_peers",
        "date": time.strftime("%Y-%m-%d"),
        "cores": args.cores,
    }
    report |= {"machine": machine(), "rows": []}
    models = [(f, s, d) for f in args.families for s in args.sizes for d in args.dtypes]
    for row in compare(models, args.works, settings):
        report["rows"].append(row)
        report["machine"] = machine()
        print(line(row), flush=True)
        if args.out is not None:
            write(args.out, report)
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
