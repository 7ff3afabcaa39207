"""The packed linear: rows, values, gradients, and when a pack is made again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from rlhf.kernels.linear import PackedWeight, can_pack, linear, pack, row_bucket

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(48, 32), (7, 100), (256, 192)]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(shape, dtype, rows=1100):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return torch.randn(rows, shape[1], generator=generator).to(dtype), weight, weight.new_ones(shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_does_not_depend_on_number_of_rows(shape, dtype, threads):
    """Would catch: a kernel chosen by the number of rows, or padding that reaches a real row."""
    x, weight, bias = make(shape, dtype)
    packed = pack(weight)
    expected = linear(x, weight, bias, packed)
    for rows in (1, 2, 3, 5, 8, 17, 33, 100, 257, 1025):
        for start in (0, 11):
            got = linear(x[start : start + rows], weight, bias, packed)
            assert torch.equal(got, expected[start : start + rows]), rows


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_f_linear(shape, dtype, tolerance):
    """Would catch: a transposed weight, a lost bias, a gradient summed over the wrong dimension."""
    x, weight, bias = (t.clone().requires_grad_() for t in make(shape, dtype, rows=21))
    out = linear(x.view(3, 7, -1), weight, bias, pack(weight))
    expected = F.linear(x.double(), weight.double(), bias.double()).view(3, 7, -1)
    scale = expected.abs().max()
    assert (out - expected).abs().max() < tolerance * scale
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(out, (x, weight, bias), grad.to(dtype))
    want = torch.autograd.grad(expected, (x, weight, bias), grad)
    for a, b in zip(got, want):
        assert (a - b).abs().max() < tolerance * b.abs().max()


def test_frozen_weight_gets_no_gradient_and_input_does():
    """Would catch: a backward that fails or works for nothing where only an adapter is trained."""
    x, weight, bias = make((48, 32), torch.float32, rows=5)
    x.requires_grad_()
    linear(x, weight, bias, pack(weight)).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-5)


def test_pack_follows_writes_that_it_can_see():
    """Would catch: logits of the old weights after an in-place optimiser step."""
    x, weight, _ = make((48, 32), torch.float32, rows=5)
    cache = PackedWeight()
    first = linear(x, weight, None, cache.update(weight))
    assert cache.update(weight) is cache.data
    weight.mul_(2)
    assert torch.equal(linear(x, weight, None, cache.update(weight)), 2 * first)


def test_pack_is_not_copied_with_its_module():
    """Would catch: a reference model that keeps the actor's pack, and deepcopy failing on an opaque
    tensor.
    """
    cache = PackedWeight()
    cache.update(torch.randn(4, 4))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.data is None and twin.source is None


def test_buckets_are_few_and_never_smaller():
    """Would catch: a new oneDNN kernel, a millisecond, for nearly every number of rows."""
    buckets = {n: row_bucket(n) for n in range(1, 8193)}
    assert all(b >= n for n, b in buckets.items())
    assert all(b <= max(n + 3, 1.5 * n) for n, b in buckets.items())
    assert all(row_bucket(b) == b for b in buckets.values())
    assert len(set(buckets.values())) < 85


def test_other_dtypes_are_left_to_torch():
    """Would catch: packing float64, which gradient checks use."""
    assert not can_pack(torch.randn(3, 3, dtype=torch.float64)) and not can_pack(torch.randn(0, 3))


@pytest.mark.parametrize("shape", [(3, 48), (2, 5, 48), (48,), (64, 48)], ids=str)
def test_a_model_may_write_into_the_result(shape):
    """Would catch: a result that autograd takes for a view, which Llama 4's attention cannot write into."""
    x, weight = torch.ones(shape, requires_grad=True), torch.ones(32, 48, requires_grad=True)
    out = linear(x, weight, None, pack(weight))
    assert out.shape == (*shape[:-1], 32) and out.is_contiguous()
    out += 1
    out.sum().backward()
    assert torch.equal(x.grad, torch.full(shape, 32.0))


def test_a_bias_alone_is_trained():
    """Would catch: frozen weights whose bias gets no gradient."""
    bias = torch.zeros(32, requires_grad=True)
    weight = torch.ones(32, 48)
    linear(torch.ones(5, 48), weight, bias, pack(weight)).sum().backward()
    assert torch.equal(bias.grad, torch.full((32,), 5.0))
