"""Where DPO and PPO put probability that no preference speaks about: the synthetic case of arXiv 2404.10719, section 4.

Runs recipes/dpo_vs_ppo.yaml and asks the trained models for the probability of every response they can give: at most
two tokens, so all of them are enumerated and nothing is sampled. A response is one of four kinds:

- preferred, dispreferred: the better or a worse answer of the prompt's preference pairs
- uncovered: an answer that is in no pair of this prompt
- no answer: anything else, such as two digits

Policies: the reference (after SFT), DPO, PPO, and the optimum of PPO's objective under the learned reward model,
reference * exp(score / kl_coef) normalised over all responses, which says what PPO would reach with more steps. Besides
the recipe as it is, two changes of it show where the comparison ends (VARIANTS).

    python benchmarks/dpo_vs_ppo.py [--seeds 3 4 5 6 7] [--variants recipe ...] [--work DIR] [--out benchmarks/results]

The recipe's settings were chosen on seeds 0 to 2. With --work a run that is finished there is read and not repeated.
Writes files only with --out: dpo_vs_ppo-DATE.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import html
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.running import ROOT, machine, train
from rlhf.charts import nice_ticks
from rlhf.data.tasks import make_rows
from rlhf.recipe.load import load_plan

RECIPE = ROOT / "recipes" / "dpo_vs_ppo.yaml"

VARIANTS = {
    "recipe": ("as in the recipe", ()),
    "weak": ("beta = kl_coef = 0.1", ("stages.dpo.preference.beta=0.1", "stages.ppo.algorithm.kl_coef=0.1")),
    "uncentred": ("scores not centred", ("stages.rm.reward_modeling.center_coef=0",)),
}
KINDS = ("preferred", "dispreferred", "uncovered", "no answer")
POLICIES = ("reference", "DPO", "PPO", "optimum")

Row = dict[str, Any]
Response = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """The prompts of a run and every response to them."""

    prompts: list[list[int]]  # P prompts, by their digit
    responses: list[Response]  # R: the end alone, and all pairs of a token and another or the end
    kinds: torch.Tensor  # (P, R) int64, index into KINDS
    answers: torch.Tensor  # (A,) int64, index of the response that is this digit
    covered: torch.Tensor  # (P, A) bool, True where a pair has this answer
    end: int  # token that ends a response


@dataclass(frozen=True)
class Measured:
    """The policies of one run. Probabilities: (P, R) fp32, rows sum to 1."""

    case: Case
    policies: dict[str, torch.Tensor]


def run(variant: str, seed: int, work: Path, overrides: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Train the recipe in `work`; its run directory and all overrides."""
    name = f"{variant}-{seed}"
    changes = [f"run.seed={seed}", f"data.task_args.seed={seed}", *VARIANTS[variant][1], *overrides]
    train(RECIPE, work, f"run.name={name}", *changes)
    return work / name, changes


def measure(run_dir: Path, overrides: Sequence[str]) -> Measured:
    """Exact probabilities of all responses under the run's policies."""
    stages = {stage.name: stage.recipe for stage in load_plan(RECIPE, overrides).stages}
    if stages["ppo"].rollout.max_response_tokens != 2:
        raise ValueError(
            f"rollout.max_response_tokens={stages['ppo'].rollout.max_response_tokens}, but the responses "
            "enumerated here have at most 2; set it to 2"
        )
    folder = run_dir / "stages"
    case = read_case(stages["ppo"].data.task_args, folder / "sft" / "model")
    models = {
        "reference": folder / "sft" / "model",
        "DPO": folder / "dpo" / "model",
        "PPO": run_dir / "model",
    }
    logprobs = {name: response_logprobs(path, case) for name, path in models.items()}
    scores = response_scores(folder / "rm" / "model", case)
    tilted = logprobs["reference"] + scores / stages["ppo"].algorithm.kl_coef
    return Measured(case, {name: x.exp() for name, x in logprobs.items()} | {"optimum": tilted.softmax(1)})


def read_case(task_args: dict[str, Any], model_dir: Path) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    lines = {row["prompt"]: row for row in make_rows("coverage", **task_args)}
    prompts, size, end = sorted(lines), len(lines), tokenizer.eos_token_id
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in prompts]
    digits = [tokenizer(str(d), add_special_tokens=False).input_ids[0] for d in range(size)]
    first = [token for token in range(len(tokenizer)) if token != end]
    responses = [(end,), *((a, b) for a in first for b in range(len(tokenizer)))]
    answers = torch.tensor([responses.index((digit, end)) for digit in digits])
    covered = torch.tensor([[str(d) in lines[p]["covered"] for d in range(size)] for p in prompts])
    best = torch.tensor([[str(d) == lines[p]["answer"] for d in range(size)] for p in prompts])
    kinds = torch.full((size, len(responses)), KINDS.index("no answer"))
    kinds[:, answers] = torch.where(best, 0, torch.where(covered, 1, 2))
    return Case(ids, responses, kinds, answers, covered, end)


@torch.no_grad()
def response_logprobs(model_dir: Path, case: Case) -> torch.Tensor:
    """(P, R) fp32, nats."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    first = [response[0] for response in case.responses]
    second = [response[-1] for response in case.responses]  # of the end alone: not counted
    ends = torch.tensor(first) == case.end
    found = []
    for prompt in case.prompts:
        lines = torch.tensor([[*prompt, token] for token in range(max(second) + 1)])
        logprobs = model(lines).logits.log_softmax(-1)
        found.append(logprobs[0, -2, first] + logprobs[first, -1, second].masked_fill(ends, 0))
    return torch.stack(found)


@torch.no_grad()
def response_scores(model_dir: Path, case: Case) -> torch.Tensor:
    """(P, R) fp32: the reward model's score of each response."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    alone, *pairs = case.responses

    def score(prompt: list[int], responses: list[Response]) -> torch.Tensor:
        return model(torch.tensor([[*prompt, *response] for response in responses])).logits[:, 0]

    return torch.stack([torch.cat([score(p, [alone]), score(p, pairs)]) for p in case.prompts])


def shares(case: Case, probs: torch.Tensor) -> dict[str, float]:
    """Probability of each kind of response, mean over prompts."""
    return {kind: (probs * (case.kinds == i)).sum(1).mean().item() for i, kind in enumerate(KINDS)}


def rows(variant: str, seed: int, measured: Measured) -> list[Row]:
    about = {"variant": variant, "seed": seed}
    return [
        about | {"policy": policy, **{k: round(v, 4) for k, v in shares(measured.case, probs).items()}}
        for policy, probs in measured.policies.items()
    ]


def select(found: Sequence[Row], variant: str, policy: str, kind: str) -> list[float]:
    """One share per seed."""
    return [row[kind] for row in found if row["variant"] == variant and row["policy"] == policy]


def table(found: Sequence[Row]) -> str:
    head = ("variant", "policy", *(f"{kind} %" for kind in KINDS))
    body = []
    for variant in dict.fromkeys(row["variant"] for row in found):
        for policy in POLICIES:
            cells = [spread(select(found, variant, policy, kind)) for kind in KINDS]
            body.append((VARIANTS[variant][0], policy, *cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, lowest and highest, in percent."""
    return f"{100 * mean(values):.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


COLOURS = {"reference": "#8b929c", "DPO": "#d1602b", "PPO": "#2a6fb0", "optimum": "#ffffff"}
INK, FAINT = "#22262b", "#dfe3e8"
WIDTH, MARGIN, CELL = 1000, 40, 28


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle", fill: str = INK) -> str:
    words = html.escape(words)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" {more}/>'


def heatmap(left: float, top: float, title: str, probs: torch.Tensor, case: Case) -> list[str]:
    """Prompts down, answers across: each answer's probability in percent. Covered answers have a frame."""
    found = [text(left + 4 * CELL, top - 26, title, size=14)]
    answers = probs[:, case.answers]
    table_PC = torch.cat([answers, 1 - answers.sum(1, keepdim=True)], 1)
    gap = 8  # between the answers and the rest
    for i, line in enumerate(table_PC.tolist()):
        found.append(text(left - 8, top + (i + 0.65) * CELL, f"{i}=", size=11, anchor="end"))
        for j, value in enumerate(line):
            x, y = left + j * CELL + gap * (j == len(case.answers)), top + i * CELL
            found.append(box(x, y, CELL - 2, CELL - 2, blend(value)))
            if value >= 0.005:
                ink = "#ffffff" if value > 0.55 else INK
                found.append(text(x + CELL / 2 - 1, y + 0.63 * CELL, f"{100 * value:.0f}", size=10, fill=ink))
            if j < len(case.answers) and case.covered[i, j]:
                frame = f'stroke="{INK}" stroke-width="1.6"'
                found.append(box(x - 0.5, y - 0.5, CELL - 1, CELL - 1, "none", frame))
    names = [str(j) for j in range(len(case.answers))] + ["else"]
    for j, name in enumerate(names):
        x = left + (j + 0.5) * CELL - 1 + gap * (name == "else")
        found.append(text(x, top - 7, name, size=11))
    return found


def blend(value: float) -> str:
    """White at 0, deep blue at 1; the root makes small probabilities visible."""
    weight = max(value, 0.0) ** 0.5
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in ((247, 23), (248, 78), (250, 140)))


def panel(
    left: float, top: float, width: float, height: float, title: str, bars: dict[str, dict[str, list[float]]]
) -> list[str]:
    """Bars of what no preference covers, bars[kind][policy]: mean over seeds, and a dot for each."""
    found = [text(left + width / 2, top - 14, title, size=13)]
    for tick in nice_ticks(0, 1, 5):
        y = top + height * (1 - tick)
        found.append(box(left, y, width, 1, FAINT))
        found.append(text(left - 6, y + 4, f"{100 * tick:.0f} %", size=10, anchor="end"))
    wide = min(width / (2 * len(POLICIES) + 2), 32)
    for group, (kind, policies) in enumerate(bars.items()):
        middle = left + (group + 0.5) * width / len(bars)
        found.append(text(middle, top + height + 18, kind))
        for i, (policy, values) in enumerate(policies.items()):
            x, tall = middle + (i - len(policies) / 2) * wide, height * mean(values)
            found.append(box(x + 1.5, top + height - tall, wide - 3, tall, COLOURS[policy], edge(policy)))
            found += [dot(x + wide / 2, top + height * (1 - value)) for value in values]
    return found


def dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{INK}" fill-opacity=".65"/>'


def edge(policy: str) -> str:
    """What is computed and not trained has a dashed edge."""
    return f'stroke="{COLOURS["PPO"]}" stroke-dasharray="3 2"' if policy == "optimum" else ""


def legend(left: float, top: float) -> list[str]:
    found = []
    for i, policy in enumerate(POLICIES):
        name = "optimum of PPO's objective" if policy == "optimum" else policy
        found.append(box(left + i * 100, top, 12, 12, COLOURS[policy], edge(policy)))
        found.append(text(left + 18 + i * 100, top + 10, name, anchor="start"))
    return found


def figure(found: Sequence[Row], first: Measured, title: str) -> str:
    """The plot as SVG: above, one run's probabilities; below, what no preference covers over all seeds."""
    note = "Probability of each answer in percent (down: prompts, across: answers; framed: in preferences; else: no answer)"
    marks = [text(MARGIN, 34, title, size=17, anchor="start"), text(MARGIN, 56, note, anchor="start")]
    for i, policy in enumerate(POLICIES[:3]):
        marks += heatmap(MARGIN + 28 + i * 322, 110, policy, first.policies[policy], first.case)
    seeds = len({row["seed"] for row in found})
    note = f"Probability of what no preference covers: mean of {seeds} seeds and, as dots, each seed"
    top, height = 470, 220
    marks += [text(MARGIN, top - 82, note, anchor="start"), *legend(MARGIN, top - 68)]
    variants = list(dict.fromkeys(row["variant"] for row in found))
    step = (WIDTH - MARGIN) / len(variants)
    for i, variant in enumerate(variants):
        bars = {kind: {p: select(found, variant, p, kind) for p in POLICIES} for kind in KINDS[2:]}
        marks += panel(MARGIN + 12 + i * step, top, step - 48, height, VARIANTS[variant][0], bars)
    tall = top + height + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        f'font-family="system-ui, sans-serif">{box(0, 0, WIDTH, tall, "#ffffff")}{"".join(marks)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7], help="of model and data")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    work = (args.work or Path(tempfile.mkdtemp(prefix="dpo_vs_ppo-"))).resolve()
    found: list[Row] = []
    first = None
    for variant in args.variants:
        for seed in args.seeds:
            measured = measure(*run(variant, seed, work))
            first = first or measured
            found += rows(variant, seed, measured)
    print(table(found))
    if args.out is not None:
        date = time.strftime("%Y-%m-%d")
        report = {"benchmark": "dpo_vs_ppo", "date": date, "rows": found, "machine": machine()}
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"dpo_vs_ppo-{date}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")
        about = f"{VARIANTS[args.variants[0]][0]}, seed {args.seeds[0]}"
        title = f"DPO and PPO from one reference and the same pairs ({about})"
        file.with_suffix(".svg").write_text(figure(found, first, title), encoding="utf-8")


if __name__ == "__main__":
    main()
