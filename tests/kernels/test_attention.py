"""Attention against a float64 loop, its gradients, and equal bits from packs and pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.kernels import attention
from rlhf.kernels.attention import Plan, attend_paged, packed_attention, paged_attention, write_kv

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


@pytest.mark.parametrize("dim", attention._NATIVE_DIMS)
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
    tolerances = (2e-5, 2e-4) if dtype == torch.float32 else (2e-2, 2e-1)
    compare_with_slow(inputs, dtype, {"window": 20, "sinks": True}, *tolerances)


def compare_with_slow(inputs, dtype, options, tolerance, grad_tolerance):
    """Values and gradients of q, k, v and the sinks against the definition in float64."""
    wide = [*inputs, with_sinks(options, inputs[0].shape[1], torch.float64).get("sinks")]
    wide = [x.requires_grad_() for x in wide if x is not None]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]

    def of(x):
        return options | {"sinks": x[3]} if len(x) > 3 else options

    got = packed_attention(*narrow[:3], ends(LENGTHS), scale=0.5, **of(narrow))
    want = slow(*wide[:3], LENGTHS, 0.5, **of(wide))
    assert torch.allclose(got.double(), want, atol=tolerance)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(got, narrow, grad.to(got.dtype))
    for a, b in zip(found, torch.autograd.grad(want, wide, grad.to(got.dtype).double())):
        assert torch.allclose(a.double(), b, atol=grad_tolerance, rtol=tolerance)


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
@pytest.mark.parametrize("dim", [8, *attention._NATIVE_DIMS])
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
    q, k, v = make(lengths, heads, dtype, data.draw(st.sampled_from(attention._NATIVE_DIMS)))
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


@pytest.mark.parametrize("window", [None, 3, 9])
def test_what_a_row_does_not_see_does_not_reach_it(window, form):
    """Would catch: rows that are worked on together and multiply another's value by 0."""
    if form != "native":
        pytest.skip("masked values are multiplied by 0 there")
    q, k, v = make([40], (4, 2), dim=32)
    expected = packed_attention(q, k, v, [0, 40], scale=0.3, window=window)
    v[20] = float("inf")
    got = packed_attention(q, k, v, [0, 40], scale=0.3, window=window)
    sees = torch.zeros(40, dtype=torch.bool)
    sees[20 : 40 if window is None else 20 + window] = True
    assert torch.equal(got[~sees], expected[~sees]) and not torch.isfinite(got[sees]).any()


def test_impossible_plans_are_refused():
    """Would catch: a sequence without queries, or contexts that the pack cannot hold."""
    with pytest.raises(ValueError, match="at least one query"):
        Plan([1, 0], [1, 1])
    with pytest.raises(ValueError, match="needs a page_table"):
        Plan([1], [2])
    with pytest.raises(ValueError, match="page_tokens=24"):
        Plan([1], [2], page_table=[[0]], page_tokens=24)
    with pytest.raises(ValueError, match="33 positions does not fit the page_table of 2 pages of 16"):
        Plan([1, 1], [3, 33], page_table=[[0, 1], [2, 3]], page_tokens=16)


def test_what_does_not_fit_the_plan_is_refused():
    """Would catch: memory beyond a tensor's end, read or written."""
    q, k, v = make([8], (4, 2))
    for count in (7, 9):
        with pytest.raises(ValueError, match=f"8 tokens, and the plan has {count}"):
            packed_attention(q, k, v, [0, count], scale=0.3)
    with pytest.raises(ValueError, match="window=0 lets a query see nothing"):
        packed_attention(q, k, v, [0, 8], scale=0.3, window=0)
    with pytest.raises(ValueError, match="need the same heads"):
        packed_attention(q[:, :3], k, v, [0, 8], scale=0.3)
    pages = torch.zeros(2, 2, 16, 16)
    with pytest.raises(ValueError, match="the last of them number 2"):
        paged_attention(q[:1], pages, pages, np.asarray([[2]]), [1], [0, 1], scale=0.3)
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
