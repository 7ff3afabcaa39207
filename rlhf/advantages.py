"""Advantages from rewards.

Here: group baselines, for which the G responses to one prompt are each other's critic. Not here: rewards and
their statistics (`rlhf.reward`), nor generalised advantage estimation, which comes with the critic.

A group function takes `rewards` (B,) with NaN = missing, and `group_ids` (B,) int, equal for responses to one
prompt and in any order. It returns (B,) in the rewards' dtype. A missing reward gets 0 and is left out of its
group's statistics. A group whose rewards are all equal, or that has fewer than two, gives exactly 0:
`zero_std_groups` counts those. Within a group the advantages add up to 0. Statistics are taken in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf.records import Batch

STD_EPS = 1e-6  # added to the standard deviation


class _Groups(NamedTuple):
    """Each response's view of its group's statistics, all (B,) float64."""

    centered: torch.Tensor  # reward - mean; 0 where the reward is missing or the group is flat
    count: torch.Tensor  # rewards present in the group
    variance: torch.Tensor  # of the rewards present, with n - 1


def group_normalized(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + eps), std with n - 1 (GRPO, arXiv 2402.03300 section 4.1.2). (B,)"""
    groups = _statistics(rewards, group_ids)
    return (groups.centered / (groups.variance.sqrt() + STD_EPS)).to(rewards.dtype)


def group_centered(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean, without the std that lifts very easy and very hard prompts (Dr.GRPO, 2503.20783).
    (B,)
    """
    return _statistics(rewards, group_ids).centered.to(rewards.dtype)


def leave_one_out(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean of the others = n / (n - 1) * (R_i - mean) (RLOO, arXiv 2402.14740). (B,)"""
    groups = _statistics(rewards, group_ids)
    return (groups.centered * groups.count / (groups.count - 1).clamp(min=1)).to(rewards.dtype)


ADVANTAGES = {"grpo": group_normalized, "dr_grpo": group_centered, "rloo": leave_one_out}


def with_advantages(batch: Batch, name: str) -> Batch:
    """The batch with `advantages` (B, T) fp32: each response's on all of its `response_mask`, 0 elsewhere.

    Call it on whole groups, before the batch is cut. Raises ValueError for an unknown name.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"advantage {name!r} is unknown; choose one of {', '.join(ADVANTAGES)}")
    assert batch.rewards is not None and batch.group_ids is not None, "advantages need rewards and group_ids"
    per_response = ADVANTAGES[name](batch.rewards, batch.group_ids).float()
    return batch.replace(advantages=torch.where(batch.response_mask, per_response[:, None], 0.0))


def zero_std_groups(rewards: torch.Tensor, group_ids: torch.Tensor) -> tuple[int, int]:
    """(groups without any advantage, groups): those with equal rewards, or with fewer than two present."""
    _check(rewards, group_ids)
    ids, group = torch.unique(group_ids, return_inverse=True)
    flat = _flat(rewards.double(), group, len(ids))
    return int(flat.sum()), len(ids)


def advantage_metrics(batch: Batch) -> dict[str, float]:
    """`advantage/{mean,std,min,max}` and `reward/groups_zero_std_frac` of a whole step's batch.

    The former are over the responses with a token in `loss_mask`, each the mean of its tokens, and left out if there is
    none; the std is with n. Over tokens the mean would drift from 0 as soon as right answers are longer than wrong ones.
    """
    assert batch.advantages is not None and batch.rewards is not None and batch.group_ids is not None
    flat, total = zero_std_groups(batch.rewards, batch.group_ids)
    metrics = {"reward/groups_zero_std_frac": flat / total} if total else {}
    counts = batch.loss_mask.sum(-1)
    values = torch.where(batch.loss_mask, batch.advantages, 0.0).double().sum(-1)[counts > 0] / counts[counts > 0]
    if values.numel():
        metrics |= {
            "advantage/mean": values.mean().item(),
            "advantage/std": values.std(correction=0).item(),
            "advantage/min": values.min().item(),
            "advantage/max": values.max().item(),
        }
    return metrics


def _check(rewards: torch.Tensor, group_ids: torch.Tensor) -> None:
    if rewards.isinf().any():
        row = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"reward {rewards[row].item()} of row {row} is infinite; a missing reward is NaN")
    assert rewards.shape == group_ids.shape and rewards.dim() == 1, (
        f"{rewards.shape} rewards, {group_ids.shape} groups"
    )


def _flat(rewards: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(num_groups,) bool: all present rewards equal, or fewer than two present."""
    missing = rewards.isnan()
    lowest = rewards.new_full((num_groups,), float("inf"))
    lowest = lowest.scatter_reduce(0, group, rewards.masked_fill(missing, float("inf")), "amin")
    highest = rewards.new_full((num_groups,), -float("inf"))
    highest = highest.scatter_reduce(0, group, rewards.masked_fill(missing, -float("inf")), "amax")
    return highest <= lowest


def _statistics(rewards: torch.Tensor, group_ids: torch.Tensor) -> _Groups:
    _check(rewards, group_ids)
    ids, group = torch.unique(group_ids, return_inverse=True)
    rewards = rewards.double()
    present = ~rewards.isnan()

    def total(per_response: torch.Tensor) -> torch.Tensor:
        return per_response.new_zeros(len(ids)).index_add(0, group, per_response)[group]

    values = torch.where(present, rewards, 0.0)
    count = total(present.double())
    live = present & ~_flat(rewards, group, len(ids))[group]
    centered = torch.where(live, values - total(values) / count.clamp(min=1), 0.0)
    return _Groups(centered, count, total(centered.square()) / (count - 1).clamp(min=1))
