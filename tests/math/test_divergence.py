"""Divergences between next-token distributions against float64 loops, and the losses of distillation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlhf.divergence
from rlhf.divergence import (
    DIVERGENCES,
    collision_entropy,
    distill_advantages,
    distill_loss,
    forward_kl,
    jsd,
    logits_divergence,
    reverse_kl,
    teacher_top_k,
    topk_divergence,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SETTINGS = {"temperature": 1.7, "jsd_beta": 0.3}


def _logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=noise, dtype=torch.float64) * 2


def _softmax(row: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    weights = [(value / temperature).exp() for value in row]
    return [weight / sum(weights) for weight in weights]


def _kl(p: list, q: list):
    return sum(a * (a / b).log() for a, b in zip(p, q))


def _paper(divergence: str, teacher: list, student: list):
    if divergence == "forward_kl":
        return _kl(teacher, student)
    if divergence == "reverse_kl":
        return _kl(student, teacher)
    b = SETTINGS["jsd_beta"]
    middle = [b * p + (1 - b) * q for p, q in zip(teacher, student)]
    return b * _kl(teacher, middle) + (1 - b) * _kl(student, middle)


def _merged(probabilities: list, ids: list[int]) -> list:
    kept = [probabilities[i] for i in ids]
    return [*kept, sum(p for i, p in enumerate(probabilities) if i not in ids)]


@pytest.fixture(params=[1 << 22, 14], ids=["one chunk", "chunks of 2 rows"], autouse=True)
def _chunk(request, monkeypatch) -> None:
    monkeypatch.setattr(rlhf.divergence, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("seed", range(5))
def test_whole_distributions_equal_the_paper(divergence: str, seed: int) -> None:
    """Would catch: teacher and student exchanged, beta on the wrong side, a chunk's rows put elsewhere."""
    student = _logits(5, 7, seed).requires_grad_()
    teacher = _logits(5, 7, seed + 100)
    got = logits_divergence(student, teacher, divergence=divergence, **SETTINGS)
    t = SETTINGS["temperature"]
    want = torch.stack([_paper(divergence, _softmax(p, t), _softmax(q, t)) for p, q in zip(teacher, student)])
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    weights = _logits(1, 5, seed)[0]  # different for every row
    (gradient,) = torch.autograd.grad((got * weights).sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad((want * weights).sum(), student)[0], **CLOSE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_top_k_with_a_bucket_for_the_rest_equals_the_paper(divergence: str, top_k: int) -> None:
    """Would catch: a renormalised top-k, a tail that is forgotten on one side, gradients of the tail."""
    student = _logits(5, 7, 1).requires_grad_()
    teacher = _logits(5, 7, 2)
    t = SETTINGS["temperature"]
    ids, logprobs = teacher_top_k(teacher, top_k=top_k, temperature=t)
    assert (logprobs[:, :-1].diff(dim=-1) <= 0).all()
    got = topk_divergence(student, ids, logprobs, divergence=divergence, **SETTINGS)
    want = torch.stack(
        [
            _paper(divergence, _merged(_softmax(p, t), kept), _merged(_softmax(q, t), kept))
            for p, q, kept in zip(teacher, student, ids.tolist())
        ]
    )
    torch.testing.assert_close(got, want.detach(), rtol=1e-8, atol=1e-10)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), student)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_as_top_k_is_the_whole_divergence(divergence: str) -> None:
    """Would catch: NaN from an empty rest, forwards or backwards."""
    student = _logits(5, 7, 1).requires_grad_()
    teacher = _logits(5, 7, 2)
    ids, logprobs = teacher_top_k(teacher, top_k=100, temperature=SETTINGS["temperature"])
    assert ids.shape == (5, 7)
    got = topk_divergence(student, ids, logprobs, divergence=divergence, **SETTINGS)
    want = logits_divergence(student, teacher, divergence=divergence, **SETTINGS)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), student)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(seed=st.integers(0, 10_000))
def test_divergences_are_zero_at_equality_and_merging_makes_them_smaller(divergence: str, seed: int) -> None:
    """Would catch: a quantity that is no divergence."""
    student, teacher = _logits(3, 7, seed), _logits(3, 7, seed + 1)
    whole = logits_divergence(student, teacher, divergence=divergence, **SETTINGS)
    ids, logprobs = teacher_top_k(teacher, top_k=2, temperature=SETTINGS["temperature"])
    merged = topk_divergence(student, ids, logprobs, divergence=divergence, **SETTINGS)
    assert (merged >= -1e-12).all() and (merged <= whole + 1e-12).all() and (whole > 0).all()
    same = logits_divergence(teacher, teacher + 3, divergence=divergence, **SETTINGS)
    torch.testing.assert_close(same, torch.zeros_like(same))


def test_the_ends_of_jsd_are_the_two_kls() -> None:
    """Would catch: beta and 1 - beta exchanged against GKD's definition."""
    teacher, student = _logits(4, 7, 1).log_softmax(-1), _logits(4, 7, 2).log_softmax(-1)
    tiny = 1e-6
    near_0 = jsd(teacher, student, jsd_beta=tiny) / tiny
    near_1 = jsd(teacher, student, jsd_beta=1 - tiny) / tiny
    torch.testing.assert_close(near_0, forward_kl(teacher, student), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(near_1, reverse_kl(teacher, student), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="jsd_beta=1.0 must be in"):
        jsd(teacher, student, jsd_beta=1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sure_and_opposite_distributions_stay_finite(divergence: str) -> None:
    """Would catch: log 0 in fp32 where teacher or student is all but certain."""
    teacher = torch.tensor([[60.0, 0, 0, 0], [0, 0, 0, 60.0]])
    student = torch.tensor([[0, 60.0, 0, 0], [0, 0, 0, 60.0]], requires_grad=True)
    settings = {"divergence": divergence, "temperature": 1.0, "jsd_beta": 0.5}
    ids, logprobs = teacher_top_k(teacher, top_k=2, temperature=1.0)
    for got in (
        logits_divergence(student, teacher, **settings),
        topk_divergence(student, ids, logprobs, **settings),
    ):
        (gradient,) = torch.autograd.grad(got.sum(), student)
        assert got.isfinite().all() and gradient.isfinite().all() and got[1] < 1e-6 < got[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_rest_that_cannot_happen_leaves_the_divergence_finite(divergence: str) -> None:
    """Would catch: an infinite loss where the teacher rules out all but its likeliest."""
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]])
    ids, logprobs = teacher_top_k(teacher, top_k=2, temperature=1.0)
    got = topk_divergence(student, ids, logprobs, divergence=divergence, temperature=1.0, jsd_beta=0.5)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    assert got.isfinite().all() and gradient.isfinite().all() and got > 0.05


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gap", [14.0, 17.0, 20.0, 35.0, 60.0])
def test_a_tail_below_fp32_s_resolution_is_not_noise(divergence: str, gap: float) -> None:
    """Would catch: the teacher's rest as 1 - its sum, which in fp32 is a multiple of 6e-8: a top-k divergence above the
    whole one, or one that the size of the tail no longer moves; the student's rest cut off, and its gradient with it.
    """
    noise = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(40, 7, generator=noise) for _ in range(2))
    teacher[:, :2] += gap
    student[20:, :2] += gap  # a student as sure, too
    ids, logprobs = teacher_top_k(teacher, top_k=2, temperature=1.0)
    settings = {"divergence": divergence, "temperature": 1.0, "jsd_beta": 0.3}
    student.requires_grad_()
    got = topk_divergence(student, ids, logprobs, **settings)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    exact = student.detach().double().requires_grad_()
    p, q = (x.double().log_softmax(-1) for x in (teacher, exact))
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, True)

    def merged(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.gather(1, ids), x.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)], -1)

    function, extra = DIVERGENCES[divergence], {"jsd_beta": 0.3} if divergence == "jsd" else {}
    want = function(merged(p), merged(q), **extra)
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(logprobs, merged(p).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, want.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient.float(), rtol=1e-5, atol=1e-6)
    assert (got <= function(p, q, **extra) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_give_fp32_values_and_gradients_of_their_own_dtype(dtype: torch.dtype) -> None:
    """Would catch: a softmax in bf16."""
    student, teacher = _logits(5, 7, 1).to(dtype).requires_grad_(), _logits(5, 7, 2).to(dtype)
    got = logits_divergence(student, teacher, divergence="forward_kl", **SETTINGS)
    exact = student.detach().double().requires_grad_()
    want = logits_divergence(exact, teacher.double(), divergence="forward_kl", **SETTINGS)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    assert got.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(gradient, want_gradient.to(dtype))


def test_no_gradient_reaches_the_teacher() -> None:
    """Would catch: a teacher in the same process that is trained along."""
    student, teacher = _logits(5, 7, 1).requires_grad_(), _logits(5, 7, 2).requires_grad_()
    loss = logits_divergence(student, teacher, divergence="jsd", **SETTINGS).sum()
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_collision_entropy() -> None:
    """Would catch: Shannon's entropy, or a temperature that is ignored."""
    logits = _logits(5, 7, 1)
    got = collision_entropy(logits, temperature=1.7)
    want = [-math.log(sum(float(p) ** 2 for p in _softmax(row, 1.7))) for row in logits]
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    uniform = collision_entropy(torch.zeros(3, 8), temperature=1.0)
    assert uniform.tolist() == pytest.approx([math.log(8)] * 3)


@given(seed=st.integers(0, 10_000))
def test_distill_loss_is_the_weighted_mean_over_the_steps_tokens(seed: int, random_batch) -> None:
    """Would catch: temperature not squared, NLL of masked tokens, a mean inside a micro-batch."""
    batch = random_batch(seed)
    shape = batch.token_ids.shape
    noise = torch.Generator().manual_seed(seed)
    divergences = torch.rand(shape, generator=noise, dtype=torch.float64)
    divergences = torch.where(batch.loss_mask, divergences, math.nan).requires_grad_()
    logprobs = torch.where(batch.loss_mask, batch.old_logprobs, math.nan).requires_grad_()
    got, sums = distill_loss(batch, logprobs, divergences, temperature=2.0, nll_coef=0.5)
    places = batch.loss_mask.nonzero().tolist()
    total = sum(4.0 * divergences[b, t].item() - 0.5 * logprobs[b, t].item() for b, t in places)
    assert got.item() == pytest.approx(total / max(len(places), 1))
    assert sums["distill/nll"].item() == pytest.approx(-sum(logprobs[b, t].item() for b, t in places))
    gradients = torch.autograd.grad(got, (divergences, logprobs))
    for gradient, weight in zip(gradients, (4.0, -0.5)):
        want = torch.where(batch.loss_mask, weight / max(len(places), 1), 0.0).double()
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=0)
    own, own_sums = distill_loss(batch, None, divergences, temperature=2.0, nll_coef=0.5)
    assert own.item() == pytest.approx(got.item() - 0.5 * sums["distill/nll"].item() / max(len(places), 1))
    assert own_sums.keys() == sums.keys() - {"distill/nll"}
    shares = [
        distill_loss(
            micro,
            logprobs[rows][:, : micro.token_ids.shape[1]],
            divergences[rows][:, : micro.token_ids.shape[1]],
            temperature=2.0,
            nll_coef=0.5,
        )[0].item()
        for rows, micro in ((rows, batch.select(rows)) for rows in ([0, 3], [], [1, 2, 4]))
    ]
    assert sum(shares) == pytest.approx(got.item())


def test_on_policy_advantages_descend_the_reverse_kl(random_batch) -> None:
    """Would catch: the sign, which would push the student away from its teacher."""
    student = _logits(1, 7, 1).requires_grad_()
    q = student.log_softmax(-1)[0]
    p = _logits(1, 7, 2).log_softmax(-1)[0]
    advantages = distill_advantages(q.detach()[None], p[None], torch.ones(1, 7, dtype=torch.bool))[0]
    # Expectation over the student's own samples of -A grad log q, exactly.
    surrogate = -(q.detach().exp() * advantages * q).sum()
    (got,) = torch.autograd.grad(surrogate, student, retain_graph=True)
    (want,) = torch.autograd.grad(reverse_kl(p[None], q[None]).sum(), student)
    torch.testing.assert_close(got, want, **CLOSE)
    batch = random_batch(3)
    masked = distill_advantages(batch.old_logprobs, batch.ref_logprobs, batch.response_mask)
    assert not masked[~batch.response_mask].any() and masked.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is unknown; choose one of forward_kl"),
        ({"temperature": 0.0}, "temperature=0.0: a distribution needs one above 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    """Would catch: a division by zero, a name that falls through."""
    logits = _logits(2, 7, 1)
    with pytest.raises(ValueError, match=message):
        logits_divergence(logits, logits, **{"divergence": "jsd", **SETTINGS, **changes})


def test_another_vocabulary_is_refused() -> None:
    """Would catch: a teacher whose tokens mean something else."""
    with pytest.raises(ValueError, match="must have one vocabulary"):
        logits_divergence(_logits(2, 7, 1), _logits(2, 8, 1), divergence="jsd", **SETTINGS)
    for kept, with_rest in ((3, 3), (2, 2)):  # rows of another batch; no log-prob of the rest
        with pytest.raises(ValueError, match=r"must be \(M, K\), \(M, K \+ 1\)"):
            topk_divergence(
                _logits(2, 7, 1),
                torch.zeros(kept, 2, dtype=torch.long),
                torch.zeros(kept, with_rest),
                divergence="jsd",
                **SETTINGS,
            )
