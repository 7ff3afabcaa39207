"""Losses on pairs of a chosen and a rejected response: DPO and its relatives.

Here: one function for each loss, from two sequences' log-probs to one number per pair; how rows become pairs;
the whole loss of a step with its sums. Not here: losses on single labelled responses (`rlhf.kto`), reward
models (`rlhf.reward_loss`), where the reference's log-probs come from.

Notation: w chosen, l rejected, rho(y) = log policy(y|x) - log reference(y|x) summed over the response's
tokens, h = beta (rho_w - rho_l), s the sigmoid. Names of losses are TRL's; "TRL" below is its version 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import logsigmoid, relu

from rlhf.recipe.rules import COUPLED, OF_THE_GAP, PER_TOKEN, REFERENCE_FREE
from rlhf.records import Batch
from rlhf.sequences import desensitized_weights, sequence_lengths, sequence_logprobs
from rlhf.settings import bind

Sums = dict[str, torch.Tensor]

EXPONENT_LIMIT = 20.0  # e^x goes on as its tangent beyond, where forward KL and alpha scores would overflow


class PreferenceSettings(Protocol):
    """What `preference_loss` reads beside the parameters of the chosen losses."""

    losses: Mapping[str, float]  # weights by name; the weighted sum is the loss
    beta: float
    nll_coef: float
    wpo: bool
    ld_alpha: float
    f_divergence: str
    f_alpha: float


@dataclass(frozen=True)
class Pairs:
    """P pairs of responses, (P,) float64 tensors; log-probs in nats, summed over a response's loss tokens."""

    logprob_w: torch.Tensor  # policy, with gradient
    logprob_l: torch.Tensor
    ref_w: torch.Tensor  # reference; 0 where no loss looks at it
    ref_l: torch.Tensor
    score_w: torch.Tensor  # f'(policy / reference), which is rho for the reverse KL; with gradient
    score_l: torch.Tensor
    len_w: torch.Tensor  # loss tokens
    len_l: torch.Tensor
    # nats, no gradient, from `with_baselines`; only for the losses in COUPLED
    baseline_w: torch.Tensor | None
    baseline_l: torch.Tensor | None

    @property
    def rho_w(self) -> torch.Tensor:
        return self.logprob_w - self.ref_w

    @property
    def rho_l(self) -> torch.Tensor:
        return self.logprob_l - self.ref_l

    @property
    def gap(self) -> torch.Tensor:
        """Difference of the implicit rewards, divided by beta."""
        return self.score_w - self.score_l


# -- losses: Pairs -> (P,) ---------------------------------------------------------------------------------


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log s(h) - e log s(-h), with e = `label_smoothing` the share of wrong labels.

    DPO (arXiv 2305.18290 eq. 7); with e > 0 cDPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    TRL's "sigmoid" ignores the smoothing.
    """
    return _smoothed(beta * pairs.gap, label_smoothing)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """[-(1 - e) log s(h) + e log s(-h)] / (1 - 2 e): unbiased if a share e of the labels is flipped.

    Robust DPO (arXiv 2403.00409). Unlike cDPO's it can be negative. Raises ValueError for e >= 0.5.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: robust needs a share of flipped labels in [0, 0.5)"
        )
    h = beta * pairs.gap
    unbiased = -(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
    return unbiased / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """(rho_w / len_w - rho_l / len_l - 1 / (2 beta))^2, beta being the paper's tau (arXiv 2310.12036 eq. 17).

    Averages over tokens, not sums: the paper does not say, its authors' experiments were made with averages,
    and TRL does the same. A sum would make the target 1 / (2 beta) mean less the longer the response.
    """
    return (pairs.rho_w / pairs.len_w - pairs.rho_l / pairs.len_l - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """max(0, 1 - h): SLiC's rank loss (arXiv 2305.10425) on the log-ratio, as in RSO (arXiv 2309.06657)."""
    return relu(1 - beta * pairs.gap)


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """KL(p || q) of the policy's preference p = (s(h), s(-h)) from q = (1 - e, e).

    EXO-pref (arXiv 2402.00856 eq. 16); e = `label_smoothing` is the paper's epsilon, 1e-3 there. Raises
    ValueError for e = 0, where the KL is infinite (older TRL silently took 1e-3).
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: exo_pair needs a value in (0, 0.5), 0.001 in the paper"
        )
    h = beta * pairs.gap
    log_p_w, log_p_l = logsigmoid(h), logsigmoid(-h)
    w = log_p_w.exp() * (log_p_w - math.log1p(-label_smoothing))
    return w + log_p_l.exp() * (log_p_l - math.log(label_smoothing))


def nca_pair(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-log s(r_w) - [log s(-r_w) + log s(-r_l)] / 2, r = beta rho: NCA for two responses (arXiv 2402.05369).

    Each reward is fitted by itself, so that the chosen one's likelihood does not fall with the rejected
    one's.
    """
    r_w, r_l = beta * pairs.rho_w, beta * pairs.rho_l
    return -logsigmoid(r_w) - 0.5 * (logsigmoid(-r_w) + logsigmoid(-r_l))


def bco_pair(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-log s(beta (rho_w - d)) - log s(-beta (rho_l - d)), d the mean of rho over both sides.

    BCO (arXiv 2404.04656) on pairs. d is the baseline, from the whole step (the paper keeps a moving
    average, whose value would depend on where a run was interrupted). TRL 1 leaves d out; the paper has it.
    """
    baseline_w, baseline_l = _baselines(pairs)
    return -logsigmoid(beta * (pairs.rho_w - baseline_w)) - logsigmoid(-beta * (pairs.rho_l - baseline_l))


def sppo_hard(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """(rho_w - 1 / (2 beta))^2 + (rho_l + 1 / (2 beta))^2: SPPO with win probabilities 1 and 0.

    arXiv 2405.00675 eq. 4.7 with eta = 1 / beta (1e3 there, hence beta = 1e-3).
    """
    return (pairs.rho_w - 0.5 / beta).square() + (pairs.rho_l + 0.5 / beta).square()


def apo_zero(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """1 - s(r_w) + s(r_l), r = beta rho: chosen up, rejected down (arXiv 2408.06266 eq. 7).

    For chosen responses better than what the policy writes. The 1 is not in the paper; it keeps the loss
    positive.
    """
    return torch.sigmoid(-beta * pairs.rho_w) + torch.sigmoid(beta * pairs.rho_l)


def apo_down(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """s(r_w) + 1 - s(r_w - r_l): both down, rejected further (arXiv 2408.06266 eq. 8).

    For chosen responses worse than what the policy writes. The 1 is not in the paper.
    """
    return torch.sigmoid(beta * pairs.rho_w) + torch.sigmoid(-beta * (pairs.rho_w - pairs.rho_l))


def aot(pairs: Pairs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Smoothed logistic loss of beta (u - v), u the policy's log p_w - log p_l, v the reference's.

    Paired AOT (arXiv 2406.05882): the distribution of u over the pairs is to dominate that of v, and sorting
    both is the optimal transport. v, of u's rank, is the baseline: the rank is taken in the whole step's
    batch, not in a micro-batch (TRL sorts each device's micro-batch, so that its loss depends on how the
    batch was cut).
    """
    baseline_w, _ = _baselines(pairs)
    return _smoothed(beta * (pairs.logprob_w - pairs.logprob_l - baseline_w), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Smoothed logistic loss of beta (rho_w - rho_l), both sides sorted over the whole step.

    AOT without regard to pairs (arXiv 2406.05882). A row knows its partner of equal rank as its baseline
    only. Every match is seen from both sides, each of which is given half of the match's value and the whole
    of its own gradient: over the step, value and gradient are those of the batch's formula.
    """
    baseline_w, baseline_l = _baselines(pairs)
    from_w = _smoothed(beta * (pairs.rho_w - baseline_w), label_smoothing)
    from_l = _smoothed(beta * (baseline_l - pairs.rho_l), label_smoothing)
    both = from_w + from_l
    return both - 0.5 * both.detach()


def discopop(pairs: Pairs, *, beta: float, discopop_tau: float) -> torch.Tensor:
    """(1 - m) (-log s(h)) + m e^-h, m = s(h / tau): logistic and exponential mixed (arXiv 2406.08414 eq. 5).

    tau = 0.05 in the paper. m e^-h is taken in one exponential, which cannot overflow for tau <= 1.
    """
    h = beta * pairs.gap
    return -torch.sigmoid(-h / discopop_tau) * logsigmoid(h) + (logsigmoid(h / discopop_tau) - h).exp()


def sigmoid_norm(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-log s(beta (rho_w / len_w - rho_l / len_l)): length-normalised DPO as in Tulu 3 (arXiv 2411.15124)."""
    return -logsigmoid(beta * (pairs.rho_w / pairs.len_w - pairs.rho_l / pairs.len_l))


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float) -> torch.Tensor:
    """-log s(beta (log p_w / len_w - log p_l / len_l) - gamma), no reference: SimPO (arXiv 2405.14734)."""
    margin = pairs.logprob_w / pairs.len_w - pairs.logprob_l / pairs.len_l
    return -logsigmoid(beta * margin - simpo_gamma)


def cpo(pairs: Pairs, *, beta: float) -> torch.Tensor:
    """-log s(beta (log p_w - log p_l)), without a reference (CPO, arXiv 2401.08417); set nll_coef too.

    The paper adds the chosen response's NLL as a sum over its tokens, its code and TRL the mean over tokens,
    which is what `nll_coef` weighs here: a sum would drown the preference.
    """
    return -logsigmoid(beta * (pairs.logprob_w - pairs.logprob_l))


def orpo(pairs: Pairs, *, orpo_lambda: float) -> torch.Tensor:
    """NLL_w - lambda log s(log odds_w - log odds_l), odds = p / (1 - p) of p = e^(mean log-prob).

    ORPO (arXiv 2403.07691). NLL_w is the mean over the chosen response's own tokens (TRL: over all tokens
    of the micro-batch, so that its weight against the odds ratio depends on the neighbours' lengths).
    """
    mean_w, mean_l = pairs.logprob_w / pairs.len_w, pairs.logprob_l / pairs.len_l
    return -mean_w - orpo_lambda * logsigmoid(log_odds(mean_w) - log_odds(mean_l))


def sft(pairs: Pairs) -> torch.Tensor:
    """-log p_w / len_w: the chosen response's NLL per token, every response weighing the same."""
    return -pairs.logprob_w / pairs.len_w


PREFERENCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "sft": sft,
}


# -- scores of f-divergences -------------------------------------------------------------------------------


def reverse_kl_score(rho: torch.Tensor, *, f_alpha: float) -> torch.Tensor:
    """f'(u) = log u + 1, the 1 left out: rho itself. Plain DPO."""
    return rho


def forward_kl_score(rho: torch.Tensor, *, f_alpha: float) -> torch.Tensor:
    """f'(u) = -1 / u, plus 1 so that it is 0 at u = 1, as for the others."""
    return -_expm1(-rho)


def js_score(rho: torch.Tensor, *, f_alpha: float) -> torch.Tensor:
    """f'(u) = log(2 u / (1 + u)), bounded above by log 2."""
    return math.log(2) + logsigmoid(rho)


def alpha_score(rho: torch.Tensor, *, f_alpha: float) -> torch.Tensor:
    """f'(u) = (1 - u^-alpha) / alpha: towards the reverse KL as alpha goes to 0, the forward KL at 1.

    The paper's alpha; TRL 1 writes (u^(a - 1) - 1) / (a - 1), so that its a is 1 - alpha.
    """
    return -_expm1(-f_alpha * rho) / f_alpha


# f-DPO (arXiv 2309.16240): the implicit reward is beta f'(policy / reference). Constants cancel.
F_DIVERGENCES = {
    "reverse_kl": reverse_kl_score,
    "forward_kl": forward_kl_score,
    "js": js_score,
    "alpha": alpha_score,
}


# -- a step's loss -----------------------------------------------------------------------------------------


def preference_loss(
    batch: Batch,
    logprobs: torch.Tensor,
    settings: PreferenceSettings,
    *,
    collision_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sums]:
    """Weighted sum of the losses in `settings.losses` + nll_coef * NLL_w / len_w, mean over the step's pairs.

    batch: both rows of every pair, with group_ids, labels and, unless all losses are in REFERENCE_FREE,
    ref_logprobs; with baselines for those in COUPLED. logprobs (B, T) of the current policy with gradient,
    nats. The scalar is this micro-batch's share of the step's loss: the denominator is num_loss_sequences /
    2. A pair without loss tokens in either row is left out.

    nll_coef is RPO's alpha (arXiv 2404.19733) or completes cpo. With `settings.wpo` every pair's loss is
    multiplied by WPO's weights, which need `collision_entropy` (B, T), -log sum_v p(v)^2 of the distributions
    the tokens were drawn from (`rlhf.divergence.collision_entropy`), and have no gradient.

    Sums over pairs beside `num_pairs`: dpo/margin, accuracy (ties count half), reward_chosen and
    reward_rejected in beta * score (beta * mean log-prob, as SimPO, where every loss is reference-free),
    logprob_chosen and logprob_rejected as sums over tokens. Raises ValueError for unknown names, settings
    that do not go together, missing fields, or a row without its partner.
    """
    check_preference_settings(settings)
    pairs, chosen, rejected = _pair_up(batch, logprobs, settings)
    losses = torch.zeros_like(pairs.logprob_w)
    for name, weight in settings.losses.items():
        losses = losses + weight * bind(PREFERENCE_LOSSES[name], settings)(pairs)
    if settings.wpo:
        weights = wpo_weights(logprobs, collision_entropy, batch.loss_mask)
        losses = losses * weights[chosen] * weights[rejected]
    if settings.nll_coef:
        plain = sequence_logprobs(logprobs, batch.loss_mask)[chosen]
        losses = losses - settings.nll_coef * plain / pairs.len_w
    share = (losses.sum() / max(batch.num_loss_sequences / 2, 1)).to(logprobs.dtype)
    return share, {"dpo/loss": share.detach().double(), **_pair_sums(pairs, settings)}


@torch.no_grad()
def with_baselines(batch: Batch, policy_logprobs: torch.Tensor, settings: PreferenceSettings) -> Batch:
    """The batch with `baselines` (B,) for the one loss in `settings.losses` that couples pairs, if any.

    batch: the whole optimiser step, with ref_logprobs. policy_logprobs (B, T): the policy as it is when the
    update begins; with several updates on the same samples, score again before each. Baselines are nats: the
    mean of rho for bco_pair; for aot the reference's gap of equal rank (on both rows of a pair); for
    aot_unpaired the rho of equal rank on the other side. Ties keep the order of group_ids. Raises ValueError
    for two coupled losses.
    """
    coupled = [name for name in settings.losses if name in COUPLED]
    if not coupled:
        return batch
    check_preference_settings(settings)
    pairs, chosen, rejected = _pair_up(batch, policy_logprobs, settings)
    baselines = torch.zeros(len(batch), dtype=torch.float64, device=policy_logprobs.device)
    baselines[chosen], baselines[rejected] = _BASELINES[coupled[0]](pairs)
    return batch.replace(baselines=baselines.to(policy_logprobs.dtype))


def check_preference_settings(settings: PreferenceSettings) -> None:
    """Raise ValueError for names that do not exist and settings that do not go together."""
    names = set(settings.losses)
    if not names or not names <= set(PREFERENCE_LOSSES):
        wrong = ", ".join(sorted(names - set(PREFERENCE_LOSSES))) or "{}"
        raise ValueError(f"losses: {wrong} is unknown; choose from {', '.join(PREFERENCE_LOSSES)}")
    if settings.f_divergence not in F_DIVERGENCES:
        raise ValueError(
            f"f_divergence={settings.f_divergence!r} is unknown; choose one of {', '.join(F_DIVERGENCES)}"
        )
    if settings.f_divergence != "reverse_kl" and not names <= OF_THE_GAP:
        raise ValueError(
            f"f_divergence={settings.f_divergence!r} is defined for {', '.join(sorted(OF_THE_GAP))}, not for "
            f"{', '.join(sorted(names - OF_THE_GAP))}; use reverse_kl there"
        )
    if settings.ld_alpha != 1 and names & PER_TOKEN:
        raise ValueError(
            f"ld_alpha={settings.ld_alpha} weighs the tokens of a sum, but "
            f"{', '.join(sorted(names & PER_TOKEN))} averages over tokens; set ld_alpha to 1"
        )
    if len(names & COUPLED) > 1:
        raise ValueError(
            f"losses {', '.join(sorted(names & COUPLED))} each need baselines of their own; use one of them"
        )


@torch.no_grad()
def wpo_weights(
    logprobs: torch.Tensor, collision_entropy: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor:
    """exp(mean over tokens of [log p(y_t) - log sum_v p(v)^2]), one factor of a pair's weight.

    WPO with sampled alignment (arXiv 2406.11827): for one token p / sum_v p(v)^2 has mean 1 over the policy's
    own samples, and a response that the policy would not write gets less. logprobs, collision_entropy, mask
    (B, T) -> (B,) float64, constant. Raises ValueError without the entropy.
    """
    if collision_entropy is None:
        raise ValueError(
            "wpo needs the collision entropy of each token's distribution; compute it with log-probs"
        )
    aligned = sequence_logprobs(logprobs + collision_entropy, mask)
    return (aligned / sequence_lengths(mask).clamp(min=1)).exp()


def log_odds(logprob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p <= 0, accurate for p near 0 and near 1, finite (no gradient) at p = 1."""
    below = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return below - (-torch.expm1(below)).log()


def _smoothed(h: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def _expm1(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1, as a straight line beyond EXPONENT_LIMIT: finite, and it still pulls back."""
    inside = x.clamp(max=EXPONENT_LIMIT)
    return torch.expm1(inside) + math.exp(EXPONENT_LIMIT) * relu(x - EXPONENT_LIMIT)


def _baselines(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    if pairs.baseline_w is None or pairs.baseline_l is None:
        raise ValueError(
            "bco_pair, aot and aot_unpaired couple the step's pairs; call with_baselines on the whole batch "
            "first"
        )
    return pairs.baseline_w, pairs.baseline_l


def _mean_of_both(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    mean = 0.5 * (pairs.rho_w + pairs.rho_l).mean()
    return mean.expand_as(pairs.rho_w), mean.expand_as(pairs.rho_l)


def _reference_gap_of_rank(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    matched = _of_equal_rank(pairs.logprob_w - pairs.logprob_l, pairs.ref_w - pairs.ref_l)
    return matched, matched


def _other_side_of_rank(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    return _of_equal_rank(pairs.rho_w, pairs.rho_l), _of_equal_rank(pairs.rho_l, pairs.rho_w)


def _of_equal_rank(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each value, the one among `others` whose rank is the same."""
    matched = torch.empty_like(others)
    matched[values.argsort(stable=True)] = others[others.argsort(stable=True)]
    return matched


_BASELINES = {"bco_pair": _mean_of_both, "aot": _reference_gap_of_rank, "aot_unpaired": _other_side_of_rank}


def _pair_up(
    batch: Batch, logprobs: torch.Tensor, settings: PreferenceSettings
) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    """The pairs in order of their group_ids, and where their chosen and rejected rows stand."""
    chosen, rejected = pair_rows(batch)
    with_reference = not set(settings.losses) <= REFERENCE_FREE
    if with_reference and batch.ref_logprobs is None:
        needy = ", ".join(name for name in settings.losses if name not in REFERENCE_FREE)
        raise ValueError(f"losses {needy} need ref_logprobs; score the batch with the reference first")
    mask, lengths = batch.loss_mask, sequence_lengths(batch.loss_mask)
    weights = None
    if settings.ld_alpha != 1:
        shared = lengths.clone()
        shared[chosen] = shared[rejected] = torch.minimum(lengths[chosen], lengths[rejected])
        weights = desensitized_weights(mask, shared, ld_alpha=settings.ld_alpha)
    policy = sequence_logprobs(logprobs, mask, weights)
    reference = torch.zeros_like(policy)
    if with_reference:
        reference = sequence_logprobs(batch.ref_logprobs, mask, weights)
    scores = bind(F_DIVERGENCES[settings.f_divergence], settings)(policy - reference)
    baselines = None if batch.baselines is None else batch.baselines.double()
    pairs = Pairs(
        logprob_w=policy[chosen],
        logprob_l=policy[rejected],
        ref_w=reference[chosen],
        ref_l=reference[rejected],
        score_w=scores[chosen],
        score_l=scores[rejected],
        len_w=lengths[chosen],
        len_l=lengths[rejected],
        baseline_w=None if baselines is None else baselines[chosen],
        baseline_l=None if baselines is None else baselines[rejected],
    )
    return pairs, chosen, rejected


def pair_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the chosen and of the rejected responses, (P,) int64 each, pairs in order of their group_ids.

    Rows without a loss token are left out. Raises ValueError where a group is then not one chosen and one
    rejected row.
    """
    assert batch.labels is not None and batch.group_ids is not None, "pairs need labels and group_ids"
    counted = batch.loss_mask.any(-1)
    sides = []
    for side in (batch.labels > 0, batch.labels < 0):
        rows = (side & counted).nonzero()[:, 0]
        sides.append(rows[batch.group_ids[rows].argsort(stable=True)])
    chosen, rejected = sides
    groups_w, groups_l = batch.group_ids[chosen].tolist(), batch.group_ids[rejected].tolist()
    if groups_w != groups_l or len(set(groups_w)) != len(groups_w):
        odd = next(g for g in groups_w + groups_l if not groups_w.count(g) == groups_l.count(g) == 1)
        raise ValueError(
            f"group {odd} has {groups_w.count(odd)} chosen and {groups_l.count(odd)} rejected rows with loss "
            "tokens where a pair has one of each; drop the pair from the data, and keep pairs whole when "
            "cutting a batch"
        )
    return chosen, rejected


def compares_means(losses: Iterable[str]) -> bool:
    """Whether responses are compared by means over their tokens, not by sums: where all losses that compare do so."""
    comparing = set(losses) - {"sft"}
    return comparing <= PER_TOKEN


@torch.no_grad()
def _pair_sums(pairs: Pairs, settings: PreferenceSettings) -> Sums:
    if set(settings.losses) <= REFERENCE_FREE:
        reward_w, reward_l = pairs.logprob_w, pairs.logprob_l
    else:
        reward_w, reward_l = pairs.score_w, pairs.score_l
    if compares_means(settings.losses):
        reward_w, reward_l = reward_w / pairs.len_w, reward_l / pairs.len_l
    reward_w, reward_l = settings.beta * reward_w, settings.beta * reward_l
    won = (reward_w > reward_l).double() + 0.5 * (reward_w == reward_l).double()
    return {
        "num_pairs": torch.full_like(reward_w, 1.0).sum(),
        "dpo/margin": (reward_w - reward_l).sum(),
        "dpo/accuracy": won.sum(),
        "dpo/reward_chosen": reward_w.sum(),
        "dpo/reward_rejected": reward_l.sum(),
        "dpo/logprob_chosen": pairs.logprob_w.sum(),
        "dpo/logprob_rejected": pairs.logprob_l.sum(),
    }
