"""RMSNorm: transformers' values, its gradients, and a row's bits at every number of rows, in both forms."""

import re

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.kernels import native
from rlhf.kernels.norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.usefixtures("form")
EPS = 1e-3


def stock_norm(weight):
    norm = LlamaRMSNorm(len(weight), EPS).to(weight.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm


def make(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    return x.to(dtype), torch.randn(shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (33, 4, 48), (9, 192)])
def test_values_and_gradients_of_the_stock_module(shape, dtype, form):
    """Would catch: a forgotten eps, a bf16 rounding at another place, a gradient without its mean term."""
    x, weight = make(shape, dtype)
    norm = stock_norm(weight)
    got, want = rms_norm(x, weight, EPS), norm(x).detach()
    if form == "torch":
        assert torch.equal(got, want)
    else:  # squares are added up in another order: now and then that moves a bf16 to its neighbour
        assert torch.allclose(got, want, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
        assert (got == want).float().mean() > (0.3 if dtype == torch.float32 else 0.99)
    x.requires_grad_(), weight.requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    want = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want):
        assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradient_in_float64():
    """Would catch: a derivative that is only nearly right."""
    x, weight = make((3, 4, 6), torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: rms_norm(a, b, EPS), (x.requires_grad_(), weight.requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 48, 100, 192])
def test_row_does_not_depend_on_number_of_rows(width, dtype, shared_out):
    """Would catch: a reduction whose order depends on how rows are shared among threads."""
    x, weight = make((1000, width), dtype)
    want = stock_norm(weight)(x).detach()
    whole = rms_norm(x, weight, EPS)
    assert torch.allclose(whole, want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    for rows in (1, 7, 256):
        parts = torch.cat([rms_norm(part, weight, EPS) for part in x.split(rows)])
        assert torch.equal(whole, parts), rows


def test_gradients_on_any_number_of_threads(shared_out, form):
    """Would catch: a weight's gradient that two threads add to, or a part of the rows left out."""
    x, weight = (t.requires_grad_() for t in make((1000, 64), torch.float32))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    torch.set_num_threads(before)
    if form == "native":
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    norm = stock_norm(weight.detach())
    wanted = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(got, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 208])
def test_addition_before_the_norm_has_the_bits_of_both(width, dtype):
    """Would catch: an engine that adds and norms in one pass and gets other numbers than the trainer."""
    x, weight = make((33, width), dtype)
    change = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    total = x + change
    got = add_rms_norm(x, change, weight, EPS)
    assert torch.equal(x, total) and torch.equal(got, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_beside_others_with_a_weight_each(dtype):
    """Would catch: q and k, normed at once where they lie beside v, in other bits than each alone."""
    x, weight = make((33, 6, 48), dtype)
    weights = torch.stack([weight * (1 + h) for h in range(4)])
    together = rms_norm(x[:, :4], weights, EPS)
    for head in range(4):
        assert torch.equal(together[:, head], rms_norm(x[:, head].contiguous(), weights[head], EPS))


def test_one_sequence_is_rows_to_share_out(form, monkeypatch):
    """Would catch: a batch of one sequence that one thread norms, as if its tokens were heads of one."""
    x, weight = make((40, 48), torch.float32)
    want = rms_norm(x, weight, EPS)
    assert torch.equal(rms_norm(x[None], weight, EPS)[0], want)
    if form != "native":
        return
    given = []
    monkeypatch.setattr(native, "function", lambda *name: lambda *arguments: given.append(arguments[4:8]))
    for shape in ((40, 48), (1, 40, 48), (5, 8, 48), (2, 4, 5, 48)):
        rms_norm(x.view(shape), weight, EPS)
    rms_norm(x.view(5, 8, 48)[:, :3], weight, EPS)  # heads beside others
    assert given == [(40, 1, 48, 48)] * 4 + [(5, 3, 48, 8 * 48)]


def test_frozen_weight_and_frozen_input():
    """Would catch: a backward that fails where only an adapter is trained."""
    x, weight = make((4, 8), torch.float32)
    norm = stock_norm(weight)
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight, EPS).sum().backward()
    norm.requires_grad_(False)(other := x.clone().requires_grad_()).sum().backward()
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-4)
    weight.requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_weights_of_one_number_a_row_and_strided_ones():
    """Would catch: a copy of the weight that is gone before it is read; a gradient that one dimension breaks."""
    x, weight = make((4, 32), torch.float32)
    strided = torch.stack([weight, weight + 1], 1)[:, 0]
    assert torch.equal(rms_norm(x, strided, EPS), rms_norm(x, weight, EPS))
    weight.requires_grad_()
    rms_norm(x[0], weight, EPS).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_what_does_not_fit_is_refused():
    """Would catch: memory beyond a weight's end; an addition to a copy; gradients of one head's weight for all."""
    x, weight = make((4, 6, 32), torch.float32)
    with pytest.raises(ValueError, match=r"weight \(31,\) for x \(4, 6, 32\)"):
        rms_norm(x, weight[:31], EPS)
    with pytest.raises(ValueError, match=r"weight \(6, 32\)"):
        rms_norm(x, weight.expand(6, -1).clone().requires_grad_(), EPS)
    for many, weights in (
        (x[None], (6, 32)),
        (x[:, 0], (4, 32)),
    ):  # the kernels know heads of (N, heads, H) only
        with pytest.raises(ValueError, match=re.escape(f"weight {weights} for x {tuple(many.shape)}")):
            rms_norm(many, torch.ones(weights), EPS)
    for shape in ((), (3, 0)):
        nothing, same = torch.ones(shape), torch.ones(shape[-1:])
        for norm, given in ((rms_norm, (nothing, same)), (add_rms_norm, (nothing, nothing, same))):
            with pytest.raises(ValueError, match=rf"x {re.escape(str(shape))} must be \(..., H\)"):
                norm(*given, EPS)
    with pytest.raises(ValueError, match="x and change must be alike"):
        add_rms_norm(x[:, 0], x[:2, 0], weight, EPS)
    apart = x[:, 0]
    total = apart + 1
    got = add_rms_norm(apart, torch.ones(4, 32), weight, EPS)
    assert torch.equal(apart, total) and torch.equal(got, rms_norm(total, weight, EPS))
    late = torch.empty(4 * 32 + 1)[1:].view(4, 32).copy_(total)  # begins 4 bytes late
    got = add_rms_norm(late, torch.ones(4, 32), weight, EPS)
    assert torch.equal(late, total + 1) and torch.equal(got, rms_norm(total + 1, weight, EPS))
    for given in ((x.to("meta"), weight), (x, weight.int())):
        with pytest.raises(ValueError, match=r"x \(4, 6, 32\) .* weight \(32,\) .*floats on one device"):
            rms_norm(*given, EPS)
    with pytest.raises(ValueError, match=r"change \(4, 32\) torch.float32 on meta"):
        add_rms_norm(total, total.to("meta"), weight, EPS)


def test_a_gradient_of_the_gradient_is_refused():
    """Would catch: a penalty on gradients that loses its term in silence."""
    x, weight = (t.requires_grad_() for t in make((4, 32), torch.float32))
    with pytest.raises(RuntimeError, match="has no gradient of its own, which create_graph=True asks for"):
        torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x, create_graph=True)
