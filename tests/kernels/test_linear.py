"""The packed linear: rows, values, gradients, and when a pack is made again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from rlhf.kernels import linear as linear_module
from rlhf.kernels import native
from rlhf.kernels.linear import (
    PackedWeight,
    _layouts,
    _segment,
    _segments,
    can_pack,
    linear,
    pack,
    packed_linear,
    row_bucket,
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(48, 32), (7, 100), (256, 192), (217, 192), (128, 800), (64, 3072)]


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
@pytest.mark.parametrize("few", ["native", "torch"])
def test_row_does_not_depend_on_number_of_rows(shape, dtype, threads, few, monkeypatch):
    """Would catch: a kernel chosen by the number of rows that adds up in another order (oneDNN's does for one row of many
    inputs), or padding that reaches a real row."""
    if few == "torch":
        monkeypatch.setattr(native, "library", lambda name: None)
    _segments.clear()
    x, weight, bias = make(shape, dtype)
    packed = pack(weight)
    expected = linear(x, weight, bias, packed)
    for rows in (1, 2, 3, 5, 7, 8, 13, 14, 15, 17, 33, 100, 257, 1025):
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


def test_pack_follows_the_tensor_and_not_its_address():
    """Would catch: logits of weights that are gone, where new ones were laid at their address; outputs that were cut off."""
    x, weight, _ = make((128, 32), torch.float32, rows=5)
    cache = PackedWeight()
    cache.update(weight)
    again = torch.from_numpy(weight.numpy())  # the same memory, with a count of writes of its own
    again.numpy()[:] *= 2
    assert again.data_ptr() == weight.data_ptr() and again._version == weight._version
    assert torch.equal(linear(x, again, None, cache.update(again)), linear(x, again, None, pack(again)))
    again.data = again.data[:64]
    assert linear(x, again, None, cache.update(again)).shape == (5, 64)
    with pytest.raises(ValueError, match=r"packed \(64, 32\) is of another weight than \(128, 32\)"):
        linear(x, weight, None, cache.data)


def test_pack_is_not_copied_with_its_module():
    """Would catch: a reference model that keeps the actor's pack, and deepcopy failing on an opaque
    tensor.
    """
    cache = PackedWeight()
    cache.update(torch.randn(4, 4))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.data is None and twin.source is None


def test_few_rows_that_do_not_fit_are_refused():
    """Would catch: memory read beyond the rows' end."""
    packed = pack(torch.zeros(64, 32))
    for x, bias in (
        (torch.zeros(2, 30), None),
        (torch.zeros(2, 32), torch.zeros(48)),
        (torch.zeros(2, 32).bfloat16(), None),
    ):
        with pytest.raises(RuntimeError):
            packed_linear(x, packed, bias)
    with pytest.raises(ValueError, match=r"x \(\) is a single number"):
        packed_linear(torch.zeros(()), packed)
    weight = torch.zeros(64, 32)
    for call in (lambda: packed_linear(weight, weight), lambda: linear(weight, weight, None, weight.clone())):
        with pytest.raises(ValueError, match=r"packed \(64, 32\) is an ordinary tensor"):
            call()


def test_few_rows_take_the_kernel_for_few():
    """Would catch: a trial that fails where it should not, after which every decoding step is slower and nobody knows."""
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    _segments.clear()
    sizes = {inner: _segment(pack(torch.randn(128, inner))) for inner in (192, 800, 3072)}
    assert sizes[192] == 192 and sizes[800] and sizes[3072], sizes
    assert all(_segment(pack(torch.randn(outs, 192))) == 192 for outs in (7, 100, 321, 1003))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_end_with_their_number(dtype):
    """Would catch: sums that are written beyond the last row, or a bias that is read there."""
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    x, weight, bias = make((113, 192), dtype, rows=3)
    packed, out = pack(weight), torch.full((3 * 113 + 64,), 7.0, dtype=dtype)
    run = native.function("linear", "linear_forward")
    where = (x.data_ptr(), linear_module._address(packed), 0, bias.data_ptr(), out.data_ptr())
    run(*where, 3, 192, 113, 192, 0, dtype == torch.bfloat16, 1)
    assert (out[3 * 113 :] == 7).all() and torch.equal(
        out[: 3 * 113].view(3, 113), packed_linear(x, packed, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layout_that_is_not_the_expected_one_is_oned_nns(dtype, monkeypatch):
    """Would catch: numbers of other outputs, in silence, where oneDNN lays a weight out in another way than a small one; a
    weight of zeros that is taken for proof."""
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    shape = torch.Size((640, 64))
    for known in (_layouts, _segments):
        known.clear()
    x, weight, _ = make(shape, dtype, rows=3)
    packed = pack(torch.zeros_like(weight))
    assert (shape, dtype) not in _layouts and not _segment(packed)
    assert not packed_linear(x, packed).any()
    packed = pack(weight)
    assert _layouts[shape, dtype] and _segment(packed)
    want = packed_linear(x, packed)
    swapped = weight.clone()
    swapped[-1] = weight[-2]  # what lies in memory is not what is looked for
    monkeypatch.setattr(linear_module, "_layouts", {})
    monkeypatch.setattr(linear_module, "_segments", {})
    linear_module._look_at_layout(swapped, packed)
    assert linear_module._layouts == {(shape, dtype): False} and not _segment(packed)
    assert torch.equal(packed_linear(x, packed), want)


def test_buckets_are_few_and_never_smaller(monkeypatch):
    """Would catch: a new oneDNN kernel, a millisecond, for nearly every number of rows."""
    monkeypatch.setattr(native, "library", lambda name: None)
    buckets = {n: row_bucket(n) for n in range(1, 8193)}
    assert all(b >= n for n, b in buckets.items())
    assert all(b <= max(n + 7, 1.07 * n) for n, b in buckets.items())
    assert all(row_bucket(b) == b for b in buckets.values())
    assert len(set(buckets.values())) < 300


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


@pytest.mark.parametrize("packs", [True, False])
def test_bad_arguments_are_named(packs, interpreting):
    """Would catch: a kernel that reads beyond the end of a weight, and oneDNN's words for it."""
    x, weight, bias = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)
    packed = pack(weight) if packs else None
    for problem, arguments in (
        (r"x \(2, 4\) and weight \(5, 3\)", (torch.zeros(2, 4), weight, bias)),
        (r"bias \(2,\) must be \(5,\)", (x, weight, torch.zeros(2))),
        ("weight is torch.float32 and x torch.bfloat16", (x.bfloat16(), weight, None)),
        ("bias is torch.float64", (x, weight, bias.double())),
        (r"x \(\) and weight \(5, 3\)", (torch.zeros(()), weight, bias)),
        ("weight is on meta", (x, weight.to("meta"), None)),
    ):
        if "meta" in problem and (packs or not interpreting):
            continue  # the pack is what counts, and torch takes it
        with pytest.raises(ValueError, match=problem):
            linear(*arguments, packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_come_often_are_no_longer_padded(dtype, monkeypatch):
    """Would catch: other bits once oneDNN has a kernel for exactly these rows; a kernel for each number that comes once;
    numbers that are remembered without end."""
    monkeypatch.setattr(linear_module, "_WORTH_A_KERNEL", 3 * 301 * 64 * 48)
    monkeypatch.setattr(linear_module, "_rounded_up", {})
    _, weight, bias = make((48, 64), dtype, rows=1)
    x = torch.randn(301, 64).to(dtype)
    packed, given = pack(weight), []
    product = linear_module._linear_pointwise
    monkeypatch.setattr(
        linear_module,
        "_linear_pointwise",
        lambda rows, *rest: given.append(len(rows)) or product(rows, *rest),
    )
    first, *later = [packed_linear(x, packed, bias) for _ in range(5)]
    assert all(torch.equal(first, y) for y in later)
    assert given == [304, 304, 304, 301, 301]
    packed_linear(x[:299], packed, bias)
    assert given[-1] == 304
    monkeypatch.setattr(linear_module, "_MOST_KERNELS", 2)
    packed_linear(x[:298], packed, bias)
    assert len(linear_module._rounded_up) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_its_own_wherever_the_form_changes(dtype):
    """Would catch: other bits where linear.cpp hands over to oneDNN, which it does at some numbers of rows and not at others."""
    x, weight, bias = make((192, 160), dtype, rows=140)
    packed = pack(weight)
    whole = packed_linear(x, packed, bias)
    for rows in (1, 5, 12, 13, 48, 49, 56, 100, 104, 127, 128, 129):
        assert torch.equal(packed_linear(x[:rows], packed, bias), whole[:rows]), rows
    folded = packed_linear(x[:120].view(2, 60, 160)[:, ::2], packed, bias)
    assert torch.equal(folded, whole[:120].view(2, 60, 192)[:, ::2])
