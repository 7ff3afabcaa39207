"""Keys and values in pages: int8 and fp8 against their definition, attention over them, and heads written in one pass."""

import numpy as np
import pytest
import torch

from rlhf.kernels import gpu, kv
from rlhf.kernels.attention import Plan, attend_packed, attend_paged
from rlhf.kernels.kv import QUANTISED, kv_rows, norm_rotate_write, quantised, write_kv
from rlhf.kernels.norm import rms_norm
from rlhf.kernels.rotary import rotate

FORMATS = list(QUANTISED)
LENGTHS = [5, 1, 30, 150]
PAGE = 32

pytestmark = pytest.mark.usefixtures("form")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty_pages(num_pages, heads, dim, dtype):
    pages = [torch.zeros(num_pages, heads, PAGE, dim, dtype=dtype) for _ in "kv"]
    return *pages, tuple(torch.zeros(num_pages, heads, PAGE) for _ in "kv") if dtype in QUANTISED else None


def slow_quantised(row, dtype):
    """The definition, in float64: the format's numbers, of which the nearest is taken."""
    most = QUANTISED[dtype]
    if dtype == torch.int8:
        numbers = torch.arange(-127.0, 128.0, dtype=torch.float64)
    else:
        numbers = torch.arange(256).to(torch.uint8).view(dtype).double()
        numbers = numbers[numbers.isfinite()].unique()
    scale = row.abs().max() / most
    nearest = numbers[((row / scale)[:, None] - numbers).abs().argmin(-1)]
    return nearest, scale


@pytest.mark.parametrize("dim", [16, 96, 256])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_written_numbers_are_the_nearest(dtype, given, dim):
    """Would catch: a scale of another token or head, a number that is cut off instead of rounded, subnormal fp8 numbers
    that are lost, a sign that is."""
    k, v = random(40, 3, dim, dtype=given), random(40, 3, dim, seed=1, dtype=given) * 1e-3
    k[7, 1, 3:] *= 1e-3  # far below the largest
    slots = torch.randperm(2 * PAGE, generator=torch.Generator().manual_seed(2))[:40]
    k_pages, v_pages, scales = empty_pages(2, 3, dim, dtype)
    write_kv(k_pages, v_pages, k, v, slots, kv_scales=scales)
    for x, pages, of_pages in ((k, k_pages, scales[0]), (v, v_pages, scales[1])):
        for token, head in ((0, 0), (7, 1), (39, 2)):
            at = slots[token] // PAGE, head, slots[token] % PAGE
            numbers, scale = slow_quantised(x[token, head].double(), dtype)
            assert abs(of_pages[at] / scale - 1) < 1e-6
            wrong = pages[at].double() != numbers
            assert wrong.sum() <= 1  # one may lie on the middle between two but for the last bit
            assert ((pages[at].double() - numbers)[wrong].abs() <= numbers[wrong].abs() / 8 + 1).all()
        numbers, own = quantised(x, dtype)
        rows = kv_rows(slots, 3, PAGE)
        assert torch.equal(pages.view(-1, dim)[rows].float(), numbers.view(-1, dim).float())
        assert torch.equal(of_pages.view(-1)[rows], own.view(-1))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_zeros_ties_the_largest_and_what_is_not_finite(dtype):
    """Would catch: 0 / 0, ties away from even, an overflow of the largest number, a NaN that becomes a number."""
    x = torch.zeros(6, 1, 16)
    x[1, 0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[2, 0, :4] = torch.tensor([448.0, 17.0, -19.0, 2**-10])
    x[3, 0, 3], x[4, 0, 3], x[5] = float("nan"), float("-inf"), 1e-36
    k_pages, v_pages, scales = empty_pages(1, 1, 16, dtype)
    write_kv(k_pages, v_pages, x, -x, torch.arange(6), kv_scales=scales)
    numbers, own = k_pages[0, 0, :6].float(), scales[0][0, 0, :6]
    assert not numbers[0].any() and own[0] == 0
    assert own[3:5].isnan().all() and not numbers[3:5].any() and own[5].isfinite()
    assert torch.equal(v_pages[0, 0, :6].float(), -numbers)
    if dtype == torch.int8:
        assert numbers[1, :4].tolist() == [127, 0, 2, -2]
    else:
        assert numbers[2, :4].tolist() == [448, 16, -20, 0]
    before = numbers[1].clone()
    write_kv(k_pages, v_pages, x[1:2], x[1:2], torch.tensor([31]), kv_scales=scales)
    assert torch.equal(k_pages[0, 0, 31].float(), before) and scales[0][0, 0, 31] == own[1]


class Pages:
    """Keys and values of some sequences in pages, and what the pages hold as fp32."""

    def __init__(self, k, v, lengths, dtype):
        counts = [-(-n // PAGE) for n in lengths]
        order = np.random.default_rng(0).permutation(sum(counts) + 2)
        self.lengths, self.table = lengths, np.full((len(lengths), max(counts)), -1)
        self.k, self.v, self.scales = empty_pages(len(order), k.shape[1], k.shape[2], dtype)
        slots = []
        for row, (n, count) in enumerate(zip(lengths, counts)):
            self.table[row, :count], order = order[:count], order[count:]
            at = np.arange(n)
            slots.append(self.table[row, at // PAGE] * PAGE + at % PAGE)
        slots = torch.from_numpy(np.concatenate(slots))
        write_kv(self.k, self.v, k, v, slots, kv_scales=self.scales)
        rows, shape = kv_rows(slots, k.shape[1], PAGE), k.shape
        self.held = [
            (pages.float() * scales[..., None]).view(-1, shape[-1])[rows].view(shape)
            for pages, scales in zip((self.k, self.v), self.scales)
        ]

    def attend(self, q, query_lens, **options):
        plan = Plan(query_lens, self.lengths, page_table=self.table, page_tokens=PAGE)
        return attend_paged(q, self.k, self.v, plan, kv_scales=self.scales, **options)


OPTIONS = [{}, {"window": 9}, {"softcap": 3.0}, {"sinks": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_quantised_pages_give_the_bits_of_their_values(dtype, given, options, form):
    """Would catch: a scale of another position, a padded key that counts, bits that depend on the cut into chunks."""
    q, k, v = (random(sum(LENGTHS), h, 32, seed=i, dtype=given) for i, h in enumerate((4, 2, 2)))
    if options.get("sinks") is True:
        options = {"sinks": torch.linspace(-1, 1, 4)}
    pages, ends = Pages(k, v, LENGTHS, dtype), np.cumsum(LENGTHS)
    whole = pages.attend(q, LENGTHS, scale=0.3, **options)
    values = attend_packed(q.float(), *pages.held, Plan(LENGTHS, LENGTHS), scale=0.3, **options)
    if form == "triton" and given != torch.float32:
        assert torch.allclose(whole.float(), values, atol=2e-2)
    else:
        assert torch.equal(whole, values.to(given))
    for count in (1, 3, 20):  # the last tokens
        counts = [min(count, n) for n in LENGTHS]
        rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts)])
        assert torch.equal(pages.attend(q[rows], counts, scale=0.3, **options), whole[rows])


def test_fp8_bytes_are_read_without_a_gpus_conversion(form, monkeypatch):
    """Would catch: e4m3 taken for another format on GPUs that have none of it."""
    if form != "triton":
        pytest.skip("the Triton form's")
    from rlhf.kernels import attention_triton

    q, k, v = (random(sum(LENGTHS), h, 32, seed=i) for i, h in enumerate((4, 2, 2)))
    k[:, :, 5] *= 1e-4
    pages = Pages(k, v, LENGTHS, torch.float8_e4m3fn)
    expected = pages.attend(q, LENGTHS, scale=0.3)
    monkeypatch.setattr(attention_triton, "_has_fp8", lambda device: False)
    assert torch.equal(pages.attend(q, LENGTHS, scale=0.3), expected)


@pytest.mark.parametrize("kind", ["random", "outliers"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 0.012), (torch.float8_e4m3fn, 0.04)], ids=str)
def test_outputs_stay_near_those_of_full_precision(dtype, most, kind):
    """Would catch: scales shared by tokens or heads, which outliers of one spoil for the others."""
    lengths = [300]
    q, k, v = (random(300, h, 64, seed=i) for i, h in enumerate((4, 2, 2)))
    if kind == "outliers":  # some channels of keys are far larger, as models have them, and some tokens
        k[:, :, 3] += 15.0
        v[::17] *= 20.0
        most *= 3
    out = Pages(k, v, lengths, dtype).attend(q, lengths, scale=0.125)
    full = attend_packed(q.double(), k.double(), v.double(), Plan(lengths, lengths), scale=0.125)
    error = (out - full).norm() / full.norm()
    assert error < most, error


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 1, 64), (3, 3, 96), (4, 2, 128), (2, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", [None, *FORMATS], ids=str)
def test_one_pass_gives_the_bits_of_separate_operations(dtype, shape, given, norm, form):
    """Would catch: another place of a cast, a head normed by another's weight, v rotated, a token in another's slot."""
    if form != "triton":
        pytest.skip("the Triton form's")
    heads, kv_heads, dim = shape
    fused = random(9, heads + 2 * kv_heads, dim, dtype=given)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    weights = random(heads + kv_heads, dim, seed=1, dtype=given) if norm else None
    cos, sin = random(9, dim, seed=2, dtype=given), random(9, dim, seed=3, dtype=given)
    slots = torch.randperm(2 * PAGE, generator=torch.Generator().manual_seed(2))[:9]
    rows = kv_rows(slots, kv_heads, PAGE)
    ours, theirs = (empty_pages(2, kv_heads, dim, dtype or given) for _ in range(2))
    assert kv.writes_in_one_pass(q, ours[0], cos, weights)
    got = norm_rotate_write(
        q, k, v, *ours[:2], rows, cos=cos, sin=sin, norm_weights=weights, eps=1e-5, kv_scales=ours[2]
    )
    both = fused[:, : heads + kv_heads]
    both = rotate(both if weights is None else rms_norm(both, weights, 1e-5), cos, sin)
    kv.write_rows(*theirs[:2], both[:, heads:], v, rows, kv_scales=theirs[2])
    assert torch.equal(got, both[:, :heads])
    for a, b in zip((*ours[:2], *(ours[2] or ())), (*theirs[:2], *(theirs[2] or ()))):
        assert torch.equal(a.float(), b.float())


def test_what_is_rotated_in_part_is_not_served(monkeypatch):
    """Would catch: a model with partial rotary whose other half is rotated too."""
    monkeypatch.setattr(gpu, "serves", lambda *tensors: True)
    q, pages = random(3, 2, 64), torch.zeros(1, 1, PAGE, 64)
    assert not kv.writes_in_one_pass(q, pages, random(3, 32), None)


def test_pages_and_new_tokens_that_do_not_fit_are_refused():
    """Would catch: memory written beyond a page's end, and numbers without their scales."""
    k = random(2, 2, 16)
    k_pages, v_pages, scales = empty_pages(2, 2, 16, torch.int8)
    slots = torch.tensor([0, 1])

    def refused(message, *pages, x=k, slots=slots, kv_scales=None):
        with pytest.raises(ValueError, match=message):
            write_kv(*pages, x, x, slots, kv_scales=kv_scales)

    refused("torch.int8 need kv_scales", k_pages, v_pages)
    refused("kv_scales are for pages of int8", k_pages.float(), v_pages.float(), kv_scales=scales)
    refused(r"kv_scales \(2, 1, 32\)", k_pages, v_pages, kv_scales=(scales[0][:, :1].contiguous(), scales[1]))
    refused("must be alike", k_pages, v_pages.float(), kv_scales=scales)
    refused("multiple of 16", torch.zeros(2, 2, 24, 16), torch.zeros(2, 2, 24, 16))
    refused("must be contiguous", *(torch.zeros(2, 32, 2, 16).transpose(1, 2) for _ in "kv"))
    refused(r"k \(2, 3, 16\) for k_pages", k_pages, v_pages, x=random(2, 3, 16), kv_scales=scales)
    refused(r"k \(2, 2, 8\) for k_pages", k_pages, v_pages, x=random(2, 2, 8), kv_scales=scales)
    refused("k torch.int64", k_pages, v_pages, x=k.long(), kv_scales=scales)
    refused("must be \\(N,\\) int64", k_pages, v_pages, slots=slots.int(), kv_scales=scales)
    refused(r"rows \(2,\)", k_pages, v_pages, slots=slots[:1], kv_scales=scales)
    plan = Plan([1], [1], page_table=[[0]], page_tokens=32)
    with pytest.raises(ValueError, match="need kv_scales"):
        attend_paged(random(1, 2, 16), k_pages, v_pages, plan, scale=1.0)


def test_heads_of_other_kinds_are_not_written_in_one_pass(monkeypatch):
    """Would catch: weights in fp32 that are taken for numbers of bf16."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "serves", lambda *tensors: True)
    q, k, cos = (random(*shape).bfloat16() for shape in ((2, 3, 32), (2, 1, 32), (2, 32)))
    pages, rows, weights = torch.zeros(1, 1, 16, 32, dtype=torch.bfloat16), torch.arange(2), random(4, 32)

    def refused(message, **given):
        given = {"cos": cos, "sin": cos, "norm_weights": weights.bfloat16()} | given
        with pytest.raises(ValueError, match=message):
            norm_rotate_write(q, k, k, pages, pages.clone(), rows, **given)

    refused("norm_weights torch.float32 on cpu must be alike", norm_weights=weights)
    refused("sin torch.float32 on cpu", sin=cos.float())
    refused(r"norm_weights \(3, 32\) for q \(2, 3, 32\)", norm_weights=weights[:3].bfloat16())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.arange(4, dtype=torch.int32), "rows torch.int32"),
        (torch.arange(16)[::4], r"stride \(4,\)"),
        (torch.arange(4)[:, None], r"rows \(4, 1\)"),
        (torch.arange(3), r"rows \(3,\)"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_written_to(rows, message):
    """Would catch: numbers of another width read as rows: writes anywhere in memory."""
    pages, x = torch.zeros(2, 2, 16, 16), torch.ones(2, 2, 16)
    with pytest.raises(ValueError, match=message):
        kv.write_rows(pages, pages.clone(), x, x, rows)
    assert not pages.any()


@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("wrong", [-1, -(10**9), 64, 10**9])
def test_rows_outside_the_pages_are_refused(wrong, stored):
    """Would catch: numbers written anywhere in memory, or from the end as torch counts."""
    k_pages, v_pages, scales = empty_pages(1, 2, 16, stored)
    rows, x = torch.arange(8), torch.ones(4, 2, 16)
    kv.write_rows(k_pages, v_pages, x, x, rows + 56, kv_scales=scales)  # the last there are
    rows[5] = wrong
    with pytest.raises(ValueError, match=rf"row.*{wrong}.*64|rows from.*to.*63"):
        kv.write_rows(k_pages, v_pages, x, x, rows, kv_scales=scales)


def test_one_pass_is_a_gpus(form):
    """Would catch: a search for a GPU's driver on a machine without one."""
    if form == "triton":
        pytest.skip("served there")
    pages, x, cos = torch.zeros(1, 2, 16, 16), torch.ones(2, 2, 16), torch.ones(2, 16)
    with pytest.raises(ValueError, match=r"q \(2, 2, 16\) torch.float32 on cpu is norm_rotate_write's where"):
        norm_rotate_write(x, x, x, pages, pages.clone(), torch.arange(4), cos=cos, sin=cos)
