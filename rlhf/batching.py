"""From records to tensors, from a step to micro-batches, from a batch to one packed row of tokens.

Here: the only place where lists become tensors, where the loss mask is decided, and where a step is cut. Not
here: anything that a model computes (`rlhf.logprobs`), nor the order in which data is visited (`rlhf.data`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.records import Batch, Rollout

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class SftExample:
    """One text to imitate. Written by `rlhf.data`."""

    id: str
    prompt_ids: tuple[int, ...]  # read, not learned; at least one token (a text alone starts after <bos>)
    response_ids: tuple[int, ...]  # learned, stop token included
    response_mask: tuple[bool, ...] | None = (
        None  # False = read only (other turns of a chat); None = all is learned
    )


@dataclass(frozen=True)
class PreferenceExample:
    """Two responses to one prompt, of which one is better. Written by `rlhf.data`."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]  # the better one, stop token included
    rejected_ids: tuple[int, ...]
    margin: float | None  # by how much it is better, in units of the reward; None = not known


@dataclass(frozen=True)
class LabelExample:
    """A response that is wanted or not. Written by `rlhf.data`."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # stop token included
    desirable: bool


@dataclass(frozen=True)
class StepExample:
    """A response in steps, each of which was judged. Written by `rlhf.data`."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # no stop token: the last step ends like the others
    step_ends: tuple[int, ...]  # place in response_ids of each step's last token, ascending
    step_labels: tuple[float, ...]  # 0 (wrong) to 1 (right), one for each step


def why_masked(rollout: Rollout, *, mask_truncated: bool, needs_reward: bool = True) -> str | None:
    """Why no token of this response counts in the loss; None if they count."""
    if not any(rollout.response_mask):
        return "the policy wrote none of it"
    if needs_reward and not _is_reward(rollout.reward):
        return f"no reward: {rollout.reward_error or rollout.reward}"
    written = zip(rollout.rollout_logprobs, rollout.response_mask, strict=True)
    if not all(math.isfinite(logprob) for logprob, by_policy in written if by_policy):
        return "the sampler reported a log-prob that is not finite"
    if mask_truncated and rollout.finish_reason != "stop":
        return f"the response did not end by itself (finish_reason={rollout.finish_reason!r})"
    return None


def make_batch(
    rollouts: Sequence[Rollout],
    *,
    group_ids: Sequence[int],
    mask_truncated: bool = False,
    needs_reward: bool = True,
    correct_above: float | None = None,
) -> Batch:
    """One step's responses as tensors on the CPU, in the order given.

    `loss_mask` is `response_mask` without the rows that `why_masked` names; such a row stays (its reward
    still counts in its group's baseline, if there is one) but not in `num_loss_sequences`; without `needs_reward`
    a missing reward is no reason to mask. A missing reward is NaN, a log-prob that is not finite becomes 0. Rows with a
    reward above `correct_above`, the penalty on their length aside, are `right`; with None that is left open. Raises
    ValueError for no rollouts, an empty prompt, or another number of group ids.
    """
    if len(group_ids) != len(rollouts):
        raise ValueError(f"{len(group_ids)} group_ids for {len(rollouts)} rollouts; give one number for each")
    rows = [_Row(r.sample_id, r.prompt.token_ids, r.response_ids, r.response_mask) for r in rollouts]
    masked = [why_masked(r, mask_truncated=mask_truncated, needs_reward=needs_reward) for r in rollouts]
    batch = _from_rows(rows, learn=[reason is None for reason in masked])
    logprobs = torch.zeros(batch.token_ids.shape)
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        logprobs[i, len(row.prompt_ids) : row.length] = torch.tensor(rollout.rollout_logprobs)
    rewards = [r.reward if _is_reward(r.reward) else math.nan for r in rollouts]
    right = None
    if correct_above is not None:
        earned = [reward - r.penalty for reward, r in zip(rewards, rollouts, strict=True)]
        right = torch.tensor([reward > correct_above for reward in earned])
    return recount(
        batch.replace(
            group_ids=torch.tensor(list(group_ids), dtype=torch.long),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            right=right,
            rollout_logprobs=torch.where(batch.response_mask & logprobs.isfinite(), logprobs, 0.0),
        )
    )


def in_batches(rows: Sequence[Any], make: Callable[[Sequence[Any]], Batch]) -> Iterator[Batch]:
    """All rows of a dataset in order, a few hundred to a batch: what is scored at once, however large the set is."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield make([rows[i] for i in range(start, min(start + _ROWS_AT_ONCE, len(rows)))])


def make_sft_batch(examples: Sequence[SftExample]) -> Batch:
    """Texts to imitate as tensors on the CPU, with the loss on the responses.

    Raises ValueError for no examples, an empty prompt or an example with nothing to learn.
    """
    rows = [
        _Row(e.id, e.prompt_ids, e.response_ids, e.response_mask or _all(e.response_ids)) for e in examples
    ]
    return _learned(rows)


def make_preference_batch(examples: Sequence[PreferenceExample]) -> Batch:
    """Pairs as tensors on the CPU: the rows are chosen_0, rejected_0, chosen_1, ..., with the loss on the responses.

    The rows of a pair share their number in `group_ids` and their margin (0 where it is not known); `labels` is 1
    for the chosen and -1 for the rejected one, so `num_loss_sequences` is twice the pairs. Raises ValueError as
    `make_sft_batch` does.
    """
    rows = []
    for e in examples:
        rows.append(_Row(f"{e.id}/chosen", e.prompt_ids, e.chosen_ids, _all(e.chosen_ids)))
        rows.append(_Row(f"{e.id}/rejected", e.prompt_ids, e.rejected_ids, _all(e.rejected_ids)))
    margins = torch.tensor([0.0 if e.margin is None else e.margin for e in examples], dtype=torch.float32)
    return _learned(rows).replace(
        group_ids=torch.arange(len(examples)).repeat_interleave(2),
        labels=torch.tensor([1.0, -1.0]).repeat(len(examples)),
        margins=margins.repeat_interleave(2),
    )


def make_label_batch(examples: Sequence[LabelExample]) -> Batch:
    """Judged responses as tensors on the CPU, `labels` 1 where desirable and -1 where not; the loss on the responses.

    Raises ValueError as `make_sft_batch` does.
    """
    rows = [_Row(e.id, e.prompt_ids, e.response_ids, _all(e.response_ids)) for e in examples]
    labels = torch.tensor([1.0 if e.desirable else -1.0 for e in examples], dtype=torch.float32)
    return _learned(rows).replace(labels=labels)


def make_step_batch(examples: Sequence[StepExample]) -> Batch:
    """Judged steps as tensors on the CPU: `loss_mask` is True and `token_labels` not NaN at the last token of each step.

    `num_loss_tokens` is therefore the number of steps. Raises ValueError as `make_sft_batch` does.
    """
    batch = _learned([_Row(e.id, e.prompt_ids, e.response_ids, _all(e.response_ids)) for e in examples])
    token_labels = torch.full(batch.token_ids.shape, math.nan)
    for i, e in enumerate(examples):
        ends = torch.tensor(e.step_ends, dtype=torch.long)
        assert len(ends) and 0 <= ends.min() and ends.max() < len(e.response_ids), (
            f"{e.id}: step_ends {e.step_ends}"
        )
        token_labels[i, len(e.prompt_ids) + ends] = torch.tensor(e.step_labels, dtype=torch.float32)
    return recount(batch.replace(loss_mask=~token_labels.isnan(), token_labels=token_labels))


def recount(batch: Batch) -> Batch:
    """The batch as a whole optimiser step of its own: the global counts are those of its loss mask."""
    tokens = batch.loss_mask.sum(-1)
    return batch.replace(
        num_loss_tokens=int(tokens.sum()),
        num_loss_sequences=int((tokens > 0).sum()),
        num_positive_tokens=0 if batch.right is None else int(tokens[batch.right].sum()),
    )


def split_minibatches(batch: Batch, n: int, *, by_groups: bool) -> list[Batch]:
    """Cut one step's samples into n optimiser steps, in order, as evenly as whole units go.

    A unit is a row, or with `by_groups` all rows of a group, wherever they stand. Each part has its own
    global counts. Raises ValueError if there are fewer units than parts.
    """
    units: dict[int, list[int]] = {}
    for row in range(len(batch)):
        unit = int(batch.group_ids[row]) if by_groups and batch.group_ids is not None else row
        units.setdefault(unit, []).append(row)
    if not 1 <= n <= len(units):
        kind = "groups" if by_groups else "rows"
        raise ValueError(f"{n} minibatches from {len(units)} {kind}; use 1 to {len(units)}")
    rows = list(units.values())
    cuts = [len(rows) * i // n for i in range(n + 1)]
    parts = [sorted(row for unit in rows[a:b] for row in unit) for a, b in zip(cuts, cuts[1:], strict=False)]
    return [recount(batch.select(part)) for part in parts]


def plan_micro_batches(
    lengths: Sequence[int], *, num_processes: int, max_tokens: int, units: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Which rows each process takes in each of its micro-batches: [process][micro-batch] -> rows, ascending.

    lengths (B,) in tokens; units (B,) numbers the unit of each row: rows of one unit (the two of a pair) are never
    parted; without it each row is one. Every row is in exactly one place, and every process has the same number of
    micro-batches, at least one (an empty list where nothing is left). None holds more than `max_tokens`
    tokens, except a longer unit, which is alone. As few micro-batches as longest-first packing into the least
    full one finds; those of one position are about equally full on all processes, which wait for each other.
    A function of the arguments alone. Raises ValueError for less than one process or token, and for another number of
    units than of lengths.
    """
    _check_bounds(num_processes, max_tokens)
    if units is not None and len(units) != len(lengths):
        raise ValueError(f"{len(units)} units for {len(lengths)} lengths; give one number for each row")
    rows_of: dict[int, list[int]] = {}
    for row, unit in enumerate(range(len(lengths)) if units is None else units):
        rows_of.setdefault(unit, []).append(row)
    groups = list(rows_of.values())
    plan = _plan([sum(lengths[r] for r in rows) for rows in groups], num_processes, max_tokens)
    return [[sorted(r for unit in micro for r in groups[unit]) for micro in process] for process in plan]


def plan_groups(batch: Batch, *, num_processes: int, max_tokens: int) -> list[list[list[int]]]:
    """`plan_micro_batches` for a batch whose groups run their prompt once, as `pack` does with `share_prompts`.

    Rows of one group that begin alike stay side by side in one micro-batch, and count as what is run of them: the
    prompt once, and every response. They are parted where they exceed `max_tokens`, where a process would otherwise have
    nothing to do, and where the processes, which wait for each other, are done sooner for it; each part runs the
    prompt again. Without such rows the plan is that of `plan_micro_batches`. Raises ValueError as that does.
    """
    _check_bounds(num_processes, max_tokens)
    units = _shared_units(batch)
    count, fastest, best = len(units), math.inf, []
    while True:
        parts = _parted(units, count, max_tokens)
        tokens = [part.tokens for part in parts]
        if sum(tokens) >= fastest * num_processes:  # no plan of these or more parts is faster
            return best
        plan = _plan(tokens, num_processes, max_tokens)
        bins = num_processes * len(plan[0])
        idle = len(parts) < min(bins, len(batch))
        time = sum(max(sum(tokens[u] for u in micro) for micro in at) for at in zip(*plan, strict=True))
        if not idle and time < fastest:
            fastest = time
            best = [[[row for u in micro for row in parts[u].rows] for micro in process] for process in plan]
        if len(parts) == len(batch):
            return best
        count = bins if idle else len(parts) + bins


@dataclass(frozen=True)
class _Unit:
    """Rows that begin with the same tokens, which run once where the rows stand side by side."""

    rows: tuple[int, ...]
    rests: tuple[int, ...]  # tokens of each row beside those
    shared: int = 0

    @property
    def tokens(self) -> int:
        return self.shared + sum(self.rests)

    def parted(self, count: int, max_tokens: int) -> list[_Unit]:
        """At least so many parts, about equally long, none longer than `max_tokens` unless it is a row alone."""
        room = max_tokens - self.shared
        needed = math.ceil(sum(self.rests) / room) if room > 0 else len(self.rows)
        count = min(max(count, needed), len(self.rows))
        while (bins := _fill(self.rests, count, room)) is None:
            count += 1
        return [
            _Unit(tuple(self.rows[i] for i in part), tuple(self.rests[i] for i in part), self.shared)
            for part in bins
        ]


def _shared_units(batch: Batch) -> list[_Unit]:
    """The rows of each group that begin alike, and every other row by itself, in the order of their first rows."""
    lengths, groups = batch.lengths, batch.group_ids
    order = groups.argsort(stable=True)
    common = _in_common(batch.token_ids[order], lengths[order], batch.response_mask[order])
    common = torch.where(groups[order][1:] == groups[order][:-1], common, 0)
    rows, tokens = order.tolist(), lengths[order].tolist()
    units, at = [], 0
    for first, end, shared in [*_shared_runs(common.tolist()), (len(rows), len(rows), 0)]:
        units += [_Unit((rows[i],), (tokens[i],)) for i in range(at, first)]
        if shared:
            units.append(_Unit(tuple(rows[first:end]), tuple(n - shared for n in tokens[first:end]), shared))
        at = end
    return sorted(units, key=lambda unit: unit.rows[0])


def _parted(units: Sequence[_Unit], count: int, max_tokens: int) -> list[_Unit]:
    """At least so many parts of the units, or every row alone; the one with the longest parts is parted first."""
    numbers = [1] * len(units)
    longest = [(-unit.tokens, i) for i, unit in enumerate(units) if len(unit.rows) > 1]
    heapq.heapify(longest)
    for _ in range(count - len(units)):
        if not longest:
            break
        _, i = heapq.heappop(longest)
        numbers[i] += 1
        if numbers[i] < len(units[i].rows):
            heapq.heappush(longest, (-units[i].tokens / numbers[i], i))
    return [part for unit, n in zip(units, numbers, strict=True) for part in unit.parted(n, max_tokens)]


def _check_bounds(num_processes: int, max_tokens: int) -> None:
    if num_processes < 1 or max_tokens < 1:
        raise ValueError(f"num_processes={num_processes}, max_tokens={max_tokens}: both must be at least 1")


def _plan(lengths: Sequence[int], num_processes: int, max_tokens: int) -> list[list[list[int]]]:
    """[process][micro-batch] -> units, ascending."""
    filled = sum(min(length, max_tokens) for length in lengths) / max_tokens  # a longer unit fills one alone
    needed = max(filled, sum(2 * length > max_tokens for length in lengths))
    per_process = max(1, math.ceil(needed / num_processes))
    while (bins := _fill(lengths, per_process * num_processes, max_tokens)) is None:
        per_process += 1
    bins.sort(key=lambda units: (-sum(lengths[u] for u in units), units))
    # Fullest first and dealt in turn: neighbours are alike, and no process ends up ahead by more than one's spread.
    return [bins[process::num_processes] for process in range(num_processes)]


def _fill(lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest unit first, each into the least full bin; None if that overfills one. A bin per unit fits."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    least_full = [(0, i) for i in range(num_bins)]
    for unit in sorted(range(len(lengths)), key=lambda u: (-lengths[u], u)):
        tokens, i = heapq.heappop(least_full)
        if bins[i] and tokens + lengths[unit] > max_tokens:
            return None
        bins[i].append(unit)
        heapq.heappush(least_full, (tokens + lengths[unit], i))
    return [sorted(units) for units in bins]


@dataclass(frozen=True)
class PackedSequences:
    """S sequences end to end in one row of N tokens, without padding, and M target tokens among them.

    Where rows begin alike and `pack` may share that, the beginning is a sequence of its own, once, and each row's
    rest a sequence that goes on from it.
    """

    token_ids: torch.Tensor  # (N,) int64
    position_ids: torch.Tensor  # (N,) int64, counted from 0 in each row
    cu_seqlens: torch.Tensor  # (S + 1,) int32, where each sequence starts, and N
    max_seqlen: int  # tokens of the longest row
    target_index: torch.Tensor  # (M,) int64, places in the pack; never a row's first token
    source_index: torch.Tensor  # (M,) int64, places of the tokens before them, which predict them
    rows: torch.Tensor  # (M,) int64, where each target stands in the batch
    cols: torch.Tensor  # (M,) int64
    prefix_starts: torch.Tensor | None = None  # (S,) int64, where what a sequence goes on from starts
    prefix_lens: torch.Tensor | None = None  # (S,) int64, how many tokens that is; 0: it begins by itself


def pack(batch: Batch, targets: torch.Tensor, *, share_prompts: bool = False) -> PackedSequences:
    """The batch's sequences end to end, in row order, and where its targets stand among them.

    targets (B, T) bool marks the tokens whose log-prob is wanted. With `share_prompts`, neighbouring rows that begin
    with the same tokens have them in common, up to the first target: the responses of a group hold their prompt
    once, so do the two of a pair. Raises ValueError for a target at padding or at the first token of a sequence.
    """
    assert targets.shape == batch.token_ids.shape and targets.dtype == torch.bool
    lengths = batch.lengths
    columns = torch.arange(batch.token_ids.shape[1], device=lengths.device)
    real = columns < lengths[:, None]
    assert torch.equal(real, batch.attention_mask), "attention_mask has a gap: sequences must be right-padded"
    if (targets & ~real).any() or targets[:, :1].any():
        row = int(((targets & ~real) | (targets & (columns == 0))).any(-1).nonzero()[0])
        raise ValueError(
            f"sample {batch.sample_ids[row]!r}: a log-prob is wanted of padding or of a sequence's first "
            "token; nothing predicts those; start the sequence with a prompt or <bos>"
        )
    rows, cols = targets.nonzero(as_tuple=True)
    shared = []
    if share_prompts and len(batch) > 1:
        shared = _shared_runs(_in_common(batch.token_ids, lengths, targets).tolist())
    if shared:
        return _pack_shared(batch, shared, rows, cols)
    ends = lengths.cumsum(0)
    target_index = (ends - lengths)[rows] + cols
    return PackedSequences(
        token_ids=batch.token_ids[real],
        position_ids=columns.expand_as(real)[real],
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        max_seqlen=int(lengths.max()) if len(batch) else 0,
        target_index=target_index,
        source_index=target_index - 1,
        rows=rows,
        cols=cols,
    )


_LEAST_SHARED = 8  # tokens; a sequence more in the pack is not worth fewer


def _in_common(token_ids: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B - 1,) int64: with how many tokens, none of them a target, each row and the next begin alike. At least one
    token of every row is left to itself."""
    before_targets = torch.where(targets.any(-1), targets.byte().argmax(-1), lengths - 1)
    room = torch.minimum(before_targets[1:], before_targets[:-1])
    differs = token_ids[1:] != token_ids[:-1]
    return torch.where(differs.any(-1), differs.byte().argmax(-1).minimum(room), room)


def _shared_runs(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """[(first row, row after the last, tokens)] of neighbours that have `tokens` in common, chosen so that as few
    tokens as possible are run: a run's first tokens once, and the rest of each of its rows.

    common[i] is what rows i and i + 1 have in common. No other choice of runs runs fewer, so that what is planned side by
    side (`plan_groups`) shares at least what was planned.
    """
    saved = [0] * (len(common) + 2)  # tokens, from each row on
    runs: list[tuple[int, int] | None] = [None] * (len(common) + 1)
    for row in range(len(common) - 1, -1, -1):
        saved[row], shared = saved[row + 1], common[row]
        for end in range(row + 2, len(common) + 2):
            shared = min(shared, common[end - 2])
            if shared < _LEAST_SHARED:
                break
            if shared * (end - row - 1) + saved[end] >= saved[row]:
                saved[row], runs[row] = shared * (end - row - 1) + saved[end], (end, shared)
    found, row = [], 0
    while row < len(runs):
        if runs[row] is None:
            row += 1
        else:
            end, shared = runs[row]
            found.append((row, end, shared))
            row = end
    return found


def _pack_shared(
    batch: Batch, shared: Sequence[tuple[int, int, int]], rows: torch.Tensor, cols: torch.Tensor
) -> PackedSequences:
    """The pack whose sequences are the shared beginnings, each followed by what its rows go on with."""
    lengths, device = batch.lengths.tolist(), batch.token_ids.device
    share_of = {first: (end, tokens) for first, end, tokens in shared}
    spans: list[tuple[int, int, int]] = []  # row, columns from and to
    prefixes: list[tuple[int, int]] = []  # start in the pack and tokens of what each goes on from
    # Place in the pack that column 0 of a row has by its prefix, and would have by its rest; tokens of the prefix.
    prefix_of, rest_of, prefix_len = torch.zeros(3, len(batch), dtype=torch.long)
    row = at = 0
    while row < len(batch):
        end, tokens = share_of.get(row, (row + 1, 0))
        start = at
        if tokens:
            spans.append((row, 0, tokens))
            prefixes.append((0, 0))
            at += tokens
        for r in range(row, end):
            prefix_of[r], rest_of[r], prefix_len[r] = start, at - tokens, tokens
            spans.append((r, tokens, lengths[r]))
            prefixes.append((start, tokens))
            at += lengths[r] - tokens
        row = end
    ends = torch.tensor([to - since for _, since, to in spans]).cumsum(0)
    starts, lens = torch.tensor(prefixes).T.to(device)
    prefix_of, rest_of, prefix_len = (x.to(device) for x in (prefix_of, rest_of, prefix_len))
    source = cols - 1
    return PackedSequences(
        token_ids=torch.cat([batch.token_ids[r, since:to] for r, since, to in spans]),
        position_ids=torch.cat([torch.arange(since, to, device=device) for _, since, to in spans]),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32),
        max_seqlen=max(lengths),
        target_index=rest_of[rows] + cols,
        source_index=torch.where(source < prefix_len[rows], prefix_of[rows], rest_of[rows]) + source,
        rows=rows,
        cols=cols,
        prefix_starts=starts,
        prefix_lens=lens,
    )


def unpack(packed: PackedSequences, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values (M,) of the targets back at their places in (B, T), the shape of `like`; 0 elsewhere."""
    empty = values.new_zeros(like.shape)
    return empty.index_put((packed.rows, packed.cols), values)


def _is_reward(reward: float | None) -> bool:
    return reward is not None and abs(reward) <= torch.finfo(torch.float32).max  # False for NaN and infinity


@dataclass(frozen=True)
class _Row:
    id: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    response_mask: Sequence[bool]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def _all(response_ids: Sequence[int]) -> tuple[bool, ...]:
    return (True,) * len(response_ids)


def _learned(rows: Sequence[_Row]) -> Batch:
    """Every row counts in the loss, so every row must have something to learn."""
    for row in rows:
        if not any(row.response_mask):
            raise ValueError(f"sample {row.id!r} has no token to learn; leave it out or give it a response")
    return _from_rows(rows, learn=[True] * len(rows))


def _from_rows(rows: Sequence[_Row], *, learn: Sequence[bool]) -> Batch:
    """Right-padded tensors; the rows that are not to be learned have an empty loss mask."""
    if not rows:
        raise ValueError("a batch of 0 samples; there is nothing to train on")
    for row in rows:
        if not row.prompt_ids:
            raise ValueError(
                f"sample {row.id!r} has an empty prompt: nothing predicts its first token; add <bos>"
            )
    shape = len(rows), max(row.length for row in rows)
    token_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        token_ids[i, : row.length] = torch.tensor([*row.prompt_ids, *row.response_ids])
        attention_mask[i, : row.length] = True
        response_mask[i, len(row.prompt_ids) : row.length] = torch.tensor(row.response_mask, dtype=torch.bool)
    return recount(
        Batch(
            sample_ids=tuple(row.id for row in rows),
            token_ids=token_ids,
            attention_mask=attention_mask,
            response_mask=response_mask,
            loss_mask=response_mask & torch.tensor(learn, dtype=torch.bool)[:, None],
            num_loss_tokens=0,
            num_loss_sequences=0,
        )
    )
