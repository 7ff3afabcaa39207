"""Lists to tensors, cutting into steps and micro-batches, packing: every token exactly once and in its
place.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.batching import (
    LabelExample,
    PreferenceExample,
    SftExample,
    StepExample,
    make_batch,
    make_label_batch,
    make_preference_batch,
    make_sft_batch,
    make_step_batch,
    pack,
    plan_groups,
    plan_micro_batches,
    split_minibatches,
    unpack,
    why_masked,
)
from rlhf.records import Prompt, Rollout


def _rollout(
    prompt: tuple[int, ...], response: tuple[int, ...], *, mask=None, reward=1.0, **fields
) -> Rollout:
    n = len(response)
    fields = {"finish_reason": "stop", "rollout_logprobs": tuple(-0.5 - i for i in range(n)), **fields}
    return Rollout(
        sample_id=f"0/0/{len(prompt)}{len(response)}",
        prompt=Prompt(id="p", token_ids=prompt, text=""),
        response_ids=response,
        response_mask=mask or (True,) * n,
        policy_versions=(0,) * n,
        reward=reward,
        **fields,
    )


def test_every_entry_stands_at_its_token() -> None:
    """Would catch: log-probs shifted by one, a mask made from token 0, tool tokens in the loss, left
    padding.
    """
    batch = make_batch(
        [_rollout((7, 0), (0, 5, 0), mask=(True, False, True)), _rollout((3,), (4,), reward=-2.0)],
        group_ids=[4, 4],
    )
    assert batch.token_ids.tolist() == [[7, 0, 0, 5, 0], [3, 4, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert torch.equal(batch.loss_mask, batch.response_mask)
    assert batch.rollout_logprobs.tolist() == [[0, 0, -0.5, 0, -2.5], [0, -0.5, 0, 0, 0]]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (3, 2)
    assert batch.rewards.tolist() == [1.0, -2.0] and batch.group_ids.tolist() == [4, 4]
    assert batch.sample_ids == ("0/0/23", "0/0/11")


def test_a_format_reward_makes_no_right_answer() -> None:
    """Would catch: any reward above 0 taken for a right answer, a missing one too; tool tokens or other rows counted."""
    mask = (True, False, True)
    rewards = (1.0, 0.2, None, 0.5, 0.6)
    rollouts = [_rollout((7,), (1, 5, 2), mask=mask, reward=reward) for reward in rewards]
    batch = make_batch(rollouts, group_ids=range(5), correct_above=0.5)
    assert batch.right.tolist() == [True, False, False, False, True] and batch.num_positive_tokens == 4
    parts = split_minibatches(batch, 5, by_groups=False)
    assert [part.num_positive_tokens for part in parts] == [2, 0, 0, 0, 2]
    assert make_batch(rollouts, group_ids=range(5)).right is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": None, "reward_error": "timed out"}, "no reward: timed out"),
        ({"reward": math.nan}, "no reward: nan"),
        ({"reward": -math.inf}, "no reward: -inf"),
        ({"reward": 1e39}, "no reward: 1e"),  # would be infinite in fp32
        ({"rollout_logprobs": (-1.0, math.nan)}, "not finite"),
        ({"rollout_logprobs": (-math.inf, -1.0)}, "not finite"),
        ({"finish_reason": "length"}, "'length'"),
        ({"finish_reason": "aborted"}, "'aborted'"),
    ],
    ids=str,
)
def test_unusable_responses_are_masked_and_not_counted(change: dict, reason: str) -> None:
    """Would catch: a missing reward read as 0, NaN that reaches the loss, a masked row in the denominator."""
    bad = _rollout((1,), (2, 3), **change)
    batch = make_batch([bad, _rollout((1,), (2, 3))], group_ids=[0, 0], mask_truncated=True)
    assert reason in why_masked(bad, mask_truncated=True)
    assert batch.loss_mask.any(-1).tolist() == [False, True]
    assert batch.response_mask.any(-1).tolist() == [True, True]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (2, 1)
    assert batch.rollout_logprobs.isfinite().all()
    assert batch.rewards.isnan().tolist() == ["reward" in change, False]


def test_what_stays_in_the_loss() -> None:
    """Would catch: truncated responses dropped without being asked, tool tokens' log-probs checked, a crash
    on empty.
    """
    truncated = _rollout((1,), (2, 3), finish_reason="length")
    tool = _rollout((1,), (2, 3), mask=(True, False), rollout_logprobs=(-1.0, math.nan))
    batch = make_batch([truncated, tool, _rollout((1,), ())], group_ids=[0, 0, 0])
    assert batch.loss_mask.sum(-1).tolist() == [2, 1, 0]
    assert batch.num_loss_sequences == 2
    assert (
        why_masked(truncated, mask_truncated=False) is None and why_masked(tool, mask_truncated=True) is None
    )
    assert batch.rollout_logprobs.isfinite().all()


def test_sft_learns_the_response_only() -> None:
    """Would catch: loss on the prompt."""
    batch = make_sft_batch([SftExample("a", (1, 2), (3, 4)), SftExample("b", (1,), (5,))])
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (3, 2)
    assert batch.rewards is None and batch.rollout_logprobs is None


def test_sft_learns_only_what_the_mask_marks() -> None:
    """Would catch: loss on the user's turns of a chat, a mask that counts from the prompt, an example that is counted
    without a token to learn.
    """
    chat = SftExample("a", (1, 2), (3, 4, 5, 6), (True, False, False, True))
    batch = make_sft_batch([chat, SftExample("b", (1,), (5,))])
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert torch.equal(batch.response_mask, batch.loss_mask)
    assert batch.attention_mask.sum(-1).tolist() == [6, 2]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (3, 2)
    for empty in (SftExample("c", (1, 2), (3,), (False,)), SftExample("c", (1, 2), ())):
        with pytest.raises(ValueError, match="sample 'c' has no token to learn"):
            make_sft_batch([chat, empty])


def test_pairs_stand_chosen_first_and_share_a_group() -> None:
    """Would catch: chosen and rejected exchanged, the margin on one row only or NaN, pairs counted instead of rows."""
    pairs = [
        PreferenceExample("a", (1, 2), (3,), (4, 5), 0.5),
        PreferenceExample("b", (6,), (7, 8, 9), (8,), None),
    ]
    batch = make_preference_batch(pairs)
    assert batch.sample_ids == ("a/chosen", "a/rejected", "b/chosen", "b/rejected")
    assert batch.token_ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 8, 9], [6, 8, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.labels.tolist() == [1, -1, 1, -1] and batch.labels.dtype == torch.float32
    assert batch.margins.tolist() == [0.5, 0.5, 0, 0] and batch.margins.dtype == torch.float32
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (7, 4)
    second = split_minibatches(batch, 2, by_groups=True)[1]
    assert second.labels.tolist() == [1, -1] and second.num_loss_sequences == 2
    with pytest.raises(ValueError, match="sample 'c/rejected' has no token to learn"):
        make_preference_batch([PreferenceExample("c", (1,), (2,), (), None)])
    with pytest.raises(ValueError, match="batch of 0 samples"):
        make_preference_batch([])


def test_labels_are_signs() -> None:
    """Would catch: undesirable as 0, which a loss that multiplies by the label would leave out."""
    batch = make_label_batch([LabelExample("a", (1,), (2, 3), True), LabelExample("b", (1, 4), (5,), False)])
    assert batch.labels.tolist() == [1, -1]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [0, 0, 1]]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (3, 2)


def test_step_labels_stand_at_the_ends_of_steps() -> None:
    """Would catch: labels counted from the sequence's beginning, a loss on tokens inside a step, steps miscounted."""
    steps = [
        StepExample("a", (1, 2), (3, 4, 5), (0, 2), (1.0, 0.0)),
        StepExample("b", (1,), (6,), (0,), (0.25,)),
    ]
    batch = make_step_batch(steps)
    nan = -1.0
    assert batch.token_labels.nan_to_num(nan).tolist() == [[nan, nan, 1, nan, 0], [nan, 0.25, nan, nan, nan]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert (batch.num_loss_tokens, batch.num_loss_sequences) == (3, 2)
    assert batch.select([1]).token_labels.shape == (1, 2)
    with pytest.raises(AssertionError, match="step_ends"):
        make_step_batch([StepExample("c", (1,), (2,), (1,), (1.0,))])


def test_bad_records_are_refused() -> None:
    """Would catch: an empty prompt, whose first response token has no log-prob, found only on the device."""
    with pytest.raises(ValueError, match="batch of 0 samples"):
        make_batch([], group_ids=[])
    with pytest.raises(ValueError, match="'0/0/02' has an empty prompt"):
        make_batch([_rollout((), (1, 2))], group_ids=[0])
    with pytest.raises(ValueError, match="2 group_ids for 1 rollouts"):
        make_batch([_rollout((1,), (2,))], group_ids=[0, 0])


def test_minibatches_keep_groups_together_and_count_for_themselves() -> None:
    """Would catch: a group torn apart, a row lost, the whole step's token count used for a part of it."""
    rollouts = [_rollout((1,), (2,) * n, reward=None if n == 4 else 0.0) for n in (1, 2, 3, 4, 5, 6)]
    batch = make_batch(rollouts, group_ids=[9, 3, 9, 3, 7, 7])
    first, second = split_minibatches(batch, 2, by_groups=True)
    assert first.group_ids.tolist() == [9, 9] and second.group_ids.tolist() == [3, 3, 7, 7]
    assert (first.num_loss_tokens, second.num_loss_tokens) == (4, 13)
    assert (first.num_loss_sequences, second.num_loss_sequences) == (2, 3)
    rows = split_minibatches(batch, 4, by_groups=False)
    assert [part.sample_ids for part in rows] == [
        batch.sample_ids[a:b] for a, b in [(0, 1), (1, 3), (3, 4), (4, 6)]
    ]
    assert sum(part.num_loss_tokens for part in rows) == batch.num_loss_tokens
    with pytest.raises(ValueError, match="4 minibatches from 3 groups; use 1 to 3"):
        split_minibatches(batch, 4, by_groups=True)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(1, 60))
def test_a_plan_holds_every_row_once_within_the_budget(
    lengths: list[int], processes: int, max_tokens: int
) -> None:
    """Would catch: a lost row, a process with fewer micro-batches (which hangs the others), an overfull
    one, more micro-batches than rows (each empty one costs a forward and a backward).
    """
    plan = plan_micro_batches(lengths, num_processes=processes, max_tokens=max_tokens)
    micros = [rows for process in plan for rows in process]
    assert sorted(row for rows in micros for row in rows) == list(range(len(lengths)))
    assert len(plan) == processes
    assert len({len(process) for process in plan}) == 1 and len(plan[0]) >= 1
    assert len(plan[0]) <= max(1, math.ceil(len(lengths) / processes))
    assert all(sum(lengths[r] for r in rows) <= max_tokens or len(rows) == 1 for rows in micros)
    assert all(rows == sorted(rows) for rows in micros)
    assert plan == plan_micro_batches(tuple(lengths), num_processes=processes, max_tokens=max_tokens)


@given(st.lists(st.integers(20, 200), min_size=64, max_size=128), st.integers(1, 4))
def test_a_plan_is_short_and_balanced(lengths: list[int], processes: int) -> None:
    """Would catch: one row per micro-batch, or a rank that waits half of the step for another."""
    plan = plan_micro_batches(lengths, num_processes=processes, max_tokens=1000)
    assert len(plan[0]) <= math.ceil(sum(lengths) / (1000 * processes)) + 1
    for micro in range(len(plan[0])):
        loads = [sum(lengths[r] for r in process[micro]) for process in plan]
        assert max(loads) - min(loads) <= max(lengths)
    totals = [sum(lengths[r] for rows in process for r in rows) for process in plan]
    assert max(totals) - min(totals) <= max(lengths)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 12)), max_size=40),
    st.integers(1, 5),
    st.integers(1, 120),
)
def test_a_plan_never_parts_a_unit(rows: list[tuple[int, int]], processes: int, max_tokens: int) -> None:
    """Would catch: a pair whose rows land in two micro-batches, which a loss on pairs cannot see together; a budget
    that counts one row of a unit; a unit per row planned otherwise than rows without units.
    """
    lengths, units = [length for length, _ in rows], [unit for _, unit in rows]
    settings = {"num_processes": processes, "max_tokens": max_tokens}
    plan = plan_micro_batches(lengths, units=units, **settings)
    micros = [micro for process in plan for micro in process]
    assert sorted(row for micro in micros for row in micro) == list(range(len(rows)))
    assert all(micro == sorted(micro) for micro in micros)
    assert len(plan) == processes and len({len(process) for process in plan}) == 1 and len(plan[0]) >= 1
    inside = [{units[row] for row in micro} for micro in micros]
    assert sum(map(len, inside)) == len(set(units))
    assert all(
        sum(lengths[r] for r in micro) <= max_tokens or len(its) == 1
        for micro, its in zip(micros, inside, strict=True)
    )
    alone = [7 * row for row in range(len(rows))]
    assert plan_micro_batches(lengths, units=alone, **settings) == plan_micro_batches(lengths, **settings)


def _groups(prompts: list[tuple[int, ...]], responses: list[list[int]], order=sorted):
    """A batch of a group for each prompt, with responses of these lengths that differ from their first token on."""
    rows = [(g, j, n) for g, lengths in enumerate(responses) for j, n in enumerate(lengths)]
    rows = order(rows)
    made = [
        _rollout(prompts[g], (100 + j, *(50 + (7 * i + j) % 40 for i in range(n - 1)))) for g, j, n in rows
    ]
    return make_batch(made, group_ids=[g for g, _, _ in rows])


def _prompt(number: int, length: int, beginning: int = 0) -> tuple[int, ...]:
    """`length` tokens of which the first `beginning` are those of every such prompt."""
    return (1,) * beginning + tuple(2 + (31 * number + i) % 97 for i in range(length - beginning))


def _tokens_run(batch, rows: list[int]) -> int:
    micro = batch.select(rows)
    return len(pack(micro, micro.response_mask, share_prompts=True).token_ids)


_RAGGED = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)


@given(_RAGGED, st.integers(1, 5), st.integers(1, 300), st.sampled_from([0, 20]), st.booleans())
def test_a_plan_of_groups_holds_every_row_once_and_what_is_run_stays_in_the_budget(
    groups, processes: int, max_tokens: int, beginning: int, mixed: bool
) -> None:
    """Would catch: a row lost with its group, a part that counts without its prompt, a pack that shares less than was
    planned (a short beginning of all prompts taken for a long one of some), a process without work beside one with
    rows to spare, one with fewer micro-batches.
    """
    prompts = [_prompt(i, length + beginning, beginning) for i, (length, _) in enumerate(groups)]
    order = (lambda rows: sorted(rows, key=lambda row: (row[1], row[0]))) if mixed else sorted
    batch = _groups(prompts, [responses for _, responses in groups], order)
    plan = plan_groups(batch, num_processes=processes, max_tokens=max_tokens)
    micros = [micro for process in plan for micro in process]
    assert sorted(row for micro in micros for row in micro) == list(range(len(batch)))
    assert len(plan) == processes and len({len(process) for process in plan}) == 1 and len(plan[0]) >= 1
    assert all(len(micro) < 2 or _tokens_run(batch, micro) <= max_tokens for micro in micros)
    assert sum(map(bool, micros)) == min(len(micros), len(batch))
    assert plan == plan_groups(batch, num_processes=processes, max_tokens=max_tokens)


def test_groups_stay_whole_where_they_can() -> None:
    """Would catch: the responses to a prompt dealt out by length, so that each micro-batch runs every prompt again; a
    budget that counts the prompt for each response; groups parted for no gain.
    """
    prompts = [_prompt(i, 500) for i in range(16)]
    batch = _groups(prompts, [[20 + (37 * (8 * g + j)) % 381 for j in range(8)] for g in range(16)])
    least = 16 * 500 + int(batch.response_mask.sum())
    for processes, most_micros in ((1, 5), (2, 3), (4, 2)):
        plan = plan_groups(batch, num_processes=processes, max_tokens=8192)
        loads = [[_tokens_run(batch, micro) for micro in process] for process in plan]
        assert sum(map(sum, loads)) == least and len(plan[0]) <= most_micros
        assert sum(max(at) for at in zip(*loads)) <= 1.05 * least / processes


def test_groups_are_parted_where_processes_would_wait() -> None:
    """Would catch: one process that runs the only group while the others look on; a group too many that one process runs
    alone; parts of one response each where two do.
    """
    batch = _groups([_prompt(0, 100)], [[60] * 8])
    plan = plan_groups(batch, num_processes=4, max_tokens=8192)
    assert [[_tokens_run(batch, micro) for micro in process] for process in plan] == [[220]] * 4
    batch = _groups([_prompt(i, 20) for i in range(3)], [[200] * 4] * 3)
    plan = plan_groups(batch, num_processes=2, max_tokens=8192)
    assert sorted(_tokens_run(batch, micro) for (micro,) in plan) == [1240, 1240]
    budget = plan_groups(batch, num_processes=1, max_tokens=450)  # two responses and their prompt
    assert [len(micro) for micro in budget[0]] == [2] * 6


@pytest.mark.parametrize(
    "batch",
    [
        _groups([_prompt(i, 5) for i in range(4)], [[30, 7, 21]] * 4),  # too short to be worth sharing
        _groups([_prompt(i, 40) for i in range(12)], [[5 * i + 3] for i in range(12)]),
        _groups([_prompt(i, 40, 20) for i in range(12)], [[5 * i + 3] for i in range(12)]),
        _groups([_prompt(i, 40) for i in range(12)], [[9]] * 12).replace(group_ids=torch.arange(12) // 3),
    ],
    ids=["short prompts", "one response each", "one beginning", "other prompts under one number"],
)
def test_without_anything_to_share_the_plan_is_that_of_rows(batch) -> None:
    """Would catch: units made of a number in the batch where `pack` shares nothing; all rows one unit for the few tokens
    that all prompts begin with."""
    for processes in (1, 3):
        settings = {"num_processes": processes, "max_tokens": 100}
        assert plan_groups(batch, **settings) == plan_micro_batches(batch.lengths.tolist(), **settings)


@given(_RAGGED, st.integers(0, 30))
def test_a_pack_runs_as_few_tokens_as_sharing_neighbours_can(groups, beginning: int) -> None:
    """Would catch: a lone row whose few tokens in common with the next group keep that group from sharing its prompt."""
    prompts = [_prompt(3 * i, length + beginning, beginning) for i, (length, _) in enumerate(groups)]
    batch = _groups(prompts, [responses for _, responses in groups])
    tokens, targets = batch.token_ids.tolist(), batch.response_mask.int().argmax(-1).tolist()
    lengths = batch.lengths.tolist()

    def common(first: int, end: int) -> int:
        """Tokens that all rows from `first` up to `end` begin with, before any target."""
        room = min(targets[first:end])
        return next((i for i in range(room) if len({row[i] for row in tokens[first:end]}) > 1), room)

    least = [0] * (len(batch) + 1)
    for row in range(len(batch) - 1, -1, -1):
        choices = [lengths[row] + least[row + 1]]
        for end in range(row + 2, len(batch) + 1):
            if (shared := common(row, end)) >= 8:
                choices.append(sum(lengths[row:end]) - (end - row - 1) * shared + least[end])
        least[row] = min(choices)
    assert _tokens_run(batch, list(range(len(batch)))) == least[0]


def test_a_plan_refuses_nonsense() -> None:
    """Would catch: an endless loop on a budget of 0, units of another batch."""
    with pytest.raises(ValueError, match="max_tokens=0"):
        plan_groups(_groups([(1,)], [[2]]), num_processes=1, max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens=0"):
        plan_micro_batches([1], num_processes=1, max_tokens=0)
    with pytest.raises(ValueError, match="1 units for 2 lengths"):
        plan_micro_batches([1, 2], num_processes=1, max_tokens=4, units=[0])


@given(seed=st.integers(0, 10_000))
def test_pack_and_unpack_are_inverse(seed: int, random_batch) -> None:
    """Would catch: padding in the pack, positions that run on, a target one token off, rows exchanged."""
    batch = random_batch(seed)
    packed = pack(batch, batch.response_mask)
    tokens, bounds = batch.token_ids.tolist(), packed.cu_seqlens.tolist()
    lengths = batch.lengths.tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and packed.max_seqlen == max(lengths)
    for row, (start, end) in enumerate(zip(bounds, bounds[1:])):
        assert packed.token_ids[start:end].tolist() == tokens[row][: lengths[row]]
        assert packed.position_ids[start:end].tolist() == list(range(lengths[row]))
    assert not set(packed.target_index.tolist()) & set(bounds)
    values = packed.token_ids[packed.target_index].double().requires_grad_()
    aligned = unpack(packed, values, batch.response_mask)
    assert torch.equal(aligned, torch.where(batch.response_mask, batch.token_ids, 0).double())
    (aligned * batch.rollout_logprobs).sum().backward()
    assert torch.equal(values.grad, batch.rollout_logprobs[batch.response_mask])


def test_pack_refuses_what_no_token_predicts() -> None:
    """Would catch: a first token scored with the last logits of the sequence before it in the pack."""
    batch = make_sft_batch([SftExample("a", (1, 2), (3,)), SftExample("b", (1,), (5,))])
    for targets in (batch.attention_mask, ~batch.attention_mask):
        with pytest.raises(ValueError, match="wanted of padding or of a sequence's first token"):
            pack(batch, targets)
    gap = batch.replace(attention_mask=torch.tensor([[True, False, True], [True, True, False]]))
    with pytest.raises(AssertionError, match="right-padded"):
        pack(gap, gap.response_mask)
