"""Both sides of the comparison with TRL: the same weights from the same files, the same rows, and what was measured.

A test gives `agree` a name, our model and loss, and TRL's; at the end of the run the relative differences are printed
as a table, from which docs/trl.md is written. TRL is imported by the tests only: without it they are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.logprobs import batch_logprobs
from rlhf.models import build_model, build_tokenizer, load_model, load_tokenizer, save_model
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.trainers.forward import loss_function

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the whole gradient, in the 2-norm

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"  # TRL tries its own sentences on the tokenizer
METHODS = {  # what a recipe of the method must name beside its model
    "grpo": {"reward": [{"function": "exact_match"}]},
    "kto": {"data": {"response_column": "completion"}},
    "sft": {"data": {"response_column": "completion"}},
}


@dataclass(frozen=True)
class Measured:
    """One row of the table: relative differences of the loss and of the whole gradient; None = not compared."""

    name: str
    loss: float | None
    gradient: float | None
    differs: bool  # on purpose


_measured: list[Measured] = []


def pytest_terminal_summary(terminalreporter):
    if not _measured:
        return
    terminalreporter.section("differences from TRL")
    for row in _measured:
        loss, gradient = ("" if x is None else f"{x:.1e}" for x in (row.loss, row.gradient))
        differs = "on purpose" if row.differs else ""
        terminalreporter.write_line(f"{row.name:<58} {loss:>8} {gradient:>8}  {differs}".rstrip())


@pytest.fixture(scope="module", autouse=True)
def offline():
    """TRL's trainers send usage statistics through the hub's client, which may be imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield


# -- both sides ------------------------------------------------------------------------------------------------------


def relative(a: float | torch.Tensor, b: float | torch.Tensor) -> float:
    """|a - b| / |b|, 2-norms."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return float((a - b).norm() / b.norm())


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return relative(*(torch.cat([g[name].flatten() for name in sorted(g)]) for g in (ours, theirs)))


@pytest.fixture(scope="session")
def measure():
    """measure(name, (our model, our loss), (TRL's model, TRL's loss)) -> Measured, kept for the table. Without `value`
    the gradients alone are compared."""

    def compare(name, ours, theirs, *, differs=False, value=True) -> Measured:
        loss = relative(ours[1].detach(), theirs[1].detach()) if value else None
        row = Measured(name, loss, gradient_difference(gradient(*ours), gradient(*theirs)), differs)
        _measured.append(row)
        return row

    return compare


@pytest.fixture(scope="session")
def note():
    """note(name, relative difference of a loss): one more row, without a gradient."""

    def keep(name, loss=None, *, gradient=None, differs=False):
        _measured.append(Measured(name, loss, gradient, differs))

    return keep


@pytest.fixture(scope="session")
def agree(measure):
    """As `measure`, and the differences must be rounding."""

    def check(name, ours, theirs, *, value=True):
        row = measure(name, ours, theirs, value=value)
        assert (row.loss or 0.0) <= LOSS_TOLERANCE and row.gradient <= GRADIENT_TOLERANCE, row

    return check


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Folders `policy` and `reference`: one model, and the same with some noise on its weights."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = build_tokenizer(BuildTokenizerConfig(alphabet=ALPHABET))
    model = build_model(BuildModelConfig(model_type="qwen3", config=SIZES), tokenizer, seed=0)
    save_model(model, tokenizer, root / "policy")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=noise)
    save_model(model, tokenizer, root / "reference")
    return root


@pytest.fixture(scope="session")
def pairs():
    """Preference rows as messages: lengths differ within the pairs and between them, both ways."""
    texts = [
        ("1+2=", "3#", "4, 3, 5#"),
        ("7-2+10=", "7-2=5, 5+10=15: 15", "6"),
        ("12*(3+4)=", "84", "12*3+4=40 #40"),
        ("9?", "9 9 9 9 9", "0: 1 2 3"),
        ("(5-1)*2+3*3=", "8+9=17", "8+9=16"),
        ("3?", "3 5", "5 3"),  # the policy prefers this one to the next, the reference does not
        ("2?", "2 1", "1 2"),
    ]
    return [
        {"prompt": message("user", p), "chosen": message("assistant", c), "rejected": message("assistant", r)}
        for p, c, r in texts
    ]


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


# -- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """What a run of ours does with a recipe, without its processes and its optimiser."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(self.recipe("sft").model, self.recipe("sft").tokenizer)
        self._frozen = {name: self.model(name, trainable=False) for name in ("policy", "reference")}

    def recipe(self, method, **sections):
        """A recipe on the policy's folder; sections by name as in a file."""
        whole = {
            "method": method,
            "model": {"path": str(self.folder / "policy"), "dtype": "float32"},
            "trainer": {"steps": 1},
            **METHODS.get(method, {}),
        }
        data = {"path": "rows.jsonl", "chat_template": True}
        sections["data"] = {**data, **whole.get("data", {}), **sections.get("data", {})}
        return plan_from_dict({**whole, **sections}).stages[0].recipe

    def model(self, name="policy", *, trainable=True):
        config = self.recipe("sft").model.model_copy(update={"path": str(self.folder / name)})
        return load_model(config, self.tokenizer, seed=0, trainable=trainable)

    @torch.no_grad()
    def logprobs(self, name, batch, *, temperature=1.0):
        """(B, T) of the loss tokens under the model in the folder of that name."""
        return batch_logprobs(self._frozen[name], batch, temperature=temperature, targets=batch.loss_mask)[0]

    def loss(self, name, recipe, batch, *, policy="policy", **changing):
        """(model, loss) and the sums of a loss of `rlhf.trainers.forward` on a whole step's batch."""
        model = self.model(policy)
        loss, sums = loss_function(name, recipe, **changing)(model, batch)
        return (model, loss), sums


@pytest.fixture(scope="session")
def ours(folder) -> Ours:
    return Ours(folder)


# -- TRL's -----------------------------------------------------------------------------------------------------------


class Theirs:
    """What TRL's trainers are made of."""

    def __init__(self, folder: Path, output_dir: Path) -> None:
        self.folder = folder
        self.output_dir = output_dir

    @property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder / "policy")

    def model(self, name="policy"):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)

    def arguments(self, **settings):
        """Arguments of any of TRL's configurations: fp32 on the CPU, nothing reported."""
        fixed = {
            "output_dir": str(self.output_dir),
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 16,
            "disable_tqdm": True,
        }
        return {**fixed, **settings}


@pytest.fixture(scope="session")
def theirs(folder, tmp_path_factory) -> Theirs:
    return Theirs(folder, tmp_path_factory.mktemp("trl"))
