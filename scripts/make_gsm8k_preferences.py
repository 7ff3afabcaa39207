"""Makes preference and label data of the GSM8K repository's model solutions.

    python scripts/make_gsm8k_preferences.py GSM8K_FOLDER OUT_FOLDER

GSM8K_FOLDER holds test.jsonl and example_model_solutions.jsonl of github.com/openai/grade-school-math: four models'
solutions to each question of the test set, each judged right or wrong. OUT_FOLDER gets, for the questions of `train`
and `heldout` (a fifth of them, by a hash of the question, so that no question is in both):

    pairs.{train,heldout}.jsonl      question, chosen (right), rejected (wrong): every pair of a question's solutions
    labels.{train,heldout}.jsonl     question, response, label (right?): every solution
    questions.{train,heldout}.jsonl  question, answer: the rows of test.jsonl

A policy trained on the pairs has seen test questions: evaluate it on questions.heldout.jsonl, not on test.jsonl. The
solutions' last line `A: 18` becomes `#### 18`, as train.jsonl writes it. The files are a function of the input alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
SPLITS = ("train", "heldout")
HELD_OUT_OF = 5  # one question of these many is held out
ANSWER = re.compile(r"^A: ?(?=\S[^\n]*\Z)", re.MULTILINE)

Row = dict[str, Any]


def main(source: Path, out: Path) -> None:
    solutions = read(source / "example_model_solutions.jsonl")
    questions = read(source / "test.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        ours = [row for row in solutions if split_of(row["question"]) == split]
        write(out / f"pairs.{split}.jsonl", [pair for row in ours for pair in pairs(row)])
        write(out / f"labels.{split}.jsonl", [label for row in ours for label in labels(row)])
        write(
            out / f"questions.{split}.jsonl", [row for row in questions if split_of(row["question"]) == split]
        )


def pairs(row: Row) -> Iterator[Row]:
    """Every right solution beside every wrong one."""
    judged = list(labels(row))
    right = [one["response"] for one in judged if one["label"]]
    wrong = [one["response"] for one in judged if not one["label"]]
    for chosen, rejected in product(right, wrong):
        yield {"question": row["question"], "chosen": chosen, "rejected": rejected}


def labels(row: Row) -> Iterator[Row]:
    """The solutions with their verdicts; of equal ones the first."""
    seen = set()
    for model in MODELS:
        text = ANSWER.sub("#### ", row[model]["solution"].strip())
        if text not in seen:
            seen.add(text)
            yield {"question": row["question"], "response": text, "label": row[model]["is_correct"]}


def split_of(question: str) -> str:
    number = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little")
    return "heldout" if number % HELD_OUT_OF == 0 else "train"


def read(path: Path) -> list[Row]:
    if not path.is_file():
        sys.exit(
            f"{path} does not exist; give the folder with GSM8K's test.jsonl and example_model_solutions.jsonl"
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Preference and label data of GSM8K's model solutions")
    parser.add_argument("source", type=Path, metavar="GSM8K_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    arguments = parser.parse_args()
    main(arguments.source, arguments.out)
