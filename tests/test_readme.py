"""What README.md shows is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rlhf.recipe.load import load_plan, plan_from_dict

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_is_at_most_eight_lines():
    (code,) = blocks("python")
    ast.parse(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8


def test_the_recipe_examples_are_valid(tmp_path):
    """Catches: a renamed key that the README still shows."""
    whole, part = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(whole)
    assert [s.name for s in load_plan(path).stages] == ["warmup", "grpo"]
    path.write_text(whole.replace("    reward:", "    algorithm: {kl_coef: 0.1}\n    reward:") + part)
    load_plan(path)


def test_the_links_lead_somewhere():
    for document in (REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "docs" / "architecture.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_commands_exist():
    for command in re.findall(r"\./scripts/\w+\.sh", README):
        assert (REPO / command).stat().st_mode & 0o111


@pytest.mark.parametrize("path", sorted((REPO / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_valid(path):
    assert load_plan(path).stages


def test_the_trainers_keywords_are_keys():
    (code,) = blocks("python")
    keywords = {k.arg for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) for k in n.keywords}
    recipe = (
        plan_from_dict(
            {
                "model": {"path": "x"},
                "data": {"path": "x"},
                "reward": [{"function": "f"}],
                "trainer": {"steps": 1},
            }
        )
        .stages[0]
        .recipe
    )
    known = set(type(recipe.trainer).model_fields) | set(type(recipe.rollout).model_fields)
    assert keywords - {"model", "train_dataset", "reward"} <= known
