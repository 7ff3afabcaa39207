"""What the operations say of which form of theirs ran."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlhf.kernels import form, native
from rlhf.kernels.linear import linear, pack
from rlhf.models import attention
from rlhf.models.probe import probe_exactness
from rlhf.models.swap import swap_modules


@pytest.fixture(autouse=True)
def forgotten():
    form.forget()
    yield
    form.forget()


def test_calls_are_counted_by_operation_and_form():
    """Would catch: a form that overwrites another, and a count that a reader can change."""
    for _ in range(3):
        form.took("norm", form.NATIVE)
    form.took("norm", form.TORCH)
    form.took("attention", form.TRITON)
    assert form.forms() == {"attention": {"triton": 1}, "norm": {"native": 3, "torch": 1}}
    form.forms()["norm"].clear()
    assert form.told() == "attention triton, norm native and torch"
    form.forget()
    assert form.told() == ""


def test_a_product_says_what_it_took():
    """Would catch: a weight without a pack, or few rows, that run elsewhere than the report says."""
    weight = torch.randn(128, 64)
    packed = pack(weight)
    for rows in (3, 200):
        linear(torch.randn(rows, 64), weight, None, packed)
    linear(torch.randn(3, 64), weight)
    few = {} if native.library("linear") is None else {"native": 1}
    assert form.forms() == {"linear": {**few, "onednn": 2 - len(few), "torch": 1}}


def test_a_model_on_this_machine():
    """Would catch: an operation of a forward that says nothing, or falls back to torch where there is a compiler."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation(attention.NAME)
    swap_modules(model)
    form.forget()
    probe_exactness(model)
    found = form.forms()
    assert {"attention", "gated activation", "keys and values", "linear", "norm", "rotary"} <= found.keys()
    if native.library("attention") is not None:
        assert all("torch" not in found[name] for name in ("attention", "linear", "norm", "rotary")), found
