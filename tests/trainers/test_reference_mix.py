"""A reference that moves towards the actor: by how much, from where, and into which checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.batching import SftExample, make_sft_batch
from rlhf.checkpoint import load_tensors
from rlhf.models import load_tokenizer
from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.assemble import Objects, group_specs, make_roles
from rlhf.runtime.groups import launch
from rlhf.trainers.roles import Clock
from tests.e2e.running import TINY
from tests.trainers.fake_roles import stage_around

ROWS = [SftExample(f"train/{i}", (3, 4 + i), (5, 6 + i, 7), None) for i in range(4)]


def recipe_with(mix: float, **placement):
    stage = {
        "method": "dpo",
        "reference": {"update_every": 1, "update_mix": mix},
        "trainer": {"steps": 2, "prompts_per_step": 4, "lr": 1e-2, "zero_stage": 0},
    }
    recipe = copy.deepcopy(
        {name: TINY[name] for name in ("run", "model", "tokenizer", "runtime", "tracking")}
    )
    recipe["data"] = {key: TINY["data"][key] for key in ("task", "task_args")}
    recipe |= {"placement": placement, **stage}
    return plan_from_dict(recipe).stages[0].recipe


APART = {"train": {"roles": ["actor"]}, "still": {"roles": ["reference"]}}


@pytest.mark.parametrize("placement", [{}, APART], ids=["beside the actor", "in a group of its own"])
def test_the_reference_moves_by_its_share_of_the_way(placement, tmp_path):
    """Would catch: the shares of actor and reference swapped, a reference that is replaced whatever the share, a second
    update that starts from the first weights again."""
    recipe = recipe_with(0.25, **placement)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    with launch(group_specs(recipe, 2, Objects()), recipe.runtime) as groups:
        roles = make_roles(recipe, groups, Clock(), tokenizer, Objects())
        actor, reference = roles["actor"], roles["reference"]

        def weights(name: str, folder) -> dict[str, torch.Tensor]:
            folder.mkdir()
            for group in {id(r.group): r.group for r in (actor, reference)}.values():
                group.call("save", str(folder))
            return load_tensors(folder / f"{name}.safetensors")

        expected = weights("reference", tmp_path / "start")
        batch = make_sft_batch(ROWS)
        for step in range(2):
            actor.update((batch, "sft"))
            now = _trained(groups)
            stage = stage_around(recipe, tmp_path / f"stage{step}", **roles)
            stage.progress.version = step + 1
            stage.refresh_reference(step)
            moved = weights("reference", tmp_path / f"after{step}")
            apart = 0.0
            for name, before in expected.items():
                want = 0.25 * now[name].double() + 0.75 * before.double()
                torch.testing.assert_close(moved[name].double(), want, rtol=0, atol=1e-6)
                apart = max(apart, float((now[name] - before).abs().max()))
            assert apart > 5e-3  # there was a way to go
            expected = moved


def _trained(groups) -> dict[str, torch.Tensor]:
    module = groups.for_role("actor")._worker.actor.module
    return {name: p.detach().clone() for name, p in module.named_parameters()}
