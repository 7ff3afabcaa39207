"""What each loss needs from a model: one function per loss, from a micro-batch to a scalar and its sums.

Here: which forward pass feeds which formula. Not here: the formulas (`rlhf.losses`, `rlhf.preference`, `rlhf.kto`,
`rlhf.reward_loss`, `rlhf.value`, `rlhf.divergence`), and the optimiser step (`deepspeed_engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlhf.batching import PackedSequences, unpack
from rlhf.divergence import collision_entropy, distill_loss, logits_divergence, topk_divergence
from rlhf.kernels.logprob import token_logprobs
from rlhf.kto import LABEL_LOSSES
from rlhf.logprobs import batch_logits, batch_logprobs, target_ids
from rlhf.losses import Sums, policy_loss, sft_loss
from rlhf.preference import preference_loss
from rlhf.recipe import rules
from rlhf.recipe.schema import Recipe
from rlhf.records import Batch
from rlhf.reward_loss import bradley_terry, prm_loss
from rlhf.settings import bind
from rlhf.value import value_loss
from rlhf.values import batch_logprobs_and_values, batch_rewards, batch_step_scores, batch_values

Loss = tuple[torch.Tensor, Sums]


def _rows_are_alike(recipe: Recipe) -> bool:
    """Whether the same tokens are the same to the model in every row: NEFTune's noise is a row's own."""
    return recipe.trainer.neftune_alpha is None


def _answer_logprobs(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> torch.Tensor:
    """Log-probs of the loss mask's tokens at temperature 1, (B, T)."""
    return batch_logprobs(
        model, micro, temperature=1.0, targets=micro.loss_mask, share_prompts=_rows_are_alike(recipe)
    )[0]


def policy(recipe: Recipe, model: torch.nn.Module, micro: Batch, *, kl_coef: float) -> Loss:
    """Policy gradient (ppo, grpo). `kl_coef` is the step's, which may adapt."""
    settings = rules.decided(recipe).model_copy(update={"kl_coef": kl_coef})
    logprobs, entropy = batch_logprobs(
        model,
        micro,
        temperature=recipe.rollout.temperature,
        entropy=True,
        share_prompts=_rows_are_alike(recipe),
    )
    return policy_loss(micro, logprobs, entropy, settings, constant_length=recipe.rollout.max_response_tokens)


def policy_and_value(recipe: Recipe, model: torch.nn.Module, micro: Batch, *, kl_coef: float) -> Loss:
    """Policy gradient and the critic's loss from one pass, where both have one trunk."""
    settings = rules.decided(recipe).model_copy(update={"kl_coef": kl_coef})
    logprobs, entropy, values = batch_logprobs_and_values(
        model,
        micro,
        temperature=recipe.rollout.temperature,
        entropy=True,
        share_prompts=_rows_are_alike(recipe),
    )
    loss, sums = policy_loss(
        micro, logprobs, entropy, settings, constant_length=recipe.rollout.max_response_tokens
    )
    critic_loss, critic_sums = bind(value_loss, recipe.critic)(micro, values)
    return loss + recipe.critic.coef * critic_loss, sums | critic_sums


def sft(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """Negative log-likelihood of the loss mask's tokens."""
    return sft_loss(micro, _answer_logprobs(recipe, model, micro))


def ptx(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """The NLL that keeps a policy a language model, weighted (InstructGPT's PPO-ptx)."""
    if recipe.shares_trunk:  # every trained tensor takes part in every micro-batch, as DeepSpeed wants it
        logprobs, _, values = batch_logprobs_and_values(
            model,
            micro,
            temperature=1.0,
            targets=micro.loss_mask,
            share_prompts=_rows_are_alike(recipe),
        )
        loss, sums = sft_loss(micro, logprobs + 0.0 * values)
    else:
        loss, sums = sft(recipe, model, micro)
    renamed = {
        name.replace("sft/", "ptx/").replace("num_", "num_ptx_"): value for name, value in sums.items()
    }
    return recipe.algorithm.ptx_coef * loss, renamed


def preference(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """DPO and its family."""
    settings = rules.decided_preference(recipe)
    if not settings.wpo:
        return preference_loss(micro, _answer_logprobs(recipe, model, micro), settings)
    packed, logits = batch_logits(model, micro, targets=micro.loss_mask)
    logprobs, _ = token_logprobs(logits, target_ids(packed), 1.0)
    spread = collision_entropy(logits.detach(), temperature=1.0)
    like = micro.token_ids
    return preference_loss(
        micro,
        unpack(packed, logprobs, like),
        settings,
        collision_entropy=unpack(packed, spread, like),
    )


def kto(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    return bind(LABEL_LOSSES[recipe.kto.loss], recipe.kto)(micro, _answer_logprobs(recipe, model, micro))


def reward_model(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """Bradley-Terry on the scores of chosen and rejected answers."""
    return bind(bradley_terry, recipe.reward_modeling)(batch_rewards(model, micro), micro)


def process_reward(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """Right or wrong, at the last token of every step of an answer."""
    return prm_loss(batch_step_scores(model, micro, micro.loss_mask), micro)


def value(recipe: Recipe, model: torch.nn.Module, micro: Batch) -> Loss:
    """The critic's squared error."""
    return bind(value_loss, recipe.critic)(micro, batch_values(model, micro))


def distill(
    recipe: Recipe, model: torch.nn.Module, micro: Batch, *, teacher: torch.nn.Module | None = None
) -> Loss:
    """Distance to the teacher at every token of the data's answers, and their NLL."""
    packed, logits, distance = _to_teacher(recipe, model, micro, teacher)
    logprobs, _ = token_logprobs(logits, target_ids(packed), 1.0)
    like = micro.token_ids
    return bind(distill_loss, recipe.distill)(
        micro, unpack(packed, logprobs, like), unpack(packed, distance, like)
    )


def distill_own(
    recipe: Recipe, model: torch.nn.Module, micro: Batch, *, teacher: torch.nn.Module | None = None
) -> Loss:
    """Distance to the teacher at every token of the student's own responses."""
    packed, _, distance = _to_teacher(recipe, model, micro, teacher)
    return bind(distill_loss, recipe.distill)(micro, None, unpack(packed, distance, micro.token_ids))


def _to_teacher(
    recipe: Recipe, model: torch.nn.Module, micro: Batch, teacher: torch.nn.Module | None
) -> tuple[PackedSequences, torch.Tensor, torch.Tensor]:
    """The pack of the loss mask's M tokens, the student's logits (M, V) and the distance (M,): to the whole distributions
    of `teacher`, or to what the batch holds of them."""
    d = recipe.distill
    packed, logits = batch_logits(model, micro, targets=micro.loss_mask)
    if teacher is not None:
        with torch.no_grad():
            _, teacher_logits = batch_logits(teacher, micro, targets=micro.loss_mask)
        return packed, logits, bind(logits_divergence, d)(logits, teacher_logits)
    at = (packed.rows, packed.cols)
    distance = bind(topk_divergence, d)(logits, micro.teacher_ids[at], micro.teacher_logprobs[at])
    return packed, logits, distance


POLICY_LOSSES = ("policy", "policy_and_value")  # they take the step's kl_coef
TEACHER_LOSSES = ("distill", "distill_own")  # they may take the teacher
LOSSES: dict[str, Callable[..., Loss]] = {
    "policy": policy,
    "policy_and_value": policy_and_value,
    "sft": sft,
    "ptx": ptx,
    "preference": preference,
    "kto": kto,
    "reward_model": reward_model,
    "process_reward": process_reward,
    "value": value,
    "distill": distill,
    "distill_own": distill_own,
}


def sharing_losses(recipe: Recipe) -> tuple[str, ...]:
    """Names of the losses that run the prompt of a group's neighbouring responses once."""
    return POLICY_LOSSES if _rows_are_alike(recipe) else ()


def loss_function(name: str, recipe: Recipe, **changing: Any) -> Callable[[torch.nn.Module, Batch], Loss]:
    """`(model, micro-batch) -> (share of the step's loss, sums)`; `changing` is what a loss takes that is not in the
    recipe: settings that differ from step to step, another model."""
    return partial(LOSSES[name], recipe, **changing)
