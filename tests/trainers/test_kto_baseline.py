"""What KTO compares every answer with."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.batching import LabelExample, make_label_batch
from rlhf.recipe.schema import KTOConfig
from rlhf.trainers.kto import with_baseline


def test_answers_are_whole_under_another_rows_prompt():
    """Would catch: an estimate of z0 from answers cut to the minibatch's longest row, which a long prompt and a long
    answer exceed together."""
    rows = [
        LabelExample(str(i), (1,) * prompt, (2,) * response, desirable=bool(i % 2))
        for i, (prompt, response) in enumerate([(4, 30), (30, 4)] * 2)
    ]
    drift = SimpleNamespace(score=lambda batch: 0.1 * batch.loss_mask)
    level = SimpleNamespace(score=lambda batch: torch.zeros(batch.loss_mask.shape))
    recipe = SimpleNamespace(kto=KTOConfig())
    stage = SimpleNamespace(recipe=recipe, actor=drift, reference=level, context=100)
    batch = make_label_batch(rows)
    assert with_baseline(stage, batch).baselines.tolist() == pytest.approx([0.1 * (30 + 4) / 2] * 4)
    stage.context = 40  # the model reads no further: 10 of the 30
    assert with_baseline(stage, batch).baselines.tolist() == pytest.approx([0.1 * (10 + 4) / 2] * 4)
