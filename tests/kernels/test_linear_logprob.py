"""linear_logprobs against float64, against the unfused path bit for bit, and its memory."""

import os
import sys

import pytest
import torch

from rlhf.kernels import linear_logprob
from rlhf.kernels.linear import pack
from rlhf.kernels.linear_logprob import linear_logprobs, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VOCABULARY, WIDTH = (530, 24) if INTERPRETED else (53, 24)  # more than two of the Triton form's blocks


@pytest.fixture(autouse=True)
def seeded_and_in_small_chunks(monkeypatch, interpreting):
    torch.manual_seed(0)
    monkeypatch.setattr(linear_logprob, "_MIN_CHUNK_ROWS", 8)  # several chunks, the last one ragged
    monkeypatch.setattr(linear_logprob, "_CPU_CHUNK_ELEMENTS", 8 * VOCABULARY)
    if interpreting:
        from rlhf.kernels import linear_logprob_triton

        monkeypatch.setattr(linear_logprob_triton, "_LEAST", 256)


def slow(hidden, weight, bias, targets, temperature):
    """The definition, row by row."""
    logprobs, entropies = [], []
    for row, target, t in zip(hidden, targets, temperature):
        logits = (row * weight).sum(-1) + bias
        probs = torch.exp(logits / t) / torch.exp(logits / t).sum()
        logprobs.append(probs[target].log())
        entropies.append(-(probs * probs.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def inputs(rows, dtype, bias=True):
    shapes = [(rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    tensors = [(torch.randn(s) * 0.5).to(dtype).requires_grad_() for s in shapes]
    return tensors if bias else [*tensors[:2], None]


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor([0.5, 1.0, 2.0] * 7)])
@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, rows, temperature):
    """Would catch: a chunk left out or counted twice, a temperature applied twice or not in the gradient, gradients
    of chunks that replace each other, an entropy's wrong slope."""
    temperature = temperature[:rows] if isinstance(temperature, torch.Tensor) else temperature
    hidden, weight, bias = inputs(rows, dtype)
    targets = torch.randint(VOCABULARY, (rows,))
    got = linear_logprobs(
        hidden, weight, targets, temperature, bias=bias, packed=pack(weight.detach()), entropy=True
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = slow(*exact, targets, torch.as_tensor(temperature, dtype=torch.float64).expand(rows))
    values, gradients = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-5, 1e-5),
        torch.bfloat16: (5e-2, 5e-2),
    }[dtype]
    for a, b in zip(got, want):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(a.double(), b, atol=values, rtol=values)
    factors = torch.randn(2, rows, dtype=torch.float64)
    got_gradients = torch.autograd.grad(
        sum((a * f.to(a.dtype)).sum() for a, f in zip(got, factors)), (hidden, weight, bias)
    )
    want_gradients = torch.autograd.grad(sum((b * f).sum() for b, f in zip(want, factors)), exact)
    for a, b in zip(got_gradients, want_gradients):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= gradients * b.norm()


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_frozen_parts_get_no_gradient_and_change_no_other(which):
    """Would catch: a head under LoRA that is computed a gradient for, or an embedding below that gets none."""
    hidden, weight, _ = inputs(21, torch.float32, bias=False)
    targets = torch.randint(VOCABULARY, (21,))
    both = torch.autograd.grad(linear_logprobs(hidden, weight, targets)[0].sum(), (hidden, weight))
    one = [x.detach().requires_grad_(needed) for x, needed in zip((hidden, weight), which)]
    linear_logprobs(*one, targets)[0].sum().backward()
    for x, needed, want in zip(one, which, both):
        assert (x.grad is not None) == needed
        assert not needed or torch.equal(x.grad, want)


def test_an_entropy_alone_has_a_gradient_and_one_that_is_only_read_has_none():
    """Would catch: an entropy bonus without effect, or a metric that bends the policy."""
    hidden, weight, bias = inputs(9, torch.float64)
    targets = torch.randint(VOCABULARY, (9,))
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, targets, 0.7, bias=b, entropy=True), (hidden, weight, bias)
    )
    plain = torch.autograd.grad(linear_logprobs(hidden, weight, targets)[0].sum(), weight)[0]
    logprobs, entropy = linear_logprobs(hidden, weight, targets, entropy=True)
    read = torch.autograd.grad((logprobs + 0.0 * entropy).sum(), weight)[0]
    assert torch.equal(plain, read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 7, 40, 303])
def test_the_bits_of_the_unfused_path(dtype, temperature, rows, monkeypatch):
    """Would catch: a trainer whose log-probs are no longer the sampler's."""
    hidden, weight, bias = inputs(rows, dtype)
    targets = torch.randint(VOCABULARY, (rows,))
    packed = None if INTERPRETED else pack(weight.detach())
    if packed is None and not INTERPRETED:
        pytest.skip("this build of torch has no packed linear")
    options = dict(temperature=temperature, bias=bias, packed=packed, entropy=True)
    want = reference(hidden, weight, targets, **options)
    got = linear_logprobs(hidden, weight, targets, **options)
    with torch.no_grad():
        frozen = linear_logprobs(hidden, weight, targets, **options)
        parts = [linear_logprobs(hidden[i : i + 5], weight, targets[i : i + 5], temperature, bias=bias, packed=packed)
                 for i in range(0, rows, 5)]  # fmt: skip
    for a, b, c in zip(got, want, frozen):
        assert torch.equal(a, b) and torch.equal(c, b)
    assert torch.equal(torch.cat([logprobs for logprobs, _ in parts]), got[0])


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton form")
def test_long_rows_of_a_small_vocabulary_are_the_unfused_path_too(monkeypatch):
    """Would catch: a product of several segments whose log-probs are those of one, here or in the backward."""
    from rlhf.kernels import matmul_triton

    monkeypatch.setattr(matmul_triton, "_WHOLE", 10)
    monkeypatch.setattr(matmul_triton, "_STEP", 16)
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 80)  # five steps in two segments
    test_the_bits_of_the_unfused_path(torch.float32, 0.7, 7, monkeypatch)
    test_values_and_gradients(torch.float32, 21, 0.6)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton form")
def test_a_target_that_is_no_token_has_no_logprob():
    """Would catch: a number from memory that nobody wrote."""
    hidden, weight, _ = inputs(3, torch.float32, bias=False)
    logprobs, _ = linear_logprobs(hidden, weight, torch.tensor([0, VOCABULARY, -1]))
    assert logprobs.isnan().tolist() == [False, True, True]


def test_no_rows_give_zero_gradients():
    """Would catch: a process without rows that leaves the others waiting for its share of the head's gradient."""
    hidden, weight, bias = inputs(0, torch.float32)
    logprobs, entropy = linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.long), bias=bias, entropy=True
    )
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH) and not weight.grad.any() and not bias.grad.any()


def test_no_tensor_of_all_logits_is_made():
    """Would catch: logits that are kept for the backward, which is what this is for."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    largest = max(largest, x.numel())
            return out

    hidden, weight, _ = inputs(200, torch.float32, bias=False)
    with Watch():
        logprobs, entropy = linear_logprobs(
            hidden, weight, torch.randint(VOCABULARY, (200,)), packed=pack(weight.detach()), entropy=True
        )
        (logprobs + entropy).sum().backward()
    assert 0 < largest <= (200 * 256 if INTERPRETED else 200 * WIDTH) < 200 * VOCABULARY


def test_bad_arguments_are_named():
    """Would catch: a transposed head, or targets of another batch, that broadcast into numbers."""
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)
    for problem, arguments, options in (
        (r"\(2, 3\) and weight \(5, 4\)", (hidden, torch.zeros(5, 4), targets), {}),
        (r"targets \(3,\)", (hidden, weight, torch.zeros(3, dtype=torch.long)), {}),
        ("int64", (hidden, weight, torch.zeros(2)), {}),
        ("float dtype", (hidden.long(), weight.long(), targets), {}),
        ("weight is torch.bfloat16", (hidden, weight.bfloat16(), targets), {}),
        (r"bias \(2,\)", (hidden, weight, targets), {"bias": torch.zeros(2)}),
        ("on meta", (hidden, weight.to("meta"), targets), {}),
        ("temperature=0", (hidden, weight, targets, 0), {}),
        (r"temperature \(1,\)", (hidden, weight, targets, torch.ones(1)), {}),
        (
            r"temperature \[1.0, 0.0\] .* all must be > 0",
            (hidden, weight, targets, torch.tensor([1.0, 0.0])),
            {},
        ),
        (r"temperature \[nan, 1.0\]", (hidden, weight, targets, torch.tensor([float("nan"), 1.0])), {}),
    ):
        with pytest.raises(ValueError, match=problem):
            linear_logprobs(*arguments, **options)
