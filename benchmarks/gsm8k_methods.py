"""SFT, reward model, DPO and KTO on GSM8K with a small model built on the spot: how often is the right solution preferred?

Runs recipes/gsm8k/{sft,rm,dpo,kto}.yaml and reads their metrics: the share of held-out pairs (a right and a wrong
solution of one question; the questions are in no training set) in which the right one scores higher. A score is the
reward model's, for DPO and KTO beta times the log-ratio to the reference, and after SFT alone the mean log-prob per
token. Two checks of the reward model come on top, from its exported folder read with transformers alone:

- an interval that draws questions, not pairs: pairs of one question share solutions and are not independent
- the baseline that knows only which solution is longer, and the reward model where that baseline errs

    python benchmarks/gsm8k_methods.py GSM8K_FOLDER [--work DIR] [--recipes sft rm dpo kto] [--out benchmarks/results]

GSM8K_FOLDER holds train.jsonl, test.jsonl and example_model_solutions.jsonl of github.com/openai/grade-school-math.
With --work a run that is finished there is read and not repeated. Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.running import ROOT, machine, read, train

RECIPES = ("sft", "rm", "dpo", "kto")
RESAMPLES = 10_000

Pair = dict[str, str]


def run(recipe: str, env: dict[str, str], work: Path) -> float:
    """Train a recipe in `work`; seconds that its steps and evaluations took."""
    train(ROOT / "recipes" / "gsm8k" / f"{recipe}.yaml", work / "runs", env=env)
    timings = read(work / "runs" / f"gsm8k_{recipe}" / "timings.jsonl")
    return sum(record["time/step_s"] for record in timings)


def held_out(run_dir: Path) -> dict[str, Any]:
    """Accuracy on the held-out pairs with its interval, before and after each stage."""
    stages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read(run_dir / "metrics.jsonl"):
        if "eval/heldout/accuracy" in record:
            stages[record["stage"]].append(record)
    return {
        stage: {
            "steps": records[-1]["step"] - records[0]["step"],
            "before": _interval(records[0]),
            "after": _interval(records[-1]),
        }
        for stage, records in stages.items()
    }


def _interval(record: dict[str, Any]) -> list[float]:
    return [
        round(record[f"eval/heldout/{name}"], 4) for name in ("accuracy", "accuracy_low", "accuracy_high")
    ]


def reward_gaps(model_dir: Path, pairs: list[Pair]) -> np.ndarray:
    """(P,) score of chosen - score of rejected, one text at a time, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()

    def score(question: str, solution: str) -> float:
        texts = [
            f"{question}\n",
            solution,
        ]  # apart, as in training: where the writer changes, so does the tokenisation
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            return model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0, 0].item()

    return np.array([score(p["question"], p["chosen"]) - score(p["question"], p["rejected"]) for p in pairs])


def longer(pairs: list[Pair]) -> np.ndarray:
    """(P,) by how many characters the chosen solution is longer."""
    return np.array([len(p["chosen"]) - len(p["rejected"]) for p in pairs], dtype=float)


def right(gaps: np.ndarray) -> np.ndarray:
    return (gaps > 0) + 0.5 * (gaps == 0)


def by_question(gaps: np.ndarray, pairs: list[Pair]) -> list[float]:
    """Accuracy and its 95 % interval from resampled questions."""
    groups: dict[str, list[float]] = defaultdict(list)
    for pair, value in zip(pairs, right(gaps), strict=True):
        groups[pair["question"]].append(float(value))
    sums, counts = (np.array([f(g) for g in groups.values()]) for f in (sum, len))
    drawn = np.random.default_rng(0).integers(0, len(groups), (RESAMPLES, len(groups)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return [round(float(x), 4) for x in (sums.sum() / counts.sum(), low, high)]


def check_reward_model(model_dir: Path, pairs: list[Pair], trained_on: list[Pair]) -> dict[str, Any]:
    gaps, length = reward_gaps(model_dir, pairs), longer(pairs)
    sign = 1 if right(longer(trained_on)).mean() >= 0.5 else -1  # what the training pairs say of length
    errs = right(sign * length) < 0.5
    return {
        "accuracy_by_question": by_question(gaps, pairs),
        "length_only_rule": "longer is right" if sign > 0 else "shorter is right",
        "length_only_by_question": by_question(sign * length, pairs),
        "accuracy_where_length_errs": round(float(right(gaps[errs]).mean()), 4),
        "accuracy_where_length_is_right": round(float(right(gaps[~errs]).mean()), 4),
        "correlation_of_gap_and_length": round(float(np.corrcoef(gaps, length)[0, 1]), 4),
    }


def check_disjoint(source: Path, pairs_dir: Path) -> int:
    """The number of held-out questions. Raises ValueError if one of them is trained on."""
    held = {row["question"] for row in read(pairs_dir / "pairs.heldout.jsonl")}
    files = (source / "train.jsonl", pairs_dir / "pairs.train.jsonl", pairs_dir / "labels.train.jsonl")
    for file in files:
        leaked = held & {row["question"] for row in read(file)}
        if leaked:
            raise ValueError(f"{file} holds {len(leaked)} held-out questions, for example {min(leaked)!r}")
    return len(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="GSM8K_FOLDER")
    parser.add_argument("--work", type=Path, help="folder for data and runs; default: a temporary one")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="gsm8k-"))).resolve()
    source, pairs_dir = args.source.resolve(), work / "pairs"
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_gsm8k_preferences.py", source, pairs_dir], check=True
    )
    env = {"GSM8K": str(source), "GSM8K_PAIRS": str(pairs_dir)}
    report: dict[str, Any] = {"benchmark": "gsm8k_methods", "date": time.strftime("%Y-%m-%d")}
    pairs, trained_on = (read(pairs_dir / f"pairs.{split}.jsonl") for split in ("heldout", "train"))
    report["held_out"] = {"pairs": len(pairs), "questions": check_disjoint(source, pairs_dir)}
    report["intervals"] = (
        "[accuracy, low, high], 95 %: Wilson over pairs; _by_question: bootstrap over questions"
    )
    for recipe in args.recipes:
        seconds = run(recipe, env, work)
        run_dir = work / "runs" / f"gsm8k_{recipe}"
        report[recipe] = {"seconds": round(seconds), "stages": held_out(run_dir)}
        if recipe == "rm":
            report[recipe]["checks"] = check_reward_model(run_dir / "model", pairs, trained_on)
    report["machine"] = machine()
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"gsm8k-methods-{report['date']}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
