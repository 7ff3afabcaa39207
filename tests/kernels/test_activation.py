"""Activations: a row's values at every number of rows, and gradients."""

import functools

import pytest
import torch
import torch.nn.functional as F

from rlhf.kernels.activation import geglu, gelu, gelu_tanh, silu, swiglu

FUNCTIONS = {silu: F.silu, gelu: F.gelu, gelu_tanh: lambda x: F.gelu(x, approximate="tanh")}
GATED = {
    "swiglu": (swiglu, F.silu),
    "geglu": (geglu, lambda x: F.gelu(x, approximate="tanh")),
    "geglu of erf": (functools.partial(geglu, tanh=False), F.gelu),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 48, 100, 128])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_row_does_not_depend_on_number_of_rows(function, width, dtype):
    """Would catch: the fused kernel's other rounding of a share's last elements (widths 48 and 100)."""
    x = (torch.randn(500, width, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = function(x)
            for rows in (1, 7):
                parts = torch.cat([function(part) for part in x.split(rows)])
                assert torch.equal(whole, parts), (threads, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function,stock", FUNCTIONS.items())
def test_values_and_gradient(function, stock):
    """Would catch: a wrong constant, an overflow far from zero, a wrong derivative."""
    x = torch.cat([torch.linspace(-8, 8, 98), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])]).requires_grad_()
    assert torch.allclose(function(x), stock(x.double()).float(), atol=1e-6)
    wide = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, wide)


EXTREMES = [-1e30, -1e4, -100.0, -88.0, -1e-30, 0.0, 1e-30, 100.0, 1e4, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [10, 48, 512])
@pytest.mark.parametrize("name", GATED)
def test_swiglu_and_geglu_values_and_gradients(name, width, dtype, form):
    """Would catch: a wrong derivative, up and gate exchanged, an overflow of e^-x far from zero."""
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn((9, width), generator=generator) * 4 for _ in range(3))
    gate[0, :10] = torch.tensor(EXTREMES)
    gelu = name != "swiglu"
    if gelu:
        gate = gate.clamp(-1e4, 1e4)  # whose cube is a number
    gate, up, grad = (x.to(dtype) for x in (gate, up, grad))
    wide = [x.double().requires_grad_() for x in (gate, up)]
    run, activation = GATED[name]
    want = activation(wide[0]) * wide[1]
    wanted = torch.autograd.grad(want, wide, grad.double())
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    got = run(*leaves)
    assert torch.equal(got, run(gate, up))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float64: 1e-12}[dtype]
    if gelu and dtype == torch.float32:  # 1 + tanh of a negative number has few digits left
        tolerance *= 3 if form == "native" and width % 16 == 0 else 50
    for a, b in zip((got, *torch.autograd.grad(got, leaves, grad)), (want, *wanted)):
        assert a.dtype == dtype and torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 48, 512])
@pytest.mark.parametrize("name", GATED)
def test_a_row_does_not_depend_on_its_neighbours(name, width, dtype, form, shared_out):
    """Would catch: other bits for gate and up out of one product, for few rows, or on more threads."""
    run, activation = GATED[name]
    generator = torch.Generator().manual_seed(0)
    together = torch.randn((2000, 2 * width), generator=generator).to(dtype)
    gate, up = together.chunk(2, -1)
    whole = run(gate.contiguous(), up.contiguous())
    want = activation(gate.double()) * up.double()
    assert torch.allclose(whole.double(), want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=4e-6)
    assert torch.equal(whole, run(gate, up))
    assert torch.equal(whole, torch.cat([run(g, u) for g, u in zip(gate.split(7), up.split(7))]))
    for shape in ((20, 100, -1), (20, 1, 100, -1)):
        folded = together.view(shape)
        for rows in (folded, folded.transpose(0, -2)):
            got = run(*rows.chunk(2, -1))
            assert torch.equal(got, run(*(x.contiguous() for x in rows.chunk(2, -1))))
        assert torch.equal(run(*folded.chunk(2, -1)).flatten(0, -2), whole)
    assert torch.equal(run(gate[::3], up[::3]), whole[::3])
    assert torch.equal(run(gate[:1].expand(5, -1), up[:5]), run(gate[:1].repeat(5, 1), up[:5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_swiglu_keeps_what_is_not_finite(bad, form):
    """Would catch: a NaN that becomes a number and trains on."""
    gate, up = torch.ones(2, 32), torch.ones(2, 32)
    gate[0, 3] = up[1, 5] = bad
    out = swiglu(gate, up)
    assert not out[0, 3].isfinite() and not out[1, 5].isfinite() and out.isfinite().sum() == 62


def test_swiglu_of_unlike_shapes_is_refused(form):
    """Would catch: memory beyond the smaller one's end."""
    with pytest.raises(ValueError, match=r"gate \(4, 16\) and up \(1, 16\)"):
        swiglu(torch.ones(4, 16), torch.ones(1, 16))
    with pytest.raises(ValueError, match=r"gate \(\) and up \(\)"):
        swiglu(torch.ones(()), torch.ones(()))
    for gated in (swiglu, geglu):
        for up in (torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(4, 16, device="meta")):
            with pytest.raises(
                ValueError, match=r"gate \(4, 16\) .*up \(4, 16\) .*one dtype and lie on one device"
            ):
                gated(torch.ones(4, 16), up)
