"""Optimisers, freezing and learning rates against torch alone and against the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.recipe.schema import TrainerConfig
from rlhf.trainers.optimizers import freeze, initial_state, lr_at, make_optimizer, state_shapes

NAMES = ("adamw", "adam", "sgd", "adagrad", "rmsprop", "adafactor", "muon")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6)


class Model(torch.nn.Module):
    """Embedding, three numbered layers, a norm and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(5, 4)
        self.model.layers = torch.nn.ModuleList(Block() for _ in range(3))
        self.model.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight


def config(**changes: object) -> TrainerConfig:
    return TrainerConfig(**{"steps": 10, "lr": 1e-2, "momentum": 0.9, "eps": 1e-6} | changes)


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=noise)


# -- optimisers ----------------------------------------------------------------------------------------------


def rule(name: str, p, m, step, lr, wd, c, matrix):
    """One step of one parameter in float64, written from the papers: (new value, new memory)."""
    value, grad = p
    b1, b2 = c.betas
    if name == "muon" and matrix:
        m = {"buf": c.momentum * m.get("buf", 0 * grad) + (1 - c.momentum) * grad}
        update = (1 - c.momentum) * grad + c.momentum * m["buf"]
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        for _ in range(5):  # Newton-Schulz on the singular values, coefficients of Muon
            s = s / s.norm() if _ == 0 else s
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        scale = 0.2 * math.sqrt(max(value.shape))
        return value * (1 - lr * wd) - lr * scale * (u * s) @ v, m
    if name in ("adamw", "adam", "muon"):
        grad = grad + wd * value if name == "adam" else grad
        value = value if name == "adam" else value * (1 - lr * wd)
        m = {
            "1": b1 * m.get("1", 0 * grad) + (1 - b1) * grad,
            "2": b2 * m.get("2", 0 * grad) + (1 - b2) * grad**2,
        }
        return value - lr * (m["1"] / (1 - b1**step)) / ((m["2"] / (1 - b2**step)).sqrt() + c.eps), m
    if name == "adafactor":
        value_rms = value.norm() / math.sqrt(value.numel())
        rate = max(1e-3, float(value_rms)) * min(lr, step**-0.5)
        value, new = value * (1 - lr * wd), step**-0.8
        tiny = torch.finfo(torch.float32).eps
        if value.dim() > 1:
            row, col = (grad**2).mean(-1, keepdim=True), (grad**2).mean(-2, keepdim=True)
            m = {
                "r": m.get("r", 0 * row) * (1 - new) + new * row,
                "c": m.get("c", 0 * col) * (1 - new) + new * col,
            }
            v = m["r"] @ m["c"] / m["r"].mean(-2, keepdim=True)
        else:
            m = {"v": m.get("v", 0 * grad) * (1 - new) + new * grad**2}
            v = m["v"]
        update = grad / v.clamp(min=tiny**2).sqrt()
        return value - rate * update / max(1.0, float(update.norm() / math.sqrt(update.numel()))), m
    grad = grad + wd * value
    if name == "sgd":
        m = {"buf": c.momentum * m.get("buf", 0 * grad) + grad}
        return value - lr * m["buf"], m
    if name == "adagrad":
        m = {"sum": m.get("sum", 0 * grad) + grad**2}
        return value - lr * grad / (m["sum"].sqrt() + c.eps), m
    m = {
        "sq": b2 * m.get("sq", 0 * grad) + (1 - b2) * grad**2,
        "buf": m.get("buf", 0 * grad),
    }
    m["buf"] = c.momentum * m["buf"] + grad / (m["sq"].sqrt() + c.eps)
    return value - lr * m["buf"], m


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_papers(name: str) -> None:
    """Would catch: a setting that goes to the wrong argument, decay of vectors, a layer's rate for another layer, muon
    on an embedding or a vector."""
    model, c = Model(), config(optimizer=name, weight_decay=0.1, layer_lr_decay=0.5)
    optimizer = make_optimizer(model, c)
    for group in optimizer.param_groups:  # as the engine starts
        for p in group["params"]:
            optimizer.state[p] = initial_state(group, p.detach())
    want = {n: p.detach().double() for n, p in model.named_parameters()}
    memory: dict[str, dict] = {n: {} for n in want}
    for step in (1, 2, 3):
        give_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * group["lr_scale"]
        optimizer.step()
        for n, p in model.named_parameters():
            above = {"model.embed_tokens.weight": 3, "model.norm.weight": 0, "model.norm.bias": 0}.get(n)
            above = 2 - int(n.split(".")[2]) if above is None else above
            decay = 0.1 if p.dim() == 2 else 0.0
            pair, matrix = (want[n], p.grad.double()), p.dim() == 2 and "layers" in n
            want[n], memory[n] = rule(name, pair, memory[n], step, 1e-2 * 0.5**above, decay, c, matrix)
    # Muon's orthogonalisation runs in bfloat16.
    close = dict(rtol=0, atol=5e-4) if name == "muon" else dict(rtol=1e-5, atol=1e-6)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), want[n], **close, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_we_make_is_the_state_torch_makes(name: str, momentum: float) -> None:
    """Would catch: a state that is incomplete when it is saved before the first step, or a first step from another
    start than torch's own."""
    ours, torchs = Model(), Model()
    optimizers = [make_optimizer(m, config(optimizer=name, momentum=momentum)) for m in (ours, torchs)]
    for group in optimizers[0].param_groups:
        for p in group["params"]:
            optimizers[0].state[p] = initial_state(group, p.detach())
            shapes = {n: t.shape for n, t in optimizers[0].state[p].items() if n != "step"}
            assert shapes == state_shapes(group, p.shape)
    if name == "adagrad":  # makes its state when it is made, which `Joined` clears
        optimizers[1] = torch.optim.Adagrad(torchs.parameters(), lr=1e-2, eps=1e-6)
    for seed in (1, 2):
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            give_gradients(model, seed)
            optimizer.step()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)
        left, right = optimizers[0].state[a], optimizers[1].state[b]
        right = {n: t for n, t in right.items() if t is not None}
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], right[n]) for n in left)


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(ValueError, match="layer_lr_decay=0.5: the model has no numbered layers"):
        make_optimizer(torch.nn.Linear(2, 2), config(layer_lr_decay=0.5))


# -- freezing ------------------------------------------------------------------------------------------------


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parameters_leave_the_optimiser() -> None:
    """Would catch: a pattern that freezes its neighbour (layers.1 and layers.10), a frozen weight that decays."""
    model = Model()
    model.model.layers.extend(Block() for _ in range(8))
    everything = trained(model)
    freeze(model, ["model.layers.1.*", "model.norm.*"])
    gone = everything - trained(model)
    assert (
        gone == {n for n in everything if n.startswith(("model.layers.1.", "model.norm."))} and len(gone) == 6
    )
    inside = {id(p) for g in make_optimizer(model, config()).param_groups for p in g["params"]}
    assert inside == {id(p) for name, p in model.named_parameters() if name not in gone}


def test_a_tied_parameter_is_frozen_by_either_name() -> None:
    for pattern in ("lm_head.*", "model.embed_tokens.weight"):
        model = Model()
        freeze(model, [pattern])
        assert "model.embed_tokens.weight" not in trained(model) and len(trained(model)) == 14


def test_names_are_those_of_the_plain_model_with_lora() -> None:
    """Would catch: recipes that need peft's prefix."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["up"]))
    freeze(model, ["model.layers.0.*"])
    assert len(trained(model)) == 4 and not any("layers.0." in name for name in trained(model))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "model.embed_tokens",
            r"no parameter is named 'model.embed_tokens'; did you mean 'model.embed_tokens\.\*'",
        ),
        ("model.layer.0.*", r"did you mean 'model.layers.0.*'"),
        ("model.norm.wieght", "did you mean 'model.norm.weight'"),
        ("zzz", "the first is 'model.embed_tokens.weight'"),
        ("*", r"\* leave no parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant(pattern: str, message: str) -> None:
    """Would catch: a misspelt pattern that freezes nothing, in silence."""
    with pytest.raises(ValueError, match=message):
        freeze(Model(), [pattern])


# -- learning rate -------------------------------------------------------------------------------------------


def rates(total: int = 10, **changes: object) -> list[float]:
    config = TrainerConfig(steps=10, lr=1.0, **changes)
    return [lr_at(update, config, total) for update in range(total)]


def test_schedules() -> None:
    """Would catch: a first update at rate 0, a peak that is never reached, a last update that misses its
    rate."""
    assert rates() == [1.0] * 10
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates(schedule="linear", warmup_steps=3, min_lr_ratio=0.3)
    assert linear == pytest.approx([1 / 3, 2 / 3, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    cosine = rates(9, schedule="cosine", min_lr_ratio=0.1)
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)])
    assert rates(1, schedule="linear") == [1.0]
    assert rates(3, schedule="cosine", warmup_steps=5) == [0.2, 0.4, 0.6]


def test_more_schedules() -> None:
    """Would catch: a restart that is off by one, a decay that starts too early or ends above its floor, a function
    of the total where there should be none."""
    polynomial = rates(5, schedule="polynomial", poly_power=2.0, min_lr_ratio=0.2)
    assert polynomial == pytest.approx([0.2 + 0.8 * (1 - i / 4) ** 2 for i in range(5)])
    for total in (6, 60):
        inverse = rates(total, schedule="inverse_sqrt", warmup_steps=2)[:6]
        assert inverse == pytest.approx([0.5, 1.0, *(math.sqrt(2 / n) for n in (3, 4, 5, 6))])
    stable = rates(8, schedule="wsd", warmup_steps=2, decay_steps=3, min_lr_ratio=0.4)
    assert stable == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])
    assert rates(30, schedule="wsd")[-5:] == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3, 0.0])
    assert rates(3, schedule="wsd") == [1.0, 1.0, 0.0]
    third = [(1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert rates(10, schedule="cosine_restarts", cycles=3) == pytest.approx([*third * 3, 0.0])
    one = rates(9, schedule="cosine_restarts", cycles=1, warmup_steps=2, min_lr_ratio=0.1)
    assert one == pytest.approx(rates(9, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1))


@pytest.mark.parametrize(
    "schedule", ["constant", "linear", "cosine", "polynomial", "inverse_sqrt", "wsd", "cosine_restarts"]
)
def test_every_schedule_stays_between_floor_and_peak(schedule: str) -> None:
    """Would catch: a rate below 0 or above the peak with few updates, or after the last one."""
    for total in (1, 2, 3, 17):
        for warmup in (0, 1, 5):
            c = TrainerConfig(
                steps=1, lr=1.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.1, cycles=2
            )
            after_warmup = [lr_at(update, c, total) for update in range(warmup, total + 3)]
            assert all(0.1 - 1e-12 <= lr <= 1.0 for lr in after_warmup)
