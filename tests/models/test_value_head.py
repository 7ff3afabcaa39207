"""A value head on a causal language model: its numbers against plain transformers, what it leaves alone, on the disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rlhf.models import load_model, save_model
from rlhf.models.attention import packed_attention
from rlhf.models.fused import StepForward
from rlhf.models.value_head import FILE, add_value_head, ask_values, is_of_value_head, save_value_head
from rlhf.recipe.schema import LoraConfig, ModelConfig
from tests.models.conftest import ARCHITECTURES

LENGTHS = [9, 20, 1, 70]


def forward(model, pack, keep=0):
    with packed_attention(pack), ask_values() as given:
        output = model(
            input_ids=pack.token_ids[None],
            position_ids=pack.position_ids[None],
            logits_to_keep=keep,
            use_cache=False,
        )
    (values,) = given
    return output.logits[0], values


def draw_head(model):
    """Random weights in place of zeros."""
    head = next(p for name, p in model.named_parameters() if is_of_value_head(name))
    head.data.normal_(generator=torch.Generator().manual_seed(5))
    return head


@pytest.fixture
def made(prepared):
    def make(name="qwen3", **changes):
        model = prepared(name, trainable=True, **changes)
        add_value_head(model, None)
        return model

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_are_made_of_the_hidden_state_of_the_logits(name, made, prepared, stock, pack):
    """Would catch: values from before the final norm, of other tokens than the logits', or logits changed by the head."""
    model, sequences = made(name), pack(LENGTHS)
    head = draw_head(model)
    logits, values = forward(model, sequences)
    assert values.dtype == torch.float32 and values.shape == (sum(LENGTHS),)
    bare = prepared(name)
    with torch.no_grad(), packed_attention(sequences):
        ids, places = sequences.token_ids[None], sequences.position_ids[None]
        assert torch.equal(bare(input_ids=ids, position_ids=places, use_cache=False).logits[0], logits)
    plain = stock(name)
    with torch.no_grad():
        trunk = plain.base_model
        hidden = torch.cat([trunk(input_ids=row[None])[0][0] for row in sequences.split(sequences.token_ids)])
    torch.testing.assert_close(values, hidden @ head[0].detach(), rtol=1e-4, atol=1e-4)
    keep = torch.tensor([3, 40, 41])
    torch.testing.assert_close(forward(model, sequences, keep)[1], values[keep], rtol=0, atol=0)


def test_engine_keeps_its_joined_forward(made, prepared):
    """Would catch: a head that makes the engine fall back to the slower forward."""
    assert StepForward(prepared("qwen3")).is_fused and StepForward(made("qwen3").eval()).is_fused


def test_gradients_reach_head_and_trunk_with_checkpointing(made, pack):
    """Would catch: values detached from the trunk."""
    one, other = made(), made(gradient_checkpointing=True)
    for model in (one, other):
        draw_head(model)
        forward(model, pack(LENGTHS))[1].square().sum().backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and (p.grad != 0).any() or "lm_head" in name or "embed_out" in name, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_head_is_trained_whole_beside_lora(made):
    """Would catch: a head that peft froze."""
    model = made(lora=LoraConfig(rank=2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in trained if "lora_" not in name] == ["base_model.model.value_head.weight"]


def test_on_disk_it_lies_beside_a_plain_model(made, tokenizer, pack, tmp_path):
    """Would catch: a folder that plain transformers warns about or cannot load, a head that starts at 0 again."""
    model, sequences = made(), pack(LENGTHS)
    draw_head(model)
    weights = dict(model.named_parameters())
    save_model(
        model, tokenizer, tmp_path, weights={n: w for n, w in weights.items() if not is_of_value_head(n)}
    )
    save_value_head(weights, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(plain).__name__ == type(model).__name__
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    again = load_model(config, tokenizer, seed=0, trainable=True)
    add_value_head(again, str(tmp_path))
    for got, want in zip(forward(again, sequences), forward(model, sequences), strict=True):
        assert torch.equal(got, want)

    for weight, said in (
        (torch.zeros(1, 63), "another model"),
        (torch.full((1, 64), torch.nan), "not finite"),
    ):
        save_file({"weight": weight}, tmp_path / FILE)
        with pytest.raises(ValueError, match=said):
            add_value_head(load_model(config, tokenizer, seed=0, trainable=True), str(tmp_path))
