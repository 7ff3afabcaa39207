"""KTO against TRL's KTOTrainer."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from rlhf.batching import make_label_batch  # noqa: E402
from rlhf.data import load_labels  # noqa: E402
from rlhf.kto import mismatched, with_kto_baseline  # noqa: E402

SETTINGS = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.3}


@pytest.fixture(scope="module")
def rows(pairs):
    """Single judged answers; prompts take turns, so that neighbours are mismatched."""
    kept = [
        (pairs[i], side) for i, side in enumerate(["chosen", "rejected", "rejected", "chosen", "rejected"])
    ]
    return [{"prompt": r["prompt"], "completion": r[s], "label": s == "chosen"} for r, s in kept]


@pytest.fixture
def ours_on(ours):
    def run(rows, policy="policy", reference="reference"):
        recipe = ours.recipe("kto", kto=SETTINGS)
        examples = load_labels(recipe.data, ours.tokenizer, name="train", rows=rows).items
        batch = make_label_batch(examples)
        batch = batch.replace(ref_logprobs=ours.logprobs(reference, batch))
        others = mismatched(batch, max_tokens=200)
        others = others.replace(ref_logprobs=ours.logprobs(reference, others))
        batch = with_kto_baseline(batch, others, ours.logprobs(policy, others))
        return ours.loss("kto", recipe, batch, policy=policy)[0], batch

    return run


@pytest.fixture
def theirs_on(theirs):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    def run(rows, policy="policy", reference="reference"):
        arguments = theirs.arguments(**{**SETTINGS, "per_device_train_batch_size": len(rows)})
        trainer = KTOTrainer(
            theirs.model(policy),
            ref_model=theirs.model(reference),
            args=KTOConfig(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=theirs.tokenizer,
        )
        features = list(trainer.train_dataset)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(features))
        return (trainer.model, loss), features

    return run


# The two models and the same in each other's place: their distance is below 0 one way and above the other.
MODELS = {"kto": ("reference", "policy"), "kto, z0 cut off at 0": ("policy", "reference")}


@pytest.mark.parametrize("name", MODELS)
def test_kto(name, rows, ours_on, theirs_on, agree):
    """Catches: a z0 of other rows or with a gradient, swapped labels or weights, a mean over one label.

    TRL puts the answer of the row before under each prompt, we that of the row after, as the paper does: with TRL's
    rows in reverse the mismatched pairs are the same.
    """
    mine, batch = ours_on(rows, *MODELS[name])
    trl, features = theirs_on(rows[::-1], *MODELS[name])
    assert (batch.baselines[0] > 0.01) == (name == "kto")
    ids = [row[:n].tolist() for row, n in zip(batch.token_ids, batch.attention_mask.sum(-1), strict=True)]
    assert ids == [f["prompt_ids"] + f["completion_ids"] for f in features[::-1]]
    agree(name, mine, trl)


def test_the_order_of_mismatched_pairs_differs(rows, ours_on, theirs_on, measure):
    models = MODELS["kto"]
    mine, trl = ours_on(rows, *models)[0], theirs_on(rows, *models)[0]
    row = measure("kto, rows in one order", mine, trl, differs=True)
    assert row.loss > 1e-5
