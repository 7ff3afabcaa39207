"""Activations: a row's values at every number of rows, and gradients."""

import pytest
import torch
import torch.nn.functional as F

from rlhf.kernels.activation import gelu_tanh, silu

FUNCTIONS = {silu: F.silu, gelu_tanh: lambda x: F.gelu(x, approximate="tanh")}


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
