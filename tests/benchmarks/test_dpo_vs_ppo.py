"""The study's synthetic case: a short run of its recipe, and the enumeration that measures it."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.dpo_vs_ppo import KINDS, figure, measure, rows, run, select, table

# Fewer updates, and larger ones after the reference.
SHORT = (
    *("stages.sft.trainer.steps=250", "stages.dpo.trainer.steps=50", "stages.rm.trainer.steps=50"),
    *("stages.ppo.trainer.steps=32", "stages.ppo.rollout.group_size=2"),
    *(f"stages.{stage}.trainer.lr=5e-4" for stage in ("dpo", "rm", "ppo")),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir, overrides = run("recipe", 1, tmp_path_factory.mktemp("work"), SHORT)
    return run_dir, measure(run_dir, overrides)


def test_dpo_leaves_the_preferences_and_ppo_does_not(trained):
    """Would catch: settings, a reward model or a loss with which the recipe no longer shows what it is for; PPO that
    stays with the reference; stages that start from one another instead of from the reference."""
    found = rows("recipe", 1, trained[1])
    reference, dpo, ppo = (
        {kind: select(found, "recipe", policy, kind)[0] for kind in KINDS}
        for policy in ("reference", "DPO", "PPO")
    )
    assert dpo["uncovered"] > 3 * reference["uncovered"], table(found)
    assert ppo["uncovered"] < 1.5 * reference["uncovered"], table(found)
    assert dpo["no answer"] > 2 * ppo["no answer"], table(found)
    for policy in (dpo, ppo):  # both learned what the pairs say
        assert policy["preferred"] > 0.5 and policy["dispreferred"] < 0.2, table(found)


def test_every_response_is_counted_once(trained):
    """Would catch: a response left out or counted twice, a log-prob taken one token too early or too late."""
    run_dir, measured = trained
    case, probs = measured.case, measured.policies["DPO"]
    for policy in measured.policies.values():
        torch.testing.assert_close(policy.sum(1), torch.ones(8))
    model = AutoModelForCausalLM.from_pretrained(run_dir / "stages" / "dpo" / "model", dtype=torch.float32)
    for p, r in itertools.product((0, 5), (0, 1, 77, len(case.responses) - 1)):
        expected, ids = 1.0, list(case.prompts[p])
        for token in case.responses[r]:
            expected *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids.append(token)
        assert probs[p, r].item() == pytest.approx(expected, rel=1e-4)
    per_prompt = [(case.kinds == kind).sum(1).unique().tolist() for kind in range(3)]
    assert per_prompt == [[1], [2], [5]]  # of 8 answers 3 are covered


def test_the_plot_is_one_file_that_stands_alone(trained):
    """Would catch: SVG that is not XML, or that needs a file or an address."""
    drawn = figure(rows("recipe", 1, trained[1]), trained[1], "title <&>")
    words = [e.text for e in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"title <&>", "as in the recipe", "DPO", "PPO", "uncovered"} <= set(words)
    assert drawn.count("http") == 1 and "href" not in drawn
