"""Log-probs of given tokens under a model. The one module that shifts tokens against logits.

The logits at position p predict token p + 1; everything outside this module is token-aligned: entry t belongs
to token t. Not here: packing (`rlhf.batching`), the log-softmax itself (`rlhf.kernels.logprob`), attention
over a pack (`rlhf.models.attention`).
"""

from __future__ import annotations

import torch

from rlhf.batching import PackedSequences, pack, unpack
from rlhf.divergence import teacher_top_k
from rlhf.kernels.logprob import token_logprobs
from rlhf.models.attention import packed_attention
from rlhf.models.head import LogprobRequest, ask_head, has_logprob_head
from rlhf.records import Batch


def packed_logprobs(
    model: torch.nn.Module, packed: PackedSequences, *, temperature: float, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(logits / temperature)[token] of the M targets of a pack, and the entropy of those
    distributions.

    (M,) fp32 each, nats, with gradient if the model has it; None in place of an entropy that was not asked
    for. Logits are computed at the M places before the targets only, and a chunk of them at a time where the
    model's head allows it (`rlhf.models.head`). `model` is a causal language model from `rlhf.models.load`, or an
    engine around one, on the pack's device. Raises ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: log-probs need one above 0; for greedy samples use 1")
    if not has_logprob_head(model):
        return token_logprobs(packed_logits(model, packed), target_ids(packed), temperature, entropy=entropy)
    request = LogprobRequest(packed.source_index, target_ids(packed), temperature, entropy)
    with ask_head(request):
        answer = _run(model, packed, logits_to_keep=0)
    return answer[:, 0], answer[:, 1] if entropy else None


def target_ids(packed: PackedSequences) -> torch.Tensor:
    """(M,) int64: the tokens whose log-probs are wanted."""
    return packed.token_ids[packed.target_index]


def packed_logits(model: torch.nn.Module, packed: PackedSequences) -> torch.Tensor:
    """(M, V) logits of the distributions that the M target tokens were drawn from."""
    sources = packed.source_index
    logits = _run(model, packed, logits_to_keep=sources)
    assert logits.shape[0] == sources.shape[0], (
        f"{logits.shape[0]} rows of logits for {sources.shape[0]} targets"
    )
    return logits


def _run(
    model: torch.nn.Module, packed: PackedSequences, *, logits_to_keep: torch.Tensor | int
) -> torch.Tensor:
    """One forward pass over the pack; what the model's head gives, a row for each token or each one kept."""
    with packed_attention(packed):
        output = model(
            input_ids=packed.token_ids[None],
            position_ids=packed.position_ids[None],
            logits_to_keep=logits_to_keep,
            use_cache=False,
        )
    return output.logits[0]


def batch_logprobs(
    model: torch.nn.Module,
    batch: Batch,
    *,
    temperature: float,
    entropy: bool = False,
    targets: torch.Tensor | None = None,
    share_prompts: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`packed_logprobs` of a batch, token-aligned: (B, T) fp32, 0 where `targets` (default: response_mask) is
    False.

    The whole batch is one pack and one forward pass: cut it first (`plan_micro_batches`). Neighbouring rows of one
    prompt run it once, with the same bits; `share_prompts=False` is for a forward that treats rows of one prompt
    differently. A batch of no rows
    gives tensors of no rows without calling the model, which a sharded model (ZeRO-3) must then be run
    through some other way.
    """
    targets = batch.response_mask if targets is None else targets
    if len(batch) == 0:
        nothing = torch.zeros(targets.shape, device=targets.device)
        return nothing, nothing.clone() if entropy else None
    packed = pack(batch, targets, share_prompts=share_prompts)
    values, entropies = packed_logprobs(model, packed, temperature=temperature, entropy=entropy)
    return unpack(packed, values, targets), unpack(packed, entropies, targets) if entropy else None


def batch_logits(
    model: torch.nn.Module, batch: Batch, *, targets: torch.Tensor
) -> tuple[PackedSequences, torch.Tensor]:
    """The pack of a batch and (M, V) logits for its targets, for what needs whole distributions."""
    packed = pack(batch, targets)
    return packed, packed_logits(model, packed)


@torch.no_grad()
def batch_top_logprobs(
    model: torch.nn.Module, batch: Batch, *, targets: torch.Tensor, temperature: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens in place of each target, likeliest first: (B, T, K) int64, and log-probs (B, T, K + 1) fp32,
    theirs and that of any other token; 0 where `targets` is False. K is `top_k`, or the vocabulary where that is
    less."""
    packed, logits = batch_logits(model, batch, targets=targets)
    ids, logprobs = teacher_top_k(logits, top_k=top_k, temperature=temperature)
    at = (packed.rows, packed.cols)
    ids, logprobs = (x.new_zeros((*targets.shape, x.shape[1])).index_put_(at, x) for x in (ids, logprobs))
    return ids, logprobs
