"""The estimators: exact expectations over a small vocabulary, values against the formula, and what the limits do. The
rule that adapts a KL's weight.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.kl import KL_ESTIMATORS, adaptive_kl_coef, kl_k1, kl_k2, kl_k3, kl_k3_k2

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "k3_k2": lambda d: math.exp(-d) - 1 + d,
}


@pytest.fixture
def policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy, with gradient, and log-probs of a reference, over 7 tokens."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=noise, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=noise, dtype=torch.float64).log_softmax(0)
    return logits, reference


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_value_and_gradient_follow_the_formula(name: str) -> None:
    """Would catch: log-ratio taken the wrong way round, a missing half, an exponent with the wrong sign."""
    noise = torch.Generator().manual_seed(1)
    policy, reference = torch.rand(2, 3, 4, generator=noise, dtype=torch.float64) * 2 - 3
    policy.requires_grad_(), reference.requires_grad_()
    want = [
        [FORMULAS[name](p - r) for p, r in zip(*rows)] for rows in zip(policy.tolist(), reference.tolist())
    ]
    torch.testing.assert_close(
        KL_ESTIMATORS[name](policy, reference), torch.tensor(want, dtype=torch.float64)
    )
    if name != "k3_k2":  # whose gradient is not its value's
        assert torch.autograd.gradcheck(KL_ESTIMATORS[name], (policy, reference))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3, kl_k3_k2])
def test_k1_and_k3_are_unbiased(estimator, policies) -> None:
    """Would catch: an estimator of KL(reference || policy) under the name of KL(policy || reference)."""
    logits, reference = policies
    logprobs = logits.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    torch.testing.assert_close((logprobs.exp() * estimator(logprobs, reference)).sum(), exact)


def _expected_gradient(estimator, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """What minimising the mean of the estimator over the policy's samples descends along, exactly."""
    logprobs = logits.log_softmax(0)
    loss = (logprobs.exp().detach() * estimator(logprobs, reference)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_expected_gradients_are_those_documented(policies) -> None:
    """Would catch: advice in the docstrings that sends someone to the wrong loss."""
    logits, reference = policies
    logprobs = logits.log_softmax(0)
    reverse = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)[
        0
    ]
    forward = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)[0]
    torch.testing.assert_close(
        _expected_gradient(kl_k1, logits, reference), torch.zeros(7, dtype=torch.float64)
    )
    torch.testing.assert_close(_expected_gradient(kl_k2, logits, reference), reverse)
    torch.testing.assert_close(_expected_gradient(kl_k3, logits, reference), forward)
    torch.testing.assert_close(_expected_gradient(kl_k3_k2, logits, reference), reverse)


def _in_reward_gradient(estimator, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """What a policy gradient on a reward of minus the estimator descends along, exactly."""
    logprobs = logits.log_softmax(0)
    penalty = estimator(logprobs, reference).detach()
    return torch.autograd.grad((logprobs.exp().detach() * penalty * logprobs).sum(), logits)[0]


def test_only_k1_in_a_reward_pulls_towards_the_reference(policies) -> None:
    """Would catch: k3 in the reward, whose gradient is that of KL(policy || reference) - KL(reference || policy)."""
    logits, reference = policies
    logprobs = logits.log_softmax(0)
    reverse = (logprobs.exp() * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()
    towards = torch.autograd.grad(reverse, logits, retain_graph=True)[0]
    got = {name: _in_reward_gradient(kl, logits, reference) for name, kl in KL_ESTIMATORS.items()}
    torch.testing.assert_close(got["k1"], towards)
    torch.testing.assert_close(got["k3"], torch.autograd.grad(reverse - forward, logits)[0])
    assert all((got[name] - towards).norm() > 0.1 * towards.norm() for name in ("k2", "k3", "k3_k2"))


@pytest.mark.parametrize(("name", "falls"), [("k1", True), ("k3", False)])
def test_a_penalty_alone_brings_the_policy_back_only_as_k1(name: str, falls: bool, policies) -> None:
    """Would catch: the same, in what it does to a policy: 300 exact policy-gradient steps on the penalty."""
    logits, reference = policies
    logits = (reference + 0.5 * (logits - reference)).detach().requires_grad_()

    def distance() -> float:
        logprobs = logits.detach().log_softmax(0)
        return float((logprobs.exp() * (logprobs - reference)).sum())

    before = distance()
    for _ in range(300):
        step = _in_reward_gradient(KL_ESTIMATORS[name], logits, reference)
        logits = (logits - 0.2 * step).detach().requires_grad_()
    assert distance() < 0.1 * before if falls else distance() > 1.5 * before


@given(st.floats(-200, 0, width=32), st.floats(-200, 0, width=32))
def test_fp32_stays_finite_and_k2_k3_are_not_negative(policy: float, reference: float) -> None:
    """Would catch: exp of an unclamped log-ratio (overflow at 89), and exp(-d) - 1 by cancellation far below
    0.
    """
    p, r = torch.tensor([[policy]], requires_grad=True), torch.tensor([[reference]])
    for name, estimator in KL_ESTIMATORS.items():
        value = estimator(p, r)
        assert (-10 if name == "k1" else -2e-6) <= value.item() <= 200
        assert torch.autograd.grad(value.sum(), p)[0].isfinite().all()
        assert estimator(p, p).item() == 0


def test_small_distances_keep_their_precision_in_fp32() -> None:
    """Would catch: exp(-d) - 1 + d in fp32, which gives 0 or 6e-8 for d = 1e-4, where k3 is 5e-9."""
    policy = torch.tensor([[-1e-4]])
    assert kl_k3(torch.zeros(1, 1), policy).item() == pytest.approx(5e-9, rel=0.01)


def test_limits_cut_k1_and_k3_but_never_the_gradient_of_k2_within_20() -> None:
    """Would catch: k2 limited to 10, which would let a policy go once it is 4.5 nats away."""
    policy = torch.tensor([[-8.0, -8.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -27.0]])
    assert kl_k1(policy, reference).tolist() == [[-7.0, 10.0]]
    assert kl_k3(policy, reference).tolist() == [[10.0, 10.0]]
    kl_k2(policy, reference).sum().backward()
    assert policy.grad.tolist() == [[-7.0, 19.0]]


@given(st.floats(-15, 0), st.floats(-15, 0))
def test_k3_k2_has_the_very_value_of_one_and_the_very_gradient_of_the_other(
    policy: float, reference: float
) -> None:
    """Would catch: the two swapped, a gradient of both, a value off by rounding, k3's limit on k2's gradient."""
    p, r = torch.tensor([[policy]], requires_grad=True), torch.tensor([[reference]])
    value = kl_k3_k2(p, r)
    assert value.item() == kl_k3(p, r).item()
    gradients = [torch.autograd.grad(x.sum(), p)[0] for x in (value, kl_k2(p, r))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("kl", "want"), [(6.0, 0.1), (6.6, 0.1 * 1.0064), (60.0, 0.1 * 1.0128), (0.0, 0.1 * 0.9872)]
)
def test_the_weight_follows_the_kl(kl: float, want: float) -> None:
    """Would catch: a step the wrong way, an error that is not limited to 20 %, samples and horizon swapped.

    The numbers: 1 + 0.1 * 640 / 10000 = 1.0064, and 1 +- 0.2 * 0.064.
    """
    got = adaptive_kl_coef(0.1, kl, kl_target=6.0, kl_horizon=10_000.0, num_samples=640)
    assert got == pytest.approx(want)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_the_weight_does_not_follow_a_kl_that_is_not_finite(kl: float) -> None:
    """Would catch: a weight of NaN from then on, or +20 % each step."""
    with pytest.raises(ValueError, match="kl_coef=0.1 cannot follow a KL that is not finite"):
        adaptive_kl_coef(0.1, kl, kl_target=6.0, kl_horizon=10_000.0, num_samples=640)
