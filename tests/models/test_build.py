"""Tokenizers and models made on the spot."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from tests.models.conftest import model_config

CHARACTERS = build_tokenizer(BuildTokenizerConfig(alphabet="01+- \n=é"))


@given(st.text("01+- \n=é"))
def test_characters_are_one_token_each_and_come_back(text):
    """Would catch: spaces lost or added by the decoder, a newline that no pattern matches."""
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text) and CHARACTERS.decode(ids) == text


def test_characters_special_tokens_and_strangers():
    """Would catch: an end token that is spelt out, and a character of no token that vanishes."""
    assert (CHARACTERS.pad_token_id, CHARACTERS.bos_token_id, CHARACTERS.eos_token_id) == (0, 1, 2)
    assert CHARACTERS.encode("1<|eos|>") == [4, 2] and len(CHARACTERS) == 11
    assert CHARACTERS.decode([4, 2], skip_special_tokens=True) == "1"
    with pytest.raises(Exception, match="UNK"):
        CHARACTERS.encode("z")


@pytest.fixture(scope="module")
def training_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "rows.jsonl"
    rows = [{"q": f"What is {i} plus {i}?", "a": [f"It is {2 * i}.", {"x": "naïve"}]} for i in range(200)]
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def test_bpe_gives_back_any_text_and_is_repeatable(training_file):
    """Would catch: a vocabulary that changes from run to run, bytes outside the training text that are
    lost.
    """
    config = BuildTokenizerConfig(kind="bpe", vocab_size=320, train_on=training_file)
    tokenizer, again = build_tokenizer(config), build_tokenizer(config)
    assert tokenizer.get_vocab() == again.get_vocab() and len(tokenizer) == 320
    for text in (" What is 7 plus 7?", "naïve\n\t 🙂", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("What is 7 plus 7?")) < len("What is 7 plus 7?") / 2


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_chat_template_extends_by_prefix(kind, training_file):
    """Would catch: a template whose prompt is not the beginning of the conversation with the answer."""
    config = BuildTokenizerConfig(kind=kind, alphabet="ab ", vocab_size=300, train_on=training_file)
    tokenizer = build_tokenizer(config)
    messages = [{"role": "user", "content": "a b"}]
    options = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "ba"}], **options)
    assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_saved_tokenizer_is_the_same_for_transformers(kind, training_file, tmp_path):
    """Would catch: a decoder or template that is not saved."""
    tokenizer = build_tokenizer(
        BuildTokenizerConfig(kind=kind, alphabet="ab \n", vocab_size=300, train_on=training_file)
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("ab \n a")
    assert loaded.encode("ab \n a") == ids and loaded.decode(ids) == "ab \n a"
    assert loaded.eos_token_id == 2 and loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "config,message",
    [
        ({"alphabet": ""}, "alphabet: is empty"),
        ({"alphabet": "aab"}, "'a' more than once"),
        ({"kind": "bpe"}, "tokenizer.build.train_on: kind: bpe needs it"),
        ({"kind": "bpe", "train_on": "/no/such/file"}, "no file /no/such/file"),
        ({"kind": "bpe", "train_on": __file__, "vocab_size": 100}, "vocab_size: 100 is too small"),
    ],
)
def test_unusable_tokenizers_are_named(config, message):
    """Would catch: an error from deep inside a library."""
    with pytest.raises(ValueError, match=message):
        build_tokenizer(BuildTokenizerConfig(**config))


def test_model_is_a_function_of_its_seed(tokenizer):
    """Would catch: weights that depend on what was drawn before, or that disturb what is drawn after."""
    config = model_config("qwen3").build
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    one = build_model(config, tokenizer, seed=0).state_dict()
    assert torch.equal(torch.rand(3), expected_draw)
    two, other = (build_model(config, tokenizer, seed=s).state_dict() for s in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    half = build_model(config, tokenizer, dtype="bfloat16", seed=0).state_dict()
    assert all(torch.equal(half[name], one[name].bfloat16()) for name in one)


@pytest.mark.parametrize(
    "model_type,config,message",
    [
        ("qwen33", {}, "no 'qwen33'; did you mean 'qwen3'"),
        ("qwen3", {"hiden_size": 64}, "no 'hiden_size'; did you mean 'hidden_size'"),
        ("qwen3", {"vocab_size": 64}, "vocab_size comes from the tokenizer"),
        ("qwen3", {"hidden_size": "many"}, "does not fit qwen3"),
    ],
)
def test_wrong_architectures_are_named(model_type, config, message, tokenizer):
    """Would catch: a misspelt key that transformers stores and ignores."""
    with pytest.raises(ValueError, match=message):
        build_model(BuildModelConfig(model_type=model_type, config=config), tokenizer)
