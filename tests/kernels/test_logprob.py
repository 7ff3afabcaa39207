"""token_logprobs against float64, its gradients, and its rows."""

import pytest
import torch

from rlhf.kernels import logprob
from rlhf.kernels.logprob import log_softmax, token_logprobs


@pytest.fixture(autouse=True)
def seeded_and_in_small_chunks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", 200)  # several chunks, the last one ragged


def slow(logits, targets, temperature):
    """The definition, row by row."""
    logprobs, entropies = [], []
    for row, target, t in zip(logits, targets, temperature):
        probs = torch.exp(row / t) / torch.exp(row / t).sum()
        logprobs.append(probs[target].log())
        entropies.append(-(probs * probs.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor([0.5, 1.0, 2.0] * 7)])
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_values_and_gradients(dtype, tolerance, temperature):
    """Would catch: a temperature applied twice or in the wrong place, a chunk left out, entropy's wrong
    gradient.
    """
    logits = torch.randn(21, 37).to(dtype).requires_grad_()
    targets = torch.randint(37, (21,))
    got = token_logprobs(logits, targets, temperature, entropy=True)
    exact = logits.detach().double().requires_grad_()
    per_row = torch.as_tensor(temperature, dtype=torch.float64).expand(21)
    want = slow(exact, targets, per_row)
    for a, b in zip(got, want):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(a.double(), b, atol=tolerance)
    weights = torch.randn(2, 21, dtype=torch.float64)
    (got_grad,) = torch.autograd.grad(sum((a * w.to(a.dtype)).sum() for a, w in zip(got, weights)), logits)
    (want_grad,) = torch.autograd.grad(sum((b * w).sum() for b, w in zip(want, weights)), exact)
    rounding = 1e-2 if dtype == torch.bfloat16 else tolerance
    assert torch.allclose(got_grad.double(), want_grad, atol=rounding, rtol=rounding)


def test_gradcheck():
    """Would catch: a gradient that is wrong where probabilities are far from uniform."""
    logits = (torch.randn(5, 9, dtype=torch.float64) * 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, torch.tensor([0, 3, 8, 8, 1]), 0.7, entropy=True), logits
    )


@pytest.mark.parametrize("vocab", [24, 61, 1003])
def test_row_does_not_depend_on_number_of_rows(vocab):
    """Would catch: a sampler's log-prob that is not the trainer's."""
    logits = torch.randn(300, vocab) * 5
    targets = torch.randint(vocab, (300,))
    whole, _ = token_logprobs(logits, targets, 0.8)
    for rows in (1, 2, 7, 64):
        parts = [token_logprobs(a, b, 0.8)[0] for a, b in zip(logits.split(rows), targets.split(rows))]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(log_softmax(logits, 0.8).gather(1, targets[:, None])[:, 0], whole)
    assert torch.equal(token_logprobs(logits, targets, torch.full((300,), 0.8))[0], whole)


def test_impossible_tokens_have_no_part_in_entropy():
    """Would catch: 0 * -inf = NaN in the entropy or its gradient."""
    logits = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), 1.0, entropy=True)
    (logprobs + entropy).sum().backward()
    assert torch.allclose(entropy, torch.tensor([0.6931472])) and torch.isfinite(logits.grad).all()


def test_bad_arguments_are_named():
    """Would catch: greedy's temperature 0 turning into infinities."""
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        token_logprobs(torch.zeros(2, 3), torch.tensor([0]), 1.0)
