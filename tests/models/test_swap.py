"""Our forms of a model's modules: the same numbers, only where they were tried, and nothing else of the model changed."""

import copy
import pickle

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.models import swap
from rlhf.models.swap import GatedGeluMLP, GatedGeluTanhMLP, GatedMLP, swap_modules

# which of rotation and MLP our form takes over: GPT-NeoX rotates a part of each head, and its MLP has no gate
SWAPPED = {
    "llama": (True, True),
    "qwen2": (True, True),
    "qwen3": (True, True),
    "mistral": (True, True),
    "gemma2": (True, True),
    "gpt_neox": (True, False),
}


def attentions(model):
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


@pytest.mark.parametrize("name", SWAPPED)
def test_padded_batches_and_gradients_are_the_stock_models(name, stock):
    """Would catch: a rotation of the wrong layout, of a wrong batch row, or an MLP that is not gated."""
    model = stock(name).train(False)
    ours = copy.deepcopy(model)
    swap_modules(ours)
    ids = torch.randint(model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0  # padded on the left
    # each row in steps of its own: attention sees distances alone
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * torch.tensor([[1], [2], [3]])
    logits = [m(input_ids=ids, attention_mask=mask, position_ids=positions).logits for m in (model, ours)]
    seen = mask.bool()
    assert torch.allclose(logits[0][seen], logits[1][seen], atol=2e-5, rtol=1e-4)
    for y in logits:
        y[seen].log_softmax(-1)[:, 3].sum().backward()
    for (label, p), q in zip(model.named_parameters(), ours.parameters()):
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-6, label


@pytest.mark.parametrize("name", SWAPPED)
def test_what_is_swapped(name, stock, monkeypatch):
    """Would catch: an architecture that silently runs without our forms, or with one it must not have."""
    model = stock(name)
    kinds = [type(a) for a in attentions(model)]
    swap_modules(model)
    rotates, gated = SWAPPED[name]
    for attention, kind in zip(attentions(model), kinds):
        assert isinstance(attention, kind) and (type(attention) is not kind) == rotates
    assert any(isinstance(m, (GatedMLP, GatedGeluTanhMLP)) for m in model.modules()) == gated
    called = []
    rotated = swap._rotated
    monkeypatch.setattr(swap, "_rotated", lambda *args: called.append(1) or rotated(*args))
    model(input_ids=torch.ones((1, 4), dtype=torch.long))
    assert bool(called) == (rotates and name != "gpt_neox")


def test_twice_is_once_and_a_copy_is_whole(stock):
    """Would catch: a rotation around a rotation, or classes that deepcopy cannot follow."""
    model = stock("qwen3")
    swap_modules(model)
    kinds = [type(m) for m in model.modules()]
    swap_modules(model)
    assert [type(m) for m in model.modules()] == kinds == [type(m) for m in copy.deepcopy(model).modules()]


def test_a_swapped_model_can_be_pickled(stock):
    """Would catch: classes made here that pickle cannot find by name."""
    model = stock("qwen3")
    swap_modules(model)
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    ids = torch.arange(5)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_norms_that_round_elsewhere_stay():
    """Would catch: OLMo's norm, which multiplies before it rounds, run as Llama's in bf16."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    model = torch.nn.Sequential(Olmo2RMSNorm(16))
    swap_modules(model)
    assert type(model[0]) is Olmo2RMSNorm


def test_an_mlp_is_tried_and_not_taken_by_its_names():
    """Would catch: trust in four names."""

    class Shifted(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    class Wanting(LlamaMLP):
        def forward(self, x):
            return super().forward(x) * self.gain

    class Config:
        hidden_size, intermediate_size, mlp_bias, hidden_act = 8, 16, False, "silu"

    class Tanh(Config):
        hidden_act = "gelu_pytorch_tanh"

    class Gelu(Config):
        hidden_act = "gelu"

    stock = torch.nn.Sequential(*(LlamaMLP(config()) for config in (Config, Tanh, Gelu)))
    ours = copy.deepcopy(stock)
    swap_modules(ours)
    assert [type(m) for m in ours] == [GatedMLP, GatedGeluTanhMLP, GatedGeluMLP]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(ours, stock):
        assert torch.allclose(mine(x), theirs(x), atol=1e-6)

    for kind, wanted in ((LlamaMLP, GatedMLP), (Shifted, Shifted), (Wanting, Wanting)):
        model = torch.nn.Sequential(kind(Config()))
        swap_modules(model)
        assert type(model[0]) is wanted


def test_a_rotation_is_tried(monkeypatch, stock):
    """Would catch: trust in a function's name: interleaved pairs are called the same."""
    from transformers.models.glm import modeling_glm

    assert not swap._is_rotation(modeling_glm.apply_rotary_pos_emb)
    monkeypatch.setattr(swap, "_is_rotation", lambda stock: False)
    swap._with_our_rotation.cache_clear()
    model = stock("llama")
    kinds = [type(a) for a in attentions(model)]
    swap_modules(model)
    assert [type(a) for a in attentions(model)] == kinds
    swap._with_our_rotation.cache_clear()
