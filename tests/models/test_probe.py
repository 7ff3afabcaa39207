"""The probe says exact where it is, and says no where one bit differs."""

import pytest
import torch
import torch.nn.functional as F

from rlhf.models import linear as linear_module
from rlhf.models import probe_exactness
from tests.models.conftest import ARCHITECTURES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact_here(name, dtype, prepared):
    """Would catch: any operation of a model whose rows depend on their number."""
    report = probe_exactness(prepared(name, dtype=dtype))
    assert report.exact and report.max_abs_diff == 0, report.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_every_head_size_is_exact_here(head_dim, dtype, prepared):
    """Would catch: operations that are right for the small heads of the other tests alone."""
    config = {"head_dim": head_dim, "hidden_size": 192, "intermediate_size": 512}
    report = probe_exactness(prepared("qwen3", dtype=dtype, config=config))
    assert report.exact, report.detail


def test_lora_is_exact_too(prepared):
    """Would catch: adapters that keep torch's own linear."""
    from rlhf.recipe.schema import LoraConfig

    model = prepared("qwen3", trainable=True, lora=LoraConfig(rank=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    assert probe_exactness(model).exact


def test_a_row_dependent_linear_is_found(prepared, monkeypatch):
    """Would catch: a probe that compares a thing with itself."""
    model = prepared("qwen3")

    def rounding_changes_with_rows(x, weight, bias=None, packed=None):
        return F.linear(x, weight, bias) * (1 + 1e-6 * (x.shape[-2] == 1))

    monkeypatch.setattr(linear_module, "linear", rounding_changes_with_rows)
    report = probe_exactness(model)
    assert not report.exact and 0 < report.max_abs_diff < 1e-3 and "differ" in report.detail
