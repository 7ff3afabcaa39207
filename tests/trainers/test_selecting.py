"""What is made of a group of responses: pairs, and the best of n."""

from __future__ import annotations

import torch

from rlhf.batching import make_batch, make_preference_batch
from rlhf.trainers.distill import with_teacher_advantages
from rlhf.trainers.online_dpo import best_worst_pairs, gold_pairs
from rlhf.trainers.rejection import select_best
from tests.trainers.fake_roles import FakeActor, fake_stage, group, rollout


def test_the_best_response_is_chosen_and_the_worst_rejected():
    """Would catch: a policy that learns to prefer the worst, the later of two equal responses, a gap with the wrong sign."""
    (pair,) = best_worst_pairs([group(3, 0.5, 0.25, 1.0, None, 0.25, 1.0)], min_gap=0.0)
    assert (pair.id, pair.prompt_ids, pair.margin) == ("0/3/2", (1, 13), 0.75)
    assert (pair.chosen_ids, pair.rejected_ids) == ((7, 0), (6, 0))
    batch = make_preference_batch([pair])
    assert batch.token_ids[0, 2:].tolist() == [7, 0] and batch.labels.tolist() == [1.0, -1.0]


def test_groups_that_prefer_nothing_give_no_pair():
    """Would catch: pairs of equal rewards or of one text, a gap at its limit taken, a missing reward counted as lowest."""
    same = [(5, 0)] * 2
    groups = [group(0, 1.0, 1.0), group(1, 1.0, None), group(2, None, None), group(3, 0.0, 1.0, ids=same)]
    assert best_worst_pairs(groups, min_gap=0.0) == []
    groups = [group(0, 0.0, 0.5), group(1, 0.0, 0.75)]
    assert [p.id for p in best_worst_pairs(groups, min_gap=0.5)] == ["0/1/1"]


def test_the_row_s_own_answer_is_chosen_against_every_other_response():
    """Would catch: SPIN with its sides swapped, a response equal to the answer rejected, another row's answer."""
    groups = [group(0, 0.0, 0.0, 0.0, ids=[(9, 0), (), (8,)]), group(1, 0.0), group(2, 0.0)]
    pairs = gold_pairs(groups, {"train/0": (9, 0), "train/1": (4, 0)})
    assert [(p.id, p.chosen_ids, p.rejected_ids, p.margin) for p in pairs] == [
        ("0/0/2", (9, 0), (8,), None),
        ("0/1/0", (4, 0), (5, 0), None),
    ]


def test_the_best_of_n_are_kept():
    """Would catch: the worst imitated, more than asked for, the later of two equal rewards."""
    groups = [group(0, 0.25, 1.0, 0.5, None, 1.0), group(1, 0.0, -1.0)]
    kept = select_best(groups, keep=2, min_reward=None)
    assert [r.sample_id for r in kept] == ["0/0/1", "0/0/4", "0/1/0", "0/1/1"]
    assert [r.sample_id for r in select_best(groups, keep=1, min_reward=None)] == ["0/0/1", "0/1/0"]


def test_what_is_not_fit_to_imitate_is_left_out():
    """Would catch: responses below the bar, cut off, or twice the same among the best; a bar that excludes its own value."""
    assert [r.sample_id for r in select_best([group(0, 0.5, 0.75, 0.25)], keep=3, min_reward=0.5)] == [
        "0/0/1",
        "0/0/0",
    ]
    assert select_best([group(0, 0.25)], keep=1, min_reward=0.5) == []
    twice = group(1, 1.0, 0.75, 0.5, ids=[(5, 0), (5, 0), (6, 0)])
    assert [r.sample_id for r in select_best([twice], keep=2, min_reward=None)] == ["0/1/0", "0/1/2"]
    cut = rollout("cut", (5, 6), reward=2.0, end="length")
    whole = group(2, 0.0)
    longer = type(whole)(whole.prompt, (cut, *whole.rollouts))
    assert [r.sample_id for r in select_best([longer], keep=2, min_reward=None)] == ["0/2/0"]


def test_a_teacher_s_advantage_is_how_much_more_it_likes_the_token(tmp_path, monkeypatch):
    """Would catch: teacher and student swapped, a value on the prompt or on padding, advantages that carry the teacher's
    log-probs as the old policy's."""
    groups = [group(0, None), group(1, None, ids=[(5,)])]
    batch = make_batch([g.rollouts[0] for g in groups], group_ids=[0, 1], needs_reward=False)
    student = torch.tensor([[9.0, 9.0, -2.0, -1.0], [9.0, 9.0, -3.0, 9.0]])
    teacher = torch.tensor([[7.0, 7.0, -0.5, -4.0], [7.0, 7.0, -3.0, 7.0]])
    recipe = {
        "method": "distill",
        "teacher": {"path": "none"},
        "distill": {"divergence": "sampled_kl", "on_policy_frac": 1},
        "trainer": {"steps": 1},
    }
    roles = {"actor": FakeActor(score=lambda _: student), "teacher": FakeActor(score=lambda _: teacher)}
    taught = with_teacher_advantages(fake_stage(recipe, tmp_path, monkeypatch, **roles), batch)
    assert taught.advantages.tolist() == [[0.0, 0.0, 1.5, -3.0], [0.0, 0.0, 0.0, 0.0]]
    assert taught.old_logprobs is student
