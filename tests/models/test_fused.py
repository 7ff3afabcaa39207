"""The engine's forward: which models it takes over, that it gives their bits, and when it must not."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu import interpreter
from rlhf.kernels import gpu, native
from rlhf.kernels import linear as linear_kernel
from rlhf.kernels.attention import Plan
from rlhf.kernels.linear import one_below_another
from rlhf.kernels.quantized import dequantize, quantize
from rlhf.models import fused
from rlhf.models.attention import PackedContext, packed_attention
from rlhf.models.fused import StepForward
from rlhf.models.linear import InvariantLinear, lay_together, weights_changed
from rlhf.models.load import save_model
from rlhf.recipe.schema import LoraConfig, TrainerConfig
from rlhf.trainers.optimizers import make_optimizer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/kernels/test_triton.py runs some so
LENGTHS = [25, 1, 40, 7]
FUSED = {"llama", "qwen2", "qwen3", "mistral"}


def own_logits(model, pack):
    with packed_attention(pack), torch.no_grad():
        output = model(input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False)
    return output.logits[0]


def step_logits(forward, pack, keep=None):
    context = PackedContext(Plan(LENGTHS, LENGTHS))
    return forward(pack.token_ids, pack.position_ids, context, keep)


def scramble(model, seed=1):
    """New values everywhere: norms that are not 1 and biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox"])
def test_it_has_the_bits_of_the_model(name, dtype, prepared, pack):
    """Would catch: a bias, a norm or a window left out, a head taken for another, a model taken for Llama's."""
    model, sequences = prepared(name, dtype=dtype), pack(LENGTHS)
    forward = StepForward(model)
    assert forward.is_fused == (name in FUSED)
    scramble(model)
    forward.refresh()
    want = own_logits(model, sequences)
    assert torch.equal(step_logits(forward, sequences), want)
    keep = torch.tensor([3, 24, 25, 72])
    assert torch.equal(step_logits(forward, sequences, keep), want[keep])


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_those_of_the_layers_linears_alone(bits, prepared, pack):
    """Would catch: a linear that is left whole or taken from another's copy, a head that is rounded, a trainer's weight that
    is written, and copies that outlive their weights."""
    model, sequences = prepared("qwen2", config={"intermediate_size": 128}), pack(LENGTHS)
    forward = StepForward(model, bits)
    for seed in (1, 2):
        scramble(model, seed)
        kept = copy.deepcopy(model.state_dict())
        forward.refresh()
        got = step_logits(forward, sequences)
        assert all(torch.equal(a, kept[name]) for name, a in model.state_dict().items())
        rounded = copy.deepcopy(model)
        with torch.no_grad():
            for module in rounded.model.layers.modules():
                if isinstance(module, InvariantLinear):
                    module.weight.copy_(dequantize(quantize(module.weight, bits)))
        want = own_logits(rounded, sequences)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not torch.allclose(got, own_logits(model, sequences), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lora", [True, False])
def test_few_bits_that_cannot_be_are_refused(lora, prepared):
    """Would catch: an engine that runs whole weights where a few bits were asked for."""
    model = prepared("qwen3", trainable=True, lora=LoraConfig(rank=4)) if lora else prepared("gpt_neox")
    with pytest.raises(
        ValueError, match="weights of 8 bits: the model is not a decoder of Llama's kind with plain"
    ):
        StepForward(model, 8)


def test_adapters_are_called_as_they_are(prepared, pack):
    """Would catch: an engine that samples from the base model without its adapters."""
    model, sequences = prepared("qwen3", trainable=True, lora=LoraConfig(rank=4)), pack(LENGTHS)
    plain = own_logits(model, sequences)
    scramble(model)
    forward = StepForward(model)
    assert forward.is_fused
    assert torch.equal(step_logits(forward, sequences), own_logits(model, sequences))
    assert not torch.equal(plain, own_logits(model, sequences))


def test_weights_that_changed_are_joined_again(prepared, pack):
    """Would catch: q, k and v of old weights, after a write in the open or through .data."""
    model, sequences = prepared("qwen3"), pack(LENGTHS)
    forward = StepForward(model)
    scramble(model)
    forward.refresh()
    assert torch.equal(step_logits(forward, sequences), own_logits(model, sequences))
    for p in model.parameters():
        p.data.mul_(0.5)
    weights_changed(model)
    forward.forget()
    want = own_logits(model, sequences)
    assert torch.equal(step_logits(forward, sequences), want)  # before the weights are joined again
    forward.refresh()
    assert forward.is_fused and torch.equal(step_logits(forward, sequences), want)


def replace(model):
    """Other parameters, with other numbers in the same memory, that were never written to."""
    for module in [m for m in model.modules() if type(m) is InvariantLinear]:
        for name, old in list(module.named_parameters()):
            new = torch.nn.Parameter(torch.from_numpy(old.detach().numpy()), requires_grad=False)
            new.numpy()[:] += 0.5
            setattr(module, name, new)


def test_weights_that_others_replaced_are_joined_again(prepared, pack):
    """Would catch: q, k and v of parameters that are gone, where new ones were laid at their address."""
    model, sequences = prepared("qwen2"), pack(LENGTHS)
    replace(model)
    forward = StepForward(model)
    replace(model)
    forward.refresh()
    got = step_logits(forward, sequences)
    weights_changed(model)
    assert forward.is_fused and torch.equal(got, own_logits(model, sequences))


def test_hooks_are_respected(prepared, pack):
    """Would catch: a forward that goes past the hooks by which others gather, offload or look at weights."""
    model, sequences = prepared("llama"), pack(LENGTHS)
    forward, calls = StepForward(model), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    forward.refresh()
    step_logits(forward, sequences)
    assert calls and not forward.is_fused
    handle.remove()
    forward.refresh()
    assert forward.is_fused


@pytest.mark.parametrize("change", ["scaled", "parameter", "module"])
def test_a_model_is_tried_and_not_taken_by_its_names(change, prepared, pack):
    """Would catch: an architecture with Llama's names and another arithmetic."""
    model, sequences = prepared("llama"), pack(LENGTHS)
    mlp = model.model.layers[1].mlp
    if change == "parameter":
        mlp.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    elif change == "module":
        mlp.add_module("extra", torch.nn.Identity())
    else:

        class Scaled(type(mlp)):
            def forward(self, x):
                return 1.5 * super().forward(x)

        mlp.__class__ = Scaled
    forward = StepForward(model)
    assert not forward.is_fused
    assert torch.equal(step_logits(forward, sequences), own_logits(model, sequences))


def test_the_model_is_left_as_it_was(prepared):
    """Would catch: joined weights in the state dict, or a copy that shares them."""
    model = prepared("qwen3")
    before = {name: p.data_ptr() for name, p in model.state_dict().items()}
    forward = StepForward(model)
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == before
    assert StepForward(copy.deepcopy(model)).is_fused and forward.is_fused


def test_where_a_bit_differs_the_model_runs_itself(prepared, pack, monkeypatch):
    """Would catch: a trial that compares a thing with itself."""
    rotate = fused.rotate_
    monkeypatch.setattr(fused, "rotate_", lambda *args: rotate(*args).mul_(1 + 1e-6))
    model, sequences = prepared("llama"), pack(LENGTHS)
    forward = StepForward(model)
    assert not forward.is_fused
    assert torch.equal(step_logits(forward, sequences), own_logits(model, sequences))


def families(model):
    """The weights of one input, of every layer."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield [m.weight for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        yield [mlp.gate_proj.weight, mlp.up_proj.weight]


def test_weights_of_one_input_lie_together(prepared, tokenizer, tmp_path):
    """Would catch: a joined copy of every weight on a GPU, weights laid in a wrong order, a checkpoint that writes all of
    the memory with each view of it, and memory taken for one piece that is not."""
    model, stock = prepared("qwen2", trainable=True), prepared("qwen2")
    assert all(one_below_another(w).data_ptr() != w[0].data_ptr() for w in families(model))
    lay_together(model, "cpu")
    model.to("cpu")
    wanted = {name: w.clone() for name, w in stock.state_dict().items()}
    assert all(torch.equal(w, wanted[name]) for name, w in model.state_dict().items())
    for weights in families(model):
        joined = one_below_another(weights)
        assert joined.data_ptr() == weights[0].data_ptr() and torch.equal(joined, torch.cat(weights))
        assert one_below_another(weights[::-1]).data_ptr() != weights[-1].data_ptr()
        assert one_below_another([weights[0][:-1], weights[1]]).data_ptr() != weights[0].data_ptr()
        weights[1].data.add_(1.0)  # as an optimiser writes
        assert torch.equal(joined, torch.cat(weights))
        weights[1].data.sub_(1.0)
    save_model(model, tokenizer, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved and all(w.untyped_storage().nbytes() >= w.nbytes for w in saved.values())
    size = sum(w.nbytes for w in saved.values())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * size + 10_000


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_that_zero_flattened_lie_together(name, optimizer, weight_decay, prepared):
    """Would catch: a joined copy for every model that is trained, or for those with biases between their weights."""
    model = prepared(name, trainable=True)
    config = TrainerConfig(steps=1, optimizer=optimizer, weight_decay=weight_decay)
    for group in make_optimizer(model, config).param_groups:
        parameters = group["params"]
        flat = torch.cat([p.detach().flatten() for p in parameters])
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.data = part.view(p.shape)
    assert all(one_below_another(w).data_ptr() == w[0].data_ptr() for w in families(model))


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton forms; tests/kernels/test_triton.py runs it")
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_on_a_gpu_joined_products_have_the_bits_of_each(name, prepared, pack, monkeypatch):
    """Would catch: an engine whose products are cut by the joint size, one that multiplies by weights of before an update, and
    joined weights that cost memory or that `forget` keeps."""
    from rlhf.kernels import matmul_triton

    monkeypatch.setattr(native, "library", lambda name: None)
    monkeypatch.setattr(gpu, "serves", interpreter.serves)
    monkeypatch.setattr(linear_kernel, "can_pack", lambda weight: False)
    monkeypatch.setattr(fused, "_TRIAL_TOKENS", (7,))
    monkeypatch.setattr(matmul_triton, "_WHOLE", 32)
    monkeypatch.setattr(matmul_triton, "_WIDE", 200)  # gate and up together, neither alone
    monkeypatch.setattr(matmul_triton, "_STEP", 16)
    model, sequences = prepared(name), pack([3, 9])
    lay_together(model, "cpu")
    forward = StepForward(model)
    calls = []
    stock = fused.joined_linear
    monkeypatch.setattr(
        fused, "joined_linear", lambda *args, **more: calls.append(args[1]) or stock(*args, **more)
    )

    def logits():
        context = PackedContext(Plan([3, 9], [3, 9]))
        return forward(sequences.token_ids, sequences.position_ids, context)

    for change in (lambda: scramble(model), lambda: [p.data.mul_(0.5) for p in model.parameters()]):
        change()
        forward.forget()
        forward.refresh()
        assert forward.is_fused and torch.equal(logits(), own_logits(model, sequences))
    held = [w[0].data_ptr() for w in families(model)]
    assert [w.data_ptr() for w in calls] == 2 * held
    forward.forget()
    del calls[:]
    assert torch.equal(logits(), own_logits(model, sequences)) and not calls
    monkeypatch.setattr(matmul_triton, "_WIDE", 48)  # q alone: it has other segments than k and v
    forward.refresh()
    assert torch.equal(logits(), own_logits(model, sequences))
    assert [w.data_ptr() for w in calls] == held[1::2]
