"""The script that makes preference data of GSM8K's model solutions, on rows of our own and on the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "gsm8k"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def _run(source: Path, out: Path) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "make_gsm8k_preferences.py"
    return subprocess.run([sys.executable, script, source, out], capture_output=True, text=True, timeout=60)


def _read(out: Path, name: str) -> list[dict]:
    return [
        json.loads(line) for split in ("train", "heldout") for line in (out / f"{name}.{split}.jsonl").open()
    ]


def _write(folder: Path, questions: list[str], solutions: list[tuple[bool, str]]) -> None:
    judged = {m: {"is_correct": c, "solution": s} for m, (c, s) in zip(MODELS, solutions, strict=True)}
    rows = [{"question": q, "ground_truth": "1", **judged} for q in questions]
    (folder / "example_model_solutions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(
        "\n".join(json.dumps({"question": q, "answer": "#### 1"}) for q in questions)
    )


def test_pairs_are_right_against_wrong_of_one_question(tmp_path: Path) -> None:
    """Catches: a wrong solution as chosen, a solution paired twice, and a question in both splits."""
    solutions = [(True, "x\nA: 1"), (False, "A: 2"), (True, "x\nA: 1"), (False, "A: 3\nand on")]
    _write(tmp_path, [f"q{i}" for i in range(40)], solutions)
    done = _run(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pairs = _read(tmp_path / "out", "pairs")
    assert [(p["chosen"], p["rejected"]) for p in pairs if p["question"] == "q7"] == [
        ("x\n#### 1", "#### 2"),
        ("x\n#### 1", "A: 3\nand on"),
    ]
    labels = [r["label"] for r in _read(tmp_path / "out", "labels") if r["question"] == "q7"]
    assert labels == [True, False, False]
    parts = [
        {
            json.loads(line)["question"]
            for name in ("pairs", "labels", "questions")
            for line in (tmp_path / "out" / f"{name}.{s}.jsonl").open()
        }
        for s in ("train", "heldout")
    ]
    assert all(parts) and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = _run(tmp_path, tmp_path / "out")
    assert (
        done.returncode == 1
        and "example_model_solutions.jsonl does not exist; give the folder" in done.stderr
    )


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the GSM8K files are not at {DATA}")
def test_the_real_solutions(tmp_path: Path) -> None:
    """Catches: pairs lost or doubled, and verdicts that do not fit the final numbers."""
    from rlhf.reward.gsm8k import final_number

    assert _run(DATA, tmp_path).returncode == 0
    pairs, labels = _read(tmp_path, "pairs"), _read(tmp_path, "labels")
    assert (len(pairs), len(labels), len(_read(tmp_path, "questions"))) == (2426, 5268, 1319)
    answers = {row["question"]: final_number(row["answer"]) for row in _read(tmp_path, "questions")}
    agree = sum((final_number(r["response"]) == answers[r["question"]]) == r["label"] for r in labels)
    assert agree / len(labels) > 0.99
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
