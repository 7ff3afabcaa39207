"""Text from tokens, piece by piece, against decoding all of them at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf.serving.terminal import printable
from rlhf.serving.text import Detokenizer, SampleText, StopCutter, TokenTexts
from rlhf.serving.tools import ToolParser


@pytest.fixture(scope="session")
def with_byte_fallback():
    """As Llama's and Gemma's: words with a mark for the space before, and bytes for what is no word."""
    words = ["▁hello", "▁wor", "ld", "▁", "é", *(f"<0x{b:02X}>" for b in range(256))]
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def pieces(tokenizer, ids):
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    return [*(text.push([token]) for token in ids), text.end()]


TEXTS = "añ€😀é 中\n"


@settings(deadline=None, max_examples=60)
@given(text=st.text(TEXTS + "xyz", max_size=30), cut=st.integers(0, 40))
def test_no_character_is_split(tokenizer, text, cut):
    """Catches: half characters shown, or lost at the end."""
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    half = ids[:cut]
    assert "".join(pieces(tokenizer, half)) == tokenizer.decode(half)


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=80))
def test_bytes_that_are_no_text(tokenizer, data):
    """Catches: text that differs from decoding everything at once, however broken it is."""
    ids = TokenIds(tokenizer)(data)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_broken_bytes_are_not_held_for_ever(tokenizer):
    """Catches: a stream that stands still, and work that grows with every token."""
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    for _ in range(500):
        text.push(TokenIds(tokenizer)(b"\xff"))
        assert len(text._held) < 40
    for count in range(20, 40):  # wherever the character begins in what is held
        ids = TokenIds(tokenizer)(b"\xff" * count + "€".encode())
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


class TokenIds:
    def __init__(self, tokenizer):
        texts = TokenTexts(tokenizer)
        self._id = {texts.bytes(i): i for i in range(256)}

    def __call__(self, data):
        return [self._id[bytes([b])] for b in data]


def test_words_with_spaces_before_and_bytes(with_byte_fallback):
    """Catches: a space lost at a piece's beginning, and characters that take back what was shown."""
    t = with_byte_fallback
    of = {w: i for w, i in t.get_vocab().items()}
    euro = [of[f"<0x{b:02X}>"] for b in "€".encode()]
    ids = [of["▁hello"], of["▁wor"], of["ld"], *euro, *euro, of["é"], *euro[:2]]
    found = pieces(t, ids)
    assert found == [
        "hello",
        " wor",
        "ld",
        "",
        "",
        "€",
        "",
        "",
        "€",
        "é",
        "",
        "",
        "\N{REPLACEMENT CHARACTER}" * 2,
    ]
    assert TokenTexts(t).bytes(euro[0]) == b"\xe2" and TokenTexts(t).name(euro[0]) == "bytes:\\xe2"


def test_the_bytes_of_tokens(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("é<|im_end|>")
    assert [texts.bytes(i) for i in ids] == [b"\xc3", b"\xa9", b"<|im_end|>"]
    assert texts.name(ids[0]) == "bytes:\\xc3" and texts.bytes(271) == b""


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab", max_size=20),
    cuts=st.lists(st.integers(0, 20)),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_are_cut(text, cuts, stops):
    """Catches: a beginning of a stop shown, text after it, and text held back for good."""
    ends = [at + len(s) for s in stops if (at := text.find(s)) >= 0]
    text = text[: min(ends, default=len(text))]  # where the engine ends it
    hits = [text[: -len(s)] for s in stops if text.endswith(s)]
    want = min(hits, key=len) if ends else text
    cutter, shown = StopCutter(stops, include=False), ""
    edges = sorted({0, *(c for c in cuts if c < len(text))})
    for a, b in zip(edges, edges[1:]):
        shown += cutter.push(text[a:b])
        assert not ends or want.startswith(shown)
    assert shown + cutter.end(text[edges[-1] :], is_stopped=bool(ends)) == want


def test_what_ends_a_sample_is_not_shown(tokenizer):
    """Catches: the end token, or the stop text, at the end of an answer."""
    end = tokenizer.eos_token_id

    def shown(text, reason, **options):
        sample = SampleText(tokenizer, **({"stop_ids": [end, 65], "stops": ["xyz"]} | options))
        ids = tokenizer.encode(text)
        return "".join([*(sample.push([i], None) for i in ids[:-1]), sample.push(ids[-1:], reason)])

    letter = tokenizer.decode([65])
    assert shown("abc<|im_end|>", "stop") == "abc" == shown("abc" + letter, "stop") == shown("abcxyz", "stop")
    assert shown("abcxyz", "stop", include_stop=True) == "abcxyz"
    assert shown("abc<|im_end|>", "stop", include_stop=True, skip_special_tokens=False) == "abc<|im_end|>"
    assert shown("abcxy", "length") == "abcxy" and shown("aé"[:2], "length") == "aé"


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "<é>"}}\n</tool_call>'


def parsed(text, size):
    """(content, calls as [name, arguments]) of a text that comes in pieces of some size."""
    parser, said, calls = ToolParser(["f"]), "", []
    for at in range(0, len(text) + size, size):
        news = parser.push(text[at : at + size], is_over=at >= len(text))
        said += news.content
        for call in news.calls:
            if call.name is not None:
                calls.append([call.name, ""])
            assert call.number == len(calls) - 1
            calls[-1][1] += call.arguments
    return said, calls


F = ["f", '{"a": "<é>"}']


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("hello  there\n", "hello  there\n", []),
        (CALL, "", [F]),
        (f"let me\n{CALL}\n{CALL}\n", "let me", [F, F]),
        (f"{CALL}\n and\n then ", "and\n then", [F]),
        ("<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", []),
        ('a <tool_call>{"name": "g"}</tool_call>', 'a <tool_call>{"name": "g"}</tool_call>', []),
        ('<tool_call>{"name": "f", ', '<tool_call>{"name": "f", ', []),
        ("a <tool", "a <tool", []),
        ('<tool_call>{"name": "f"}</tool_call>', "", [["f", "{}"]]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [["f", '{"a": 1}']]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [["f", '{"a": 1}']]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>}\\""}}</tool_call>.', ".", [["f", '{"a": "</tool_call>}\\""}']]),
        ('<tool_call>{"name": "f", "arguments": {"a": [{"b": {}}], "c', "", [["f", '{"a": [{"b": {}}], "c']]),
        ('<tool_call>{"name": "f", "arguments": {"a": </tool_call> x', "x", [["f", '{"a": ']]),
        ('<tool_call>{"name": "f", "arguments": {}} and so on', "and so on", [["f", "{}"]]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool', "", [["f", "{}"]]),
        ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', '<tool_call>{"name": "g", "arguments": {}}</tool_call>', []),
    ],
)  # fmt: skip
def test_calls_of_tools(size, text, content, calls):
    """Catches: calls shown as text, text lost, calls of tools that are not there, and calls that depend on how the text came."""
    assert parsed(text, size) == (content, calls)


def test_a_call_is_told_as_it_is_written():
    """Catches: arguments held back until the call is complete."""
    parser = ToolParser(["f"])
    news = [call for c in CALL for call in parser.push(c, is_over=False).calls]
    assert [c.name for c in news] == ["f"] + [None] * (len(news) - 1)
    assert [c.arguments for c in news] == list(F[1])


def test_nothing_reaches_the_terminal_as_a_code():
    """Catches: a model that clears the screen, or writes backwards."""
    assert (
        printable("a\x1b[2Jb\n\tc\u202ed😀")
        == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc\N{REPLACEMENT CHARACTER}d😀"
    )
