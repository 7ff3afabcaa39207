"""Random ragged batches for the tests of the mathematics."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from rlhf.batching import recount
from rlhf.records import Batch

# The same examples on every run, and no deadline: the first call of a torch operation is slow.
settings.register_profile("rlhf", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("rlhf")


def _random_batch(
    seed: int, *, rows: int = 5, width: int = 9, group_size: int = 2, garbage: float = 0.0
) -> Batch:
    """Ragged rows in float64 with tool tokens, masked rows and log-probs around -1; `garbage` outside
    response_mask.
    """
    dice = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    attention_mask = torch.zeros(rows, width, dtype=torch.bool)
    response_mask = torch.zeros(rows, width, dtype=torch.bool)
    learned = torch.zeros(rows, 1, dtype=torch.bool)
    for row in range(rows):
        prompt = dice.randint(1, width - 1)
        length = dice.randint(prompt, width)
        attention_mask[row, :length] = True
        response_mask[row, prompt:length] = torch.tensor(
            [dice.random() < 0.8 for _ in range(length - prompt)]
        )
        learned[row] = dice.random() < 0.85

    def per_token(scale: float, shift: float) -> torch.Tensor:
        values = torch.randn(rows, width, generator=noise, dtype=torch.float64) * scale + shift
        return torch.where(response_mask, values, garbage)

    batch = Batch(
        sample_ids=tuple(f"0/{row}/0" for row in range(rows)),
        token_ids=torch.randint(0, 11, (rows, width), generator=noise) * attention_mask,
        attention_mask=attention_mask,
        response_mask=response_mask,
        loss_mask=response_mask & learned,
        num_loss_tokens=0,
        num_loss_sequences=0,
        group_ids=torch.arange(rows) // group_size,
        rewards=torch.randn(rows, generator=noise, dtype=torch.float64),
        rollout_logprobs=per_token(0.5, -1.0),
        old_logprobs=per_token(0.5, -1.0),
        ref_logprobs=per_token(0.5, -1.0),
        advantages=per_token(1.0, 0.0),
    )
    return recount(batch.replace(right=batch.rewards > 0.5))


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., Batch]:
    return _random_batch
