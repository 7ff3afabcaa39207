"""The one shift: log-probs of a batch against a model read one prefix at a time, and against stock
transformers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

import rlhf.models.attention  # noqa: F401  (registers the attention implementation "rlhf")
from rlhf.batching import SftExample, make_sft_batch, recount
from rlhf.logprobs import batch_logprobs
from rlhf.models.swap import swap_modules
from rlhf.records import Batch

VOCABULARY = 11


class MeanOfPrefix(torch.nn.Module):
    """A causal model with Hugging Face's call: logits from the mean embedding of the sequence so far."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, 6, generator=noise, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(6, VOCABULARY, generator=noise, dtype=torch.float64))

    def next_token(self, prefix: torch.Tensor) -> torch.Tensor:
        return self.embedding[prefix].mean(0) @ self.head

    def forward(self, input_ids, position_ids, logits_to_keep, use_cache):
        starts = [i - int(position_ids[0, i]) for i in range(input_ids.shape[1])]
        kept = [self.next_token(input_ids[0, starts[i] : i + 1]) for i in logits_to_keep.tolist()]
        logits = torch.stack(kept) if kept else torch.zeros(0, VOCABULARY)
        return SimpleNamespace(logits=logits[None])


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_each_token_is_scored_by_what_stands_before_it(seed: int, temperature: float, random_batch) -> None:
    """Would catch: a shift by one, temperature multiplied or forgotten, sequences that see their
    neighbours.
    """
    batch, model = random_batch(seed), MeanOfPrefix()
    got, entropy = batch_logprobs(model, batch, temperature=temperature, entropy=True)
    want, want_entropy = torch.zeros_like(got), torch.zeros_like(got)
    for row, col in batch.response_mask.nonzero().tolist():
        logits = model.next_token(batch.token_ids[row, :col]) / temperature
        want[row, col] = logits.log_softmax(0)[batch.token_ids[row, col]]
        want_entropy[row, col] = -(logits.softmax(0) * logits.log_softmax(0)).sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(entropy, want_entropy)
    if not batch.response_mask.any():
        return
    weights = batch.old_logprobs
    got_gradients = torch.autograd.grad(((got + entropy) * weights).sum(), list(model.parameters()))
    want_gradients = torch.autograd.grad(((want + want_entropy) * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(got_gradients, want_gradients)


def test_targets_and_empty_batches(random_batch) -> None:
    """Would catch: targets ignored; a crash where a process has no rows, or a row no response."""
    batch, model = random_batch(3), MeanOfPrefix()
    everything, nothing = batch_logprobs(model, batch, temperature=1.0)
    assert nothing is None
    some, _ = batch_logprobs(model, batch, temperature=1.0, targets=batch.loss_mask)
    assert not torch.equal(batch.loss_mask, batch.response_mask)
    torch.testing.assert_close(some, torch.where(batch.loss_mask, everything, 0.0))
    none, _ = batch_logprobs(model, batch, temperature=1.0, targets=batch.loss_mask & False)
    assert none.shape == batch.token_ids.shape and not none.any()
    empty, entropy = batch_logprobs(None, batch.select([]), temperature=1.0, entropy=True)  # not called
    assert empty.shape == entropy.shape == (0, 0)
    with pytest.raises(ValueError, match="temperature=0"):
        batch_logprobs(model, batch, temperature=0)


@pytest.fixture(scope="module")
def models() -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """The same tiny Qwen3 as transformers has it, and prepared as the trainer and the sampler use it."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    stock = Qwen3ForCausalLM(config).eval()
    ours = Qwen3ForCausalLM._from_config(config, attn_implementation="rlhf").eval()
    ours.load_state_dict(stock.state_dict())
    swap_modules(ours)
    return stock, ours


@pytest.fixture(scope="module")
def examples() -> Batch:
    noise = torch.Generator().manual_seed(0)
    lengths = [(1, 5), (7, 1), (3, 40), (70, 9), (2, 1)]
    rows = [torch.randint(0, VOCABULARY, (a + b,), generator=noise).tolist() for a, b in lengths]
    batch = make_sft_batch(
        [SftExample(f"row {a}+{b}", tuple(ids[:a]), tuple(ids[a:])) for (a, b), ids in zip(lengths, rows)]
    )
    response_mask = batch.response_mask.clone()
    response_mask[-1] = False  # a row of which nothing is wanted
    return recount(batch.replace(response_mask=response_mask, loss_mask=response_mask))


def test_a_real_model_gives_what_transformers_gives(models, examples) -> None:
    """Would catch: positions or masks of a pack that differ from each sequence alone, forwards or
    backwards.
    """
    stock, ours = models
    got, _ = batch_logprobs(ours, examples, temperature=0.8)
    want = torch.zeros_like(got)
    for row, length in enumerate(examples.lengths.tolist()):
        ids = examples.token_ids[row : row + 1, :length]
        logprobs = (stock(input_ids=ids).logits[0, :-1].float() / 0.8).log_softmax(-1)
        want[row, 1:length] = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    want = torch.where(examples.response_mask, want, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got_gradients = torch.autograd.grad(got.square().sum(), list(ours.parameters()))
    want_gradients = torch.autograd.grad(want.square().sum(), list(stock.parameters()))
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-4)


def test_company_padding_and_order_do_not_change_a_bit(models, examples) -> None:
    """Would catch: a micro-batch plan that changes log-probs, so that the ratio on policy is not exactly
    1.
    """
    _, ours = models
    with torch.no_grad():
        together, entropies = batch_logprobs(ours, examples, temperature=1.0, entropy=True)
        for rows in ([4, 3, 2, 1, 0], [2], [0, 2], [1, 3]):
            cut = examples.select(rows)
            got, got_entropies = batch_logprobs(ours, cut, temperature=1.0, entropy=True)
            width = got.shape[1]
            assert torch.equal(got, together[rows][:, :width])
            assert torch.equal(got_entropies, entropies[rows][:, :width])
