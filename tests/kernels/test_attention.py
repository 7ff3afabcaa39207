"""Attention against a float64 loop, its gradients, and equal bits from packs and pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.kernels import attention, native
from rlhf.kernels.attention import Plan, attend_paged, packed_attention, paged_attention
from rlhf.kernels.kv import write_kv

HEADS = [(4, 4), (6, 2), (5, 1)]
OPTIONS = [
    {},
    {"window": 9},
    {"window": 150},
    {"softcap": 3.0},
    {"sinks": True},
    {"window": 5, "softcap": 2.0},
]
LENGTHS = [5, 1, 30, 17, 33, 2, 150]


pytestmark = pytest.mark.usefixtures("form")


def slow(q, k, v, lengths, scale, window=None, softcap=None, sinks=None):
    """The definition: one sequence, one query head, one query at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    start = 0
    for n in lengths:
        for h in range(q.shape[1]):
            for t in range(n):
                first = 0 if window is None else max(0, t - window + 1)
                keys = slice(start + first, start + t + 1)
                scores = k[keys, h // group] @ q[start + t, h] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                probs = scores.softmax(0)[: t + 1 - first]
                out[start + t, h] = probs @ v[keys, h // group]
        start += n
    return out


def slow_blocks(q, k, v, lengths, scale, mask, block, window=None, softcap=None, sinks=None):
    """The same under a block mask (S, Qb, Kb): one query after another, of only the keys that it sees."""
    group, outputs, start = q.shape[1] // k.shape[1], [], 0
    for s, n in enumerate(lengths):
        for t in range(n):
            first = 0 if window is None else max(0, t - window + 1)
            keys = [start + j for j in range(first, t + 1) if mask[s, t // block, j // block]]
            if not keys:
                outputs.append(torch.zeros(q.shape[1], v.shape[-1], dtype=q.dtype))
                continue
            heads = torch.arange(q.shape[1]) // group
            scores = (k[keys][:, heads] * q[start + t]).sum(-1).T * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores if sinks is None else torch.cat([scores, sinks[:, None]], 1)
            probs = scores.softmax(1)[:, : len(keys)]
            outputs.append((probs.T[..., None] * v[keys][:, heads]).sum(0))
        start += n
    return torch.stack(outputs)


def make(lengths, heads, dtype=torch.float32, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return [
        torch.randn(n, h, dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads[0], heads[1], heads[1])
    ]


def with_sinks(options, heads, dtype):
    if options.get("sinks") is True:
        return {**options, "sinks": torch.linspace(-1, 1, heads, dtype=dtype)}
    return options


def ends(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_values_and_gradients(heads, options, monkeypatch):
    """Would catch: a window off by one, heads matched to the wrong keys, a gradient lost at a cut between
    pieces.
    """
    monkeypatch.setattr(attention, "_MAX_QUERIES", 16)  # several pieces of one sequence
    lengths = [5, 1, 30, 17, 2]
    inputs = [t.requires_grad_() for t in make(lengths, heads, torch.float64, dim=8)]
    options = with_sinks(options, heads[0], torch.float64)
    if "sinks" in options:
        inputs.append(options["sinks"].requires_grad_())
    got = packed_attention(*inputs[:3], ends(lengths), scale=0.4, **options)
    want = slow(*inputs[:3], lengths, 0.4, **options)
    assert torch.allclose(got, want, atol=1e-12)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
        assert torch.allclose(a, b, atol=1e-11)


def test_gradient_of_whole_sequences():
    """Would catch: a wrong order of keys on the shorter way back, where every sequence is one piece."""
    lengths = [3, 9, 40, 1]
    inputs = [t.requires_grad_() for t in make(lengths, (4, 2), torch.float64, dim=8)]
    assert Plan(lengths, lengths).layout(2, 2, None).key_order is not None
    grad = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    got = torch.autograd.grad(packed_attention(*inputs, ends(lengths), scale=0.4), inputs, grad)
    want = torch.autograd.grad(slow(*inputs, lengths, 0.4), inputs, grad)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, want))


@pytest.mark.parametrize("dim", attention.NATIVE_DIMS)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"sinks": True}], ids=str)
def test_every_head_size_in_fp32(dim, options):
    """Would catch: lanes in a wrong order, a masked lane that counts, an exponential that is off."""
    compare_with_slow(
        make(LENGTHS, (4, 2), torch.float64, dim=dim),
        torch.float32,
        options,
        2e-5 if dim < 256 else 4e-5,
        2e-4,
    )


@pytest.mark.parametrize("heads", [(8, 1), (16, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_and_bf16(dtype, heads):
    """Would catch: rows of a group taken for queries, gradients of bf16 that are added up in bf16."""
    inputs = [x.to(dtype).double() for x in make(LENGTHS, heads, torch.float64, dim=32)]
    tolerance, of_grad = (2e-5, 2e-4) if dtype == torch.float32 else (2e-2, 5e-2)
    of_grad *= max(1.0, heads[0] / heads[1] / 4) ** 0.5  # as many heads' roundings add up in the gradient of a key
    compare_with_slow(inputs, dtype, {"window": 20, "sinks": True}, tolerance, of_grad)


@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": True}], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 32), ((4, 1), 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_and_gradients(dtype, heads, dim, options):
    """Would catch: probabilities or sums that are rounded on their way, in a form that only a GPU runs; fp16 taken for bf16."""
    lengths = [5, 1, 20, 17]
    inputs = [x.to(dtype).double() for x in make(lengths, heads, torch.float64, dim=dim)]
    tolerances = (1.2e-2, 5e-2) if dtype == torch.bfloat16 else (2e-3, 6e-3)  # of numbers up to 3 and 9
    compare_with_slow(inputs, dtype, options, *tolerances, lengths=lengths, scale=0.3, relative=0.0)


def compare_with_slow(
    inputs, dtype, options, tolerance, grad_tolerance, *, lengths=LENGTHS, scale=0.5, relative=None
):
    """Values and gradients of q, k, v and the sinks against the definition in float64."""
    wide = [*inputs, with_sinks(options, inputs[0].shape[1], torch.float64).get("sinks")]
    wide = [x.requires_grad_() for x in wide if x is not None]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]

    def of(x):
        return options | {"sinks": x[3]} if len(x) > 3 else options

    got = packed_attention(*narrow[:3], ends(lengths), scale=scale, **of(narrow))
    want = slow(*wide[:3], lengths, scale, **of(wide))
    assert torch.allclose(got.double(), want, atol=tolerance)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(got, narrow, grad.to(got.dtype))
    for a, b in zip(found, torch.autograd.grad(want, wide, grad.to(got.dtype).double())):
        relatively = tolerance if relative is None else relative
        assert torch.allclose(a.double(), b, atol=grad_tolerance, rtol=relatively), (
            (a.double() - b).abs().max()
        )


def test_gradients_of_wide_heads_in_bf16():
    """Would catch: gradients of keys or values that are lost where they are not added up together."""
    inputs = [x.bfloat16().double() for x in make(LENGTHS, (2, 1), torch.float64, dim=160)]
    compare_with_slow(inputs, torch.bfloat16, {"window": 20}, 4e-2, 4e-1)


@pytest.mark.parametrize("shared", [False, True])
def test_threads_change_no_bit(shared, monkeypatch):
    """Would catch: rows that two threads write, or gradients in the order in which threads come."""
    monkeypatch.setattr(attention, "_WORTH_THREADS", 0)
    q, k, v = (x.requires_grad_() for x in make(LENGTHS, (4, 2), dim=48))
    lens = np.asarray(LENGTHS)
    plan = Plan(lens, lens)
    if shared:  # all but the first go on from its first three tokens
        plan = Plan(lens, lens + np.where(np.arange(len(lens)), 3, 0), prefix_starts=np.zeros(len(lens), int))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = attention.attend_packed(q, k, v, plan, scale=0.3)
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_sinks_alone_are_trained():
    """Would catch: a result without gradient where everything but the sinks is frozen."""
    q, k, v = make([5, 9], (4, 2))
    sinks = torch.zeros(4, requires_grad=True)
    packed_attention(q, k, v, [0, 5, 14], scale=0.3, sinks=sinks).square().sum().backward()
    assert sinks.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_the_arithmetics(dtype):
    """Would catch: memory of another size than it is written with."""
    q, k, v = (x.requires_grad_() for x in make([50, 9], (4, 2), dim=32))
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            out = packed_attention(q, k, v, [0, 50, 59], scale=0.3, sinks=torch.ones(4, dtype=torch.float32))
            results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_scores_far_apart_and_all_equal():
    """Would catch: an exponential that overflows, underflows into a denormal, or a sum of probabilities that is not 1."""
    q, k, v = make([40, 3], (4, 2), dim=32)
    for scale in (0.0, 40.0, 1e4):
        got = packed_attention(q, k, v, ends([40, 3]), scale=scale)
        want = slow(q.double(), k.double(), v.double(), [40, 3], scale)
        assert torch.allclose(got.double(), want, atol=2e-5), scale


class Pages:
    """Keys and values of some sequences, scattered over pages in random order."""

    def __init__(self, k, v, lengths, page_tokens, seed=0):
        counts = [-(-n // page_tokens) for n in lengths]
        order = np.random.default_rng(seed).permutation(sum(counts) + 3)
        self.k = torch.full(
            (len(order), k.shape[1], page_tokens, k.shape[2]), 7.0, dtype=k.dtype
        )  # stale, but finite
        self.v = self.k.clone()
        self.table = np.full((len(lengths), max(counts)), -1)
        slots, used = [], 0
        for row, (n, count) in enumerate(zip(lengths, counts)):
            self.table[row, :count] = order[used : used + count]
            used += count
            at = np.arange(n)
            slots.append(self.table[row, at // page_tokens] * page_tokens + at % page_tokens)
        write_kv(self.k, self.v, k, v, torch.from_numpy(np.concatenate(slots)))

    def attend(self, q, query_lens, context_lens, **options):
        return paged_attention(
            q,
            self.k,
            self.v,
            torch.from_numpy(self.table),
            torch.tensor(context_lens),
            torch.tensor(ends(query_lens)),
            **options,
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_pages_give_the_bits_of_the_pack(heads, options, dtype, threads):
    """Would catch: a result that depends on the page size, the batch, the cut of a prefill, or decoding."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = make(LENGTHS, heads, dtype)
        options = {"scale": 0.3, **with_sinks(options, heads[0], torch.float32)}
        expected = packed_attention(q, k, v, ends(LENGTHS), **options)
        last = torch.from_numpy(ends(LENGTHS)[1:] - 1)
        for page_tokens in (16, 64, 256):
            pages = Pages(k, v, LENGTHS, page_tokens)
            assert torch.equal(pages.attend(q, LENGTHS, LENGTHS, **options), expected)
            decoded = pages.attend(q[last], [1] * len(LENGTHS), LENGTHS, **options)
            assert torch.equal(decoded, expected[last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, *attention.NATIVE_DIMS])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_head_size_decodes_in_the_bits_of_the_pack(heads, dim, dtype):
    """Would catch: another order of additions, or another rounding, for rows alone than for rows together."""
    q, k, v = make(LENGTHS, heads, dtype, dim)
    expected, last = packed_attention(q, k, v, ends(LENGTHS), scale=0.3), ends(LENGTHS)[1:] - 1
    pages = Pages(k, v, LENGTHS, 64)
    for count in (1, 2, 3):  # of each sequence's last tokens
        rows = np.concatenate(
            [np.arange(max(end + 1 - count, end + 1 - n), end + 1) for end, n in zip(last, LENGTHS)]
        )
        got = pages.attend(q[rows], [min(count, n) for n in LENGTHS], LENGTHS, scale=0.3)
        assert torch.equal(got, expected[rows])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mixture_of_chunks_gives_the_same_bits(data):
    """Would catch: a token whose result depends on which other tokens share its step."""
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    context = [data.draw(st.integers(1, n)) for n in lengths]
    query = [data.draw(st.integers(1, c)) for c in context]
    heads = data.draw(st.sampled_from(HEADS))
    window = data.draw(st.sampled_from([None, 1, 20, 140]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    q, k, v = make(lengths, heads, dtype, data.draw(st.sampled_from(attention.NATIVE_DIMS)))
    expected = packed_attention(q, k, v, ends(lengths), scale=0.3, window=window)
    chosen = np.concatenate([np.arange(s + c - n, s + c) for s, c, n in zip(ends(lengths), context, query)])
    pages = Pages(k, v, lengths, data.draw(st.sampled_from([16, 32, 128])))
    assert torch.equal(pages.attend(q[chosen], query, context, scale=0.3, window=window), expected[chosen])


def test_repeats_of_the_last_token_get_its_output():
    """Would catch: rows that fill a bucket and change another row, or read rows that do not exist."""
    lengths = [5, 1, 30]
    q, k, v = make(lengths, (4, 2))
    pages = Pages(k, v, lengths, 16)
    expected = packed_attention(q, k, v, ends(lengths), scale=0.3)
    plan = Plan(lengths, lengths, page_table=pages.table, page_tokens=16, num_repeats=4)
    filled = torch.cat([q, q[-1:].expand(4, -1, -1)])
    got = attend_paged(filled, pages.k, pages.v, plan, scale=0.3)
    assert torch.equal(got, torch.cat([expected, expected[-1:].expand(4, -1, -1)]))


@pytest.mark.parametrize("window", [None, 40])
def test_long_sequences_in_bounded_pieces(window, monkeypatch):
    """Would catch: a piece with more scores than allowed, and pieces whose cut changes a bit."""
    lengths = [700, 3, 260]
    q, k, v = make(lengths, (4, 2))
    whole = packed_attention(q, k, v, ends(lengths), scale=0.3, window=window)
    monkeypatch.setattr(attention, "_MAX_SCORES", 1 << 16)
    blocks = Plan(lengths, lengths).layout(2, 2, window).blocks
    assert len(blocks) > 3
    assert max(b.query_rows.numel() * b.num_keys for b in blocks) <= max(1 << 16, 16 * 4 * 704)
    assert torch.equal(packed_attention(q, k, v, ends(lengths), scale=0.3, window=window), whole)


def test_a_window_reads_only_its_own_tiles():
    """Would catch: sliding-window decode that costs as much as full attention."""
    plan = Plan([1], [1000], page_table=np.arange(63)[None], page_tokens=16)
    assert plan.layout(2, 2, 20).blocks[0].num_keys <= 128 + 16
    assert plan.layout(2, 2, None).blocks[0].num_keys == 1008


def test_padding_is_bounded():
    """Would catch: one long context that makes every short one pay."""
    context = [2000] * 3 + [20] * 200
    blocks = (
        Plan([1] * 203, context, page_table=np.zeros((203, 125), int), page_tokens=16)
        .layout(2, 2, None)
        .blocks
    )
    assert sum(b.num_pieces * b.num_keys for b in blocks) < 1.5 * (3 * 2000 + 200 * 32)


def test_other_sequences_are_not_touched_by_nan():
    """Would catch: one bad sequence that poisons the batch through padding."""
    lengths = [7, 12, 3]
    q, k, v = make(lengths, (4, 2))
    expected = packed_attention(q, k, v, ends(lengths), scale=0.3)
    k[7:19] = float("nan")
    got = packed_attention(q, k, v, ends(lengths), scale=0.3)
    keep = torch.tensor([*range(7), *range(19, 22)])
    assert torch.equal(got[keep], expected[keep]) and torch.isnan(got[7:19]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3, 9, 17])
def test_what_a_row_does_not_see_does_not_reach_it(window, dtype):
    """Would catch: rows that are worked on together and multiply another's value by 0, or add its score to a mask."""
    q, k, v = make([40], (4, 2), dtype, dim=32)
    expected = packed_attention(q, k, v, [0, 40], scale=0.3, window=window)
    sees = torch.zeros(40, dtype=torch.bool)
    for at in (5, 39):
        sees[at : 40 if window is None else at + window] = True
    for spoilt, value in ((v, float("inf")), (v, float("nan")), (k, float("nan"))):
        kept = spoilt.clone()
        spoilt[[5, 39], 1, 5] = value  # of the second key head only
        got = packed_attention(q, k, v, [0, 40], scale=0.3, window=window)
        assert torch.equal(got[~sees], expected[~sees]) and torch.equal(got[:, :2], expected[:, :2])
        assert not torch.isfinite(got[sees][:, 2:]).all(-1).any()
        pages = Pages(k, v, [40], 16)
        for first, count in ((0, 12), (12, 20), (19, 1), (30, 10), (39, 1)):  # in chunks
            own = slice(first, first + count)
            chunk = pages.attend(q[own], [count], [first + count], scale=0.3, window=window)
            assert torch.equal(chunk[~sees[own]], expected[own][~sees[own]])
            assert not torch.isfinite(chunk[sees[own]][:, 2:]).all(-1).any()
        spoilt.copy_(kept)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_what_a_row_does_not_see_of_quantised_pages_does_not_reach_it(stored):
    """Would catch: the scale NaN of a later token that is multiplied by 0."""
    q, k, v = make([40], (4, 2), dim=32)
    v[20, 1] = float("nan")
    pages, scales = (
        [torch.zeros(3, 2, 16, 32, dtype=stored) for _ in "kv"],
        [torch.zeros(3, 2, 16) for _ in "kv"],
    )
    write_kv(*pages, k, v, torch.arange(40), kv_scales=tuple(scales))
    for first, count in ((0, 40), (12, 20), (19, 1), (30, 10)):
        plan = Plan([count], [first + count], page_table=[[0, 1, 2]], page_tokens=16)
        got = attend_paged(q[first : first + count], *pages, plan, scale=0.3, kv_scales=tuple(scales))
        finite = torch.isfinite(got).all(-1)
        assert finite[:, :2].all() and finite[: max(20 - first, 0)].all()
        assert not finite[max(20 - first, 0) :, 2:].any()


def test_impossible_plans_are_refused():
    """Would catch: a sequence without queries, or contexts that the pack cannot hold."""
    with pytest.raises(ValueError, match="at least one query"):
        Plan([1, 0], [1, 1])
    with pytest.raises(ValueError, match="needs a page_table"):
        Plan([1], [2])
    with pytest.raises(ValueError, match="page_tokens=24"):
        Plan([1], [2], page_table=[[0]], page_tokens=24)
    for start in (-1, 3):
        with pytest.raises(ValueError, match="a prefix must lie before"):
            Plan([4, 2], [4, 4], prefix_starts=[0, start])
    for queries, repeats in (([1], -1), ([], 1)):
        with pytest.raises(ValueError, match=f"num_repeats={repeats} copies"):
            Plan(queries, queries, num_repeats=repeats)
    with pytest.raises(ValueError, match="33 positions does not fit the page_table of 2 pages of 16"):
        Plan([1, 1], [3, 33], page_table=[[0, 1], [2, 3]], page_tokens=16)


def test_what_does_not_fit_the_plan_is_refused():
    """Would catch: memory beyond a tensor's end, read or written."""
    q, k, v = make([8], (4, 2))
    for count in (7, 9):
        with pytest.raises(ValueError, match=f"8 tokens, and the plan has {count}"):
            attention.attend_packed(q, k, v, Plan([count], [count]), scale=0.3)
    for starts in ([0, 7], [0, 9], [1, 8], [0, 5, 5, 8], [0, 5, 3, 8], [], [[0, 8]]):
        with pytest.raises(ValueError, match=r"cu_seqlens .* for q \(8, 4, 16\)"):
            packed_attention(q, k, v, starts, scale=0.3)
    with pytest.raises(ValueError, match=r"k \(7, 2, 16\) has 7 tokens, and the plan has 8"):
        attention.attend_packed(q, k[:7], v[:7], Plan([8], [8]), scale=0.3)
    with pytest.raises(ValueError, match="window=0 is no number of tokens"):
        packed_attention(q, k, v, [0, 8], scale=0.3, window=0)
    with pytest.raises(ValueError, match="k and v need the same"):
        packed_attention(q[:, :3], k, v, [0, 8], scale=0.3)
    pages = torch.zeros(2, 2, 16, 16)
    with pytest.raises(ValueError, match="the last of them number 2"):
        paged_attention(q[:1], pages, pages, np.asarray([[2]]), [1], [0, 1], scale=0.3)
    with pytest.raises(ValueError, match=r"query_starts .* for q \(1, 4, 16\)"):
        paged_attention(q[:1], pages, pages, np.asarray([[1]]), [1], [0, 2], scale=0.3)
    late = torch.zeros(2 * 2 * 16 * 16 + 1)[1:].view(2, 2, 16, 16)
    for both in ((pages, late), (late, pages)):
        with pytest.raises(ValueError, match="must begin at a multiple of 16 bytes"):
            paged_attention(q[:1], *both, np.asarray([[1]]), [1], [0, 1], scale=0.3)
    with pytest.raises(ValueError, match="slots from 5 to 32 .* places 0 to 31"):
        write_kv(pages, pages.clone(), k[:2], v[:2], torch.tensor([5, 32]))


def test_nothing_at_all_is_nothing():
    """Would catch: a step without tokens that ends the process."""
    empty = torch.zeros(0, 4, 16)
    assert attention.attend_packed(empty, empty, empty, Plan([], []), scale=1.0).shape == empty.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 265])
def test_segments_of_long_contexts_decode_in_the_bits_of_the_pack(window, dtype):
    """Would catch: segments of a long context that are merged otherwise where programs share them out, a window that begins
    within one, and a prompt that several sequences go on from read at the wrong place."""
    prompt, own, page = 260, [20, 290], 32
    contexts = [prompt + own[0], own[1]]
    q, k, v = make([prompt, *own], (2, 1), dtype)
    plan = Plan([prompt, *own], [prompt, *contexts], prefix_starts=[0, 0, 0])
    packed = attention.attend_packed(q, k, v, plan, scale=0.25, window=window)
    pages_each = -(-max(contexts) // page)
    table = np.arange(2 * pages_each)[::-1].copy().reshape(2, -1)
    k_pages, v_pages = (torch.zeros(2 * pages_each, 1, page, 16, dtype=dtype) for _ in "kv")
    ends = [prompt + own[0], prompt + own[0] + own[1]]
    for row, tokens in ((0, range(ends[0])), (1, range(ends[0], ends[1]))):
        tokens, at = torch.tensor(list(tokens)), torch.arange(len(tokens))
        slots = torch.from_numpy(table)[row, at // page] * page + at % page
        write_kv(k_pages, v_pages, k[tokens], v[tokens], slots)
    for count in (1, 9):  # few enough to be shared out, and not
        plan = Plan([count, count], contexts, page_table=table, page_tokens=page)
        rows = [row for end in ends for row in range(end - count, end)]
        got = attend_paged(q[rows], k_pages, v_pages, plan, scale=0.25, window=window)
        assert torch.equal(got, packed[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 140, "sinks": True}], ids=str)
def test_a_mixed_step_gives_the_bits_of_the_pack(options, dtype, form, monkeypatch):
    """Would catch: decoding beside a chunk of a prompt that walks a long context in one program, or has other bits there."""
    lengths, queries = (
        [300, 40, 290, 150, 33],
        [1, 1, 3, 20, 33],
    )  # decode, decode, drafts, a chunk, a whole prompt
    if form == "triton":
        from rlhf.kernels import attention_triton

        monkeypatch.setattr(attention_triton, "SEGMENT", 128)
    q, k, v = make(lengths, (2, 1), dtype)
    options = {"scale": 0.3, **with_sinks(options, 2, torch.float32)}
    packed = packed_attention(q, k, v, ends(lengths), **options)
    pages = Pages(k, v, lengths, 32)
    rows = [np.arange(end - n, end) for end, n in zip(ends(lengths)[1:], queries)]
    step = np.concatenate(rows)
    plan = Plan(queries, lengths, page_table=pages.table, page_tokens=32)
    assert torch.equal(attend_paged(q[step], pages.k, pages.v, plan, **options), packed[step])
    for s in (0, 2, 3):
        alone = Plan(
            queries[s : s + 1], lengths[s : s + 1], page_table=pages.table[s : s + 1], page_tokens=32
        )
        assert torch.equal(attend_paged(q[rows[s]], pages.k, pages.v, alone, **options), packed[rows[s]])
    if form == "triton":
        works = [x for x in plan.made.values() if isinstance(x, attention_triton.Work)]
        (shared,) = (x for x in works if x.shares is not None)
        (whole,) = (x for x in works if x.shares is None)
        assert set(shared.items[:, 3].tolist()) == {0, 1, 2} and set(whole.items[:, 3].tolist()) == {3, 4}
        assert int((shared.shares[:, 5] - shared.shares[:, 4]).max()) <= 128 < 290


@pytest.mark.parametrize("options", [{}, {"window": 290, "sinks": True}], ids=str)
def test_gradients_of_short_answers_to_a_long_prompt_segments(options):
    """Would catch: keys of a prompt that hear of one answer only, or rows whose sums were not kept for the backward."""
    lengths, contexts = [300, 3, 2, 5], [300, 303, 302, 305]
    wide = [x.requires_grad_() for x in make(lengths, (4, 2), torch.float64)]
    sinks = with_sinks(options, 4, torch.float64).get("sinks")
    wide += [] if sinks is None else [sinks.requires_grad_()]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    grad = torch.randn(sum(lengths), 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for inputs in (wide, narrow):
        plan = Plan(lengths, contexts, prefix_starts=[0, 0, 0, 0])
        given = options | ({"sinks": inputs[3]} if len(inputs) > 3 else {})
        out = attention.attend_packed(*inputs[:3], plan, scale=0.25, **given)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))])
    for b, a in zip(*results):
        assert torch.allclose(a.double(), b, atol=2e-4, rtol=1e-4)


BLOCK_LENGTHS = [700, 130, 20]


def block_mask(seed=0, num=6):
    """Sparse, with rows that see nothing, not even themselves."""
    mask = torch.rand(len(BLOCK_LENGTHS), num, num, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 2], mask[0, 1, 0], mask[0, 5, [0, 2, 3]], mask[0, 5, [1, 5]] = False, True, True, False
    mask[1], mask[2] = True, False
    return mask.numpy()


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"sinks": True}], ids=str)
def test_block_mask_values_and_gradients(options):
    """Would catch: a hidden block that is counted, a visible one that is not, a row that sees nothing and becomes NaN or
    passes a gradient on, segments with holes."""
    mask = block_mask()
    wide = [x.requires_grad_() for x in make(BLOCK_LENGTHS, (4, 2), torch.float64)]
    sinks = with_sinks(options, 4, torch.float64).get("sinks")
    wide += [] if sinks is None else [sinks.requires_grad_()]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    grad = torch.randn(sum(BLOCK_LENGTHS), 4, 16, generator=torch.Generator().manual_seed(1)).double()

    def of(inputs):
        return options | ({"sinks": inputs[3]} if len(inputs) > 3 else {})

    want = slow_blocks(*wide[:3], BLOCK_LENGTHS, 0.3, mask, 128, **of(wide))
    plan = Plan(BLOCK_LENGTHS, BLOCK_LENGTHS, block_mask=mask, block=128)
    got = attention.attend_packed(*narrow[:3], plan, scale=0.3, **of(narrow))
    assert torch.allclose(got.double(), want, atol=2e-5)
    assert not got[256:384].any() and not got[830:].any()
    found = torch.autograd.grad(got, narrow, grad.float())
    for a, b in zip(found, torch.autograd.grad(want, wide, grad)):
        assert torch.allclose(a.double(), b, atol=2e-4, rtol=1e-4)
    assert not found[0][256:384].any() and not found[1][830:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 200])
def test_block_mask_from_pages_gives_the_bits_of_the_pack(dtype, window):
    """Would catch: positions of a chunk taken for those of its sequence, bits that depend on what is cut where."""
    mask = block_mask(1)
    q, k, v = make(BLOCK_LENGTHS, (4, 2), dtype)
    pages = Pages(k, v, BLOCK_LENGTHS, 32)
    options = {"scale": 0.3, "window": window}
    plan = Plan(BLOCK_LENGTHS, BLOCK_LENGTHS, block_mask=mask, block=128)
    packed = attention.attend_packed(q, k, v, plan, **options)
    last = ends(BLOCK_LENGTHS)[1:]
    for count in (1, 7, 200):
        counts = [min(count, n) for n in BLOCK_LENGTHS]
        rows = np.concatenate([np.arange(end - n, end) for end, n in zip(last, counts)])
        plan = Plan(counts, BLOCK_LENGTHS, page_table=pages.table, page_tokens=32, block_mask=mask, block=128)
        got = attend_paged(q[rows], pages.k, pages.v, plan, **options)
        assert torch.equal(got, packed[rows])


def test_a_full_block_mask_changes_nothing():
    """Would catch: another order of additions under a mask that hides nothing; larger blocks, shared by the sequences."""
    q, k, v = make(BLOCK_LENGTHS, (4, 2), torch.float64)
    plain = attention.attend_packed(q, k, v, Plan(BLOCK_LENGTHS, BLOCK_LENGTHS), scale=0.3)
    plan = Plan(BLOCK_LENGTHS, BLOCK_LENGTHS, block_mask=np.ones((2, 2), bool), block=384)
    assert torch.allclose(attention.attend_packed(q, k, v, plan, scale=0.3), plain, atol=1e-13)


def test_hidden_blocks_are_not_computed(form):
    """Would catch: a mask that only hides."""
    mask = np.eye(8, dtype=bool)
    mask[:, 0] = True
    plan = Plan([1024], [1024], block_mask=mask, block=128)
    if form == "triton":
        from rlhf.kernels import attention_triton

        tile = attention_triton.tile_of(torch.float32, 16, 16, 2)
        work = attention_triton.work_of(plan, 2, None, tile)
        spans = work.ranges[:, 1] - work.ranges[:, 0]
        assert int(spans.max()) <= 256  # its own block, and the first where that is beside it
        keys = attention_triton.key_work_of(plan, tile.keys)
        readers = keys.readers[keys.blocks[-1, 2] : keys.blocks[-1, 3]].tolist()
        assert readers == [[0, 896, 1024]]
    else:
        assert max(b.num_keys for b in plan.layout(2, 2, None).blocks) <= 256


def test_no_heads_and_no_integers_are_refused():
    """Would catch: a division by no heads in C++, which ends the process, and lengths that are cut off."""
    q, k = torch.zeros(10, 4, 16), torch.zeros(10, 2, 16)
    plan = Plan([10], [10])
    with pytest.raises(ValueError, match=r"q \(10, 0, 16\).*there must be heads"):
        attention.attend_packed(q[:, :0], k, k, plan, scale=0.1)
    for window in (4.5, 4.0, float("nan"), 1 << 63):
        with pytest.raises(ValueError, match=f"window={window} is no number of tokens"):
            attention.attend_packed(q, k, k, plan, scale=0.1, window=window)
    for sizes in ((0, 16), (16, 0)):
        given = q[..., : sizes[0]], k[..., : sizes[0]], k[..., : sizes[1]]
        with pytest.raises(ValueError, match="there must be heads and numbers of them"):
            attention.attend_packed(*given, plan, scale=0.1)
    for lens in ([1.9], torch.tensor([1.0])):
        with pytest.raises(ValueError, match="are integers, not float"):
            Plan(lens, [2])


def test_what_an_operation_does_not_take_is_refused():
    """Would catch: a launch on memory of another size, kind or device than the kernel reads."""
    q, k, v = make([8], (4, 2))
    plan = Plan([8], [8])

    def refused(message, q=q, k=k, v=v, plan=plan, **options):
        with pytest.raises(ValueError, match=message):
            attention.attend_packed(q, k, v, plan, scale=0.3, **options)

    refused(r"q \(8, 64\), k .*must be \(N, Hq, D\)", q=q.flatten(1))
    refused("k and v .N, Hkv, D.", k=k[None])
    refused("k and v must be alike", v=v.bfloat16())
    refused("fp64 meets fp64 only", q=q.double())
    refused("only pages may be quantised", k=k.to(torch.int8), v=v.to(torch.int8))
    refused("all must be on one device", k=k.to("meta"), v=v.to("meta"))
    refused(r"sinks \(3,\)", sinks=torch.zeros(3))
    refused("softcap=0", softcap=0)
    refused("k and v need the same", k=k[..., :8])
    pages = torch.zeros(2, 2, 16, 16)
    paged = Plan([1], [3], page_table=[[-1]], page_tokens=16)
    with pytest.raises(ValueError, match="the first of them number -1"):
        attend_paged(q[:1], pages, pages, paged, scale=0.3)
    with pytest.raises(ValueError, match="as the plan has a page_table"):
        attention.attend_packed(q[:1], k[:1], v[:1], paged, scale=0.3)
    with pytest.raises(ValueError, match="pages must be contiguous"):
        attend_paged(q[:1], *(pages.transpose(2, 3).contiguous().transpose(2, 3),) * 2, paged, scale=0.3)
    with pytest.raises(ValueError, match=r"page_table \(2, 1\) for 1 sequences"):
        Plan([1], [3], page_table=[[0], [1]], page_tokens=16)
    with pytest.raises(ValueError, match=r"query_lens \(1,\) and context_lens \(2,\)"):
        Plan([1], [1, 1])
    for mask, message in (
        (np.ones((1, 1), int), "must be bool"),
        (np.ones((3, 1, 1), bool), r"must be bool \(Qb, Kb\) or \(1, Qb, Kb\)"),
        (np.ones((2, 1), bool), "does not reach over a context of 200"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan([200], [200], block_mask=mask)
    with pytest.raises(ValueError, match="block=64 must be a multiple of 128"):
        Plan([8], [8], block_mask=np.ones((1, 1), bool), block=64)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"window": 40}], ids=str)
@pytest.mark.parametrize("heads", HEADS + [(16, 1)])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 32), (torch.float32, 128), (torch.bfloat16, 64)])
def test_samples_that_begin_with_the_same_pages(options, heads, dtype, dim, shared_out):
    """Would catch: a row of a group that reads another's pages, or whose numbers depend on who shares its prompt."""
    # groups of samples: (full pages that they share, contexts); a context may end with the shared pages
    teams = [
        (3, [49, 48, 70, 55, 97]),
        (1, [17, 200, 16]),
        (0, [5]),
        (6, [96] * 5 + [130] * 7),
        (2, [33, 40]),
    ]
    page, lens, table, used = 16, [], [], 0
    for shared, contexts in teams:
        common = list(range(used, used + shared))
        used += shared
        for context in contexts:
            own = -(-context // page) - shared
            table.append(common + list(range(used, used + own)))
            used += own
            lens.append(context)
    width = max(map(len, table))
    order = torch.randperm(used, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[int(order[p]) for p in row] + [0] * (width - len(row)) for row in table])
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(used, heads[1], page, dim, generator=generator).to(dtype) for _ in "kv")
    q = torch.randn(len(lens), heads[0], dim, generator=generator).to(dtype)
    given = dict(options)
    if given.pop("sinks", False):
        given["sinks"] = torch.randn(heads[0], generator=generator)
    plan = Plan([1] * len(lens), lens, page_table=table, page_tokens=page)
    together = attend_paged(q, k, v, plan, scale=0.3, **given)
    for i, length in enumerate(lens):
        alone = Plan([1], [length], page_table=table[i : i + 1], page_tokens=page)
        assert torch.equal(attend_paged(q[i : i + 1], k, v, alone, scale=0.3, **given)[0], together[i]), i


@pytest.mark.skipif(native.library("attention") is None, reason="of the native form")
@pytest.mark.parametrize(
    ("heads", "dim", "stored"),
    [
        ((4, 2), 32, torch.float32),
        ((4, 2), 32, torch.int8),
        ((2, 2), 64, torch.bfloat16),
        ((8, 1), 128, torch.bfloat16),
        ((2, 1), 256, torch.float32),
    ],
)
def test_groups_that_share_pages_decode_in_the_bits_of_each_alone(
    heads, dim, stored, shared_out, monkeypatch
):
    """Would catch: a sample that sees another one's page, a shared part that ends inside a page that is not, a sequence that is
    left out between two groups, and sums in another order where rows are worked on together."""
    if not native.serves("attention", dim, torch.zeros(1)):
        pytest.skip("of the native form")
    page, dtype = 32, torch.float32 if stored == torch.int8 else stored
    # (group, pages that it begins with, contexts): one of 5, one alone, two whose own page is the last or none, two that begin
    # as those do and of which one has guesses, and more than are worked on together
    groups = [
        (0, 2, [70, 65, 64, 131, 90]),
        (1, 0, [33]),
        (2, 3, [96, 97]),
        (3, 1, [40, 50]),
        (4, 4, [129 + i % 31 for i in range(70)]),
    ]
    generator = np.random.default_rng(0)
    tables, lens, begin = [], [], np.zeros(0, np.int64)
    for group, count, tokens in groups:
        begin = generator.permutation(400)[:count] + 400 * group if group != 3 else begin[:count]
        for length in tokens:
            own = 2000 + 10 * len(tables) + np.arange(5)
            tables.append(np.concatenate([begin, own])[:5])
            lens.append(length)
    table, lens = np.stack(tables), np.asarray(lens)
    pages = [
        torch.randn(3000, heads[1], page, dim, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    scales = None
    if stored == torch.int8:
        scales = tuple(torch.rand(3000, heads[1], page) for _ in "kv")
        pages = [x.mul(50).clamp(-127, 127).to(torch.int8) for x in pages]
    pages = [x.to(stored) for x in pages]
    counts = np.ones_like(lens)
    counts[9] = 3  # guesses
    q = torch.randn(int(counts.sum()), heads[0], dim).to(dtype)
    options = {"scale": dim**-0.5, "kv_scales": scales}
    monkeypatch.setattr(attention, "_WORTH_THREADS", 0)
    got = attention.attend_paged(q, *pages, Plan(counts, lens, page_table=table, page_tokens=page), **options)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for s, (begin, end) in enumerate(zip(starts, starts[1:])):
        plan = Plan(counts[s : s + 1], lens[s : s + 1], page_table=table[s : s + 1], page_tokens=page)
        assert torch.equal(got[begin:end], attention.attend_paged(q[begin:end], *pages, plan, **options)), s


def test_gradients_where_a_prefix_begins_inside_a_sequence():
    """Would catch: keys before the prefix that get a gradient of it."""
    lens, contexts, starts = [40, 6], [40, 20], [0, 12]
    q, k, v = (x.requires_grad_() for x in make([46], (4, 2)))
    out = attention.attend_packed(q, k, v, Plan(lens, contexts, prefix_starts=starts), scale=0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(out, (q, k, v), grad)
    whole = [torch.cat([x[:40], x[12:26], x[40:]]).detach().requires_grad_() for x in (q, k, v)]
    own = attention.attend_packed(*whole, Plan([40, 20], [40, 20]), scale=0.3)
    wanted = torch.autograd.grad(torch.cat([own[:40], own[54:]]), whole, grad)
    for got, want in zip(found, wanted):
        joined = torch.cat([want[:40], want[54:]])
        joined[12:26] += want[40:54]
        torch.testing.assert_close(got, joined, atol=2e-5, rtol=1e-4)


def test_a_gradient_is_of_the_plans_tokens_alone():
    """Would catch: gradients of rows that no one has computed, read from memory as it was."""
    q, k, v = (x.requires_grad_() for x in make([8], (4, 2)))
    with pytest.raises(
        ValueError, match=r"q \(8, 4, 16\) and k \(8, 2, 16\) for a plan of 6 tokens and 2 repeats"
    ):
        attention.attend_packed(q, k, v, Plan([6], [6], num_repeats=2), scale=0.3)
