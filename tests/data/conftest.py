"""A byte-level tokenizer of our own, with the chat templates that occur in the wild."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.models.build import build_tokenizer
from rlhf.recipe.schema import BuildTokenizerConfig

# What stands before and after an assistant's text; "keep" does the same for every turn.
TEMPLATES = {
    "keep": "{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' + m.content + '<|eos|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}",
    # Thoughts of earlier turns are left out, so a turn changes when another follows.
    "forget": "{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(hm)' }}{% endif %}{{ m.content + '<|eos|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}",
    # The same with marks.
    "marked": "{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '(hm)' }}{% endif %}{{ m.content + '<|eos|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eos|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}",
    # Turns end in a token of the template's own, not in the end-of-sequence token.
    "own end": "{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}",
    # Turns do not end at all.
    "endless": "{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}",
}


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedTokenizerFast]:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six user assistant\n" * 5)

    def build(template: str = "keep") -> PreTrainedTokenizerFast:
        tokenizer = build_tokenizer(BuildTokenizerConfig(kind="bpe", vocab_size=300, train_on=str(path)))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return build
