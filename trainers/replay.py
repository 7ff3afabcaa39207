"""A replay buffer: scored groups of earlier steps that had an advantage, shown to the update again.

They carry the log-probs of the weights that sampled them, so that `algorithm.correction` weighs their tokens for the
distance of the policy since, and `staleness/*` says how old they are. What is drawn is a function of (seed, step, buffer),
and the buffer is part of the checkpoint. Not here: the corrections (`rlhf.corrections`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf import rng
from rlhf.recipe.schema import ReplayConfig
from rlhf.records import Prompt, Rollout, RolloutGroup

_FILE = "replay.json"  # in a checkpoint


class Replay:
    """The last `config.groups` groups whose rewards differ."""

    def __init__(self, config: ReplayConfig, *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._groups: list[RolloutGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def exchange(self, fresh: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        """`config.fraction` as many earlier groups as there are fresh ones, fewer while there are fewer, oldest first; the
        fresh ones with an advantage are kept for later steps."""
        count = min(round(self._config.fraction * len(fresh)), len(self._groups))
        chosen = rng.generator(self._seed, "replay", step).permutation(len(self._groups))[:count]
        drawn = [self._groups[i] for i in sorted(chosen.tolist())]
        kept = [*self._groups, *(_without_row(group) for group in fresh if has_advantage(group))]
        self._groups = kept[-self._config.groups :]
        return drawn

    def save(self, folder: Path) -> None:
        groups = [
            {"prompt": asdict(g.prompt), "rollouts": [_as_json(r) for r in g.rollouts]} for g in self._groups
        ]
        (folder / _FILE).write_text(json.dumps(groups))

    def load(self, folder: Path) -> None:
        self._groups = [_group(**group) for group in json.loads((folder / _FILE).read_text())]


def has_advantage(group: RolloutGroup) -> bool:
    """Whether at least two of its rewards differ; missing ones say nothing."""
    return len({reward for reward in group.rewards if reward is not None}) > 1


def _without_row(group: RolloutGroup) -> RolloutGroup:
    """The group without the dataset's columns, which only rewards read."""
    prompt = Prompt(group.prompt.id, group.prompt.token_ids, group.prompt.text)
    return RolloutGroup(prompt, tuple(r.replace(prompt=prompt) for r in group.rollouts))


def _as_json(rollout: Rollout) -> dict[str, object]:
    fields = {name: value for name, value in vars(rollout).items() if name != "prompt"}
    return fields | {"reward_parts": dict(rollout.reward_parts)}


def _group(prompt: dict, rollouts: list[dict]) -> RolloutGroup:
    whose = Prompt(prompt["id"], tuple(prompt["token_ids"]), prompt["text"])
    tuples = ("response_ids", "response_mask", "rollout_logprobs", "policy_versions")
    return RolloutGroup(
        whose,
        tuple(Rollout(prompt=whose, **(r | {name: tuple(r[name]) for name in tuples})) for r in rollouts),
    )
