"""Advantages from rewards: what each token is worth, compared with what was to be expected.

Here: rewards with the KL in them, group baselines (the G responses to one prompt are each other's critic), the
estimators of the REINFORCE family, generalised advantage estimation, whitening, and the two entry points
`with_advantages` and `with_gae`. Not here: rewards and their statistics (`rlhf.reward`), nor the critic
(`rlhf.value`).

A group function takes `rewards` (B,) with NaN = missing, and `group_ids` (B,) int, equal for responses to one
prompt and in any order. It returns (B,) in the rewards' dtype. A missing reward gets 0 and is left out of its
group's statistics. A group whose rewards are all equal, or that has fewer than two, gives exactly 0:
`zero_std_groups` counts those. Within a group the advantages add up to 0. Statistics are taken in float64.

The settings of the entry points are a recipe's algorithm section, with `kl_in_reward` and `whiten_advantages`
decided. Call them on a whole step's batch, before it is cut: groups and whitening couple its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rlhf.kl import kl_k1
from rlhf.recipe.rules import OF_A_GROUP
from rlhf.records import Batch
from rlhf.settings import bind

STD_EPS = 1e-6  # added to the standard deviation
WHITEN_EPS = 1e-8  # added to the variance
_AT_ONCE = 1 << 17  # tokens whose sums are made at once: what a core's caches hold


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


def remax(rewards: torch.Tensor, baselines: torch.Tensor) -> torch.Tensor:
    """A = R(y) - R(greedy y), `baselines` (B,) the rewards of the greedy responses to the same prompts (ReMax, arXiv
    2310.10505). (B,), 0 where either reward is missing (NaN).
    """
    return (rewards - baselines).nan_to_num(nan=0.0)


def return_to_go(token_rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """G_t = u_t + gamma G_t', t' the next token in `mask` (B, T); 0 outside the mask. (B, T), the rewards' dtype."""
    nothing = torch.zeros_like(token_rewards)
    return gae(token_rewards, nothing, mask, gamma=gamma, lam=1.0)[0]


# -- rewards with the KL in them ---------------------------------------------------------------------------------------


def sequence_rewards(batch: Batch, *, kl_coef: float, reward_clip: float | None) -> torch.Tensor:
    """clip(R, +-reward_clip) - kl_coef sum_t KL_t of each response: (B,) in the rewards' dtype, NaN = missing.

    KL_t is k1 on each token of `response_mask`, the one estimator whose policy gradient as a reward is that of
    KL(policy || reference) (`rlhf.kl`); the policy's log-probs are
    `old_logprobs`, or the sampler's where the batch was not scored. None for reward_clip = no clip. Raises ValueError
    if a KL is asked for and log-probs are missing.
    """
    rewards = _clipped_rewards(batch, reward_clip)
    if not kl_coef:
        return rewards
    return rewards - kl_coef * _token_kl(batch).sum(-1).to(rewards.dtype)


def token_rewards(batch: Batch, *, kl_coef: float, reward_clip: float | None) -> torch.Tensor:
    """u_t = -kl_coef KL_t on every token of `response_mask`, plus clip(R, +-reward_clip) on the last: (B, T), 0
    elsewhere (InstructGPT, arXiv 2203.02155 section 3.5).

    The last token of a response without a reward is NaN. For the rest see `sequence_rewards`, whose sum over tokens
    this is wherever the policy wrote any.
    """
    rewards, mask = _clipped_rewards(batch, reward_clip), batch.response_mask
    spread = torch.where(_last_token(mask), rewards[:, None], 0.0)
    if not kl_coef:
        return spread
    return spread - kl_coef * _token_kl(batch).to(rewards.dtype)


def _clipped_rewards(batch: Batch, reward_clip: float | None) -> torch.Tensor:
    assert batch.rewards is not None, "advantages need rewards"
    return _clip(batch.rewards, reward_clip)


def _clip(rewards: torch.Tensor, reward_clip: float | None) -> torch.Tensor:
    return rewards if reward_clip is None else rewards.clamp(-reward_clip, reward_clip)


def _token_kl(batch: Batch) -> torch.Tensor:
    policy = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
    if policy is None or batch.ref_logprobs is None:
        missing = "ref_logprobs" if policy is not None else "old_logprobs"
        raise ValueError(
            f"a KL in the reward needs {missing}: score the batch with the reference and the policy first, or set "
            "algorithm.kl_coef: 0"
        )
    mask = batch.response_mask
    policy, reference = (torch.where(mask, x, 0.0) for x in (policy, batch.ref_logprobs))
    return kl_k1(policy, reference)


def _last_token(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool, True on the last True of each row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


# -- estimators by name ------------------------------------------------------------------------------------------------


def _of_group(estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def advantages(batch: Batch, rewards: torch.Tensor) -> torch.Tensor:
        assert batch.group_ids is not None, "group advantages need group_ids"
        return estimator(rewards, batch.group_ids)[:, None]

    return advantages


def _remax(batch: Batch, rewards: torch.Tensor, *, reward_clip: float | None) -> torch.Tensor:
    if batch.baselines is None:
        raise ValueError("remax needs baselines: the rewards of the greedy responses to the same prompts")
    return remax(rewards, _clip(batch.baselines, reward_clip))[:, None]


def _reinforce_pp(batch: Batch, rewards: torch.Tensor, *, gamma: float) -> torch.Tensor:
    assert batch.token_rewards is not None
    return return_to_go(batch.token_rewards, _judged(batch), gamma=gamma)


# Each takes the batch, with its token_rewards, and the rewards of whole sequences (B,), both with the KL in them if it
# belongs there; and gives (B, 1) or (B, T). reinforce_pp: return-to-go of each token, whitened over the batch's tokens
# (arXiv 2501.03262); its -baseline: less the group's mean, then whitened. Whitening is `whiten_advantages`.
ADVANTAGES = {
    "grpo": _of_group(group_normalized),
    "dr_grpo": _of_group(group_centered),
    "rloo": _of_group(leave_one_out),
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _of_group(group_centered),
    "remax": _remax,
}


def with_advantages(batch: Batch, settings: Any) -> Batch:
    """The batch with `advantages` (B, T) fp32 by the estimator `settings.advantage`, 0 outside `response_mask`.

    A response without a reward gets 0 and is left out of every statistic. Whitening is over the loss tokens. Raises
    ValueError for an unknown name or for something missing.
    """
    if settings.advantage not in ADVANTAGES:
        raise ValueError(
            f"advantage {settings.advantage!r} is unknown; choose one of {', '.join(ADVANTAGES)}"
        )
    shaping = _shaping(settings)
    shaped = batch.replace(token_rewards=token_rewards(batch, **shaping))
    per_token = bind(ADVANTAGES[settings.advantage], settings)(shaped, sequence_rewards(batch, **shaping))
    advantages = torch.where(_judged(batch), per_token.float(), 0.0)
    return batch.replace(advantages=_whitened(batch, advantages, settings))


def with_gae(batch: Batch, settings: Any) -> Batch:
    """The batch with `token_rewards`, `advantages` and `returns` (B, T) fp32 from the critic's `values`, for PPO; all
    0 outside `response_mask`.

    lambda is `settings.lam`; `critic_lam` is another for the returns (VAPO, arXiv 2504.05118: 1), and
    `length_adaptive_lam` = alpha gives the advantages 1 - 1 / (alpha * response length), not below 0 (VAPO: .05).
    A response without a reward gets 0 everywhere and is left out of every statistic; its token_rewards have NaN on
    the last token. Whitening is over the loss tokens, of the advantages alone.
    """
    assert batch.values is not None, "gae needs the critic's values"
    batch = batch.replace(token_rewards=token_rewards(batch, **_shaping(settings)).float())
    mask = _judged(batch)
    rewards = torch.where(mask, batch.token_rewards, 0.0)
    critic_lam = settings.lam if settings.critic_lam is None else settings.critic_lam
    lam = _policy_lam(batch, settings)
    advantages, returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=lam)
    if lam is not critic_lam:
        returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=critic_lam)[1]
    return batch.replace(advantages=_whitened(batch, advantages.float(), settings), returns=returns.float())


def _policy_lam(batch: Batch, settings: Any) -> float | torch.Tensor:
    """One number, or (B,) where it adapts to the responses' lengths (the policy's tokens)."""
    alpha = settings.length_adaptive_lam
    if alpha is None:
        return settings.lam
    lengths = batch.response_mask.sum(-1).clamp(min=1).double()
    return (1.0 - 1.0 / (alpha * lengths)).clamp(min=0.0)


def gae(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns): delta_t = u_t + gamma V_t' - V_t, A_t = delta_t + gamma lam A_t', return_t = A_t + V_t
    (GAE, arXiv 1506.02438 eq. 16), with t' the next token in `mask`, and V = A = 0 after the last.

    Tokens outside the mask (a tool's, padding) are no steps: they are skipped, not discounted, and get 0 whatever
    stands there. lam is one number or (B,). Results have the rewards' dtype; sums are in float64, and a row's bits are
    its own. Raises ValueError for shapes that do not fit.
    """
    _check_tokens(token_rewards, values, mask, lam)
    decay = gamma * torch.as_tensor(lam, dtype=torch.float64, device=mask.device).expand(len(mask))
    advantages, returns = torch.empty_like(token_rewards), torch.empty_like(token_rewards)
    rows = max(1, _AT_ONCE // max(1, mask.shape[1]))
    for at in (slice(first, first + rows) for first in range(0, len(mask), rows)):
        inside = mask[at]
        u, v = (torch.where(inside, x[at], 0.0).double() for x in (token_rewards, values))
        found = _gae(u, v, inside, gamma, decay[at, None])
        advantages[at], returns[at] = found, found + v
    return advantages, returns


def _gae(
    u: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, gamma: float, decay: torch.Tensor
) -> torch.Tensor:
    """Advantages of rewards u and values v (B, T), both 0 outside the mask; decay (B, 1); all float64."""
    counts = mask.sum(-1, keepdim=True)
    place = torch.where(mask, counts + 1 - mask.cumsum(-1), 0)  # counted from the last token; 0 is after it
    u, v = (x.new_zeros(len(x), int(counts.max()) + 1).scatter_(1, place, x) for x in (u, v))
    sums = u - v
    sums[:, 1:] += gamma * v[:, :-1]
    step = sums[:, 1:]
    distance = 1
    while distance < step.shape[1]:  # each holds the sum of that many tokens, then of twice as many
        step[:, distance:] += decay * step[:, :-distance]
        distance, decay = 2 * distance, decay * decay
    return sums.gather(1, place)


def _check_tokens(
    token_rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, lam: float | torch.Tensor
) -> None:
    shape = tuple(token_rewards.shape)
    if len(shape) != 2 or mask.dtype != torch.bool:
        raise ValueError(f"token_rewards {shape}, mask of {mask.dtype}: they must be (B, T) and bool")
    for name, x in (("values", values), ("mask", mask)):
        if x.shape != shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} for token_rewards {shape}; give one number for each token"
            )
    if isinstance(lam, torch.Tensor) and lam.shape not in ((), shape[:1]):
        raise ValueError(
            f"lam {tuple(lam.shape)} for token_rewards {shape}; it must be one number or {shape[:1]}"
        )


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) over the entries in `mask`, var with n - 1; 0 outside the mask. (B, T).

    Equal entries, and a single one, give 0. Statistics in float64; result in the dtype of `values`.
    """
    inside = values[mask].double()
    if not inside.numel():
        return torch.zeros_like(values)
    centered = inside - inside.mean()
    variance = centered.square().sum() / max(inside.numel() - 1, 1)
    whitened = torch.zeros_like(values)
    whitened[mask] = (centered / (variance + WHITEN_EPS).sqrt()).to(values.dtype)
    return whitened


def _judged(batch: Batch) -> torch.Tensor:
    """(B, T) bool: the policy's tokens in responses that have a reward."""
    assert batch.rewards is not None
    return batch.response_mask & ~batch.rewards.isnan()[:, None]


def _shaping(settings: Any) -> dict[str, Any]:
    assert settings.kl_in_reward is not None, "kl_in_reward is undecided; resolve the method's default first"
    return {
        "kl_coef": settings.kl_coef if settings.kl_in_reward else 0.0,
        "reward_clip": settings.reward_clip,
    }


def _whitened(batch: Batch, advantages: torch.Tensor, settings: Any) -> torch.Tensor:
    assert settings.whiten_advantages is not None, (
        "whiten_advantages is undecided; resolve the method's default first"
    )
    return whiten(advantages, batch.loss_mask & _judged(batch)) if settings.whiten_advantages else advantages


# -- statistics --------------------------------------------------------------------------------------------------------


def zero_std_groups(rewards: torch.Tensor, group_ids: torch.Tensor) -> tuple[int, int]:
    """(groups without any advantage, groups): those with equal rewards, or with fewer than two present."""
    _check(rewards, group_ids)
    ids, group = torch.unique(group_ids, return_inverse=True)
    flat = _flat(rewards.double(), group, len(ids))
    return int(flat.sum()), len(ids)


def advantage_metrics(batch: Batch, settings: Any, *, rewarded: bool = True) -> dict[str, float]:
    """`advantage/{mean,std,min,max}`; where a response is compared with its group `reward/groups_zero_std_frac`; and where
    there are returns `return/mean`; of a whole step's batch as `with_advantages` or `with_gae` left it. `rewarded`: rewards
    are where the advantages come from, as they are in all but distillation.

    Advantages are over the tokens of `loss_mask` where tokens have their own or were whitened over tokens; else over the
    responses with one, of which a longer one counts no more than a shorter one. They are left out if there is none; the
    std is with n. `return/mean` is over the loss tokens.
    """
    assert batch.advantages is not None and batch.rewards is not None
    metrics: dict[str, float] = {}
    if rewarded and batch.returns is None and settings.advantage in OF_A_GROUP:
        flat, total = zero_std_groups(sequence_rewards(batch, **_shaping(settings)), batch.group_ids)
        metrics["reward/groups_zero_std_frac"] = flat / total
    values = batch.advantages[batch.loss_mask].double()
    if (
        batch.returns is None
        and settings.advantage in (*OF_A_GROUP, "remax")
        and not settings.whiten_advantages
    ):
        counts = batch.loss_mask.sum(-1)
        sums = torch.where(batch.loss_mask, batch.advantages, 0.0).double().sum(-1)
        values = sums[counts > 0] / counts[counts > 0]
    if values.numel():
        metrics |= {
            "advantage/mean": values.mean().item(),
            "advantage/std": values.std(correction=0).item(),
            "advantage/min": values.min().item(),
            "advantage/max": values.max().item(),
        }
        if batch.returns is not None:
            metrics["return/mean"] = batch.returns[batch.loss_mask].double().mean().item()
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
