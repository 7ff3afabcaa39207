"""Linears with weights of 8 and 4 bits: values, rows, rounding, layouts and what is refused."""

import pytest
import torch

from rlhf.kernels.quantized import can_quantize, dequantize, quantize, quantized_linear

FORMATS = [(8, 32), (4, 32), (4, 64), (4, 128)]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def make(outs, inputs, dtype=torch.float32, rows=37):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(outs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator)
    return x.to(dtype), weight, torch.randn(outs, generator=generator).to(dtype)


def slowly_rounded(weight, bits, group):
    """One number after another in float64, with the scale that leaves the smallest error of a group."""
    rows = []
    for row in weight.double().tolist():
        made = []
        for at in range(0, len(row), group if bits == 4 else len(row)):
            numbers = row[at : at + group] if bits == 4 else row
            largest = max(numbers, key=abs)
            if bits == 8:
                scales, least, most = [abs(largest) / 127], -127, 127
            else:
                shrinks = (1.0, 0.94, 0.88, 0.8)
                scales = [float(torch.tensor(largest / -8 * s).bfloat16()) for s in shrinks]
                least, most = -8, 7
            tried = [[s * min(max(round(a / s), least), most) for a in numbers] for s in scales]
            made += min(tried, key=lambda got: sum((a - b) ** 2 for a, b in zip(got, numbers)))
        rows.append(made)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_every_weight_becomes_the_nearest(form, bits, group):
    """Would catch: a scale of the wrong group, halves or pairs that change places, a sign lost with the bits."""
    _, weight, _ = make(80, 256)
    q = quantize(weight, bits, group)
    torch.testing.assert_close(
        dequantize(q, torch.float64), slowly_rounded(weight, bits, group), rtol=1e-6, atol=1e-6
    )
    assert q.blocked == (form == "native")
    error = (dequantize(q) - weight).norm() / weight.norm()
    assert error < (0.01 if bits == 8 else 0.11)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_product_is_that_of_the_rounded_weight(form, bits, group, dtype):
    """Would catch: codes and scales that do not meet, a lost bias, outputs beyond the last whole block."""
    for outs, inputs in ((80, 256), (144, 768)):
        x, weight, bias = make(outs, inputs, dtype, rows=3)
        q = quantize(weight, bits, group)
        got = quantized_linear(x.view(3, 1, inputs), q, bias)
        want = x.double() @ dequantize(q, torch.float64).T
        assert got.shape == (3, 1, outs) and got.dtype == dtype
        for found, expected in ((got[:, 0], want + bias.double()), (quantized_linear(x, q), want)):
            assert (found.double() - expected).abs().max() <= TOLERANCES[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_row_does_not_depend_on_number_of_rows(form, bits, group, dtype, shared_out):
    """Would catch: tiles of rows that add up in another order, or read a neighbour's row."""
    if form == "triton" and shared_out > 1:
        pytest.skip("the interpreter is slow")
    x, weight, bias = make(80, 256, dtype, rows=141)
    q = quantize(weight, bits, group)
    whole = quantized_linear(x, q, bias)
    for rows in (1, 2, 33) if form == "triton" else (*range(1, 26), 100):
        for start in (0, 11):
            got = quantized_linear(x[start : start + rows], q, bias)
            assert torch.equal(got, whole[start : start + rows]), rows


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_part_of_a_weight_has_the_bits_of_the_whole(form, bits, group, monkeypatch):
    """Would catch: a part that is rounded by what lies beside it, or cut into the segments of a weight of its own size."""
    x, weight, bias = make(192, 1024, rows=3)
    if form == "triton":
        from rlhf.kernels import quantized_triton

        monkeypatch.setattr(quantized_triton, "_FULL", 6)  # 2 segments of the whole, 6 of a part
    whole = quantized_linear(x, quantize(weight, bits, group), bias)
    for part in (slice(0, 64), slice(64, 136), slice(136, 192)):
        own = quantize(weight[part], bits, group)
        assert torch.equal(quantized_linear(x, own, bias[part], whole=192), whole[:, part])


def test_rows_beyond_what_is_read_at_once(form):
    """Would catch: a second part of many rows that is written over the first, or not at all."""
    x, weight, _ = make(64, 4096, rows=9)
    q = quantize(weight, 8)
    many = x.repeat(12, 1)
    assert torch.equal(quantized_linear(many, q), quantized_linear(x, q).repeat(12, 1))


def test_zero_and_equal_weights(form):
    """Would catch: a scale of 0 that is divided by, and a group without a largest number."""
    for bits in (8, 4):
        weight = torch.zeros(16, 64)
        weight[1], weight[2, 0] = -3.0, 1e-30
        whole = dequantize(quantize(weight, bits))
        assert torch.equal(whole[0], torch.zeros(64)) and whole.isfinite().all()
        torch.testing.assert_close(whole[1], weight[1], rtol=5e-3, atol=0)


def test_no_rows(form):
    """Would catch: a launch of no programs."""
    for bits in (8, 4):
        q = quantize(torch.ones(16, 64), bits)
        assert quantized_linear(torch.zeros(0, 64), q).shape == (0, 16)


def test_memory_is_what_the_bits_say(form):
    """Would catch: a second copy of the weights that stays."""
    sizes = {bits: quantize(torch.randn(128, 1024), bits).nbytes for bits in (8, 4)}
    assert sizes == {8: 128 * 1024 + 128 * 4, 4: 128 * 1024 // 2 + 128 * 32 * 2}


def test_what_does_not_fit_is_named(form):
    """Would catch: memory beyond a tensor that is read, and a gradient that is silently none."""
    x, weight, bias = make(80, 256, rows=2)
    q = quantize(weight, 8)
    refused = {
        r"x \(2, 255\) for a weight \(80, 256\)": lambda: quantized_linear(x[:, 1:], q),
        "x of torch.float64": lambda: quantized_linear(x.double(), q),
        r"bias \(79,\) of torch.float32 for x \(2, 256\)": lambda: quantized_linear(x, q, bias[1:]),
        r"bias \(80,\) of torch.bfloat16": lambda: quantized_linear(x, q, bias.bfloat16()),
        "gives none: it is frozen": lambda: quantized_linear(x.clone().requires_grad_(), q),
        "bits=3": lambda: quantize(weight, 3),
        "group=48": lambda: quantize(weight, 4, 48),
        r"weight \(80, 96\) for 4 bits.*pairs of groups of 32": lambda: quantize(weight[:, :96], 4),
        r"weight \(256,\) for 8 bits": lambda: quantize(weight[0], 8),
        "weight of torch.int64": lambda: quantize(weight.long(), 8),
        "not finite": lambda: quantize(weight / 0.0, 8),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert can_quantize((80, 96), 8) and not can_quantize((80, 96), 4)


def test_sizes_that_the_native_form_does_not_take_run_in_torch(form):
    """Would catch: a row of outputs that is written beyond its end."""
    if form == "triton":
        pytest.skip("the Triton form takes every size")
    x, weight, bias = make(7, 99, rows=5)
    q = quantize(weight, 8)
    assert not q.blocked
    torch.testing.assert_close(quantized_linear(x, q, bias), x @ dequantize(q).T + bias)


@pytest.mark.parametrize("outs", [1, 63, 65, 100])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_any_number_of_outputs(outs, bits, group, form):
    """Would catch: a weight whose number of outputs is no multiple of 16 that is made whole for each product; and the end of
    a row of outputs, written beyond or not at all."""
    x, weight, bias = make(outs, 256, rows=5)
    q = quantize(weight, bits, group)
    assert q.blocked == (form == "native")
    whole = dequantize(q)
    assert whole.shape == weight.shape
    torch.testing.assert_close(quantized_linear(x, q, bias), x @ whole.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-41])
def test_tiny_weights_are_rounded_too(size):
    """Would catch: a scale whose inverse is infinite, and weights that all become the largest number or none."""
    weight = torch.linspace(-1, 1, 128).mul(size).repeat(64, 1)
    weight[0] = 0
    weight[2] = torch.linspace(-1, 1, 128)  # beside them
    whole = dequantize(quantize(weight, 8)).double()
    error = (whole - weight.double()).abs().amax(1)
    assert error[1] <= 0.006 * size and error[2] <= 0.005 and not whole[0].any()


def test_rows_that_could_have_a_gradient_run_without():
    """Would catch: weights that are refused in the engine, which runs without gradients."""
    x, weight, _ = make(16, 64, rows=2)
    with torch.no_grad():
        assert quantized_linear(x.requires_grad_(), quantize(weight, 4)).shape == (2, 16)
