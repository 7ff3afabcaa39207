"""token_logprobs against float64, its gradients, and its rows."""

import pytest
import torch

from rlhf.kernels import logprob
from rlhf.kernels.logprob import log_softmax, token_logprobs


@pytest.fixture(autouse=True)
def seeded_and_in_small_chunks(monkeypatch, interpreting):
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
def test_row_does_not_depend_on_number_of_rows(vocab, interpreting):
    """Would catch: a sampler's log-prob that is not the trainer's."""
    many = 30 if interpreting else 300
    logits = torch.randn(many, vocab) * 5
    targets = torch.randint(vocab, (many,))
    whole, _ = token_logprobs(logits, targets, 0.8)
    for rows in (1, 2, 7, 64):
        parts = [token_logprobs(a, b, 0.8)[0] for a, b in zip(logits.split(rows), targets.split(rows))]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(token_logprobs(logits, targets, torch.full((many,), 0.8))[0], whole)
    assert torch.equal(token_logprobs(logits / 0.8, targets)[0], whole)  # a sampler has divided already
    softmax = log_softmax(logits, 0.8).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(softmax, whole, atol=1e-5)


def test_impossible_tokens_have_no_part_in_entropy():
    """Would catch: 0 * -inf = NaN in the entropy or its gradient."""
    logits = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), 1.0, entropy=True)
    (logprobs + entropy).sum().backward()
    assert torch.allclose(entropy, torch.tensor([0.6931472])) and torch.isfinite(logits.grad).all()
    (grad,) = torch.autograd.grad(token_logprobs(logits, torch.tensor([1]), 0.5)[0].sum(), logits)
    assert torch.allclose(grad, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("kept", [1, 300, 600])
def test_what_is_far_below_or_missing(kept):
    """Would catch: an empty block of a masked row that turns its sums into NaN, or a maximum of another block."""
    logits = torch.randn(3, 600) * 3
    logits[:, :-kept] = float("-inf")
    logits[1, -1] = 500.0
    targets = torch.full((3,), 599)
    got, entropy = token_logprobs(logits, targets, 0.7, entropy=True)
    every = torch.log_softmax(logits.double()[:, -kept:] / 0.7, -1)
    assert torch.allclose(got.double(), every[:, -1], atol=1e-5)
    assert torch.allclose(entropy.double(), -(every.exp() * every).sum(-1), atol=1e-5)


def test_bad_arguments_are_named():
    """Would catch: greedy's temperature 0 turning into infinities."""
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        token_logprobs(torch.zeros(2, 3), torch.tensor([0]), 1.0)


def test_the_order_of_the_tokens_in_a_block_is_no_matter(interpreting):
    """Would catch: sums that depend on which thread holds which token: a head that keeps logits in registers gives
    other bits than one that wrote them."""
    if not interpreting:
        pytest.skip("of the Triton form")
    logits = torch.randn(4, 512) * 3
    order = torch.cat([torch.randperm(256), 256 + torch.randperm(256)])
    for targets in (torch.arange(4), torch.arange(300, 304)):
        want = token_logprobs(logits, order[targets], 0.8, entropy=True)
        got = token_logprobs(logits[:, order], targets, 0.8, entropy=True)
        assert all(map(torch.equal, got, want))


def test_what_a_gpu_would_read_beyond_its_end_is_named(interpreting):
    """Would catch: a kernel that reads targets of another type or temperatures of another batch."""
    if not interpreting:
        pytest.skip("of the Triton form")
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for problem, arguments in (
        ("int64", (logits, targets.int())),
        (r"temperature \(3,\)", (logits, targets, torch.ones(3))),
        ("on meta", (logits, targets.to("meta"))),
    ):
        with pytest.raises(ValueError, match=problem):
            token_logprobs(*arguments)
    assert token_logprobs(logits, torch.tensor([3, -1]))[0].isnan().all()  # no token, no number


@pytest.fixture
def cpu_form(form):
    """The forms for a CPU: the tests above are those of Triton's."""
    if form == "triton":
        pytest.skip("of the forms for a CPU")
    return form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 15, 16, 65, 2048, 2049, 5003])
def test_values_and_gradients_at_every_width(vocab, dtype, cpu_form):
    """Would catch: a vector's or a block's tail that is left out, counted twice or written beyond, and a largest logit
    of an earlier or later block; fewer digits than torch's own form."""
    logits = (torch.randn(5, vocab) * 4).to(dtype)
    logits[1, -1], logits[2, 0] = 60.0, 60.0
    logits.requires_grad_()
    targets = torch.tensor([0, vocab - 1, vocab // 2, 0, vocab - 1])
    temperature = torch.tensor([1.0, 0.7, 2.0, 0.5, 1.0])
    got = token_logprobs(logits, targets, temperature, entropy=True)
    exact = logits.detach().double().requires_grad_()
    every = torch.log_softmax(exact / temperature.double()[:, None], -1)
    want = every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    for a, b in zip(got, want):
        assert torch.allclose(a.double(), b, rtol=2e-6, atol=2e-6)
    factors = torch.randn(2, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad(sum((a * f.to(a.dtype)).sum() for a, f in zip(got, factors)), logits)
    (wanted,) = torch.autograd.grad(sum((b * f).sum() for b, f in zip(want, factors)), exact)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(grad.double(), wanted, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("form", ["native"], indirect=True)
def test_the_native_form_is_at_least_as_exact_as_torchs(form, interpreting):
    """Would catch: an exponential or a sum with too few digits, which biases every ratio of two policies."""
    if interpreting:
        pytest.skip("of the forms for a CPU")
    logits, targets = torch.randn(64, 30011) * 3, torch.randint(30011, (64,))
    want = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]
    ours = (token_logprobs(logits, targets)[0] - want).abs()
    stock = (torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0] - want).abs()
    assert ours.mean() <= stock.mean() and ours.max() <= stock.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [61, 4103])
def test_bits_depend_on_a_rows_numbers_alone(vocab, dtype, cpu_form, shared_out):
    """Would catch: another sum where rows lie apart, threads share them, the entropy is asked for, logits are narrow or
    temperatures one for all."""
    if cpu_form == "torch" and shared_out > 1:
        pytest.skip("torch's own promise, at its own sizes")
    wide = (torch.randn(40, 2 * vocab) * 5).to(dtype)
    targets = torch.randint(vocab, (40,))
    logits = wide[:, :vocab].contiguous()
    whole, entropies = token_logprobs(logits, targets, 0.8, entropy=True)
    for rows in (1, 3, 40):
        parts = [token_logprobs(a, b, 0.8)[0] for a, b in zip(logits.split(rows), targets.split(rows))]
        assert torch.equal(torch.cat(parts), whole)
    for same in (
        token_logprobs(wide[:, :vocab], targets, torch.full((40,), 0.8), entropy=True),
        token_logprobs(logits.float(), targets, 0.8, entropy=True),
        token_logprobs(logits.float() / 0.8, targets, entropy=True),
        token_logprobs(logits.clone().requires_grad_(), targets, 0.8, entropy=True),
        token_logprobs(logits.t().contiguous().t(), targets, 0.8, entropy=True),
    ):
        assert torch.equal(same[0], whole) and torch.equal(same[1], entropies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype, cpu_form):
    """Would catch: a NaN or an infinity that the maximum passes over and the sum makes a number of; a neighbour's row
    that is spoilt; -inf in a whole block."""
    logits = torch.randn(6, 5000).to(dtype)
    logits[0, 4999] = logits[1, 0] = float("nan")
    logits[2, 17] = float("inf")
    logits[3] = float("-inf")
    logits[4, :4990] = float("-inf")
    logits.requires_grad_()
    targets = torch.full((6,), 4995)
    got, entropy = token_logprobs(logits, targets, 0.9, entropy=True)
    (got.sum() + entropy.sum()).backward()
    assert got.isnan().tolist() == entropy.isnan().tolist() == [True] * 4 + [False] * 2
    assert logits.grad[:4].isnan().any(1).all() and logits.grad[4:].isfinite().all()
    want = torch.log_softmax(logits[4, 4990:].double() / 0.9, -1)
    assert abs(got[4].item() - want[5].item()) < 1e-5


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_is_no_token_is_refused(target, cpu_form):
    """Would catch: a number read from a neighbour's row or from beyond the logits."""
    with pytest.raises((IndexError, RuntimeError), match="index|no token"):
        token_logprobs(torch.zeros(2, 5), torch.tensor([0, target]))


def test_half_precision_is_taken_as_the_sampler_takes_it(cpu_form):
    """Would catch: fp16 logits whose log-probs are the sampler's, which works in fp32, but for a bit."""
    logits, targets = torch.randn(9, 777).half().requires_grad_(), torch.arange(9)
    got, entropy = token_logprobs(logits, targets, 0.7, entropy=True)
    wide = logits.detach().float().requires_grad_()
    want, wanted = token_logprobs(wide, targets, 0.7, entropy=True)
    assert torch.equal(got, want) and torch.equal(entropy, wanted)
    (got.sum() + entropy.sum()).backward()
    (want.sum() + wanted.sum()).backward()
    assert torch.equal(logits.grad, wide.grad.half())


def test_an_empty_batch_has_no_rows(cpu_form):
    """Would catch: a process without rows that fails."""
    logits = torch.zeros(0, 7, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.zeros(0, dtype=torch.long), entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,) and logits.grad.shape == (0, 7)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e38])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_masked_block_of_tokens_has_no_part(low, temperature, interpreting):
    """Would catch: NaN in entropy or gradient where many tokens are masked with the lowest number that there is."""
    logits = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    logits[:, 256:512] = low
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([3, 7]), temperature, entropy=True)
    (logprobs + entropy).sum().backward()
    kept = torch.cat([logits[:, :256], logits[:, 512:]], 1).detach().double() / temperature
    every = torch.log_softmax(kept, -1)
    assert torch.allclose(logprobs.double(), every[torch.arange(2), [3, 7]], atol=1e-5)
    assert torch.allclose(entropy.double(), -(every.exp() * every).sum(-1), atol=1e-5)
    assert torch.isfinite(logits.grad).all() and (logits.grad[:, 256:512] == 0).all()


@pytest.mark.parametrize("vocab", [7, 64, 1003, 2100])
def test_an_infinite_temperature_makes_all_tokens_alike(vocab, cpu_form):
    """Would catch: what fills the last vector of a row, divided by infinity: no number, in the sum of all."""
    logits, targets = torch.randn(3, vocab), torch.tensor([0, 1, vocab - 1])
    logprobs, entropies = token_logprobs(logits, targets, float("inf"), entropy=True)
    want = torch.full((3,), float(vocab)).log()
    assert torch.allclose(logprobs, -want) and torch.allclose(entropies, want)
