import numpy as np
import pytest
import torch

from rlhf.kernels.kv import write_kv
from rlhf.rollout.cache import KVPages, PagePool, free_memory_bytes, prefix_digests


def make_pool(num_pages):
    pool = PagePool(0)
    pool.grow(num_pages)
    return pool


def test_pages_come_back_after_the_last_reference():
    # catches a page freed while a fork still reads it, and one that never comes back
    pool = make_pool(4)
    pages = pool.take(2)
    pool.share(pages, 2)
    for _ in range(2):
        pool.release(pages)
        assert pool.num_in_use == 2
    pool.release(pages)
    assert pool.num_in_use == 0 and pool.num_available == 4
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages[:1])


def test_a_page_is_never_handed_out_twice():
    # catches a free list that loses or doubles pages, over random traffic with sharing and caching
    source = np.random.default_rng(0)
    pool, held, digests = make_pool(16), [], iter(range(10_000))
    for _ in range(2000):
        if held and source.random() < 0.5:
            pool.release(held.pop(source.integers(len(held))))
        else:
            count = int(source.integers(1, 4))
            if count <= pool.num_available:
                pages = pool.take(count)
                held.append(pages)
                if source.random() < 0.5:
                    pool.remember(pages, [str(next(digests)).encode() for _ in pages])
            if held and source.random() < 0.3:
                pool.share(held[0], 1)
                held.append(list(held[0]))
        counts = np.bincount(np.concatenate([*held, []]).astype(int), minlength=16)
        assert (counts == pool.references).all()
        assert pool.num_in_use == (counts > 0).sum()
    for pages in held:
        pool.release(pages)
    assert pool.num_in_use == 0 and sorted(pool.take(16)) == list(range(16))


def test_cached_pages_are_found_until_their_room_is_needed():
    # catches eviction of the wrong page: the least recently used prefix first, its tail before its head
    pool = make_pool(4)
    old, new = pool.take(2), pool.take(2)
    pool.remember(old, [b"old0", b"old1"])
    pool.remember(new, [b"new0", b"new1"])
    pool.release(new)
    pool.release(old)
    again = pool.find([b"new0", b"new1"])  # now more recent than `old`
    assert again == new
    pool.release(again)
    pool.take(1)
    assert pool.find([b"old0", b"old1"]) == old[:1] and pool.num_cached == 3
    assert pool.find([b"new0", b"other"]) == new[:1]


def test_a_page_in_use_is_not_evicted():
    # catches a cached page that is taken from under the sequence that found it
    pool = make_pool(2)
    pages = pool.take(1)
    pool.remember(pages, [b"a"])
    pool.release(pages)
    assert pool.find([b"a"]) == pages
    assert pool.num_available == 1
    assert pool.take(1) != pages


def test_forget_frees_idle_pages_and_keeps_those_in_use():
    pool = make_pool(3)
    pages = pool.take(2)
    pool.remember(pages, [b"a", b"b"])
    pool.release(pages[1:])
    pool.forget()
    assert pool.find([b"a"]) == [] and pool.num_cached == 0 and pool.num_in_use == 1
    pool.release(pages[:1])
    assert pool.num_available == 3


def test_a_known_prefix_keeps_its_page():
    # catches two pages under one digest, of which one could then never be evicted
    pool = make_pool(2)
    first, second = pool.take(1), pool.take(1)
    pool.remember(first, [b"a"])
    pool.remember(second, [b"a"])
    pool.release(first)
    pool.release(second)
    assert pool.find([b"a"]) == first
    pool.release(first)
    assert sorted(pool.take(2)) == [0, 1]


def test_digests_depend_on_version_and_on_everything_before():
    # catches a chain that hashes pages alone (another prompt's page would match) or leaves the version out
    tokens = np.arange(10)
    digests = prefix_digests(3, tokens, 4)
    assert len(digests) == 2  # the last, partial page has none
    assert prefix_digests(3, tokens[:8], 4) == digests
    assert not set(prefix_digests(4, tokens, 4)) & set(digests)
    other = tokens.copy()
    other[0] = 99
    assert not set(prefix_digests(3, other, 4)) & set(digests)


def test_pages_grow_with_their_contents_and_start_at_zero():
    # catches uninitialised memory (0 * NaN in a masked position is NaN) and contents lost in growth
    pages = KVPages([(2, 3), (1, 4)], 4, torch.float32, torch.device("cpu"))
    assert pages.page_bytes == 2 * 4 * 4 * (2 * 3 + 1 * 4)
    pages.grow(2)
    pages.k[1][1] = 7
    pages.grow(50)
    assert pages.num_pages == 50 and (pages.k[1][1] == 7).all()
    assert all((t[2:] == 0).all() for t in (*pages.k, *pages.v))
    pages.clear()
    assert pages.num_pages == 0


def test_copy_takes_only_the_positions_asked_for():
    # catches a fork that copies another page, another layer's page, or too few positions
    pages = KVPages([(1, 2), (1, 2)], 4, torch.float32, torch.device("cpu"))
    pages.grow(4)
    for tensors in (pages.k, pages.v):
        for layer, tensor in enumerate(tensors):
            tensor[1] = layer + 1
    pages.copy([1, 1], [2, 3], 3)
    for tensors in (pages.k, pages.v):
        for layer, tensor in enumerate(tensors):
            assert (tensor[2:, :, :3] == layer + 1).all() and (tensor[2:, :, 3:] == 0).all()
    pages.copy([], [], 0)


def test_free_memory_is_a_number_of_bytes():
    # catches kB taken for bytes: this process alone has more than 1 MB and less than a petabyte
    assert 1 << 20 < free_memory_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_pages_with_scales_grow_are_copied_and_put_by_with_them(dtype):
    # catches numbers that come back under another page's scale, and memory that is not counted
    pages = KVPages([(2, 16)], 16, dtype, torch.device("cpu"))
    assert pages.page_bytes == 2 * 16 * 2 * (16 + 4)
    pages.grow(2)
    x = torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(0))
    write_kv(pages.k[0], pages.v[0], x, -x, torch.arange(16, 32), kv_scales=pages.scales[0])
    pages.grow(5)
    pages.copy([1], [3], 7)
    pages.load(pages.save([1]), [4])

    def held(page):
        return [n[0][page].float() * s[page][..., None] for n, s in zip((pages.k, pages.v), pages.scales[0])]

    for one, part, whole in zip(held(1), held(3), held(4)):
        assert one.abs().max() > 1 and torch.equal(whole, one)
        assert torch.equal(part[:, :7], one[:, :7]) and not part[:, 7:].any()
    pages.clear()
    assert pages.num_pages == len(pages.scales[0][0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_tokens", [0, 5, 32, 83])
def test_positions_go_from_pages_to_pages_of_another_size(dtype, num_tokens):
    """Would catch: positions, heads or scales that change places; scales at an address that they cannot have."""
    shapes = [(1, 3), (2, 5)]  # key heads and their size
    there, here = (KVPages(shapes, size, dtype, torch.device("cpu")) for size in (16, 32))
    there.grow(9)
    here.grow(5)
    torch.manual_seed(0)
    for tensor in there._all():
        tensor.copy_(torch.randint(1, 100, tensor.shape))
    ours, theirs, start = [4, 0, 2], [7, 1, 0, 8, 3, 2], 32 if num_tokens > 32 else 0
    flat = there.read(theirs, num_tokens)
    assert len(flat) == num_tokens * there.token_bytes
    here.write(flat, num_tokens, ours[start // 32 :], start)
    for given, taken in zip(there._all(), here._all(), strict=True):
        for at in range(num_tokens):
            expected = given[theirs[at // 16], :, at % 16] if at >= start else 0 * given[0, :, 0]
            assert torch.equal(taken[ours[at // 32], :, at % 32], expected), at
        used = [(page, at) for page in range(5) for at in range(32) if taken[page, :, at].any()]
        assert len(used) == num_tokens - start, "more was written"
