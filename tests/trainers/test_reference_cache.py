"""A reference's log-probs kept on the disk: what is found again, and what a file may not be used for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlhf.batching import PreferenceExample, make_preference_batch
from rlhf.data import mixed
from rlhf.data.rows import Dataset
from rlhf.records import Batch
from rlhf.trainers.reference_cache import ReferenceCache, shared_file

IDENTITY = {"model": {"weights": "a1"}, "training data": {"rows": "b2"}}


def pairs(name: str, rows: int) -> Dataset[PreferenceExample]:
    items = tuple(
        PreferenceExample(f"{name}/{i}", (1, 2 + i), tuple(range(3, 5 + i % 3)), (9, i), margin=None)
        for i in range(rows)
    )
    return Dataset(items, f"print of {name}", {"kept": rows, "bad_rows": 0})


class Scorer:
    """Log-probs that are a function of all tokens up to here; counts the rows it has seen."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.rows += len(batch)
        before = torch.cumsum(batch.token_ids * torch.arange(1, batch.token_ids.shape[1] + 1), -1)
        return torch.where(batch.loss_mask, -before.float() / 7, 0.0)


def batch_of(rows: Sequence[PreferenceExample]) -> Batch:
    return make_preference_batch(rows)


def test_what_is_looked_up_is_what_a_fresh_pass_gives(tmp_path):
    """Would catch: log-probs of another row, or put at another token; values changed on the way to the disk and back."""
    sets, score, path = {"train": pairs("train", 300), "held": pairs("held", 7)}, Scorer(), tmp_path / "r"
    made = ReferenceCache.make(sets, batch_of, score, IDENTITY)
    made.save(path)
    read = ReferenceCache.load(path, sets, IDENTITY)
    rows = [sets["train"][299], sets["held"][6], sets["train"][0], sets["train"][256]]
    batch = batch_of(rows)
    for cache in (made, read):
        torch.testing.assert_close(cache.look_up(batch), score(batch), rtol=0, atol=0)


def test_rows_that_come_several_times_are_scored_once():
    """Would catch: a mixture whose weight is above 1 refused, or its rows scored as often as they come."""
    more, score = pairs("mix.more", 5), Scorer()
    train = mixed([pairs("train", 4), more], [1.0, 2.0])
    assert len(train) == 14
    cache = ReferenceCache.make({"train": train}, batch_of, score, IDENTITY)
    assert score.rows == 2 * (4 + 5)
    batch = batch_of([more[3], more[3]])
    torch.testing.assert_close(cache.look_up(batch), Scorer()(batch), rtol=0, atol=0)


def test_an_id_of_two_rows_is_refused():
    """Would catch: a held-out set of the training set's name compared with the training set's log-probs."""
    sets = {"train": pairs("train", 3), "other": pairs("train", 3)}
    assert ReferenceCache.make(sets, batch_of, Scorer(), IDENTITY)  # the very same rows
    different = Dataset((PreferenceExample("train/0", (8,), (3,), (4,), None),), "x", {})
    with pytest.raises(ValueError, match="two rows have the id 'train/0'"):
        ReferenceCache.make({**sets, "other": different}, batch_of, Scorer(), IDENTITY)


def test_a_file_of_other_weights_data_or_sets_is_not_used(tmp_path):
    """Would catch: a run that compares with the log-probs of another model, or misses those of a set added since."""
    sets, path = {"train": pairs("train", 3)}, tmp_path / "r"
    assert ReferenceCache.load(path, sets, IDENTITY) is None
    ReferenceCache.make(sets, batch_of, Scorer(), IDENTITY).save(path)
    assert ReferenceCache.load(path, sets, IDENTITY) is not None
    for part, key in (("model", "weights"), ("training data", "rows")):
        assert ReferenceCache.load(path, sets, IDENTITY | {part: {key: "c3"}}) is None
    assert ReferenceCache.load(path, {**sets, "held": pairs("held", 2)}, IDENTITY) is None


def test_a_damaged_file_is_not_used(tmp_path):
    """Would catch: log-probs with a flipped bit taken as they are, a file cut short that crashes the run."""
    sets, path = {"train": pairs("train", 3)}, tmp_path / "r"
    ReferenceCache.make(sets, batch_of, Scorer(), IDENTITY).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert ReferenceCache.load(path, sets, IDENTITY) is None
    path.write_bytes(whole[:40])
    assert ReferenceCache.load(path, sets, IDENTITY) is None


def test_runs_find_one_file_by_what_it_was_made_from(tmp_path):
    """Would catch: two models, datasets or sets of them that would write over, or read, one another's file."""
    sets = {"train": pairs("train", 3)}
    ours = shared_file(tmp_path, sets, IDENTITY)
    assert ours == shared_file(tmp_path, {"train": pairs("train", 3)}, dict(reversed(IDENTITY.items())))
    others = [shared_file(tmp_path, sets, IDENTITY | {part: {"x": "c3"}}) for part in IDENTITY]
    others.append(shared_file(tmp_path, {**sets, "held": pairs("held", 2)}, IDENTITY))
    assert len({ours, *others}) == 4
