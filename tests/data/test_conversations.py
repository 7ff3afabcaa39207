"""Chats to examples: exactly the assistant's tokens are learned, and what cannot be told apart is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rlhf.data import load_prompts, load_sft
from rlhf.recipe.schema import DatasetConfig


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages written "role: text"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


FOUR = chat("user: one", "assistant: two", "user: three", "assistant: four")


def _load(tokenizer: Any, *conversations: Any, max_context: int | None = None, **config: Any):
    config = {"path": "handed over", "messages_column": "messages", "chat_template": True, **config}
    rows = [{"messages": c} for c in conversations]
    return load_sft(DatasetConfig(**config), tokenizer, name="train", max_context=max_context, rows=rows)


def _learned(tokenizer: Any, example: Any) -> str:
    """The text in the loss, a bar between stretches."""
    mask = example.response_mask or (True,) * len(example.response_ids)
    stretches: list[list[int]] = [[]]
    for token, learned in zip(example.response_ids, mask, strict=True):
        if learned:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return "|".join(tokenizer.decode(s) for s in stretches)


@pytest.mark.parametrize(
    ("template", "prompt", "learned"),
    [
        ("keep", "<|bos|>user\none<|eos|>\n<|bos|>assistant\n", "two<|eos|>|four<|eos|>"),
        ("marked", "<|bos|>user\none<|eos|>\n<|bos|>assistant\n", "two<|eos|>|(hm)four<|eos|>"),
        ("own end", "<|bos|>user\none<|end|>\n<|bos|>assistant\n", "two<|end|>|four<|end|>"),
        ("endless", "<|bos|>user\none<|bos|>assistant\n", "two|four<|eos|>"),
    ],
)
def test_the_assistants_turns_are_learned_with_their_end(
    byte_tokenizer: Any, template: str, prompt: str, learned: str
) -> None:
    """Catches: loss on the user's text, on the turn's header or on the new line after its end (which sampling never
    writes), an end that is not learned, and a text that is not the template's own."""
    tokenizer = byte_tokenizer(template)
    example = _load(tokenizer, FOUR)[0]
    assert tokenizer.decode(example.prompt_ids) == prompt
    assert _learned(tokenizer, example) == learned
    whole = tokenizer.apply_chat_template(FOUR, tokenize=False)
    text = tokenizer.decode(example.prompt_ids + example.response_ids)
    assert whole.rstrip("\n") == text.removesuffix("<|eos|>" if template == "endless" else "")


def test_texts_of_different_writers_are_tokenised_apart(byte_tokenizer: Any) -> None:
    """Catches a token that joins the header's new line with the answer's: sampling can never meet it."""
    tokenizer = byte_tokenizer()
    messages = chat("user: one", "assistant: two")
    example = _load(tokenizer, messages)[0]
    config = DatasetConfig(path="handed over", chat_template=True)
    prompt = load_prompts(config, tokenizer, name="train", max_context=None, rows=[{"prompt": messages[:1]}])[
        0
    ]
    assert example.prompt_ids == prompt.token_ids
    assert example.response_mask is None
    assert example.response_ids == (
        *tokenizer.encode("two", add_special_tokens=False),
        tokenizer.eos_token_id,
    )


def test_an_answer_may_be_a_message(byte_tokenizer: Any) -> None:
    """Catches: a message's answer with two ends, or with the template's header inside."""
    tokenizer = byte_tokenizer()
    config = DatasetConfig(path="handed over", response_column="answer", chat_template=True)
    rows = [
        {"prompt": "one", "answer": chat("assistant: two")},
        {"prompt": chat("user: one"), "answer": "two"},
    ]
    a, b = load_sft(config, tokenizer, name="train", rows=rows)
    assert (a.prompt_ids, a.response_ids) == (b.prompt_ids, b.response_ids)
    with pytest.raises(
        ValueError, match="column 'answer' is messages of user; it must be text or one message"
    ):
        load_sft(config, tokenizer, name="train", rows=[{"prompt": "one", "answer": chat("user: two")}])
    plain = DatasetConfig(path="handed over", response_column="answer")
    with pytest.raises(ValueError, match="is a list, not text; set data.chat_template: true for messages"):
        load_sft(plain, tokenizer, name="train", rows=rows)


def test_a_template_that_changes_earlier_turns_is_refused_with_an_example(byte_tokenizer: Any) -> None:
    """Catches: learned text taken from the wrong place, where a template drops the thoughts of earlier turns."""
    tokenizer = byte_tokenizer("forget")
    with pytest.raises(
        ValueError, match=r"row train/0: .*first 2 messages.*\(hm\)two.*assistant\\ntwo.*generation"
    ):
        _load(tokenizer, FOUR, bad_rows="skip")
    assert _learned(tokenizer, _load(tokenizer, FOUR[:2])[0]) == "(hm)two<|eos|>"


def test_an_end_that_sampling_does_not_know_is_said(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a policy that never stops, because its stop token was never trained."""
    with caplog.at_level(logging.WARNING, logger="rlhf.data"):
        _load(byte_tokenizer("keep"), FOUR)
        assert not caplog.records
        _load(byte_tokenizer("own end"), FOUR)
    assert "stops only where sampling stops at '<|end|>' too" in caplog.text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (FOUR[:3], "the last message is the user's; there is no answer to it"),
        (FOUR[1:], "begins with the assistant's message; it must begin with the user's"),
        ([*FOUR[:1], *FOUR], "two messages of the user follow each other"),
        ([*FOUR, *FOUR[-1:]], "two messages of the assistant follow each other"),
        (chat("user: one", "assistant:  "), "a message of the assistant is empty"),
        (chat("user: one", "system: two", "assistant: three"), "a system message comes after the first"),
        (chat("user: one", "bot: two"), "role is 'bot'"),
        ("text", "the conversation is 'text', neither text nor a list"),
        ([], r"the conversation is \[\]"),
        (chat("system: one", "assistant: two"), "begins with the assistant's message"),
    ],
)
def test_wrong_conversations_are_bad_rows(byte_tokenizer: Any, messages: Any, reason: str) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=f"row train/1: .*{reason}"):
        _load(tokenizer, FOUR, messages)
    data = _load(tokenizer, FOUR, messages, bad_rows="skip")
    assert data.counts == {"kept": 1, "filtered_long": 0, "truncated": 0, "bad_rows": 1}


def test_a_template_without_a_learned_text_is_a_bad_row(byte_tokenizer: Any) -> None:
    """Catches an example without a loss token, which would be nothing divided by something."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(ValueError, match="row train/0: the chat template marks no text as the assistant's"):
        _load(tokenizer, FOUR)


def test_the_system_prompt_and_the_room(byte_tokenizer: Any) -> None:
    """Catches: a system prompt left out of conversations, and a conversation longer than the context."""
    tokenizer = byte_tokenizer()
    example = _load(tokenizer, FOUR, system_prompt="six")[0]
    assert tokenizer.decode(example.prompt_ids).startswith("<|bos|>system\nsix<|eos|>\n<|bos|>user\none")
    length = len(example.prompt_ids) + len(example.response_ids)
    fits = {"max_context": length, "system_prompt": "six"}
    assert _load(tokenizer, FOUR, **fits).counts["kept"] == 1
    with pytest.raises(ValueError, match="none of 1 rows is left: 0 bad, 1 longer"):
        _load(tokenizer, FOUR, **(fits | {"max_context": length - 1}))


def test_what_the_recipe_must_say(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="data.messages_column='messages' needs data.chat_template: true"):
        _load(tokenizer, FOUR, chat_template=False)
    with pytest.raises(ValueError, match="both set; keep one"):
        _load(tokenizer, FOUR, response_column="answer")
    with pytest.raises(ValueError, match="no column 'mesages'; did you mean 'messages'"):
        _load(tokenizer, FOUR, messages_column="mesages")
