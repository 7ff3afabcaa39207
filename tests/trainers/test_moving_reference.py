"""A reference that follows the actor by small shares, in bfloat16 and with LoRA."""

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
from rlhf.trainers.moving_reference import MovingReference
from rlhf.trainers.roles import Clock
from tests.e2e.running import TINY
from tests.trainers.fake_roles import stage_around

APART = {"train": {"roles": ["actor"]}, "still": {"roles": ["reference"]}}
ROWS = [SftExample(f"train/{i}", (3, 4 + i), (5, 6 + i, 7), None) for i in range(4)]


def test_many_small_shares_add_up_in_bfloat16() -> None:
    """Would catch: an average that is rounded to bfloat16 after each update, which mixes of .008 never move."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    start = model.weight.detach().float().clone()
    goal = start + 0.01 * torch.randn(16, 16)
    moving = MovingReference(model)
    for _ in range(200):
        moving.mix([("weight", goal)], 0.008)
    want = goal + 0.992**200 * (start - goal)  # .80 of the way
    torch.testing.assert_close(moving.state_dict()["weight"], want, rtol=0, atol=1e-6)
    assert torch.equal(model.weight, moving.state_dict()["weight"].to(torch.bfloat16))
    assert not torch.equal(model.weight.float(), start)


def recipe_with(mix: float, *, zero_stage: int, lora: bool, placement: dict):
    recipe = copy.deepcopy(
        {name: TINY[name] for name in ("run", "model", "tokenizer", "runtime", "tracking")}
    )
    recipe["model"] |= {"dtype": "bfloat16"} | ({"lora": {"rank": 4}} if lora else {})
    recipe |= {
        "method": "dpo",
        "data": {key: TINY["data"][key] for key in ("task", "task_args")},
        "reference": {"update_every": 1, "update_mix": mix},
        "trainer": {"steps": 3, "prompts_per_step": 4, "lr": 1e-2, "zero_stage": zero_stage},
        "placement": placement,
    }
    return plan_from_dict(recipe).stages[0].recipe


def _exact(groups) -> dict[str, torch.Tensor]:
    """The actor's weights as those of a plain model, in fp32."""
    weights = groups.for_role("actor")._worker.actor.named_full_weights(exact=True)
    return {name: w.detach().float().clone() for name, w in weights}


def _held(groups) -> dict[str, torch.Tensor]:
    model = groups.for_role("reference")._worker._frozen["reference"]
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("placement", [{}, APART], ids=["beside the actor", "in a group of its own"])
@pytest.mark.parametrize(("zero_stage", "lora"), [(1, False), (2, True), (3, False), (3, True)])
def test_the_reference_is_the_average_of_whole_weights(zero_stage, lora, placement, tmp_path):
    """Would catch: adapters' A and B averaged apart, merged weights rounded before they are averaged, an average that a
    checkpoint forgets or rounds."""
    recipe = recipe_with(0.05, zero_stage=zero_stage, lora=lora, placement=placement)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    with launch(group_specs(recipe, 3, Objects()), recipe.runtime) as groups:
        roles = make_roles(recipe, groups, Clock(), tokenizer, Objects())
        want, batch = _exact(groups), make_sft_batch(ROWS)
        for step in range(3):
            roles["actor"].update((batch, "sft"))
            stage = stage_around(recipe, tmp_path / f"stage{step}", **roles)
            stage.progress.version = step + 1
            stage.refresh_reference(step)
            want = {name: 0.05 * w + 0.95 * want[name] for name, w in _exact(groups).items()}
        roles["reference"].group.call("save", str(tmp_path))
        rounded = all(torch.equal(w, w.to(torch.bfloat16).float()) for w in _exact(groups).values())
        assert rounded != lora  # what is averaged is the sum of base and adapters, not its rounding
        saved, held = load_tensors(tmp_path / "reference.safetensors"), _held(groups)
        assert saved.keys() == want.keys() == held.keys()
        for name in want:
            torch.testing.assert_close(saved[name], want[name], rtol=0, atol=1e-6)
            assert torch.equal(held[name], saved[name].to(torch.bfloat16))
        stage.refresh_reference(3)
        further = _held(groups)
        roles["reference"].group.call("load", str(tmp_path))
        again = _held(groups)
        assert all(torch.equal(again[name], held[name]) for name in held)
        stage.refresh_reference(3)
        assert all(torch.equal(further[name], now) for name, now in _held(groups).items())


@pytest.mark.parametrize("placement", [{}, APART], ids=["beside the actor", "in a group of its own"])
def test_a_replaced_reference_with_lora_is_the_actor_to_the_last_bit(placement, tmp_path):
    """Would catch: merged weights in the place of the actor's adapters where the reference is a copy: a KL that is not 0."""
    recipe = recipe_with(1.0, zero_stage=1, lora=True, placement=placement)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    with launch(group_specs(recipe, 3, Objects()), recipe.runtime) as groups:
        roles = make_roles(recipe, groups, Clock(), tokenizer, Objects())
        batch = make_sft_batch(ROWS)
        for step in range(2):
            roles["actor"].update((batch, "sft"))
            before = roles["reference"].score(batch)
            stage = stage_around(recipe, tmp_path / f"stage{step}", **roles)
            stage.progress.version = step + 1
            stage.refresh_reference(step)
            assert torch.equal(roles["reference"].score(batch), roles["actor"].score(batch))
            assert not torch.equal(roles["reference"].score(batch), before)
