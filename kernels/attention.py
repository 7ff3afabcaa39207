"""Causal attention over packed sequences and over paged keys and values, the same numbers from both.

Here: one plan (which rows of q and of k/v meet in which batched product, built once and shared by all layers)
and one function that attends; packed training batches (differentiable), prefill in any chunks and decode are
plans. A query's output depends on its own q and the k/v of its own positions, bit for bit, because in every
case:

- query rows are padded to a multiple of 4 and keys to a multiple of 16: a row of a product does not see its
  neighbours;
- masked scores are so low that their probabilities are exact zeros, and zeros change no sum;
- probabilities meet values in tiles of 128 absolute positions, added in order.

Arithmetic is in fp32 (fp64 for fp64 inputs). `rlhf.models.probe` checks on the machine at hand that the
products keep the first promise; it needs head_dim >= 8. Not here: how a model reaches these functions
(`rlhf.models.attention`), which page belongs to whom (`rlhf.rollout.cache`). On CUDA attention_triton.py runs, which keeps
the promise in its own way.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.kv import PAGE_STEP, QUANTISED, KvScales, as_bytes, check_pages
from rlhf.kernels.layout import compute_dtype, heads_together, wide
from rlhf.kernels.threads import serial

ROW_STEP = 4  # query rows of one product are padded to a multiple of this
KEY_STEP = PAGE_STEP  # keys are padded to a multiple of this
TILE = 128  # probabilities x values is summed over tiles of this many positions
_MASKED = -1e30
_NOWHERE = 1 << 40  # a position after all others
_MAX_QUERIES = 256  # longest run of one sequence's queries in one product
_MAX_SCORES = 1 << 21  # scores of one product, unless a single run of 16 queries has more
_MAX_KEYS = 1 << 17  # keys of one product, unless one sequence has more
_CHEAP_SCORES = 1 << 15  # padding of this size costs less than one more product
_MASK_KEPT = 1 << 18  # larger masks are made again in every layer
NATIVE_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # attention.cpp has a function for each
_NATIVE_NUMBERS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.float8_e4m3fn: 3,
}  # keys and values there
_NO_MEMORY = 2  # as attention.h has it
_FP32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the default is
_MOST_TRITON_GROUP = 64
MOST_GROUP = 256  # query heads of a key head that attention.cpp takes
_WORTH_THREADS = 1 << 22  # multiplications, from which on they are shared out


@dataclass(frozen=True)
class Block:
    """Pieces of sequences that one batched product serves: S pieces x Hkv heads, R queries x G query heads
    each, L keys.
    """

    num_pieces: int
    num_queries: int  # R
    num_keys: int  # L
    query_rows: torch.Tensor  # (S*Hkv*R*G,) int64, rows of q seen as a table of rows of D
    padding: torch.Tensor | None  # (S*Hkv, R*G, 1) fp32, 0 at rows that only pad or see no key
    has_blind: bool  # whether a row may see no key
    run: int  # positions of one head that are gathered together
    key_rows: torch.Tensor  # (S*Hkv*L / run,) int64, rows of k and v seen as such runs
    query_at: torch.Tensor  # (S or 1, 1, R or 1, 1, 1) int64, a query's position counted from the first key
    key_at: torch.Tensor  # (S or 1, 1, 1, 1, L) int64, a key's, counted likewise
    window: int | None
    mask: torch.Tensor | None  # kept where it is small

    def make_mask(self) -> torch.Tensor:
        """(S or 1, 1, R or 1, 1, L) fp32, 0 where a query may see a key."""
        if self.mask is not None:
            return self.mask
        return _mask(self.query_at, self.key_at, self.window)


@dataclass(frozen=True)
class Layout:
    """Every block of a plan for one (Hkv, G, window) and one way that q lies in memory."""

    blocks: tuple[Block, ...]
    num_rows: int  # of the blocks' outputs, one block after another
    output_rows: torch.Tensor  # (N'*Hq,) int64, where each row of the output lies in those
    key_order: torch.Tensor | None  # (N*Hkv,) int64, the same for keys where each lies in one block only


class Plan:
    """Who attends to what. Sequence s has `query_lens[s]` >= 1 new tokens, the last of its `context_lens[s]`
    positions; the new tokens of all sequences lie one after another in q (N, Hq, D).

    Without pages k and v are (N, Hkv, D) beside q and a context is its queries, before which come, where
    `prefix_starts` is given, the tokens from row `prefix_starts[s]` on: the queries of an earlier sequence that
    this one goes on from, as many as the context lacks. With pages, position p of sequence s lies in page
    `page_table[s, p // page_tokens]`; table entries beyond the context are never read. Unwritten positions of a
    page must be finite (allocate pages with zeros).

    q may end with `num_repeats` more rows, copies of its last token that only fill a bucket of rows: N' = N +
    num_repeats, and their outputs are the last token's.

    `block_mask`, bool (Qb, Kb) or one for each sequence (S, Qb, Kb), says which blocks of `block` positions see each
    other: a query at position p sees a key at position j <= p only where [p // block, j // block] is True. All heads share
    it. What is False is not computed. A query that sees no key at all has output 0 and passes no gradient on. Dao et al. 2022,
    arXiv 2205.14135, section 3.3. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        query_lens: Sequence[int] | np.ndarray | torch.Tensor,
        context_lens: Sequence[int] | np.ndarray | torch.Tensor,
        *,
        page_table: np.ndarray | torch.Tensor | None = None,
        page_tokens: int | None = None,
        prefix_starts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        num_repeats: int = 0,
        block_mask: np.ndarray | torch.Tensor | None = None,
        block: int = TILE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.query_lens, self.context_lens = _ints(query_lens), _ints(context_lens)
        self.page_table = None if page_table is None else _ints(page_table)
        self.prefix_starts = None if prefix_starts is None else _ints(prefix_starts)
        self.page_tokens, self.num_repeats, self.device = page_tokens, num_repeats, torch.device(device)
        self.starts = np.cumsum(self.query_lens) - self.query_lens
        self.num_tokens = int(self.query_lens.sum())
        self.most_queries = int(self.query_lens.max(initial=0))  # of a sequence
        self._layouts: dict[tuple[int, int, int | None, int], Layout] = {}
        self.made: dict[tuple[Any, ...], Any] = {}  # what other forms made of the plan
        self.num_scores = int((self.query_lens * self.context_lens).sum())
        self.arrays = {  # what attention.cpp reads
            "starts": self.starts,
            "query_lens": self.query_lens,
            "context_lens": self.context_lens,
            "page_table": self.page_table,
            "prefix_starts": self.prefix_starts,
        }
        if self.query_lens.ndim != 1 or self.query_lens.shape != self.context_lens.shape:
            raise ValueError(
                f"query_lens {self.query_lens.shape} and context_lens {self.context_lens.shape} must be (S,) both"
            )
        for name, given, ndim in (
            ("page_table", self.page_table, 2),
            ("prefix_starts", self.prefix_starts, 1),
        ):
            if given is not None and (given.ndim != ndim or len(given) != len(self.query_lens)):
                raise ValueError(f"{name} {given.shape} for {len(self.query_lens)} sequences")
        if (self.query_lens < 1).any() or (self.context_lens < self.query_lens).any():
            raise ValueError(
                "every sequence needs at least one query and a context that ends with its queries"
            )
        if num_repeats < 0 or num_repeats and not self.num_tokens:
            raise ValueError(f"num_repeats={num_repeats} copies of the last of {self.num_tokens} tokens")
        self.block = block
        self.block_mask = None if block_mask is None else self._checked(block_mask)
        if self.prefix_starts is not None:
            if self.page_table is not None:
                raise ValueError("prefix_starts and page_table both say where a context begins; give one")
            before = self.context_lens - self.query_lens
            if (self.prefix_starts + before > self.starts).any() or (
                self.prefix_starts[before > 0] < 0
            ).any():
                raise ValueError(
                    f"prefix_starts {self.prefix_starts.tolist()} of {before.tolist()} tokens each: a prefix must lie before the "
                    f"sequence that goes on from it, which begin at {self.starts.tolist()}"
                )
        elif self.page_table is None:
            if (self.context_lens != self.query_lens).any():
                raise ValueError("a context longer than its queries needs a page_table or prefix_starts")
        elif page_tokens is None or page_tokens % KEY_STEP:
            raise ValueError(f"page_tokens={page_tokens} must be a multiple of {KEY_STEP}")
        elif self.context_lens.max(initial=0) > self.page_table.shape[1] * page_tokens:
            raise ValueError(
                f"a context of {self.context_lens.max()} positions does not fit the page_table of "
                f"{self.page_table.shape[1]} pages of {page_tokens} tokens"
            )

    def _checked(self, block_mask: np.ndarray | torch.Tensor) -> np.ndarray:
        """(S, Qb, Kb) bool."""
        mask = np.asarray(block_mask.cpu() if isinstance(block_mask, torch.Tensor) else block_mask)
        longest, num_sequences = int(self.context_lens.max(initial=0)), len(self.context_lens)
        if self.block < TILE or self.block % TILE:
            raise ValueError(f"block={self.block} must be a multiple of {TILE} positions")
        if mask.dtype != bool or mask.ndim not in (2, 3) or mask.ndim == 3 and len(mask) != num_sequences:
            raise ValueError(
                f"block_mask {mask.shape} {mask.dtype} must be bool (Qb, Kb) or ({num_sequences}, Qb, Kb)"
            )
        if min(mask.shape[-2:]) * self.block < longest:
            raise ValueError(
                f"block_mask {mask.shape} of blocks of {self.block} does not reach over a context of {longest} positions"
            )
        if self.prefix_starts is not None:
            raise ValueError(
                "block_mask with prefix_starts is not served; give every sequence its own prefix"
            )
        return np.broadcast_to(mask, (num_sequences, *mask.shape[-2:]))

    @functools.cached_property
    def page_range(self) -> tuple[int, int]:
        """The smallest and the largest number of a page that a context lies in; (0, -1) without pages."""
        if self.page_table is None or not len(self.context_lens):
            return 0, -1
        used = -(-self.context_lens // self.page_tokens)
        pages = self.page_table[np.arange(self.page_table.shape[1]) < used[:, None]]
        return int(pages.min()), int(pages.max())

    def query_runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sequence, first query, number of queries) of runs that one row of the block mask serves; whole sequences
        without one."""
        if self.block_mask is None:
            return np.arange(len(self.query_lens)), np.zeros_like(self.query_lens), self.query_lens
        before = self.context_lens - self.query_lens
        first_block = before // self.block
        seq, number = counted((self.context_lens - 1) // self.block - first_block + 1)
        start = (first_block[seq] + number) * self.block - before[seq]  # a query
        first = np.maximum(start, 0)
        return seq, first, np.minimum(start + self.block, self.query_lens[seq]) - first

    def visible_tiles(self, seq: int, position: int, key_from: int, key_end: int) -> np.ndarray:
        """Of the tiles of TILE positions between two, the first multiple of TILE, those that a query may see."""
        row = self.block_mask[seq, position // self.block]
        tiles = np.arange(key_from // TILE, -(-key_end // TILE))
        return tiles[row[tiles * TILE // self.block]]

    def layout(
        self, num_kv_heads: int, group: int, window: int | None, token_rows: int | None = None
    ) -> Layout:
        """`group` query heads share a key head; a query sees the last `window` positions, itself included. In the
        table that q is, a token's rows begin `token_rows` after those of the token before (None: Hq)."""
        key = (num_kv_heads, group, window, token_rows or num_kv_heads * group)
        if key not in self._layouts:
            self._layouts[key] = self._make_layout(*key)
        return self._layouts[key]

    def _make_layout(self, heads: int, group: int, window: int | None, token_rows: int) -> Layout:
        seq, first, count = self._pieces(heads * group)
        start_at = (self.context_lens - self.query_lens)[seq] + first  # position of a piece's first query
        key_from = (
            np.zeros_like(seq) if window is None else np.maximum(start_at - window + 1, 0) // TILE * TILE
        )
        padded = _round_up(count, ROW_STEP // np.gcd(ROW_STEP, group))
        keys = _round_up(start_at + count - key_from, KEY_STEP)
        tiles: list[np.ndarray] | None = None
        if self.block_mask is not None:
            ends = start_at + count
            tiles = [self.visible_tiles(*piece) for piece in zip(seq, start_at, key_from, ends)]
            over = [t[-1] * TILE + TILE - end if len(t) else 0 for t, end in zip(tiles, ends)]
            lens = np.asarray([len(t) for t in tiles], np.int64) * TILE - np.maximum(over, 0)
            keys, key_from = _round_up(np.maximum(lens, 1), KEY_STEP), np.zeros_like(key_from)
        blocks: list[Block] = []
        output_rows = np.empty((self.num_tokens + self.num_repeats) * heads * group, np.int64)
        offset = 0
        for members, rows, width in _group(padded, keys, heads, group):
            query = np.minimum(np.arange(rows), count[members, None] - 1)  # (S, R), padding repeats the last
            token = (self.starts[seq] + first)[members, None] + query
            head = np.arange(heads)[:, None, None] * group + np.arange(group)  # (Hkv, 1, G)
            query_rows = token[:, None, :, None] * token_rows + head  # (S, Hkv, R, G)
            output = token[:, None, :, None] * (heads * group) + head
            real = np.arange(rows) < count[members, None]
            valid = np.broadcast_to(real[:, None, :, None], query_rows.shape)
            place = offset + np.arange(query_rows.size).reshape(query_rows.shape)
            output_rows[output[valid]] = place[valid]
            offset += query_rows.size
            at = (start_at - key_from)[members]
            at = at[:1, None] + np.arange(rows) if (at == at[0]).all() else at[:, None] + query
            query_at = self._tensor(at[:, None, :, None, None])
            if (count[members] == 1).all():
                query_at = query_at[:, :, :1]
            key_at = self._tensor(np.arange(width)[None])
            key_places = key_from[members, None] + np.arange(width)[None]
            if tiles is not None:
                key_places = _places([tiles[i] for i in members], width)
                key_at = self._tensor(key_places)
            key_at = key_at[:, None, None, None]
            mask = _mask(query_at, key_at, window)
            if tiles is not None:
                sees = (mask == 0).any(-1, keepdim=True).expand(len(members), 1, rows, 1, 1).cpu().numpy()
                valid = valid & sees[..., 0]
            run, key_rows = self._key_rows(seq[members], key_places, width, heads)
            blocks.append(
                Block(
                    num_pieces=len(members),
                    num_queries=rows,
                    num_keys=width,
                    query_rows=self._tensor(query_rows.ravel()),
                    padding=None
                    if valid.all()
                    else self._tensor(valid.astype(np.float32).reshape(len(members) * heads, -1, 1)),
                    has_blind=tiles is not None,
                    run=run,
                    key_rows=self._tensor(key_rows.ravel()),
                    query_at=query_at,
                    key_at=key_at,
                    window=window,
                    mask=mask if mask.numel() <= _MASK_KEPT else None,
                )
            )
        by_token = output_rows.reshape(-1, heads * group)
        by_token[self.num_tokens :] = by_token[self.num_tokens - 1]
        return Layout(
            tuple(blocks), offset, self._tensor(output_rows), self._key_order(blocks, heads, len(seq))
        )

    def _pieces(self, num_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut long runs of queries: (sequence, first query, number of queries) of each piece."""
        if len(self.query_lens) == self.num_tokens:  # decoding: one query each
            whole = np.arange(self.num_tokens)
            return whole, np.zeros_like(whole), self.query_lens
        longest = int(self.context_lens[self.query_lens > 1].max(initial=1))
        size = int(np.clip(_MAX_SCORES // (num_heads * longest), 16, _MAX_QUERIES)) // 16 * 16
        return self.pieces(size)

    def pieces(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sequence, first query, number of queries) of the runs, cut into pieces of at most `size` queries."""
        seq, first, count = self.query_runs()
        run, number = counted(-(-count // size))
        return seq[run], first[run] + number * size, np.minimum(count[run] - number * size, size)

    def _key_rows(
        self, seq: np.ndarray, places: np.ndarray, width: int, heads: int
    ) -> tuple[int, np.ndarray]:
        """The length of a run and (S, Hkv, L / run) rows of the key table for keys at `places` (S, L) of their sequences;
        beyond the context, the last row of the context again.
        """
        last = self.context_lens[seq, None] - 1
        head = np.arange(heads)[:, None]
        if self.page_table is None:
            position = np.minimum(places, last)
            own = position - (self.context_lens - self.query_lens)[seq, None]
            token = self.starts[seq, None] + own
            if self.prefix_starts is not None:
                token = np.where(own < 0, self.prefix_starts[seq, None] + position, token)
            return 1, token[:, None] * heads + head
        whole = width <= self.page_tokens and self.block_mask is None and not places[:, 0].any()
        run = width if whole else math.gcd(width, self.page_tokens, TILE)  # whole: the beginning of a page
        runs = self.page_tokens // run if self.page_tokens % run == 0 else 1
        at = np.minimum(places[:, ::run] // run, last // run)
        page = np.take_along_axis(self.page_table[seq], at // runs, 1)
        return run, (page[:, None] * heads + head) * runs + (at % runs)[:, None]

    def _key_order(self, blocks: list[Block], heads: int, num_pieces: int) -> torch.Tensor | None:
        own_keys = self.page_table is None and self.prefix_starts is None
        if self.block_mask is not None or not own_keys or num_pieces != len(self.query_lens):
            return None
        rows = torch.cat([b.key_rows for b in blocks]).cpu().numpy()
        first_of_row = np.unique(rows, return_index=True)[1]  # what repeats a row after it is padding
        assert len(first_of_row) == self.num_tokens * heads, "every key lies in exactly one block"
        return self._tensor(first_of_row)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _ints(values: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """A copy of its own, without gaps in memory. Raises ValueError for what is no integer."""
    numbers = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise ValueError(f"a plan's lengths, starts and pages are integers, not {numbers.dtype}")
    return numbers.astype(np.int64, order="C")


def _lengths(name: str, starts: Sequence[int] | np.ndarray | torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """(S,) from where sequences begin in q (N, Hq, D), and N after them. Raises ValueError."""
    ints = _ints(starts)
    if ints.ndim != 1 or not len(ints) or ints[0] or ints[-1] != len(q) or (np.diff(ints) < 1).any():
        raise ValueError(
            f"{name} {ints.shape} {ints.tolist()} for q {tuple(q.shape)}: (S + 1,) numbers that begin with 0, increase, and end "
            f"with {len(q)}"
        )
    return np.diff(ints)


def counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 counts[0] times, 1 counts[1] times ...; and how many of the same were before."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _places(tiles: list[np.ndarray], width: int) -> np.ndarray:
    """(S, width) positions in the tiles, one tile after another, and then positions that nobody sees."""
    places = np.full((len(tiles), _round_up(np.asarray(width), TILE)), _NOWHERE)
    for row, own in zip(places, tiles):
        row[: len(own) * TILE] = (own[:, None] * TILE + np.arange(TILE)).ravel()[: len(row)]
    return places[:, :width]


def _round_up(values: np.ndarray, step: int) -> np.ndarray:
    return -(-values // step) * step


def _group(
    queries: np.ndarray, keys: np.ndarray, heads: int, group: int
) -> list[tuple[np.ndarray, int, int]]:
    """Pieces of similar size together: (members, padded queries, padded keys), padding at most half as much
    again as the work itself, or too little to matter."""

    def is_little(waste: int, work: int) -> bool:
        return waste <= work // 2 or waste * heads * group <= _CHEAP_SCORES

    num_pieces, top_r, top_width, work = (
        len(queries),
        int(queries.max()),
        int(keys.max()),
        int(queries @ keys),
    )
    if is_little(num_pieces * top_r * top_width - work, work):  # the usual step of decoding
        order, groups = np.arange(num_pieces), [(num_pieces, top_r, top_width, num_pieces, work)]
    else:
        shape, member_of, counts = np.unique(queries << 32 | keys, return_inverse=True, return_counts=True)
        order = np.argsort(member_of, kind="stable")
        groups = []  # end in `order`, R, L, number of pieces, real scores
        end = 0
        for code, n in zip(shape.tolist(), counts.tolist()):
            r, width, end = code >> 32, code & 0xFFFFFFFF, end + n
            if groups:
                _, last_r, last_width, last_n, last_work = groups[-1]
                top_r, top_width, total = max(r, last_r), max(width, last_width), n + last_n
                work = last_work + n * r * width
                if is_little(total * top_r * top_width - work, work):
                    groups[-1] = (end, top_r, top_width, total, work)
                    continue
            groups.append((end, r, width, n, n * r * width))
    out = []
    start = 0
    for end, r, width, _, _ in groups:
        step = max(1, min(_MAX_SCORES // (r * group), _MAX_KEYS) // (heads * width))
        out += [(order[i : min(i + step, end)], r, width) for i in range(start, end, step)]
        start = end
    return out


def _mask(query_at: torch.Tensor, key_at: torch.Tensor, window: int | None) -> torch.Tensor:
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    mask = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    return mask.masked_fill_(hidden, _MASKED)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: Sequence[int] | np.ndarray | torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within each of the packed sequences [cu_seqlens[s], cu_seqlens[s+1]). Differentiable;
    the backward recomputes the probabilities block by block, so memory stays bounded for long sequences.

    q (N, Hq, D), k (N, Hkv, D), v (N, Hkv, Dv) -> (N, Hq, Dv). scores = softcap * tanh(scale * q k / softcap)
    where softcap is set; a query sees the last `window` positions, itself included; `sinks` (Hq,) are logits
    of an extra key with no value. A NaN, or a value that is infinite, reaches all rows that see it and no others; so may a key
    that is infinite, whose scores are. Gradients of its whole sequence may be NaN.
    """
    lens = _lengths("cu_seqlens", cu_seqlens, q)
    return attend_packed(
        q, k, v, Plan(lens, lens, device=q.device), scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`packed_attention` with a plan that other layers share."""
    _check(q, k, v, plan, window, softcap, sinks)
    if not len(q):
        return q.new_zeros(0, q.shape[1], v.shape[-1])
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if plan.num_repeats or not len(q) == len(k) == plan.num_tokens:
            raise ValueError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} for a plan of {plan.num_tokens} tokens and {plan.num_repeats} "
                "repeats: a gradient needs a row for each token, and no others"
            )
        return _PackedAttention.apply(q.contiguous(), k, v, sinks, plan, scale, window, softcap)
    if is_native(q, k, v, plan, softcap, sinks):
        return _attend_native(q, k, v, plan, scale, window, sinks)
    if _is_triton(q, k, v):
        return _attend_triton(q, k, v, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)[0]
    if native.hollow(*inputs) is not None:
        return _shape_only(q, v, inputs)
    table, token_rows = _table(q)
    layout = plan.layout(k.shape[1], q.shape[1] // k.shape[1], window, token_rows)
    return _attend(table, k, v, layout, scale, softcap, sinks).view(*q.shape[:2], v.shape[-1])


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> torch.Tensor:
    """Attention of new tokens to their contexts in pages; decode, prefill and chunked prefill in any mixture.

    q (N, Hq, D) with sequence s in [query_starts[s], query_starts[s+1]), its tokens the last of its
    context_lens[s] positions, already written; pages (P, Hkv, page, D), with `kv_scales` in the formats of
    `rlhf.kernels.kv`; page_table (S, max pages) -> (N, Hq, D). No gradient. The page size does not change the result.
    Bitwise equal to `packed_attention` of the same sequences; of int8 or fp8 pages to that of their values in fp32, but
    that on CUDA with q in bf16 or fp16 the scales go onto scores and probabilities, which is bitwise equal to itself for
    every cut into chunks.
    """
    if k_pages.dim() != 4:
        raise ValueError(f"k_pages {tuple(k_pages.shape)} must be (P, Hkv, page, D)")
    plan = Plan(
        _lengths("query_starts", query_starts, q),
        context_lens,
        page_table=page_table,
        page_tokens=k_pages.shape[2],
        device=q.device,
    )
    return attend_paged(
        q, k_pages, v_pages, plan,
        scale=scale, window=window, softcap=softcap, sinks=sinks, kv_scales=kv_scales,
    )  # fmt: skip


def attend_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> torch.Tensor:
    """`paged_attention` with a plan that other layers share."""
    check_pages(k_pages, v_pages, kv_scales)
    heads = k_pages.shape[1]
    _check(q, k_pages, v_pages, plan, window, softcap, sinks)
    if not len(q):
        return q.new_zeros(0, q.shape[1], v_pages.shape[-1])
    beside = (sinks, *(kv_scales or ()))
    if is_native(q, k_pages, v_pages, plan, softcap, *beside):
        return _attend_native(q, k_pages, v_pages, plan, scale, window, sinks, kv_scales)
    if _is_triton(q, k_pages, v_pages):
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        return _attend_triton(q, k_pages, v_pages, plan, kv_scales=kv_scales, **options)[0]
    given = (q, k_pages, v_pages, *beside)
    if native.hollow(*given) is not None:
        return _shape_only(q, v_pages, given)
    with torch.no_grad():
        table, token_rows = _table(q)
        layout = plan.layout(heads, q.shape[1] // heads, window, token_rows)
        out = _attend(table, k_pages, v_pages, layout, scale, softcap, sinks, kv_scales)
    return out.view(*q.shape[:2], v_pages.shape[-1])


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise ValueError for what does not fit together; k and v (N, Hkv, D), or pages (P, Hkv, page, D) that `check_pages`
    has seen."""
    shape, keys, values = q.shape, k.shape, v.shape
    if len(shape) != 3 or len(keys) != (3 if plan.page_table is None else 4) or len(values) != len(keys):
        kind = (
            "(N, Hkv, D)"
            if plan.page_table is None
            else "pages (P, Hkv, page, D), as the plan has a page_table"
        )
        raise ValueError(
            f"q {tuple(shape)}, k {tuple(keys)}, v {tuple(values)}: q must be (N, Hq, D), k and v {kind}"
        )
    num_rows = plan.num_tokens + plan.num_repeats
    if shape[0] != num_rows:
        raise ValueError(f"q {tuple(shape)} has {len(q)} tokens, and the plan has {num_rows}")
    some = shape[1] and keys[1] and shape[2] and values[-1]
    if not some or shape[1] % keys[1] or shape[2] != keys[-1] or keys[:-1] != values[:-1]:
        shapes = f"q {tuple(shape)}, k {tuple(keys)}, v {tuple(values)}"
        raise ValueError(
            f"{shapes}: there must be heads and numbers of them, k and v need the same heads, which divide q's, and k needs "
            "q's size"
        )
    own, stored = q.dtype, k.dtype
    unlike = own != stored and compute_dtype(own) != compute_dtype(stored)
    if not own.is_floating_point or stored != v.dtype or unlike:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: k and v must be alike, and fp64 meets fp64 only"
        )
    if len(keys) == 3 and not stored.is_floating_point:
        raise ValueError(f"k {tuple(keys)} {k.dtype}: only pages may be quantised")
    device = q.device
    if not k.device == v.device == device or plan.device.type != device.type:
        raise ValueError(
            f"q on {device}, k on {k.device}, v on {v.device}, the plan for {plan.device}: all must be on one device"
        )
    if window is not None and not (isinstance(window, Integral) and 1 <= window < _NOWHERE):
        raise ValueError(
            f"window={window!r} is no number of tokens; give a whole number from 1 on, or None for all"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0, or None")
    if sinks is not None and (sinks.shape != shape[1:2] or sinks.device != device):
        raise ValueError(
            f"sinks {tuple(sinks.shape)} on {sinks.device} for q {tuple(shape)} on {device}: one for each query head"
        )
    if plan.page_table is None:
        if keys[0] < plan.num_tokens:
            raise ValueError(f"k {tuple(keys)} has {len(k)} tokens, and the plan has {plan.num_tokens}")
        return
    check_paged(plan, k)


def check_paged(plan: Plan, pages: torch.Tensor) -> None:
    """Raise ValueError for pages (P, Hkv, page, D) that the plan's page table does not fit."""
    keys, (lowest, highest) = pages.shape, plan.page_range
    if keys[2] != plan.page_tokens or highest >= keys[0] or lowest < 0:
        raise ValueError(
            f"pages {tuple(keys)} for a plan with pages of {plan.page_tokens} tokens, the first of them number {lowest}, "
            f"the last of them number {highest}"
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, H, D) -> (N*H, D)."""
    return x.reshape(-1, x.shape[-1])


def _table(q: torch.Tensor) -> tuple[torch.Tensor, int]:
    """q (N, H, D) as a table of rows of D, and how many rows lie between a token's and the next one's: without a
    copy where its heads lie beside others in memory."""
    num_tokens, heads, dim = q.shape
    token_rows = q.stride(0) // dim
    if num_tokens and q.stride() == (token_rows * dim, dim, 1):
        return q.as_strided(((num_tokens - 1) * token_rows + heads, dim), (dim, 1)), token_rows
    return _rows(q), heads


def _runs(x: torch.Tensor, run: int) -> torch.Tensor:
    """Pages (P, Hkv, page, D), or k and v (N, Hkv, D), as a table with `run` positions of one head a row."""
    if x.dim() == 3:
        return _rows(x)
    page_tokens, dim = x.shape[2:]
    if page_tokens % run:
        return x.view(-1, page_tokens * dim)[:, : run * dim]
    return x.view(-1, run * dim)


def _gather(table: torch.Tensor, rows: torch.Tensor, *shape: int) -> torch.Tensor:
    """Rows of a table in the dtype of the arithmetic."""
    return wide(table.index_select(0, rows).view(shape))


_scratch_buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


def _scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, on the CPU in memory that the next block and layer use again: new pages of
    memory cost more than the copy into them."""
    size = math.prod(shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _scratch_buffers.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        buffer = _scratch_buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)


def _gather_scratch(name: str, table: torch.Tensor, rows: torch.Tensor, *shape: int) -> torch.Tensor:
    """`_gather` into scratch memory."""
    given = table.dtype
    table = as_bytes(table)
    place = _scratch(name, (rows.shape[0], table.shape[1]), table.dtype, table.device)
    with serial(place.numel()):
        torch.index_select(table, 0, rows, out=place)
    dtype = compute_dtype(given)
    if dtype != given:
        place = _scratch(name, place.shape, dtype, table.device).copy_(place.view(given))
    return place.view(shape)


def _gather_keys(pages: torch.Tensor, scales: torch.Tensor | None, block: Block, batch: int) -> torch.Tensor:
    """(S*Hkv, L, D) keys or values of a block, times their scales, in scratch memory."""
    shape = (batch, block.num_keys, pages.shape[-1])
    numbers = _gather_scratch("kv", _runs(pages, block.run), block.key_rows, *shape)
    if scales is not None:
        table = _runs(scales[..., None], block.run)
        numbers.mul_(_gather_scratch("scales", table, block.key_rows, *shape[:2], 1))
    return numbers


def _attend(
    q_rows: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_scales: KvScales | None = None,
) -> torch.Tensor:
    """q a table of rows of D; k, v (N, Hkv, D) or pages (P, Hkv, page, D) -> (N*Hq, Dv). No gradient."""
    took("attention", TORCH)
    k_scales, v_scales = kv_scales or (None, None)
    heads, v_dim = k.shape[1], v.shape[-1]
    dtype, device, dim = compute_dtype(q_rows.dtype), q_rows.device, q_rows.shape[-1]
    flat = _scratch("out", (layout.num_rows, v_dim), dtype, device)
    for block, out in zip(layout.blocks, flat.split([b.query_rows.shape[0] for b in layout.blocks])):
        batch = block.num_pieces * heads
        rows = block.query_rows.shape[0] // batch
        qb = _gather_scratch("q", q_rows, block.query_rows, batch, rows, dim)
        kb = _gather_keys(k, k_scales, block, batch)
        scores = _scratch("scores", (batch, rows, block.num_keys), dtype, device)
        _scores(qb, kb, block, heads, scale, softcap, scores)
        probs = _probs(scores, sinks, block, _scratch("probs", scores.shape, dtype, device))
        vb = _gather_keys(v, v_scales, block, batch)
        out = out.view(batch, rows, v_dim)
        _weighted_values(probs, vb, out, block, heads)
        if block.has_blind and block.padding is not None:
            out *= block.padding
    with serial(flat.numel()):
        return flat.index_select(0, layout.output_rows).to(q_rows.dtype)


# -- the native form ---------------------------------------------------------------------------------------------


class AttentionCall(ctypes.Structure):
    """As in attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "sinks", "starts", "query_lens")),
        *((name, ctypes.c_void_p) for name in ("context_lens", "page_table", "prefix_starts")),
        *((name, ctypes.c_void_p) for name in ("grad", "dq", "dk", "dv", "dsinks", "k_scales", "v_scales")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "group", "dim", "q_token", "k_token")),
        *((name, ctypes.c_int64) for name in ("v_token", "table_width", "page_tokens", "window", "threads")),
        ("numbers", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


def _shape_only(q: torch.Tensor, v: torch.Tensor, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The result of tensors of which one has no numbers: it has none."""
    return native.hollow(*given).new_empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)


def is_native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    softcap: float | None,
    *beside: torch.Tensor | None,
) -> bool:
    """Whether attention.cpp serves the call: fp32 or bf16 on a CPU, pages in int8 or fp8 too, heads of a size that it has,
    neither soft cap nor block mask. `beside`: sinks and scales."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and (q.dtype == k.dtype or k.dtype in QUANTISED)
        and k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in NATIVE_DIMS
        and softcap is None
        and plan.block_mask is None
        and q.shape[1] // k.shape[1] <= MOST_GROUP
        and native.plain(q, k, v, *beside)
        and native.library("attention") is not None
    )


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    scale: float,
    window: int | None,
    **tensors: torch.Tensor | None,
) -> AttentionCall:
    """q (N', Hq, D); k, v (N, Hkv, D) or pages (P, Hkv, page, D); sinks (Hq,). It keeps what it points to alive."""
    dim = q.shape[-1]
    q = heads_together(q.detach().float())
    if plan.page_table is None:
        k, v = heads_together(k.detach()), heads_together(v.detach())
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    held = {"q": q, "k": k, "v": v, "sinks": sinks, **tensors}
    addresses = {name: x.data_ptr() for name, x in held.items() if x is not None}
    tokens = {"q_token": q.stride(0), "k_token": k.stride(0), "v_token": v.stride(0)}
    call = of_plan(plan, k, q.shape[1], dim, window=window or 0, scale=scale, **addresses, **tokens)
    call.held = held, plan
    return call


def of_plan(plan: Plan, k: torch.Tensor, heads: int, dim: int, /, **fields: Any) -> AttentionCall:
    """What a plan says, for `heads` of q and k (N, Hkv, D) or pages (P, Hkv, page, D); it is to be kept alive."""
    return AttentionCall(
        **{name: None if x is None else x.ctypes.data for name, x in plan.arrays.items()},
        sequences=len(plan.query_lens),
        heads=k.shape[1],
        group=heads // k.shape[1],
        dim=dim,
        table_width=0 if plan.page_table is None else plan.page_table.shape[1],
        page_tokens=plan.page_tokens or 0,
        threads=torch.get_num_threads() if plan.num_scores * heads * dim > _WORTH_THREADS else 1,
        numbers=_NATIVE_NUMBERS[k.dtype],
        **fields,
    )


def _run(function: str, call: AttentionCall) -> None:
    done = getattr(native.library("attention"), function)(ctypes.byref(call))
    if done == _NO_MEMORY:
        raise MemoryError(f"{function} of {call.sequences} sequences wanted more memory than there is")
    if done:
        raise RuntimeError(f"attention.cpp has no {function} for heads of {call.dim}")


def _attend_native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
    kv_scales: KvScales | None = None,
) -> torch.Tensor:
    """q (N', Hq, D); k, v (N, Hkv, D) or pages (P, Hkv, page, D) -> (N', Hq, D). No gradient."""
    took("attention", NATIVE)
    out = torch.empty(q.shape, **_FP32)
    scales = {} if kv_scales is None else {"k_scales": kv_scales[0], "v_scales": kv_scales[1]}
    _run("attention_forward", _call(q, k, v, sinks, plan, scale, window, out=out, **scales))
    if plan.num_repeats:
        out[plan.num_tokens :] = out[plan.num_tokens - 1]
    return out.to(q.dtype)


def _gradients_native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    plan: Plan,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients to q (N, Hq, D), k and v (N, Hkv, D) and sinks (Hq,) of packed attention, where `grad` is the result's."""
    grad = grad.float().contiguous()
    dq, dk, dv = torch.empty(q.shape, **_FP32), torch.zeros(k.shape, **_FP32), torch.zeros(v.shape, **_FP32)
    dsinks = None if sinks is None else torch.empty(q.shape[:2], **_FP32)
    gradients = {"grad": grad, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    _run("attention_backward", _call(q, k.float(), v.float(), sinks, plan, scale, window, **gradients))
    of_sinks = None if dsinks is None else dsinks.sum(0).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_sinks


# -- the Triton form ---------------------------------------------------------------------------------------------


def _is_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether attention_triton.py serves the call."""
    return (
        gpu.serves(*((q,) if k.dtype in QUANTISED else (q, k, v)))
        and max(q.shape[-1], v.shape[-1]) <= gpu.LARGEST_HEAD
        and gpu.holds_tiles(q, max(q.shape[-1], v.shape[-1]))
        and q.shape[1] // k.shape[1] <= _MOST_TRITON_GROUP
    )


def _attend_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    share_out: bool = True,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result; and without `share_out` what the backward wants to know of every row's sum. `options`: scale, window,
    softcap and sinks."""
    took("attention", TRITON)
    from rlhf.kernels import attention_triton

    if plan.page_table is None:
        k, v = heads_together(k), heads_together(v)
    return attention_triton.forward(heads_together(q), k, v, plan, share_out=share_out, **options)


def _gradients_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logs: torch.Tensor,
    grad: torch.Tensor,
    plan: Plan,
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    from rlhf.kernels import attention_triton

    q, k, v = map(heads_together, (q, k, v))
    return attention_triton.gradients(q, k, v, out, logs, grad, plan, **options)


# -- the torch form ----------------------------------------------------------------------------------------------


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    block: Block,
    heads: int,
    scale: float,
    softcap: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(S*Hkv, R*G, D) x (S*Hkv, L, D) -> masked scores (S*Hkv, R*G, L)."""
    scores = torch.bmm(q, k.transpose(1, 2), out=out)
    by_head = scores.view(block.num_pieces, heads, block.num_queries, -1, block.num_keys)
    if softcap is None:
        with serial(scores.numel()):
            torch.add(block.make_mask(), by_head, alpha=scale, out=by_head)
    else:
        by_head.mul_(scale / softcap).tanh_().mul_(softcap).add_(block.make_mask())
    if _not_finite(k) is not None:  # what is not finite stays so whatever is added
        by_head.masked_fill_(block.make_mask() < 0, _MASKED)
    return scores


def _not_finite(x: torch.Tensor) -> torch.Tensor | None:
    """(S*Hkv, L) bool, which keys or values (S*Hkv, L, D) hold a number that is not finite; None where none does. On a
    GPU it waits for the device."""
    with serial(x.numel()):
        return None if torch.isfinite(x.sum()) else ~torch.isfinite(x).all(-1)


def _probs(
    scores: torch.Tensor, sinks: torch.Tensor | None, block: Block, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax over the keys; with sinks, over KEY_STEP columns in front too, of which the first is the
    sink.
    """
    if sinks is None:
        return torch.softmax(scores, -1, out=out)
    batch, rows, _ = scores.shape
    heads = batch // block.num_pieces
    front = scores.new_full((batch, rows, KEY_STEP), _MASKED)
    group = rows // block.num_queries
    by_head = front.view(block.num_pieces, heads, block.num_queries, group, KEY_STEP)
    by_head[..., 0] = sinks.detach().view(heads, 1, group).to(scores.dtype)
    return torch.softmax(torch.cat([front, scores], -1), -1)


def _weighted_values(
    probs: torch.Tensor, v: torch.Tensor, out: torch.Tensor, block: Block, heads: int
) -> None:
    """(S*Hkv, R*G, L) x (S*Hkv, L, Dv) -> out (S*Hkv, R*G, Dv), tile after tile. Of values that are not finite, the rows
    that see one are NaN and the others as if it were 0: 0 times infinity is none."""
    num_keys, wrong = v.shape[1], _not_finite(v)
    if wrong is not None:
        v = v.masked_fill(wrong[..., None], 0.0)
    probs = probs[..., probs.shape[-1] - num_keys :]
    torch.bmm(probs[..., :TILE], v[:, :TILE], out=out)
    for start in range(TILE, num_keys, TILE):
        out.baddbmm_(probs[..., start : start + TILE], v[:, start : start + TILE])
    if wrong is not None:
        of_piece = wrong.view(block.num_pieces, heads, 1, 1, num_keys)
        sees = ((block.make_mask() == 0) & of_piece).any(-1, keepdim=True)
        out.view(block.num_pieces, heads, block.num_queries, -1, out.shape[-1]).masked_fill_(sees, torch.nan)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        plan: Plan,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.plan, ctx.scale, ctx.window, ctx.softcap = plan, scale, window, softcap
        native_serves = is_native(q, k, v, plan, softcap, sinks)
        if not native_serves and _is_triton(q, k, v):
            options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
            out, logs = _attend_triton(q, k, v, plan, share_out=False, **options)
            ctx.save_for_backward(q, k, v, sinks, out, logs)
            return out
        ctx.save_for_backward(q, k, v, sinks)
        if native_serves:
            return _attend_native(q, k, v, plan, scale, window, sinks)
        if native.hollow(q, k, v, sinks) is not None:
            return _shape_only(q, v, (q, k, v, sinks))
        layout = plan.layout(k.shape[1], q.shape[1] // k.shape[1], window)
        out = _attend(_rows(q), k, v, layout, scale, softcap, sinks)
        return out.view(*q.shape[:2], v.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, *of_triton = ctx.saved_tensors
        if of_triton:
            options = {"scale": ctx.scale, "window": ctx.window, "softcap": ctx.softcap, "sinks": sinks}
            of_inputs = _gradients_triton(q, k, v, *of_triton, grad, ctx.plan, **options)
            return *of_inputs, None, None, None, None
        if native.hollow(q, k, v, sinks, grad) is not None:
            of_inputs = (None if x is None else torch.empty_like(x) for x in (q, k, v, sinks))
            return *of_inputs, None, None, None, None
        if is_native(q, k, v, ctx.plan, ctx.softcap, sinks, grad):
            of_inputs = _gradients_native(q, k, v, grad, ctx.plan, ctx.scale, ctx.window, sinks)
            return *of_inputs, None, None, None, None
        heads, layout = k.shape[1], ctx.plan.layout(k.shape[1], q.shape[1] // k.shape[1], ctx.window)
        q_rows, k_rows, v_rows, grad_rows = _rows(q), _rows(k), _rows(v), _rows(grad)
        grads_q, grads_k, grads_v = [], [], []
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for block in layout.blocks:
            batch = block.num_pieces * heads
            qb = _gather(q_rows, block.query_rows, batch, -1, q.shape[-1])
            kb = _gather(k_rows, block.key_rows, batch, block.num_keys, k.shape[-1])
            vb = _gather(v_rows, block.key_rows, batch, block.num_keys, v.shape[-1])
            gb = _gather(grad_rows, block.query_rows, batch, -1, v.shape[-1])
            if block.padding is not None:
                gb *= block.padding
            scores = _scores(qb, kb, block, heads, ctx.scale, ctx.softcap)
            probs = _probs(scores, sinks, block)
            front = probs.shape[-1] - block.num_keys
            grads_v.append(torch.bmm(probs[..., front:].transpose(1, 2), gb))
            grad_probs = torch.bmm(gb, vb.transpose(1, 2))
            if front:
                grad_probs = torch.nn.functional.pad(grad_probs, (front, 0))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            if grad_sinks is not None:
                by_head = grad_scores[..., 0].view(block.num_pieces, heads, block.num_queries, -1)
                grad_sinks += by_head.sum((0, 2)).view(-1).to(grad_sinks.dtype)
                grad_scores = grad_scores[..., front:]
            if ctx.softcap is not None:  # d tanh; masked scores are beyond it and have no gradient
                grad_scores = grad_scores * (1 - (scores / ctx.softcap).clamp_(-1, 1).square_())
            grads_q.append(torch.bmm(grad_scores, kb).mul_(ctx.scale))
            grads_k.append(torch.bmm(grad_scores.transpose(1, 2), qb).mul_(ctx.scale))
        grad_q = _concat(grads_q).index_select(0, layout.output_rows).view(q.shape).to(q.dtype)
        grad_k = _sum_keys(grads_k, layout, k)
        grad_v = _sum_keys(grads_v, layout, v)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None, None


def _concat(parts: list[torch.Tensor]) -> torch.Tensor:
    flat = [_rows(p) for p in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _sum_keys(parts: list[torch.Tensor], layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """Gradients of the blocks' keys back to (N, Hkv, D). Padding keys carry exact zeros."""
    if layout.key_order is not None:
        total = _concat(parts).index_select(0, layout.key_order)
    else:
        total = torch.zeros(
            like.shape[0] * like.shape[1], like.shape[2], dtype=parts[0].dtype, device=like.device
        )
        for part, block in zip(parts, layout.blocks):
            total.index_add_(0, block.key_rows, _rows(part))
    return total.view(like.shape).to(like.dtype)
