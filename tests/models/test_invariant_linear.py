"""Swapped linears inside models: what must not change, and when packs are dropped."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.models.linear import InvariantLinear, weights_changed
from rlhf.models.swap import FastRMSNorm, swap_modules


def test_swap_changes_nothing_but_the_class(stock):
    """Would catch: renamed parameters, untied embeddings, a state dict with packs in it."""
    model = stock("qwen2")
    model.set_input_embeddings(model.get_input_embeddings())
    model.lm_head.weight = model.get_input_embeddings().weight
    before = {name: p.data_ptr() for name, p in model.state_dict().items()}
    count = swap_modules(model)
    assert count == sum(isinstance(m, nn.Linear) for m in model.modules()) == 15
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == before
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(isinstance(m, nn.Linear) for m in model.modules() if isinstance(m, InvariantLinear))
    assert swap_modules(model) == count


def test_subclasses_keep_their_own_forward():
    """Would catch: a quantised or wrapped linear whose forward is thrown away."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(3, 3)
    assert swap_modules(nn.Sequential(layer)) == 0 and type(layer) is Doubled


def test_writes_through_data_need_weights_changed():
    """Would catch: weights_changed that forgets a layer: DeepSpeed writes weights through .data."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    swap_modules(model)
    x = torch.randn(9, 4)
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            p.data.copy_(torch.zeros_like(p))
        weights_changed(model)
        assert torch.equal(model(x), torch.zeros(9, 4))


def test_optimiser_steps_are_seen_and_copies_are_apart():
    """Would catch: a frozen reference that follows the actor, or an actor that does not follow itself."""
    model = nn.Linear(4, 4)
    swap_modules(model)
    x = torch.randn(9, 4)
    before = model(x).detach()
    twin = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimiser.step()
    assert not torch.equal(model(x), before) and torch.equal(twin(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_without_a_kernel_still_run(dtype):
    """Would catch: an error where torch's own linear works."""
    layer = nn.Linear(4, 3, dtype=dtype)
    x = torch.randn(5, 4, dtype=dtype)
    want = layer(x)
    swap_modules(layer)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize(
    "name,swapped",
    [("qwen3", 9), ("llama", 5), ("mistral", 5), ("gemma2", 0), ("gemma3_text", 0), ("gpt_neox", 0)],
)
def test_only_norms_that_compute_the_same_are_swapped(stock, name, swapped):
    """Would catch: Gemma's (1 + weight) norm run as Llama's; a swap that changes a bit or a gradient."""
    model = stock(name)
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_(1)
    inputs = [torch.randn(3, 5, norm.weight.numel()) for norm in norms]
    want = [norm(x) for norm, x in zip(norms, inputs)]
    wanted_grads = [torch.autograd.grad(y.square().sum(), n.weight)[0] for n, y in zip(norms, want)]
    swap_modules(model)
    assert sum(isinstance(m, FastRMSNorm) for m in norms) == swapped
    for norm, x, y, grad in zip(norms, inputs, want, wanted_grads):
        got = norm(x)
        assert torch.allclose(got, y, rtol=1e-6, atol=1e-7)
        assert torch.allclose(torch.autograd.grad(got.square().sum(), norm.weight)[0], grad, rtol=1e-4)


def test_a_norm_is_tried_and_not_taken_by_its_name():
    """Would catch: trust in a class's name and attributes."""

    class ShiftedRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * (1 + 1 / self.weight)

    model = nn.Sequential(ShiftedRMSNorm(8))
    swap_modules(model)
    assert type(model[0]) is ShiftedRMSNorm
