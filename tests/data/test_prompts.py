"""Rows to prompts and examples: what is refused, what is counted, and that no token is doubled or lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data import load_prompts, load_sft
from rlhf.data.tasks import TASKS
from rlhf.models.build import build_tokenizer
from rlhf.recipe.schema import BuildTokenizerConfig, DatasetConfig

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPHABET = BuildTokenizerConfig().alphabet
LETTERS = ALPHABET + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>!\n"


def _characters(
    alphabet: str = LETTERS, *, adds_bos: bool = False, chat_template: str | None = None, **kwargs: Any
):
    """One token per character; a character outside the alphabet gets no token at all."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
        )
    names = {"pad_token": SPECIALS[0], "bos_token": SPECIALS[1], "eos_token": SPECIALS[2]} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **names)


def _bytes() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["one two three " * 9],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIALS[2])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return _characters()


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], str]:
    return lambda rows: _write(tmp_path / "rows.jsonl", rows)


def _load(tokenizer: Any, rows: list[Any], max_context: int | None = None, **config: Any):
    config = {"path": "rows handed over", **config}
    return load_prompts(DatasetConfig(**config), tokenizer, name="train", max_context=max_context, rows=rows)


def _sft(tokenizer: Any, rows: list[Any], max_context: int | None = None, **config: Any):
    config = {"path": "rows handed over", "response_column": "response", **config}
    return load_sft(DatasetConfig(**config), tokenizer, name="train", max_context=max_context, rows=rows)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_holds_text_tokens_and_the_whole_row(tokenizer: Any) -> None:
    data = _load(tokenizer, [{"prompt": "1+1=", "answer": "2", "n": 7}])
    prompt = data[0]
    assert (prompt.id, prompt.text) == ("train/0", "1+1=")
    assert tokenizer.decode(prompt.token_ids) == "1+1="
    assert prompt.row == {"prompt": "1+1=", "answer": "2", "n": 7}
    assert data.counts == {"kept": 1, "filtered_long": 0, "truncated": 0, "bad_rows": 0}


def test_the_template_takes_columns_and_interprets_no_value(tokenizer: Any) -> None:
    """Catches str.format on data: a brace in a question must stay a brace."""
    rows = [{"question": "{answer} <2>", "answer": "5"}]
    data = _load(_bytes(), rows, prompt_template="Question: {question}\nAnswer {{x}}:")
    assert data[0].text == "Question: {answer} <2>\nAnswer {x}:"


@pytest.mark.parametrize(
    "template", ["{question.x}", "{question[0]}", "{}", "{question!r}", "{question:>9}", "{question"]
)
def test_a_template_is_plain_fields_only(tokenizer: Any, template: str) -> None:
    with pytest.raises(ValueError, match="prompt_template"):
        _load(tokenizer, [{"question": "x"}], prompt_template=template)


def test_bos_comes_once() -> None:
    """Catches the double BOS of a template or a text that brings its own."""
    plain, adds = _characters(), _characters(adds_bos=True)
    chat = _characters(adds_bos=True, chat_template=CHAT)
    bos = plain.bos_token_id
    assert bos not in _load(plain, [{"prompt": "hi"}])[0].token_ids
    assert _load(adds, [{"prompt": "hi"}])[0].token_ids.count(bos) == 1
    assert _load(adds, [{"prompt": "<|bos|>hi"}])[0].token_ids.count(bos) == 1
    assert _load(chat, [{"prompt": "hi"}], chat_template=True)[0].token_ids.count(bos) == 1
    bare = _characters(adds_bos=True, chat_template="{{ messages[0]['content'] }}")
    assert (
        bos not in _load(bare, [{"prompt": "hi"}], chat_template=True)[0].token_ids
    )  # the template's choice
    with pytest.raises(ValueError, match=r"row train/0: the prompt begins with two <\|bos\|> tokens"):
        _load(adds, [{"prompt": "<|bos|><|bos|>hi"}])
    with pytest.raises(ValueError, match="begins with two"):
        _load(
            _characters(adds_bos=True, chat_template="{{ bos_token }}" + CHAT),
            [{"prompt": "hi"}],
            chat_template=True,
        )


def test_chat_prompts() -> None:
    tokenizer = _characters(chat_template=CHAT)
    text = _load(tokenizer, [{"prompt": "hi"}], chat_template=True, system_prompt="be brief")[0].text
    assert text == "<|bos|><system>be brief<user>hi<assistant>"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert (
        _load(tokenizer, [{"prompt": turns}], chat_template=True)[0].text
        == "<|bos|><user>a<assistant>b<user>c<assistant>"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "neither text nor a list of messages"),
        (5, "neither text nor a list of messages"),
        (" ", "the prompt is empty"),
        ([{"role": "user"}], r"is not \{role, content\}"),
        ([{"role": "user", "content": None}], r"is not \{role, content\}"),
        ([{"role": "human", "content": "x"}], "role is 'human'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "nothing to answer"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "system", "content": "y"},
                {"role": "user", "content": "z"},
            ],
            "system",
        ),
        (
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
            "a system message of its own",
        ),
    ],
)
def test_wrong_messages_are_refused(messages: Any, message: str) -> None:
    """Catches roles in the wrong order, which a template would render without complaint."""
    with pytest.raises(ValueError, match=f"row train/0: .*{message}"):
        _load(
            _characters(chat_template=CHAT),
            [{"prompt": messages}],
            chat_template=True,
            system_prompt="be brief",
        )


def test_a_template_that_raises_or_reaches_out_is_a_bad_row() -> None:
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.x() }}",
    ):
        with pytest.raises(ValueError, match="row train/0: the chat template refuses it"):
            _load(_characters(chat_template=template), [{"prompt": "hi"}], chat_template=True)


def test_no_chat_template_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="chat_template is true, but the tokenizer has no chat template"):
        _load(tokenizer, [{"prompt": "hi"}], chat_template=True)


def test_messages_without_chat_template_are_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="column 'prompt' is a list, not text; set data.chat_template: true"):
        _load(tokenizer, [{"prompt": [{"role": "user", "content": "hi"}]}])


# -- bad rows --------------------------------------------------------------------------------------


def test_a_missing_column_lists_the_columns(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"data.prompt_column: the dataset has no column 'prompt'; it has answer, question"
    ):
        _load(tokenizer, [{"question": "x", "answer": "y"}])
    with pytest.raises(
        ValueError, match=r"data.prompt_template: .* no column 'qestion'; did you mean 'question'\?"
    ):
        _load(tokenizer, [{"question": "x", "answer": "y"}], prompt_template="{qestion}")
    with pytest.raises(ValueError, match=r"data.response_column: .* no column 'response'"):
        _sft(tokenizer, [{"prompt": "x"}])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None}, "column 'prompt' is None"),
        ({"other": "x"}, "column 'prompt' is missing"),
        ({"prompt": 5}, "column 'prompt' is a int, not text"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "1+1=\u00e9"}, "the prompt has characters that the tokenizer does not know: '\u00e9'"),
        ("text", "it is a str, not a mapping of columns"),
    ],
)
def test_a_bad_row_stops_or_is_skipped_and_counted(
    tokenizer: Any, row: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a row dropped in silence, and ids that shift when a row before them is dropped."""
    rows = [{"prompt": "a"}, row, {"prompt": "b"}]
    with pytest.raises(ValueError, match=f"row train/1: {reason}.*bad_rows: skip"):
        _load(tokenizer, rows)
    with caplog.at_level(logging.WARNING, logger="rlhf.data"):
        data = _load(tokenizer, rows, bad_rows="skip")
    assert [p.id for p in data] == ["train/0", "train/2"]
    assert data.counts["bad_rows"] == 1
    assert f"row train/1 is left out: {reason}" in caplog.text


def test_characters_of_the_chat_template_are_checked_too() -> None:
    """Catches a template whose turn marks vanish, so that no turn can be told from another."""
    with pytest.raises(ValueError, match="the prompt in the chat template has characters .*: '\\['"):
        _load(_characters(chat_template="[user]{{ bos_token }}"), [{"prompt": "hi"}], chat_template=True)
    data = _load(_characters(chat_template="{{ eos_token }}hi"), [{"prompt": "hi"}], chat_template=True)
    assert len(data[0].token_ids) == 3


def test_a_tokenizer_with_an_unknown_token_does_not_hide_unknown_characters() -> None:
    core = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert _load(tokenizer, [{"prompt": "aa"}])[0].token_ids == (1, 1)
    with pytest.raises(ValueError, match="does not know: 'b'"):
        _load(tokenizer, [{"prompt": "ab"}])


def test_an_invisible_character_may_vanish_or_be_unknown() -> None:
    """Catches a crash of the tokenizer in the middle of loading, and rows lost to a zero-width space."""
    assert (
        _load(_characters(), [{"prompt": "a\u200bb"}])[0].token_ids
        == _load(_characters(), [{"prompt": "ab"}])[0].token_ids
    )
    with pytest.raises(ValueError, match="does not know"):
        _load(build_tokenizer(BuildTokenizerConfig()), [{"prompt": "1\u200b2"}])


def test_a_byte_level_tokenizer_knows_everything() -> None:
    data = _load(_bytes(), [{"prompt": "\u00e9\u4e2d\U0001f600\u200b\n\t one"}])
    assert _bytes().decode(data[0].token_ids) == "\u00e9\u4e2d\U0001f600\u200b\n\t one"


def test_an_empty_dataset_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="dataset 'train' is empty"):
        _load(tokenizer, [])
    with pytest.raises(ValueError, match="none of 2 rows is left: 1 bad, 1 longer than"):
        _load(tokenizer, [{"prompt": None}, {"prompt": "a" * 9}], bad_rows="skip", max_prompt_tokens=8)


# -- length ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_prompt_tokens", "max_context"), [(4, None), (9, 4), (4, 9)])
def test_long_prompts_go_by_policy(max_prompt_tokens: int, max_context: int | None) -> None:
    """Catches an off-by-one at the limit, a limit of the context that is forgotten, and a truncation that
    loses BOS."""
    tokenizer = _characters(adds_bos=True)
    rows = [{"prompt": "abc"}, {"prompt": "abcd"}]
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_context": max_context}
    with pytest.raises(ValueError, match="row train/1: the prompt has 5 tokens, there is room for 4; raise"):
        _load(tokenizer, rows, too_long="error", **limits)
    filtered = _load(tokenizer, rows, too_long="filter", **limits)
    assert [p.text for p in filtered] == ["abc"]
    assert filtered.counts == {"kept": 1, "filtered_long": 1, "truncated": 0, "bad_rows": 0}
    cut = _load(tokenizer, rows, too_long="truncate", **limits)
    assert tokenizer.decode(cut[1].token_ids) == "<|bos|>bcd"
    assert cut[1].text == "bcd"
    assert cut.counts == {"kept": 2, "filtered_long": 0, "truncated": 1, "bad_rows": 0}


def test_limit_takes_the_first_rows(tokenizer: Any) -> None:
    assert [p.text for p in _load(tokenizer, [{"prompt": c} for c in "abcd"], limit=2)] == ["a", "b"]


# -- sft -------------------------------------------------------------------------------------------


def test_an_example_is_prompt_and_response_with_one_eos() -> None:
    """Catches a policy that never learns to stop, and a response that is given BOS in its middle."""
    tokenizer = _characters(adds_bos=True)
    data = _sft(tokenizer, [{"prompt": "1+1=", "response": "2"}, {"prompt": "1+2=", "response": "3<|eos|>"}])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.decode(data[0].prompt_ids) == "<|bos|>1+1="
    assert tokenizer.decode(data[0].response_ids) == "2<|eos|>"
    assert tokenizer.decode(data[1].response_ids) == "3<|eos|>"
    assert all(e.response_ids.count(eos) == 1 and bos not in e.response_ids for e in data)


def test_prompt_ids_of_sft_and_rl_are_the_same() -> None:
    """Catches a warm-up on other prompts than the policy meets later."""
    rows = TASKS["chain_arithmetic"](count=20, lazy_frac=0.5)
    for tokenizer in (_characters(ALPHABET), _characters(ALPHABET, adds_bos=True)):
        assert [e.prompt_ids for e in _sft(tokenizer, rows)] == [p.token_ids for p in _load(tokenizer, rows)]


def test_an_example_fits_into_the_context(tokenizer: Any) -> None:
    rows = [
        {"prompt": "abc", "response": "12"},
        {"prompt": "abcd", "response": "12"},
        {"prompt": "a", "response": "1" * 7},
    ]
    assert [e.id for e in _sft(tokenizer, rows, max_context=6)] == ["train/0"]
    cut = _sft(tokenizer, rows, max_context=6, too_long="truncate")
    assert [tokenizer.decode(e.prompt_ids) for e in cut] == ["abc", "bcd"]
    assert cut.counts == {"kept": 2, "filtered_long": 1, "truncated": 1, "bad_rows": 0}
    with pytest.raises(ValueError, match="row train/1: the prompt has 4 tokens, there is room for 3"):
        _sft(tokenizer, rows, max_context=6, too_long="error")


def test_bad_responses_are_bad_rows(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "response": r} for r in ("b", None, "", 5, "\u00e9")]
    data = _sft(tokenizer, rows, bad_rows="skip")
    assert [e.id for e in data] == ["train/0"]
    assert data.counts["bad_rows"] == 4


def test_sft_needs_a_response_column_and_an_eos(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="data.response_column is not set"):
        _sft(tokenizer, [{"prompt": "a", "response": "b"}], response_column=None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _sft(_characters(eos_token=None), [{"prompt": "a", "response": "b"}])


# -- fingerprint -----------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_anything_that_a_run_reads(tokenizer: Any) -> None:
    """Catches data that changed between save and resume unnoticed, a reward column included."""
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    base = _load(tokenizer, rows).fingerprint
    assert _load(_characters(), [dict(r) for r in rows]).fingerprint == base
    changed = [
        _load(tokenizer, [rows[0], {"prompt": "b", "answer": "3"}]),
        _load(tokenizer, [rows[0], {"prompt": "c", "answer": "2"}]),
        _load(tokenizer, rows[::-1]),
        _load(tokenizer, rows[:1]),
        _load(_characters(LETTERS[::-1]), rows),
    ]
    assert len({base, *(c.fingerprint for c in changed)}) == 6
    examples = [_sft(tokenizer, [{"prompt": "a", "response": r}]).fingerprint for r in ("b", "c")]
    assert examples[0] != examples[1]


# -- a task and a file through the whole way -------------------------------------------------------


def test_the_built_in_task_needs_no_path() -> None:
    config = DatasetConfig(task="chain_arithmetic", task_args={"count": 5}, response_column="response")
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    prompts = load_prompts(config, tokenizer, name="train", max_context=None)
    assert [p.row for p in prompts] == TASKS["chain_arithmetic"](count=5)
    assert len(load_sft(config, tokenizer, name="train")) == 5


def test_the_tokenizers_that_a_recipe_builds(tmp_path: Path) -> None:
    """Catches characters that a built tokenizer cannot spell, and turns of its chat template that double BOS."""
    characters = build_tokenizer(BuildTokenizerConfig())
    with pytest.raises(ValueError, match="row train/0: the prompt has characters .*: '\\\\n', 'a'"):
        _load(characters, [{"prompt": "1+\na"}])
    (tmp_path / "text.txt").write_text("one two three\n")
    pieces = build_tokenizer(
        BuildTokenizerConfig(kind="bpe", vocab_size=300, train_on=str(tmp_path / "text.txt"))
    )
    for tokenizer in (characters, pieces):
        plain = _load(tokenizer, [{"prompt": "1+1="}])[0]
        assert tokenizer.decode(plain.token_ids) == plain.text == "1+1="
        chat = _load(tokenizer, [{"prompt": "1+1="}], chat_template=True, system_prompt="2")[0]
        assert tokenizer.decode(chat.token_ids) == chat.text
        assert chat.token_ids[0] == tokenizer.bos_token_id != chat.token_ids[1]


def test_a_damaged_line_is_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "\xff"}\n{"prompt": \n[1]\n{"prompt": "b"}')
    with pytest.raises(ValueError, match="row train/1: line 3 is not valid UTF-8 at byte 12"):
        load_prompts(DatasetConfig(path=str(path)), tokenizer, name="train", max_context=None)
    data = load_prompts(
        DatasetConfig(path=str(path), bad_rows="skip"), tokenizer, name="train", max_context=None
    )
    assert [(p.id, p.text) for p in data] == [("train/0", "a"), ("train/4", "b")]
    assert data.counts["bad_rows"] == 3


def test_an_alphabet_may_lack_any_character(tmp_path: Path) -> None:
    """Would catch: a text of our own that the tokenizer is asked for and that its alphabet cannot spell."""
    tokenizer = build_tokenizer(BuildTokenizerConfig(alphabet="ab"))
    config = DatasetConfig(path="in-memory", response_column="response")
    rows = [{"prompt": "ab", "response": "ba"}]
    (example,) = load_sft(config, tokenizer, name="train", max_context=64, rows=rows)
    assert tokenizer.decode(example.prompt_ids) == "ab"
