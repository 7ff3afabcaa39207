"""SFT against TRL's SFTTrainer."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from rlhf.batching import make_sft_batch  # noqa: E402
from rlhf.data import load_sft  # noqa: E402

# Roles cannot be spelt in the tokenizer's alphabet; the marks tell both sides what the assistant wrote.
MARKED = (
    "{% for m in messages %}{{ '<|bos|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>' }}{% endif %}"
)
COMPLETIONS = {"data": {"response_column": "completion"}}
CONVERSATIONS = {"data": {"response_column": None, "messages_column": "messages"}}


@pytest.fixture(scope="module")
def completions(pairs):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]


@pytest.fixture(scope="module")
def conversations(pairs):
    """Two turns each, in turn of the users and of the assistant."""
    turns = [[*row["prompt"], *row["chosen"]] for row in pairs]
    return [{"messages": a + b} for a, b in zip(turns, turns[1:], strict=False)]


@pytest.fixture
def ours_on(ours):
    def run(rows, sections, template=None):
        recipe = ours.recipe("sft", **sections)
        tokenizer = ours.tokenizer
        before = tokenizer.chat_template
        tokenizer.chat_template = template or before
        batch = make_sft_batch(load_sft(recipe.data, tokenizer, name="train", rows=rows).items)
        tokenizer.chat_template = before
        return ours.loss("sft", recipe, batch)[0], batch

    return run


@pytest.fixture
def trainer_on(theirs):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def make(rows, *, template=None, **settings):
        tokenizer = theirs.tokenizer
        tokenizer.chat_template = template or tokenizer.chat_template
        return SFTTrainer(
            theirs.model(),
            args=SFTConfig(**theirs.arguments(shuffle_dataset=False, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return make


def same_tokens(batch, features):
    for i, feature in enumerate(features):
        length = int(batch.attention_mask[i].sum())
        assert batch.token_ids[i, :length].tolist() == feature["input_ids"]
        assert batch.loss_mask[i, :length].tolist() == [label != -100 for label in feature["labels"]]
    assert len(features) == len(batch)


def test_sft(completions, ours_on, trainer_on, agree):
    """Catches: a shift by one token, a prompt that is learned, packed rows that read each other."""
    mine, batch = ours_on(completions, COMPLETIONS)
    trainer = trainer_on(completions)
    features = list(trainer.train_dataset)
    same_tokens(batch, features)
    agree("sft", mine, (trainer.model, trainer.compute_loss(trainer.model, trainer.data_collator(features))))


def test_sft_in_micro_batches(completions, ours_on, trainer_on, agree):
    """Catches: a mean of micro-batches' means; both sides divide by the step's tokens."""
    mine, batch = ours_on(completions, COMPLETIONS)
    trainer = trainer_on(completions)
    features = list(trainer.train_dataset)
    count = sum(label != -100 for f in features for label in f["labels"])
    assert count == batch.num_loss_tokens
    shares = [
        trainer.compute_loss(trainer.model, trainer.data_collator(part), num_items_in_batch=count)
        for part in (features[:2], features[2:])
    ]
    agree("sft, two micro-batches", mine, (trainer.model, sum(shares)))


def test_the_assistants_turns(conversations, ours_on, trainer_on, agree):
    """Catches: a user's turn that is learned, an answer's end that is not."""
    mine, batch = ours_on(conversations, CONVERSATIONS, MARKED)
    trainer = trainer_on(conversations, template=MARKED, assistant_only_loss=True)
    features = list(trainer.train_dataset)
    same_tokens(batch, features)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    agree("sft, conversations, assistant only", mine, (trainer.model, theirs))
