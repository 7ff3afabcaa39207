"""Which token's score is read: values, rewards and step scores against a model read one prefix at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.models import build_tokenizer, load_scalar_model
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, ModelConfig
from rlhf.records import Batch
from rlhf.values import batch_rewards, batch_step_scores, batch_values

VOCABULARY = 11


class MeanOfPrefix(torch.nn.Module):
    """A scalar model's packed call: the score of a prefix is that of its mean embedding."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, 6, generator=noise, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(6, generator=noise, dtype=torch.float64))

    def score(self, prefix: torch.Tensor) -> torch.Tensor:
        return self.embedding[prefix].mean(0) @ self.head

    def forward(self, input_ids, position_ids, use_cache):
        starts = [i - int(position_ids[0, i]) for i in range(input_ids.shape[1])]
        return torch.stack([self.score(input_ids[0, starts[i] : i + 1]) for i in range(len(starts))])


def same_with_gradients(model: MeanOfPrefix, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want)
    if not want.requires_grad:
        return
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = list(model.parameters())
    of_got = torch.autograd.grad((got * weights).sum(), parameters)
    torch.testing.assert_close(of_got, torch.autograd.grad((want * weights).sum(), parameters))


@given(seed=st.integers(0, 10_000))
def test_a_value_is_read_before_its_token_and_a_step_score_at_it(seed: int, random_batch) -> None:
    """Would catch: a value that has seen the token it is the baseline of, a step judged before it ended."""
    batch, model = random_batch(seed), MeanOfPrefix()
    values, steps = batch_values(model, batch), batch_step_scores(model, batch, batch.loss_mask)
    want_values, want_steps = torch.zeros_like(values), torch.zeros_like(steps)
    for row, col in batch.response_mask.nonzero().tolist():
        want_values[row, col] = model.score(batch.token_ids[row, :col])
    for row, col in batch.loss_mask.nonzero().tolist():
        want_steps[row, col] = model.score(batch.token_ids[row, : col + 1])
    same_with_gradients(model, values, want_values)
    same_with_gradients(model, steps, want_steps)
    some = batch_values(model, batch, targets=batch.loss_mask)
    torch.testing.assert_close(some, torch.where(batch.loss_mask, values, 0.0))


@given(seed=st.integers(0, 10_000))
def test_a_reward_is_read_at_the_last_token(seed: int, random_batch) -> None:
    """Would catch: a reward read at padding, at the last token of the response mask, or at a neighbour's."""
    batch, model = random_batch(seed), MeanOfPrefix()
    rows = zip(batch.token_ids, batch.lengths.tolist(), strict=True)
    same_with_gradients(
        model, batch_rewards(model, batch), torch.stack([model.score(r[:n]) for r, n in rows])
    )


def test_no_rows(random_batch) -> None:
    """Would catch: a crash where a process has no rows."""
    empty = random_batch(3).select([])
    assert batch_rewards(None, empty).shape == (0,)
    assert batch_values(None, empty).shape == (0, 0)
    assert batch_step_scores(None, empty, empty.loss_mask).shape == (0, 0)


@pytest.fixture(scope="module")
def critic() -> torch.nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = ModelConfig(build=BuildModelConfig(config=sizes), dtype="float32")
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    return load_scalar_model(config, tokenizer, head="new", seed=0, trainable=True)


def test_cutting_a_batch_changes_no_bit(critic: torch.nn.Module, random_batch) -> None:
    """Would catch: values, and with them advantages, that depend on the micro-batch plan; float64 or an index
    in place of fp32."""
    batch: Batch = random_batch(5, rows=6, width=40)
    with torch.no_grad():
        values, rewards = batch_values(critic, batch), batch_rewards(critic, batch)
        steps = batch_step_scores(critic, batch, batch.response_mask)
        assert values.dtype == rewards.dtype == steps.dtype == torch.float32
        assert values.any() and steps.any() and rewards.all()
        for rows in ([5, 1, 0], [2], [3, 4]):
            part = batch.select(rows)
            width = part.token_ids.shape[1]
            assert torch.equal(batch_values(critic, part), values[rows][:, :width])
            assert torch.equal(batch_rewards(critic, part), rewards[rows])
            got = batch_step_scores(critic, part, part.response_mask)
            assert torch.equal(got, steps[rows][:, :width])
