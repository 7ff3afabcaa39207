"""The head that answers with log-probs: the same numbers as from all logits, and only where that is right."""

import pytest
import torch

from rlhf.batching import SftExample, make_sft_batch
from rlhf.kernels.logprob import token_logprobs
from rlhf.logprobs import batch_logits, batch_logprobs, target_ids
from rlhf.models import load_model
from rlhf.models.head import PlainLogprobHead, has_logprob_head
from rlhf.recipe.schema import BuildModelConfig, LoraConfig, ModelConfig


@pytest.fixture
def batch(tokenizer):
    noise = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(tokenizer), (n,), generator=noise).tolist() for n in (12, 3, 40)]
    return make_sft_batch([SftExample(f"{len(r)}", tuple(r[:2]), tuple(r[2:])) for r in rows])


def from_logits(model, batch, temperature):
    packed, logits = batch_logits(model, batch, targets=batch.loss_mask)
    return token_logprobs(logits, target_ids(packed), temperature, entropy=True)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_those_of_the_logits(name, dtype, prepared, batch):
    """Would catch: another row's hidden state, a head's bias left out, bits that differ from the sampler's."""
    model = prepared(name, dtype=dtype, trainable=True)
    assert has_logprob_head(model)
    got, entropy = batch_logprobs(model, batch, temperature=0.7, entropy=True)
    want, want_entropy = from_logits(model, batch, 0.7)
    assert torch.equal(got[batch.loss_mask], want) and torch.equal(entropy[batch.loss_mask], want_entropy)
    parameters = list(model.parameters())
    got_gradients = torch.autograd.grad(got.square().sum() + entropy.sum(), parameters)
    want_gradients = torch.autograd.grad(want.square().sum() + want_entropy.sum(), parameters)
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(got_gradients, want_gradients):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize(
    "name,config",
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_change_their_logits_keep_them(name, config, tokenizer, batch):
    """Would catch: log-probs of another model than the one that is sampled from."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **config,
    }
    model = load_model(
        ModelConfig(build=BuildModelConfig(model_type=name, config=sizes)), tokenizer, seed=0, trainable=False
    )
    assert not has_logprob_head(model)
    got, _ = batch_logprobs(model, batch, temperature=1.0)
    assert torch.equal(got[batch.loss_mask], from_logits(model, batch, 1.0)[0])


def test_adapters(prepared, batch):
    """Would catch: a head's own adapter that is passed over, or one anywhere else that takes the head away."""
    beside = prepared(trainable=True, lora=LoraConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    assert has_logprob_head(beside)
    got, _ = batch_logprobs(beside, batch, temperature=1.0)
    assert torch.equal(got[batch.loss_mask], from_logits(beside, batch, 1.0)[0])
    inside = prepared(trainable=True, lora=LoraConfig(rank=2, target_modules=["lm_head"]))
    assert not has_logprob_head(inside)


def test_a_model_without_invariance_has_one_too(tokenizer, batch):
    """Would catch: whole logits in memory wherever runtime.deterministic is off."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(build=BuildModelConfig(model_type="llama", config=sizes))
    model = load_model(config, tokenizer, seed=0, trainable=True, invariant=False)
    assert type(model.lm_head) is PlainLogprobHead
    got, _ = batch_logprobs(model, batch, temperature=1.0)
    torch.testing.assert_close(got[batch.loss_mask], from_logits(model, batch, 1.0)[0])


def test_checkpointed_activations_give_the_same_gradients(prepared, batch):
    """Would catch: a recomputed layer that is run under another context than its forward was."""
    gradients = []
    for checkpointed in (False, True):
        model = prepared(trainable=True, gradient_checkpointing=checkpointed)
        loss = batch_logprobs(model, batch, temperature=1.0)[0].sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_an_empty_set_of_targets(prepared, batch):
    """Would catch: a crash, or a head without gradient, where a process has nothing that counts."""
    model = prepared(trainable=True)
    none, _ = batch_logprobs(model, batch, temperature=1.0, targets=batch.loss_mask & False)
    none.sum().backward()
    assert model.lm_head.weight.grad is not None and not model.lm_head.weight.grad.any()
