"""Scores of given tokens under a scalar model: a critic's values, a reward model's rewards, scores of steps.

The companion of `rlhf.logprobs`: the only place that knows at which token a number is read. A value is that of the
state in which a token is chosen, so that it is read at the token before; a reward is read at a row's last token, a
step's score at the step's last token. Not here: the models (`rlhf.models.scalar`, `rlhf.models.value_head`), packing
(`rlhf.batching`).

Every function makes one pack and one forward pass of the whole batch: cut it first (`plan_micro_batches`). A batch
of no rows gives a tensor of no rows without calling the model, which a sharded model (ZeRO-3) must then be run through
some other way.
"""

from __future__ import annotations

import torch

from rlhf.batching import PackedSequences, pack, unpack
from rlhf.logprobs import packed_logprobs
from rlhf.models.attention import packed_attention
from rlhf.models.value_head import ask_values
from rlhf.records import Batch


def packed_scores(model: torch.nn.Module, packed: PackedSequences) -> torch.Tensor:
    """The score of each of the N tokens of a pack, read when that token has been. (N,) fp32, with gradient if the
    model has it. `model` is from `load_scalar_model`, or an engine around one, on the pack's device.
    """
    with packed_attention(packed):
        scores = model(
            input_ids=packed.token_ids[None], position_ids=packed.position_ids[None], use_cache=False
        )
    assert scores.shape == packed.token_ids.shape, (
        f"scores {tuple(scores.shape)} of {len(packed.token_ids)} tokens"
    )
    return scores


def batch_values(
    model: torch.nn.Module, batch: Batch, *, targets: torch.Tensor | None = None
) -> torch.Tensor:
    """V_t, what the critic expects of the state before token t is chosen: its score at token t - 1.

    Token-aligned: (B, T) fp32, 0 where `targets` (default: response_mask) is False.
    """
    targets = batch.response_mask if targets is None else targets
    return _read(model, batch, targets, before=True)


def batch_logprobs_and_values(
    model: torch.nn.Module,
    batch: Batch,
    *,
    temperature: float,
    entropy: bool = False,
    targets: torch.Tensor | None = None,
    share_prompts: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`batch_logprobs` and `batch_values` from one forward pass of a causal language model with a value head
    (`rlhf.models.value_head`): log-probs, entropies or None, values; each (B, T) fp32, 0 where `targets` (default:
    response_mask) is False. `share_prompts` as there.
    """
    targets = batch.response_mask if targets is None else targets
    if len(batch) == 0:
        nothing = torch.zeros(targets.shape, device=targets.device)
        return nothing, nothing.clone() if entropy else None, nothing.clone()
    packed = pack(batch, targets, share_prompts=share_prompts)
    with ask_values() as given:
        logprobs, entropies = packed_logprobs(model, packed, temperature=temperature, entropy=entropy)
    (values,) = given
    if len(values) == len(packed.token_ids):  # of every token; else of those before the targets already
        values = values[packed.source_index]
    entropies = unpack(packed, entropies, targets) if entropy else None
    return unpack(packed, logprobs, targets), entropies, unpack(packed, values, targets)


def batch_step_scores(model: torch.nn.Module, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
    """A process reward model's score (a logit) at each of the tokens that `targets` (B, T) bool marks, read when
    that token has been. (B, T) fp32, 0 elsewhere.
    """
    return _read(model, batch, targets, before=False)


def batch_rewards(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(B,) fp32: the reward model's score at each row's last token, whatever that token is."""
    if len(batch) == 0:
        return torch.zeros(0, device=batch.token_ids.device)
    packed = pack(batch, batch.response_mask & False)
    return packed_scores(model, packed)[packed.cu_seqlens[1:].long() - 1]


def _read(model: torch.nn.Module, batch: Batch, targets: torch.Tensor, *, before: bool) -> torch.Tensor:
    """Scores at the targets; or `before` them, where rows of one prompt run it once."""
    if len(batch) == 0:
        return torch.zeros(targets.shape, device=targets.device)
    packed = pack(batch, targets, share_prompts=before)
    places = packed.source_index if before else packed.target_index
    return unpack(packed, packed_scores(model, packed)[places], targets)
