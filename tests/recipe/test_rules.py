"""Rules between sections: each bad pair of settings is refused by name, with the way out."""

from __future__ import annotations

import copy

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.problems import RecipeError
from tests.e2e.running import TINY

REFUSED = {
    "pass@k of fewer responses": (
        {"evaluation": {"samples": 2, "ks": [4], "temperature": 1.0}},
        "pass@4 needs 4 responses",
    ),
    "greedy copies": ({"evaluation": {"samples": 2}}, "gives the same response 2 times"),
    "pairs of one response": (
        {"judge": {"path": "org/judge", "template": "{prompt} {first} {second}"}},
        "use evaluation.samples >= 2",
    ),
    "pairs of a group of one": (
        {
            "method": "ppo",
            "rollout": {"group_size": 1},
            "judge": {"path": "org/judge", "template": "{prompt} {first} {second}"},
        },
        "compares two responses to a prompt: use group_size >= 2",
    ),
    "replay as if it were fresh": ({"algorithm": {"replay": {}}}, "set a correction, for example tis"),
    "replay without groups": (
        {"method": "ppo", "algorithm": {"replay": {}, "correction": "tis"}},
        "ppo has no groups to replay",
    ),
    "rates of texts": ({"method": "dpo", "curriculum": {}}, "dpo samples no responses"),
    "empty window": ({"curriculum": {"low": 0.9, "high": 0.1}}, "low=0.9 is above high=0.1"),
    "a critic of its own, shared": (
        {"method": "ppo", "critic": {"shared": True, "pretrain_steps": 3}},
        "pretrain_steps=3 is a critic's of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """Would catch: a setting that is taken and then has no effect, or fails hours later."""
    changes, said = REFUSED[name]
    recipe = copy.deepcopy(TINY)
    recipe.pop("stages")
    recipe["trainer"] = {"steps": 4, "prompts_per_step": 8}
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(recipe.get(section), dict) else values
    with pytest.raises(RecipeError, match=said):
        plan_from_dict(recipe)
