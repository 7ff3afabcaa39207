"""The Triton form of the linear, in Triton's interpreter: values, gradients, and rows that are alike in every product."""

import os

import pytest
import torch

from rlhf.kernels.linear import can_join, joined_linear, linear

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="of the Triton form; test_triton.py runs it"
)
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def in_short_segments(interpreting, monkeypatch):
    """Rows of up to 64 numbers are one segment, up to 128 two, longer ones four."""
    from rlhf.kernels import matmul_triton

    torch.manual_seed(0)
    monkeypatch.setattr(matmul_triton, "_WHOLE", 64)
    monkeypatch.setattr(matmul_triton, "_HALVES", 128)
    return matmul_triton


def make(rows, columns, inner, dtype):
    return [torch.randn(shape).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))]


@pytest.mark.parametrize(
    "shape", [(1, 7, 33), (3, 129, 100), (65, 129, 1), (2, 5, 300), (130, 300, 70)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape):
    """Would catch: a tail of the inner axis that is left out or counted twice, a lost segment or bias, a row beyond the
    end, a transposed gradient."""
    inputs = [x.requires_grad_() for x in make(*shape, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, want = linear(*inputs), exact[0] @ exact[1].t() + exact[2]
    assert out.dtype == dtype and (out - want).abs().max() <= DTYPES[dtype] * want.abs().max()
    grad = torch.randn_like(want).to(dtype)
    found, wanted = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, exact, grad.double())
    for a, b in zip(found, wanted):
        assert a.dtype == dtype and (a - b).abs().max() <= DTYPES[dtype] * b.abs().max()


@pytest.mark.parametrize(
    "dtype,inner", [(torch.float32, 300), (torch.bfloat16, 70), (torch.bfloat16, 50), (torch.float16, 300)]
)
def test_a_row_is_its_own(dtype, inner, in_short_segments, monkeypatch):
    """Would catch: segments that are added up in another order where programs share them out or a tile is larger, or
    whose borders follow the number of rows."""
    x, weight, bias = make(140, 300, inner, dtype)
    whole = linear(x, weight, bias)
    for rows in (1, 3, 65):
        assert torch.equal(linear(x[9 : 9 + rows], weight, bias), whole[9 : 9 + rows]), rows
    for programs in (0, 1 << 20):  # never shared out, always
        monkeypatch.setattr(in_short_segments, "_FULL", programs)
        monkeypatch.setattr(in_short_segments, "_LARGE", 1 if programs == 0 else 1 << 20)
        assert torch.equal(linear(x, weight, bias), whole)


def test_the_layout_of_x_and_of_weights_beside_each_other_does_not_matter(in_short_segments):
    """Would catch: strides that are not looked at, and joined weights that are cut by their joint size."""
    x, weight, bias = make(20, 96, 300, torch.float32)
    want = linear(x, weight, bias)
    wide = torch.zeros(20, 400)
    wide[:, 50:350] = x
    assert torch.equal(linear(wide[:, 50:350], weight, bias), want)
    assert torch.equal(linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias), want)
    assert torch.equal(linear(x.view(4, 5, 300), weight, bias), want.view(4, 5, 96))
    in_short_segments._WIDE, before = 90, in_short_segments._WIDE
    try:
        assert in_short_segments.segments_of(96, 300)[0] == 1 != in_short_segments.segments_of(48, 300)[0]
        parts = [linear(x, weight[i : i + 48], bias[i : i + 48]) for i in (0, 48)]
        joined = in_short_segments.linear(x, weight, bias, whole=48)
    finally:
        in_short_segments._WIDE = before
    assert torch.equal(torch.cat(parts, -1), joined)


def test_a_model_may_write_into_the_result():
    """Would catch: a result that autograd takes for a view."""
    x, weight = torch.ones((2, 5, 48), requires_grad=True), torch.ones(32, 48, requires_grad=True)
    out = linear(x, weight)
    out += 1
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 5, 48), 32.0))


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((2, 0), (3, 0)), ((2, 4), (0, 4))], ids=str)
def test_nothing_is_a_sum_of_nothing(shapes):
    """Would catch: a launch of no programs, and a division by a row's length of 0."""
    x, weight = (torch.zeros(s) for s in shapes)
    assert torch.equal(linear(x, weight), x @ weight.t())


def test_a_part_of_a_weight_has_the_bits_of_the_whole(in_short_segments, monkeypatch):
    """Would catch: a part that is cut into the segments that a weight of its own size has."""
    monkeypatch.setattr("rlhf.kernels.linear.can_pack", lambda weight: False)  # a CPU's here
    monkeypatch.setattr(in_short_segments, "_WIDE", 90)
    x, weight, bias = make(20, 96, 300, torch.float32)
    whole = linear(x, weight, bias)
    parts = [joined_linear(x, weight[i : i + 48], bias[i : i + 48], whole=96) for i in (0, 48)]
    alone = linear(x, weight[:48], bias[:48])
    assert can_join([weight[:48], weight[48:]], wholes=[96, 96])
    assert not can_join([weight[:48], weight[:48]], wholes=[96, 48])
    assert torch.equal(torch.cat(parts, -1), whole) and not torch.equal(alone, whole[:, :48])
