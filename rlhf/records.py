"""The records that flow along the straight line: Prompt, Rollout, RolloutGroup, Batch.

Here: what one sample is, from the prompt to the tensors a trainer consumes, and who writes each field. Not here: how
records become tensors (`rlhf.batching`) and what is computed from them (`rlhf.advantages`, `rlhf.objectives`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the policy reads it. Written by `rlhf.data`."""

    id: str  # stable name of the dataset row, for example "train/17"
    token_ids: tuple[int, ...]  # what the policy is given, special tokens included
    text: str  # the same as text, for people and for rewards; never tokenised again
    row: Mapping[str, Any] = field(default_factory=dict)  # the dataset row's columns; rewards read them


@dataclass(frozen=True)
class Rollout:
    """One sampled response with its record. A stage returns a copy with its own fields added."""

    sample_id: str  # "step/prompt position/sample index"; the order of results is the order of these
    prompt: Prompt
    # written by the rollout engine
    response_ids: tuple[int, ...]  # every token after the prompt, stop token included
    response_mask: tuple[bool, ...]  # True = written by the policy, False = by a tool
    rollout_logprobs: tuple[
        float, ...
    ]  # fp32, nats, under the policy at the sampling temperature; 0 where masked
    policy_versions: tuple[int, ...]  # optimiser steps in the weights that wrote each token
    finish_reason: FinishReason
    response_text: str = ""  # decoded for people and for rewards
    # written by the scorer
    reward: float | None = None  # None = not scored, or scoring failed: masked and counted, never a zero
    reward_parts: Mapping[str, float] = field(default_factory=dict)  # unweighted components by name
    reward_error: str | None = None  # why `reward` is missing
    penalty: float = 0.0  # what of `reward` is for its length, and says nothing about how good it is

    def __post_init__(self) -> None:
        n = len(self.response_ids)
        for name in ("response_mask", "rollout_logprobs", "policy_versions"):
            assert len(getattr(self, name)) == n, (
                f"{self.sample_id}: {name} has {len(getattr(self, name))} of {n}"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)

    def replace(self, **changes: Any) -> Rollout:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class RolloutGroup:
    """The responses to one prompt, in sample order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> tuple[float | None, ...]:
        return tuple(r.reward for r in self.rollouts)


_ROW_TENSORS = (
    "token_ids",
    "attention_mask",
    "response_mask",
    "loss_mask",
    "group_ids",
    "rewards",
    "right",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
    "labels",
    "margins",
    "baselines",
    "token_labels",
    "token_rewards",
    "cov_tokens",
    "teacher_ids",
    "teacher_logprobs",
)


@dataclass(frozen=True)
class Batch:
    """What a trainer consumes: B sequences, right-padded to T tokens. All per-token arrays are token-aligned
    (entry t belongs to token t) and 0 / False at padding.

    `num_loss_tokens`, `num_loss_sequences` and `num_positive_tokens` are counts over the whole optimiser step, all
    micro-batches and all processes; a micro-batch cut from a batch keeps them, so that cutting differently does not
    change the gradient.
    """

    sample_ids: tuple[str, ...]  # (B,)
    token_ids: torch.Tensor  # (B, T) int64, prompt + response
    attention_mask: torch.Tensor  # (B, T) bool, True = real token
    response_mask: torch.Tensor  # (B, T) bool, True = written by the policy
    loss_mask: torch.Tensor  # (B, T) bool, True = counts in the loss, a subset of response_mask
    num_loss_tokens: int
    num_loss_sequences: int  # sequences with at least one loss token
    num_positive_tokens: int = 0  # loss tokens in rows that are `right`
    group_ids: torch.Tensor | None = None  # (B,) int64, rows of one prompt share a number
    rewards: torch.Tensor | None = None  # (B,) fp32, NaN = missing
    right: torch.Tensor | None = None  # (B,) bool, True = the reward is that of a right answer
    rollout_logprobs: torch.Tensor | None = None  # (B, T) fp32, nats, from the sampler
    old_logprobs: torch.Tensor | None = None  # (B, T) fp32, nats, policy before this update
    ref_logprobs: torch.Tensor | None = None  # (B, T) fp32, nats, reference
    values: torch.Tensor | None = None  # (B, T) fp32, critic
    advantages: torch.Tensor | None = None  # (B, T) fp32, 0 outside response_mask
    returns: torch.Tensor | None = None  # (B, T) fp32
    labels: torch.Tensor | None = None  # (B,) fp32, 1 = chosen or desirable, -1 = rejected or undesirable
    margins: torch.Tensor | None = (
        None  # (B,) fp32, by how much chosen is better; the same on both rows of a pair
    )
    baselines: torch.Tensor | None = None  # (B,) fp32, what a loss that couples rows compares this one with
    token_labels: torch.Tensor | None = None  # (B, T) fp32, 0 or 1 at a step's last token, NaN elsewhere
    token_rewards: torch.Tensor | None = None  # (B, T) fp32, reward of each token, KL included
    cov_tokens: torch.Tensor | None = None  # (B, T) bool, held back for their covariance
    teacher_ids: torch.Tensor | None = None  # (B, T, K) int64, the teacher's likeliest tokens at t
    teacher_logprobs: torch.Tensor | None = None  # (B, T, K + 1) fp32, nats: theirs, and of any other token

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        assert len(self.sample_ids) == shape[0], f"{len(self.sample_ids)} sample ids for {shape[0]} rows"
        for name in _ROW_TENSORS:
            value = getattr(self, name)
            if value is not None:
                want = shape[: value.dim()]
                assert value.shape[:2] == want, f"{name} is {tuple(value.shape)}, expected {tuple(want)}"

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) int64, real tokens per row."""
        return self.attention_mask.sum(-1)

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)

    def select(self, rows: list[int]) -> Batch:
        """The given rows, trimmed to their longest. The step's global counts stay."""
        index = torch.tensor(rows, dtype=torch.long)
        width = int(self.lengths[index].max()) if rows else 0
        cut: dict[str, Any] = {}
        for name in _ROW_TENSORS:
            value = getattr(self, name)
            if value is not None:
                cut[name] = value[index][:, :width] if value.dim() > 1 else value[index]
        return self.replace(sample_ids=tuple(self.sample_ids[i] for i in rows), **cut)

    def zeros(self, *, rows: int, width: int) -> Batch:
        """Rows of real tokens, numbered 0, in which nothing counts, with the fields that this batch has; labels
        alternate and neighbours share a group, as in preference pairs."""
        filled: dict[str, Any] = {}
        for name in _ROW_TENSORS:
            value = getattr(self, name)
            if value is not None:
                shape = (rows, width, *value.shape[2:])[: max(value.dim(), 1)]
                filled[name] = value.new_zeros(shape)
        filled["attention_mask"] |= True
        filled["response_mask"][:, 1:] = True
        if self.labels is not None:
            filled["labels"] = 1.0 - 2.0 * (torch.arange(rows, device=self.labels.device) % 2)
        if self.group_ids is not None:
            filled["group_ids"] = torch.arange(rows, device=self.group_ids.device) // 2
        return self.replace(sample_ids=("",) * rows, **filled)

    def to(self, device: torch.device | str) -> Batch:
        moved = {n: getattr(self, n).to(device) for n in _ROW_TENSORS if getattr(self, n) is not None}
        return self.replace(**moved)
