"""Training steps against TRL's trainers: the same model files, rows, counts of tokens and precision, one thread each.

SFT and DPO: 32 sequences of 64 + 128 tokens (16 pairs); GRPO: 4 prompts of 64 tokens x 8 responses of 128, generation
included, no reference. Two processes live through a comparison and take one step in turn, ours through the stage that
`rlhf train` runs (data, update, metrics and records on disk included), TRL's between its callbacks' on_step_begin and
on_step_end. First steps are warm-ups; medians are reported. In bfloat16 TRL's optimiser works on bfloat16 weights,
ours on fp32 masters. DPO: TRL runs its reference in every step, we once before the first; both our step alone and
with its share of that pass are shown, and the ratio is of the latter.

    python benchmarks/train_vs_trl.py [--sizes 5m 30m] [--methods sft dpo grpo] [--dtypes float32 bfloat16] [--steps 5]
                                      [--out benchmarks/results]

Needs TRL. Prints a table; writes a file only with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from benchmarks.running import machine

PROMPT, RESPONSE, SEQUENCES, GROUP = 64, 128, 32, 8
ROWS = 64  # of each dataset: the steps go round
TOKENS = SEQUENCES * (PROMPT + RESPONSE)
SHAPES = {  # hidden, layers, heads, key/value heads, head, mlp, vocabulary
    "5m": (256, 5, 8, 4, 32, 768, 4096),
    "30m": (512, 8, 8, 4, 64, 1536, 8192),
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TRL_TELEMETRY": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


# -- what both sides work on -------------------------------------------------------------------------------------------


def make_model(folder: Path, size: str) -> None:
    """A random Qwen3 of the given shape and a tokenizer of one token a character."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary = SHAPES[size]
    tokens = {"<pad>": 0, "<eos>": 1, **{_character(i): i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def _character(token: int) -> str:
    """One of the 20,992 ideographs, none of which any rule of text treats specially."""
    return chr(0x4E00 + token)


def make_rows(method: str, vocabulary: int) -> list[dict[str, str]]:
    """Rows of random characters; both sides put an end token after an answer."""
    from rlhf.rng import generator

    source = generator(0, "benchmark rows", method)

    def text(count: int) -> str:
        return "".join(map(_character, source.integers(2, vocabulary, count)))

    answers = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "grpo": []}[method]
    return [{"prompt": text(PROMPT), **{name: text(RESPONSE - 1) for name in answers}} for _ in range(ROWS)]


def variety(responses: list[str]) -> list[float]:
    """A reward that differs within a group and needs no model."""
    return [float(len(set(response)) % 7) for response in responses]


def num_distinct(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """`variety` as `rlhf` calls a reward function."""
    return variety(responses)


# -- the two processes -----------------------------------------------------------------------------------------------


class Turns:
    """A side's end of the conversation: waits for "step", says how long the step took."""

    def __init__(self, channel: TextIO) -> None:
        self._channel, self.started, self._started_cpu = channel, 0.0, 0.0

    def wait(self) -> bool:
        """Whether there is another step to take."""
        go = sys.stdin.readline().strip() == "step"
        self.started, self._started_cpu = time.perf_counter(), time.process_time()
        return go

    def done(self, **facts: float) -> None:
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self._started_cpu
        self.say(seconds=seconds, cpu=cpu, peak_mb=_status_mb("VmHWM"), **facts)

    def say(self, **facts: float) -> None:
        print(json.dumps(facts), file=self._channel, flush=True)


def _status_mb(field: str) -> float:
    """Of this process, by the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run_ours(
    turns: Turns, method: str, model: str, dtype: str, rows: list[dict[str, str]], folder: Path
) -> None:
    """Step by step through `rlhf.trainers.stage`, with everything around a step but checkpoints and evaluation."""
    from rlhf.console import Console
    from rlhf.models import load_tokenizer
    from rlhf.recipe.load import plan_from_dict
    from rlhf.runtime.assemble import Objects, group_specs, load_datasets, make_roles, sampling_params
    from rlhf.runtime.groups import launch
    from rlhf.runtime.run import METHODS
    from rlhf.tracking import Tracker
    from rlhf.trainers.roles import Clock
    from rlhf.trainers.stage import Preempted, Stage

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run").mkdir()
    a_step = {"sft": SEQUENCES, "dpo": SEQUENCES // 2, "grpo": SEQUENCES // GROUP}[method]
    recipe = {
        "method": method,
        "run": {"name": "run", "output_dir": str(folder), "save_every": 10**6},
        "model": {"path": model, "dtype": dtype},
        "data": {"path": str(folder / "rows.jsonl")},
        "trainer": {"steps": 10**6, "prompts_per_step": a_step, "zero_stage": 0, "lr": 1e-6},
        "runtime": {"threads": 1},
        "tracking": {"wandb": "off", "report_every": 10**6},
    }
    if method == "sft":
        recipe["data"]["response_column"] = "completion"
    if method == "grpo":
        recipe["rollout"] = {"group_size": GROUP, "max_response_tokens": RESPONSE}
        recipe["reward"] = [{"function": f"{Path(__file__).resolve()}:num_distinct"}]
    plan = plan_from_dict(recipe)
    recipe = plan.stages[0].recipe
    objects, tokenizer = Objects(), load_tokenizer(recipe.model, recipe.tokenizer)
    data = load_datasets(recipe, tokenizer, objects)
    sampling, eval_sampling = sampling_params(recipe, tokenizer, objects)
    console = Console(file=sys.stderr, interactive=False)
    tracker = Tracker(
        folder, recipe.tracking, run_name="run", resolved_recipe={}, resume_step=None, console=console
    )
    tracker.begin_stage(method, method=method, first_step=1, last_step=recipe.trainer.steps)
    in_step = False

    def should_stop() -> bool:  # asked before and after every step
        nonlocal in_step
        in_step = not in_step
        if in_step:
            return not turns.wait()
        timings = json.loads((folder / "timings.jsonl").read_text().splitlines()[-1])
        turns.done(update_s=timings["time/update_s"])
        return False

    with launch(group_specs(recipe, recipe.trainer.steps, objects), recipe.runtime) as groups:
        clock = Clock()
        stage = Stage(
            name=method,
            recipe=recipe,
            folder=folder,
            offset=0,
            total_steps=recipe.trainer.steps,
            data=data.train,
            eval_sets={},
            eval_pairs={},
            tracker=tracker,
            clock=clock,
            sampling=replace(sampling, min_tokens=RESPONSE),
            eval_sampling=eval_sampling,
            should_stop=should_stop,
            **make_roles(recipe, groups, clock, tokenizer, objects),
        )
        before = time.perf_counter()
        if method == "dpo":
            from rlhf.batching import make_preference_batch

            stage.prepare_reference(make_preference_batch)  # kept in a file, which the loop then finds
        a_batch = (time.perf_counter() - before) * a_step / len(rows)
        turns.say(loaded_mb=_status_mb("VmRSS"), reference_s=a_batch)
        try:
            METHODS[method](stage)
        except Preempted:
            pass
    tracker.close("stopped")


def run_trl(
    turns: Turns, method: str, model: str, dtype: str, rows: list[dict[str, str]], folder: Path
) -> None:
    """TRL's trainer as it is, the whole step in one micro-batch."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    generating = 0.0

    class Wait(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal generating
            generating = 0.0
            if not turns.wait():
                os._exit(0)  # nothing to save

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.done(update_s=time.perf_counter() - turns.started - generating)

    common = {
        "output_dir": str(folder),
        "max_steps": 10**6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 1e-6,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": SEQUENCES // 2 if method == "dpo" else SEQUENCES,
    }
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": AutoTokenizer.from_pretrained(model),
        "callbacks": [Wait()],
    }
    if method == "sft":
        trainer = trl.SFTTrainer(args=trl.SFTConfig(**common, max_length=PROMPT + RESPONSE), **arguments)
    elif method == "dpo":
        trainer = trl.DPOTrainer(
            args=trl.DPOConfig(**common, max_length=PROMPT + RESPONSE, beta=0.1), **arguments
        )
    else:
        config = trl.GRPOConfig(
            **common,
            num_generations=GROUP,
            max_completion_length=RESPONSE,
            beta=0.0,
            temperature=1.0,
            generation_kwargs={"min_new_tokens": RESPONSE},
        )
        trainer = trl.GRPOTrainer(args=config, reward_funcs=_trl_reward, **arguments)
        generate = trainer._generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal generating
            start = time.perf_counter()
            result = generate(*args, **kwargs)
            generating += time.perf_counter() - start
            return result

        trainer._generate = timed
    turns.say(loaded_mb=_status_mb("VmRSS"), reference_s=0.0)
    trainer.train()


def _trl_reward(completions: list[str], **columns: list) -> list[float]:
    return variety(completions)


SIDES: dict[str, Callable[..., None]] = {"ours": run_ours, "trl": run_trl}


def child(side: str, method: str, model: str, dtype: str) -> None:
    """One side's process: its standard output is for the conversation alone."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        SIDES[side](Turns(channel), method, model, dtype, make_rows(method, vocabulary), Path(folder))


# -- the comparison --------------------------------------------------------------------------------------------------


class Side:
    """One process, seen from outside."""

    def __init__(self, side: str, method: str, model: Path, dtype: str, log: TextIO) -> None:
        command = [sys.executable, __file__, "--child", side, method, str(model), dtype]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        )
        self.start = self._hear()

    def _hear(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}; see its messages above")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        print("step", file=self._process.stdin, flush=True)
        return self._hear()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=120)


def compare(method: str, model: Path, dtype: str, *, steps: int, log: TextIO) -> dict[str, Any]:
    """Medians of `steps` steps of each side, taken in turn after one that warms up."""
    sides = {name: Side(name, method, model, dtype, log) for name in SIDES}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(steps + 1):
        for name, side in sides.items():
            seen[name].append(side.step())
    result: dict[str, Any] = {"method": method, "model": model.name, "dtype": dtype}
    for name, side in sides.items():
        side.close()
        taken = seen[name][1:]
        reference = side.start["reference_s"]
        result[name] = {
            "step_s": statistics.median(s["seconds"] for s in taken) + reference,
            "update_s": statistics.median(s["update_s"] for s in taken) + reference,
            "reference_s": reference,
            "steps_s": [round(s["seconds"], 3) for s in taken],
            "peak_mb": taken[-1]["peak_mb"],
            "loaded_mb": side.start["loaded_mb"],
        }
        result[name]["tokens_per_s"] = TOKENS / result[name]["step_s"]
    ours, theirs = result["ours"], result["trl"]
    result["step_ratio"] = theirs["step_s"] / ours["step_s"]
    result["update_ratio"] = theirs["update_s"] / ours["update_s"]
    result["memory_ratio"] = ours["peak_mb"] / theirs["peak_mb"]
    return {k: _rounded(v) for k, v in result.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return round(value, 3) if isinstance(value, float) else value


HEADER = (
    f"{'':<22} {'step s':>15} {'ratio':>6} {'update s':>15} {'ratio':>6} {'tokens/s':>13} {'peak MB':>13}\n"
    f"{'':<22} {'ours / TRL':>15} {'':>6} {'ours / TRL':>15} {'':>6} {'ours / TRL':>13} {'ours / TRL':>13}"
)


def line(r: dict[str, Any]) -> str:
    o, t = r["ours"], r["trl"]
    return (
        f"{r['method']:<5}{r['model']:<5}{r['dtype']:<12}"
        f" {o['step_s']:7.2f} {t['step_s']:7.2f} {r['step_ratio']:6.2f}"
        f" {o['update_s']:7.2f} {t['update_s']:7.2f} {r['update_ratio']:6.2f}"
        f" {o['tokens_per_s']:6.0f} {t['tokens_per_s']:6.0f} {o['peak_mb']:6.0f} {t['peak_mb']:6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--methods", nargs="+", choices=["sft", "dpo", "grpo"], default=["sft", "dpo", "grpo"]
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    results = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            make_model(Path(folder) / size, size)
            for method in args.methods:
                for dtype in args.dtypes:
                    with tempfile.TemporaryFile("w+") as log:
                        try:
                            result = compare(method, Path(folder) / size, dtype, steps=args.steps, log=log)
                        except Exception:
                            log.seek(0)
                            print(log.read()[-4000:], file=sys.stderr)
                            raise
                    results.append(result)
                    print(line(result), flush=True)
    if args.out:
        print(write(args.out, results, args.steps, args.sizes))


def write(out: Path, results: list[dict[str, Any]], steps: int, sizes: list[str]) -> Path:
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"threads": 1, "trl": version("trl")},  # threads: of each side
        "workload": {
            "sequences": SEQUENCES,
            "prompt": PROMPT,
            "response": RESPONSE,
            "group": GROUP,
            "steps": steps,
        },
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"train_vs_trl-{'-'.join(sizes)}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
