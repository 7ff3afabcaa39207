"""The reward model's loss against TRL's RewardTrainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForSequenceClassification

pytest.importorskip("trl")

from rlhf.batching import make_preference_batch  # noqa: E402
from rlhf.data import load_preferences  # noqa: E402
from rlhf.models import load_scalar_model, save_model  # noqa: E402
from rlhf.trainers.forward import loss_function  # noqa: E402

MARGINS = (0.0, 0.5, 1.0, 0.25, 2.0, 0.1, 0.0)


@pytest.fixture(scope="module")
def scorer(ours):
    """The folder of a reward model: the policy's trunk with a new head."""
    config = ours.recipe("rm").model
    model = load_scalar_model(config, ours.tokenizer, head="new", seed=0, trainable=True)
    with torch.no_grad():
        model.score.weight *= 3  # rewards of about 1
    save_model(model, ours.tokenizer, ours.folder / "scorer")
    return ours.folder / "scorer"


@pytest.fixture
def ours_on(ours, scorer):
    def run(rows, *, without_ends=False, **sections):
        recipe = ours.recipe("rm", model={"path": str(scorer), "dtype": "float32"}, **sections)
        examples = load_preferences(recipe.data, ours.tokenizer, name="train", rows=rows).items
        if without_ends:
            examples = [
                dataclasses.replace(e, chosen_ids=e.chosen_ids[:-1], rejected_ids=e.rejected_ids[:-1])
                for e in examples
            ]
        batch = make_preference_batch(examples)
        model = load_scalar_model(recipe.model, ours.tokenizer, head="load", seed=0, trainable=True)
        return (model, loss_function("reward_model", recipe)(model, batch)[0]), batch

    return run


@pytest.fixture
def theirs_on(theirs, scorer):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    def run(rows, *, pad_token=None, **settings):
        tokenizer = theirs.tokenizer
        tokenizer.pad_token = pad_token or tokenizer.pad_token
        trainer = RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32),
            args=RewardConfig(**theirs.arguments(**settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        features = list(trainer.train_dataset)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(features))
        return (trainer.model, loss), [f[side] for f in features for side in ("chosen_ids", "rejected_ids")]

    return run


CASES = {
    "rm": (False, {}, {}),
    "rm, margins": (True, {"data": {"margin_column": "margin"}}, {}),
    "rm, center_coef": (
        False,
        {"reward_modeling": {"center_coef": 0.05}},
        {"center_rewards_coefficient": 0.05},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bradley_terry(name, pairs, ours_on, theirs_on, agree):
    """Catches: a score read at another token than the last, a margin or a centring with another sign or weight."""
    with_margins, mine, trl = CASES[name]
    rows = [{**row, "margin": m} for row, m in zip(pairs, MARGINS, strict=True)] if with_margins else pairs
    ours, batch = ours_on(rows, **mine)
    theirs, ids = theirs_on(rows, **trl)
    assert [r[:n].tolist() for r, n in zip(batch.token_ids, batch.attention_mask.sum(-1), strict=True)] == ids
    agree(name, ours, theirs)


def test_where_pad_is_the_end_token_the_score_is_still_the_last_tokens(
    pairs, ours_on, theirs_on, measure, agree
):
    """transformers reads the last token that is not the pad token; where that is the end token, the one before. With
    the answers' ends cut off ours is the same."""

    def trl():
        return theirs_on(pairs, pad_token="<|eos|>")[0]

    row = measure("rm, pad token = end token", ours_on(pairs)[0], trl(), differs=True)
    assert row.loss > 1e-4
    agree("rm, pad token = end token, ours without the ends", ours_on(pairs, without_ends=True)[0], trl())
