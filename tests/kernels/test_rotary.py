"""Rotary embedding: transformers' values and gradients, in place and out of it, in both forms."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rlhf.kernels.rotary import rotate, rotate_

pytestmark = pytest.mark.usefixtures("form")
DIMS = [6, 16, 48, 128]


def make(tokens, heads, dim, dtype):
    """cos and sin whose halves differ: a model may scale them apart."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, dim), (tokens, dim), (tokens, dim), (tokens, heads, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", DIMS)
def test_values_and_gradients_of_transformers(dim, dtype):
    """Would catch: halves exchanged, a wrong sign in the gradient, cos of one half used for both."""
    x, cos, sin, grad = make(11, 3, dim, dtype)
    wide = x.double().transpose(0, 1)[None].requires_grad_()
    want, _ = apply_rotary_pos_emb(wide, wide[:, :1], cos.double()[None], sin.double()[None])
    (wanted_grad,) = torch.autograd.grad(want, wide, grad.double().transpose(0, 1)[None])
    leaf = x.clone().requires_grad_()
    got = rotate(leaf, cos, sin)
    (got_grad,) = torch.autograd.grad(got, leaf, grad)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    for a, b in ((got, want), (got_grad, wanted_grad)):
        assert a.dtype == dtype
        assert (a.double() - b[0].transpose(0, 1)).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
def test_in_place_alone_and_among_others_give_the_same_bits(dim, dtype, shared_out):
    """Would catch: an engine that rotates q and k at once, where they lie beside v, and gets other numbers."""
    x, cos, sin, _ = make(300, 6, dim, dtype)
    apart = [rotate(part.contiguous(), cos, sin) for part in (x[:, :3], x[:, 3:5])]
    rows = [rotate(x[i : i + 1, :3], cos[i : i + 1], sin[i : i + 1]) for i in range(len(x))]
    assert torch.equal(torch.cat(rows), apart[0])
    v = x[:, 5].clone()
    rotate_(x[:, :5], cos, sin)
    assert torch.equal(x[:, :5], torch.cat(apart, 1)) and torch.equal(x[:, 5], v)


def test_heads_apart_in_memory_and_shapes_that_are_refused():
    """Would catch: numbers between the heads that are rotated too; memory beyond the end of cos."""
    x, cos, sin, _ = make(5, 6, 32, torch.float32)
    every_other, between = x[:, ::2], x[:, 1::2].clone()
    want = rotate(every_other.contiguous(), cos, sin)
    assert torch.equal(rotate(every_other, cos, sin), want)
    rotate_(every_other, cos, sin)
    assert torch.equal(x[:, ::2], want) and torch.equal(x[:, 1::2], between)
    with pytest.raises(ValueError, match="cos on meta, sin on cpu must be on one device"):
        rotate(torch.zeros(5, 6, 32), torch.zeros(5, 32, device="meta"), torch.zeros(5, 32))
    with pytest.raises(ValueError, match=r"x \(5, 6, 32\), cos \(4, 32\)"):
        rotate(x, cos[:4], sin[:4])


def test_what_is_expanded_is_not_written():
    """Would catch: a row that is rotated as often as it is shown."""
    cos, sin = torch.ones(3, 16), torch.zeros(3, 16)
    for x in (torch.zeros(1, 2, 16).expand(3, 2, 16), torch.zeros(3, 1, 16).expand(3, 2, 16)):
        with pytest.raises(ValueError, match="is expanded; clone it"):
            rotate_(x, cos, sin)
