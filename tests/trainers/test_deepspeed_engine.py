"""The engine against a plain torch loop, over ZeRO stages, types, ways of cutting the batch and numbers of
processes.

The two-process part runs once for the whole file: `two_processes` starts both ranks on this file (`main` at
the end).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlhf.checkpoint import load_tensors, save_tensors
from rlhf.logprobs import batch_logprobs
from rlhf.models import build_tokenizer, load_scalar_model, save_model
from rlhf.process import ProcessInfo
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, LoraConfig, ModelConfig, TrainerConfig
from rlhf.records import Batch
from rlhf.trainers import deepspeed_engine
from rlhf.trainers.deepspeed_engine import TrainingEngine, init_process
from rlhf.trainers.neftune import embedding_noise
from rlhf.trainers.optimizers import lr_at
from rlhf.values import batch_values

REPO = Path(__file__).resolve().parent.parent.parent
ALONE = ProcessInfo("train", 0, 1, 0, "127.0.0.1", 0, "cpu")
KINDS = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]
VOCABULARY, ROWS, WIDTH = 37, 8, 12
CONFIG = dict(steps=10, lr=1e-2, eps=1e-3, max_grad_norm=0.5, weight_decay=0.1)
WHOLE = [[0, 1, 2, 3, 4, 5, 6, 7]]
SINGLE = [[row] for row in range(ROWS)]
RAGGED = [[0, 1, 2], [], [3], [4, 5, 6, 7]]
OPTIMIZERS_OF_TWO = [(2, "adagrad"), (3, "rmsprop")]
OF_TWO = [[[0, 1], [2], [3, 4]], [[5, 6, 7], [], []]]  # by rank


def build_model(dtype: str = "float32", seed: int = 0, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.unused = torch.nn.Parameter(
        torch.full((3,), -0.0)
    )  # no gradient ever, and a sign that adding 0 loses
    if lora:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0)
        )
    return model.to(getattr(torch, dtype)) if dtype != "float32" else model


def build_batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, WIDTH + 1, (ROWS,), generator=g)
    attention = torch.arange(WIDTH) < lengths[:, None]
    response = attention & (torch.arange(WIDTH) >= 2)
    ids = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=g) * attention
    return Batch(tuple(map(str, range(ROWS))), ids, attention, response, response, int(response.sum()), ROWS)


def nll(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean negative log-likelihood over the step's tokens: this micro-batch's share."""
    output = model(input_ids=micro.token_ids, attention_mask=micro.attention_mask.long(), use_cache=False)
    logprobs = torch.log_softmax(output.logits[:, :-1].float(), -1)
    per_token = -torch.nn.functional.pad(logprobs.gather(-1, micro.token_ids[:, 1:, None])[..., 0], (1, 0))
    counted = torch.where(micro.loss_mask, per_token, 0.0)
    loss = counted.sum() / micro.num_loss_tokens
    inside = counted[micro.loss_mask].detach() if micro.loss_mask.any() else torch.tensor([math.nan])
    return loss, {"tokens": micro.loss_mask.sum(), "nll_max": inside.max(), "nll_min": inside.min()}


def engine_for(
    model: torch.nn.Module, stage: int, dtype: str = "float32", info: ProcessInfo = ALONE, **changes: object
) -> TrainingEngine:
    init_process(info, threads=1, timeout_s=120)
    config = TrainerConfig(**(CONFIG | changes), zero_stage=stage)
    return TrainingEngine(model, config, dtype=dtype, total_updates=10, info=info, seed=0)


def cut(batch: Batch, rows: list[list[int]]) -> list[Batch]:
    return [batch.select(part) for part in rows]


def weights(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in engine.named_full_weights()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


@functools.cache
def plain_torch(steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The whole batch at once through torch alone in float64: losses, gradient norms, weights."""
    model = build_model().double()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
    losses, norms = [], []
    for _ in range(steps):
        adam.zero_grad()
        loss, _ = nll(model, build_batch())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach()))
        adam.step()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def collect_only_ours():
    """Building and destroying engines collects garbage; skip what the imports have left, which takes most of
    the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [WHOLE, SINGLE, RAGGED], ids=["1x8", "8x1", "ragged"])
def test_equals_plain_torch_however_the_batch_is_cut(stage: int, rows: list[list[int]]) -> None:
    """Would catch: division by the number of micro-batches, a local instead of the global count, clipping of
    each micro-batch, decay of norms, an empty micro-batch that counts, Adam's bias correction off by a
    step."""
    engine = engine_for(build_model(), stage)
    losses, norms, want = plain_torch(4)
    stats = [engine.update(cut(build_batch(), rows), nll) for _ in range(4)]
    assert [s.loss for s in stats] == pytest.approx(losses, rel=1e-6)
    assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.5, "clipping must have been at work"
    assert furthest(weights(engine), want) < 2e-6
    assert stats[-1].sums["tokens"] == build_batch().num_loss_tokens
    assert (engine.version, engine.updates) == (4, 4)
    engine.destroy()


def test_sums_and_extremes_add_up() -> None:
    """Would catch: extremes that are added, or an empty micro-batch's stand-in row in the numbers."""
    _, want = nll(build_model(), build_batch())
    for rows in (WHOLE, RAGGED):
        engine = engine_for(build_model(), 2)
        sums = engine.update(cut(build_batch(), rows), nll).sums
        assert list(sums) == list(want)
        for name in want:
            assert float(sums[name]) == pytest.approx(float(want[name]), rel=1e-5)
        engine.destroy()


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_save_load_step_is_bitwise_the_step_that_would_have_followed(alone, stage: int, dtype: str) -> None:
    """Would catch: moments or step counts lost, masters rounded to the model's type, weights that lag their
    masters."""
    result = alone[1](stage, dtype)
    assert result["loaded state equals saved"] and result["exact after load"]
    assert result["skipped"] and result["nothing moved"] and result["no trace of the skip"]
    assert result["empty step skipped"] and result["empty step moved nothing"]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(2, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]
)
def test_the_same_with_the_optimiser_offloaded(alone, stage: int, dtype: str, tmp_path: Path) -> None:
    """Would catch: the gradient of a skipped step that stays in a buffer and spoils every step after it."""
    result = exercise(stage, dtype, ALONE, tmp_path, offload_optimizer=True)
    assert result["loaded state equals saved"] and result["exact after load"]
    assert result["skipped"] and result["nothing moved"] and result["no trace of the skip"]
    assert result["losses"] == pytest.approx(alone[1](stage, dtype)["losses"], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_before_the_first_step(stage: int) -> None:
    """Would catch: a save at step 0 without moments, and a step count that starts at 1 after loading it."""
    first, second = engine_for(build_model(), stage), engine_for(build_model(seed=1), stage)
    tensors, scalars = first.state_dict()
    assert scalars == {"version": 0, "updates": 0} and all(
        not t.any() for n, t in tensors.items() if n.startswith("exp")
    )
    second.load_state(tensors, scalars)
    for engine in (first, second):
        engine.update(cut(build_batch(), WHOLE), nll)
    assert same_bits(weights(first), weights(second))
    first.destroy(), second.destroy()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_bad_loss_with_a_finite_gradient_skips_too(stage: int, bad: float) -> None:
    """Would catch: a check of gradients only. loss + inf has the gradient of loss."""
    engine = engine_for(build_model(), stage)
    before = weights(engine)

    def broken(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = nll(model, micro)
        return loss + (bad if "3" in micro.sample_ids else 0.0), sums

    stats = engine.update(cut(build_batch(), RAGGED), broken)
    assert stats.skipped and not math.isfinite(stats.loss) and not math.isfinite(stats.grad_norm)
    assert (engine.version, engine.updates) == (0, 1) and same_bits(before, weights(engine))
    assert not engine.update(cut(build_batch(), RAGGED), nll).skipped
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_unused_parameter_decays_like_any_other(stage: int) -> None:
    """Would catch: stages that differ because one leaves out parameters without a gradient."""
    model = build_model()
    model.idle = torch.nn.Parameter(torch.ones(3, 3))
    engine = engine_for(model, stage)
    engine.update(cut(build_batch(), RAGGED), nll)
    assert weights(engine)["idle"].allclose(torch.full((3, 3), 1 - 1e-2 * 0.1), atol=1e-7)
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_float32_masters_and_buffers(stage: int) -> None:
    """Would catch: steps lost to rounding (lr far below bfloat16's spacing), rotary frequencies cast to
    bfloat16."""
    model = build_model("bfloat16")
    frequencies = build_model().model.rotary_emb.inv_freq
    model.model.rotary_emb.inv_freq = frequencies.clone()
    engine = engine_for(model, stage, "bfloat16", lr=1e-6)
    for _ in range(3):
        engine.update(cut(build_batch(), RAGGED), nll)
    tensors, _ = engine.state_dict()
    assert torch.equal(engine.module.model.rotary_emb.inv_freq, frequencies)
    now = weights(engine)
    moved = 0.0
    for name, start in build_model("bfloat16").named_parameters():
        master = tensors[f"master.{name}"]
        assert master.dtype == torch.float32 and now[name].dtype == torch.bfloat16
        assert torch.equal(master.to(torch.bfloat16), now[name]), name
        moved = max(moved, float((master - start.detach().float()).abs().max()))
    assert 2.5e-6 < moved < 3.5e-6, "three steps of 1e-6 must have added up in the masters"
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_gradients_add_up_in_float32(stage: int) -> None:
    """Would catch: a sum of micro-batches rounded to bfloat16 each time, which stalls as it grows."""
    norms = []
    for parts in (1, 32):

        def part(model: torch.nn.Module, micro: Batch, n: int = parts) -> tuple[torch.Tensor, dict]:
            return nll(model, micro)[0] / n, {}

        engine = engine_for(build_model("bfloat16"), stage, "bfloat16")
        norms.append(engine.update(cut(build_batch(), [[0]] * parts), part).grad_norm)
        engine.destroy()
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_trains_adapters_only_and_shows_merged_weights(stage: int) -> None:
    """Would catch: frozen weights in the optimiser or its state, a merge that forgets the scale, peft's
    names."""
    engine = engine_for(build_model(lora=True), stage)
    frozen = {n: w for n, w in dict(engine.named_full_weights(merged=False)).items() if "lora" not in n}
    for _ in range(3):
        engine.update(cut(build_batch(), RAGGED), nll)
    tensors, scalars = engine.state_dict()
    assert tensors and all("lora_" in name for name in tensors)
    now = {n: w.clone() for n, w in engine.named_full_weights(merged=False)}
    assert same_bits(frozen, {n: w for n, w in now.items() if n in frozen})
    assert all(w.any() for n, w in now.items() if "lora_B" in n), "every adapter must have moved"
    other = build_model(lora=True)
    other.load_state_dict(now, strict=False)
    want = dict(other.merge_and_unload().named_parameters())
    assert furthest(dict(engine.named_full_weights()), want) < 1e-6
    fresh = engine_for(build_model(lora=True), stage)
    fresh.load_state(tensors, scalars)
    for e in (engine, fresh):
        e.update(cut(build_batch(), RAGGED), nll)
    assert same_bits(weights(engine), weights(fresh))
    engine.destroy(), fresh.destroy()


def test_state_of_another_model_is_refused_by_name() -> None:
    """Would catch: a partly loaded state after the model or the LoRA rank was changed."""
    engine = engine_for(build_model(), 2)
    tensors, scalars = engine.state_dict()
    name = "master.model.layers.0.mlp.up_proj.weight"
    changed = {n: t for n, t in tensors.items() if n != name} | {"master.strange": torch.zeros(1)}
    changed["exp_avg.model.norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        engine.load_state(changed, scalars)
    for part in (
        f"missing: {name}",
        "not of this model: master.strange",
        r"norm.weight is (5,), the model has (32,)",
    ):
        assert part in str(error.value)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_destroy_frees_everything_but_the_model(stage: int) -> None:
    """Would catch: stages of a run that pile up in memory, and hooks of a dead engine in the next one's
    forward."""
    model = build_model()
    engine = engine_for(model, stage)
    engine.update(cut(build_batch(), WHOLE), nll)
    inner, master = (
        weakref.ref(engine.model),
        weakref.ref(next(iter(engine._optimizer.state.values()))["exp_avg"]),
    )
    before = weights(engine)
    engine.destroy()
    if stage == 3:
        del model
    gc.collect()
    assert inner() is None and master() is None
    if stage < 3:
        assert not model._forward_pre_hooks and not model._forward_hooks
        assert same_bits(before, dict(model.named_parameters()))
        again = engine_for(
            model, (stage + 1) % 3
        )  # the next stage of a run may go on with the very same model
        assert not again.update(cut(build_batch(), RAGGED), nll).skipped
        again.destroy()


def test_packed_weights_are_dropped_whenever_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a forward after a step or a load that still multiplies with the old weights."""
    calls = []
    monkeypatch.setattr(deepspeed_engine, "weights_changed", calls.append)
    engine = engine_for(build_model(), 1)
    assert calls == [engine.module]
    engine.update(cut(build_batch(), WHOLE), nll)
    assert calls == [engine.module] * 2
    engine.load_state(*engine.state_dict())
    assert calls == [engine.module] * 3
    engine.destroy()


def test_a_process_has_one_place() -> None:
    init_process(ALONE, threads=1, timeout_s=10)
    with pytest.raises(ValueError, match="rank 0 of 1 already and cannot become rank 1 of 2"):
        init_process(dataclasses.replace(ALONE, rank=1, world_size=2, master_port=1), threads=1, timeout_s=10)


def test_a_process_alone_has_plain_tracebacks() -> None:
    """Would catch: "[rank0]:" before every line of an exception in a script that uses the Python API."""
    init_process(ALONE, threads=1, timeout_s=10)
    assert "distributed" not in sys.excepthook.__module__


def test_bad_calls_are_refused() -> None:
    engine = engine_for(build_model(), 0)
    with pytest.raises(ValueError, match="no micro-batch"):
        engine.update([], nll)
    engine.destroy()
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        engine_for(build_model().requires_grad_(False), 0)
    with pytest.raises(ValueError, match="2 processes need a master port"):
        ProcessInfo("train", 0, 2, 0, "127.0.0.1", 0, "cpu")


# -- optimisers, the moving average, what does not move ------------------------------------------------------


OTHERS = dict(momentum=0.9, ema_decay=0.7, layer_lr_decay=0.8, weight_decay=0.1)
# Two processes run adagrad and rmsprop under ZeRO too.
STAGES_OF = {
    "adam": (0,),
    "sgd": (0, 1, 3),
    "adagrad": (0, 3),
    "rmsprop": (0,),
    "adafactor": (0,),
    "muon": (0,),
}


@pytest.mark.parametrize("optimizer", STAGES_OF)
def test_every_optimizer_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    """Would catch: a part of an optimiser's state that is not saved, a layer's rate that ZeRO forgets, a step count
    that starts again, an optimiser that DeepSpeed replaces."""
    want = None
    for stage in STAGES_OF[optimizer]:
        result = exercise(stage, "float32", ALONE, tmp_path, optimizer=optimizer, **OTHERS)
        assert result["loaded state equals saved"] and result["exact after load"], stage
        assert (
            result["nothing moved"] and result["empty step moved nothing"] and result["no trace of the skip"]
        )
        final = load_tensors(tmp_path / f"{stage}-float32-False.weights")
        saved = load_tensors(tmp_path / f"{stage}-float32-False.safetensors")
        want = want or (result["losses"], final, saved)
        assert result["losses"] == pytest.approx(want[0], rel=1e-5)
        assert furthest(final, want[1]) < 5e-6 and furthest(saved, want[2]) < 5e-5


def test_optimizers_that_need_whole_matrices_refuse_zero() -> None:
    for stage, dtype in ((1, "float32"), (0, "bfloat16")):
        with pytest.raises(
            ValueError, match="muon reads whole matrices.*zero_stage: 0 and model.dtype: float32"
        ):
            engine_for(build_model(dtype), stage, dtype, optimizer="muon")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_state_saved_with_another_optimizer_is_refused(stage: int) -> None:
    """Would catch: a resume that goes on with half of the memory it had."""
    engine = engine_for(build_model(), stage, optimizer="sgd", momentum=0.9)
    tensors, scalars = engine.state_dict()
    engine.destroy()
    other = engine_for(build_model(), stage, ema_decay=0.9)
    with pytest.raises(ValueError, match="(?s)missing: exp_avg.unused.*missing: ema.unused") as e:
        other.load_state(tensors, scalars)
    assert "trainer.optimizer, momentum, freeze or ema_decay changed?" in str(e.value)
    other.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layers_learn_at_their_own_rates(stage: int) -> None:
    """Would catch: one rate for all, given to every group at each update; ZeRO-3's parts in another group."""
    start = {n: p.detach() for n, p in build_model().named_parameters()}
    moves = []
    for changes in ({}, {"layer_lr_decay": 0.5}):
        engine = engine_for(build_model(), stage, optimizer="sgd", weight_decay=0.0, lr=1.0, **changes)
        engine.update(cut(build_batch(), RAGGED), nll)
        moves.append({n: w - start[n] for n, w in weights(engine).items()})
        engine.destroy()
    for name, moved in moves[0].items():
        scale = 0.25 if "embed" in name else 0.5 if "layers.0" in name else 1.0
        torch.testing.assert_close(moves[1][name], scale * moved, rtol=1e-4, atol=1e-6)
    assert moves[0]["model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_weights_stay_and_are_not_saved(stage: int) -> None:
    """Would catch: weight decay of what is frozen, its moments in the checkpoint."""
    engine = engine_for(build_model(), stage, freeze=["model.embed_tokens.*", "model.layers.0.*"])
    before = weights(engine)
    engine.update(cut(build_batch(), RAGGED), nll)
    after, frozen = weights(engine), ("model.embed_tokens.", "model.layers.0.")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if not n.startswith(frozen) and n != "unused"
    }
    assert not [n for n in engine.state_dict()[0] if n.split(".", 1)[1].startswith(frozen)]
    engine.destroy()


@pytest.mark.parametrize(("stage", "dtype"), [KINDS[0], KINDS[2], (1, "bfloat16"), (3, "bfloat16")])
def test_the_moving_average_is_shown_and_training_goes_on_from_the_weights(stage: int, dtype: str) -> None:
    """Would catch: an average of rounded weights, one that a skipped step moves, weights that stay averaged after
    an export, a forward on packed copies of the other weights."""
    engine = engine_for(build_model(dtype), stage, dtype, ema_decay=0.7)
    plain = engine_for(build_model(dtype), stage, dtype)
    want = {n: p.detach().float() for n, p in build_model(dtype).named_parameters()}

    def broken(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = nll(model, micro)
        return loss * math.nan, sums

    for fn in (nll, broken, nll, nll):
        for e in (engine, plain):
            e.update(cut(build_batch(), RAGGED), fn)
        tensors, _ = engine.state_dict()
        if fn is nll:
            want = {n: 0.7 * w + 0.3 * tensors[f"master.{n}"] for n, w in want.items()}
        before = weights(engine)
        with engine.averaged_weights():
            shown = weights(engine)
        assert furthest({n: tensors[f"ema.{n}"] for n in want}, want) < 1e-6
        assert same_bits(weights(engine), before) and not same_bits(shown, before)
        assert all(torch.equal(shown[n], tensors[f"ema.{n}"].to(shown[n].dtype)) for n in want)
    assert same_bits(weights(engine), weights(plain))
    with pytest.raises(ValueError, match="no moving average.*trainer.ema_decay"), plain.averaged_weights():
        pass
    engine.destroy(), plain.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_moving_average_of_adapters_is_merged(stage: int) -> None:
    """Would catch: an export of averages that merges the adapters as they are now."""
    engine = engine_for(build_model(lora=True), stage, ema_decay=0.5)
    for _ in range(3):
        engine.update(cut(build_batch(), RAGGED), nll)
    tensors, _ = engine.state_dict()
    other = build_model(lora=True)
    other.load_state_dict({n[4:]: t for n, t in tensors.items() if n.startswith("ema.")}, strict=False)
    want = dict(other.merge_and_unload().named_parameters())
    with engine.averaged_weights():
        assert furthest(dict(engine.named_full_weights()), want) < 1e-6
    assert furthest(dict(engine.named_full_weights()), want) > 1e-4
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tensors_that_the_first_step_leaves_alone_are_named(stage: int) -> None:
    """Would catch: a trained weight that no gradient reaches, in silence; a report in every step, one before
    anything was applied, one about the A of adapters, whose first gradient is 0."""
    engine = engine_for(build_model(), stage, weight_decay=0.0)
    bad = [lambda model, micro: (nll(model, micro)[0] * math.nan, {})]
    reports = [engine.update(cut(build_batch(), RAGGED), fn).unchanged for fn in (*bad, nll, nll)]
    assert reports == [(), ("unused",), ()]
    engine.destroy()
    adapted = engine_for(build_model(lora=True), stage, weight_decay=0.0)
    assert [adapted.update(cut(build_batch(), RAGGED), nll).unchanged for _ in range(3)] == [()] * 3
    adapted.destroy()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", ["zero", "new"])
def test_a_head_of_zeros_lets_its_trunk_start_later(head: str, lora: bool, stage: int) -> None:
    """Would catch: a report about the whole trunk of a critic, whose head starts at 0, and none about a tensor that really
    stays; a model that is watched for longer than it needs."""
    source = build_model()
    config = ModelConfig(path="none", dtype="float32", lora=LoraConfig(rank=3) if lora else None)
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    critic = load_scalar_model(config, tokenizer, head=head, seed=0, trainable=True, model=source)
    critic.still = torch.nn.Parameter(torch.ones(3))
    engine = engine_for(critic, stage, weight_decay=0.0)

    def error(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return ((batch_values(model, micro) - 1.0)[micro.loss_mask] ** 2).sum() / micro.num_loss_tokens, {}

    reports = [engine.update(cut(build_batch(), RAGGED), error).unchanged for _ in range(5)]
    steps = 1 + lora + (head == "zero")
    assert reports == [()] * (steps - 1) + [("still",)] + [()] * (5 - steps)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_without_gradient_says_nothing_about_the_tensors(stage: int) -> None:
    """Would catch: a report about every weight because the first step's advantages were all 0."""
    engine = engine_for(build_model(), stage, weight_decay=0.0)
    flat = [lambda model, micro: (nll(model, micro)[0] * 0.0, {})]
    reports = [engine.update(cut(build_batch(), RAGGED), fn).unchanged for fn in (*flat, nll, nll)]
    assert reports == [(), ("unused",), ()]
    engine.destroy()


def logprob_nll(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -batch_logprobs(model, micro, temperature=1.0)[0].sum() / micro.num_loss_tokens, {}


def test_neftune_is_in_training_forwards_only_and_the_same_however_they_are_cut() -> None:
    """Would catch: noise in scoring or after `destroy`, noise at another sequence's place, the same noise in every
    update."""
    batch = build_batch()

    def make(**changes: object) -> TrainingEngine:
        model = build_model()
        model.set_attn_implementation("rlhf")
        return engine_for(model, 2, **changes)

    def with_noise(update: int) -> float:
        """The loss of the initial weights by hand: every row alone, noise added to its embeddings."""
        model, total = build_model(), 0.0
        rows = embedding_noise(batch, 32, alpha=5.0, seed=0, update=update, dtype=torch.float32)
        for row, noise in enumerate(rows.split(batch.lengths.tolist())):
            ids = batch.token_ids[row, : len(noise)]
            logits = model(inputs_embeds=(model.model.embed_tokens(ids) + noise)[None]).logits[0, 1:-1]
            total -= float(logits.log_softmax(-1).gather(-1, ids[2:, None]).sum())
        return total / batch.num_loss_tokens

    for rows in (WHOLE, RAGGED):
        engine = make(neftune_alpha=5.0)
        skipped = engine.update(cut(batch, rows), lambda m, b: (logprob_nll(m, b)[0] * math.nan, {}))
        assert skipped.skipped
        clean, _ = batch_logprobs(engine.module, batch, temperature=1.0)
        assert engine.update(cut(batch, rows), logprob_nll).loss == pytest.approx(with_noise(1), rel=1e-5)
        engine.destroy()
    assert with_noise(0) != pytest.approx(with_noise(1), rel=1e-4)
    plain = make()
    assert torch.equal(clean, batch_logprobs(plain.module, batch, temperature=1.0)[0])
    assert plain.update(cut(batch, WHOLE), logprob_nll).loss != pytest.approx(with_noise(0), rel=1e-4)
    plain.destroy()


@pytest.mark.parametrize("lora", [False, True])
def test_a_critic_trains_under_zero_3_as_without(lora: bool, tmp_path: Path) -> None:
    """Would catch: a head that ZeRO-3 has split, adapters' head left out of the exported model."""
    tokenizer = build_tokenizer(
        BuildTokenizerConfig(alphabet="".join(chr(33 + i) for i in range(VOCABULARY)))
    )
    sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, head_dim=6)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    model_config = ModelConfig(
        build=BuildModelConfig(config=sizes), dtype="float32", lora=LoraConfig(rank=3) if lora else None
    )

    def squares(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = torch.where(micro.response_mask, batch_values(model, micro) - 1.0, 0.0)
        return error.square().sum() / micro.num_loss_tokens, {}

    found = {}
    for stage in (0, 2, 3):
        model = load_scalar_model(model_config, tokenizer, head="new", seed=0, trainable=True)
        engine = engine_for(model, stage)
        losses = [engine.update(cut(build_batch(), RAGGED), squares).loss for _ in range(3)]
        found[stage] = losses, weights(engine)
        save_model(engine.module, tokenizer, tmp_path / str(stage), weights=found[stage][1])
        losses.append(engine.update(cut(build_batch(), WHOLE), squares).loss)
        engine.destroy()
        own = ModelConfig(path=str(tmp_path / str(stage)), dtype="float32")
        scorer = load_scalar_model(own, tokenizer, head="load", seed=0, trainable=False)
        assert furthest(dict(scorer.named_parameters()), found[stage][1]) == 0.0
        with torch.no_grad():
            assert float(squares(scorer, build_batch())[0]) == pytest.approx(losses[-1], rel=1e-4)
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert furthest(found[stage][1], found[0][1]) < 5e-6


# -- learning rate -------------------------------------------------------------------------------------------


def test_the_rate_follows_updates_tried_and_survives_a_load() -> None:
    """Would catch: a schedule that restarts on resume or that falls behind by the skipped steps."""
    engine = engine_for(build_model(), 2, schedule="linear", warmup_steps=2)

    def broken(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = nll(model, micro)
        return loss * math.nan, sums

    seen = [engine.update(cut(build_batch(), WHOLE), fn).lr for fn in (nll, broken)]
    fresh = engine_for(build_model(), 2, schedule="linear", warmup_steps=2)
    fresh.load_state(*engine.state_dict())
    seen.append(fresh.update(cut(build_batch(), WHOLE), nll).lr)
    config = TrainerConfig(**CONFIG, schedule="linear", warmup_steps=2)
    assert seen == [lr_at(i, config, 10) for i in range(3)] and (fresh.version, fresh.updates) == (2, 3)
    engine.destroy(), fresh.destroy()


# -- one or two processes ------------------------------------------------------------------------------------


def exercise(
    stage: int, dtype: str, info: ProcessInfo, folder: Path, lora: bool = False, **changes: object
) -> dict[str, object]:
    """Five updates; then the same from a save after the second, with two steps in between: one that is bad on
    the last rank, one without a token in its loss."""
    rows = RAGGED if info.world_size == 1 else OF_TWO[info.rank]
    micros = [cut(build_batch(seed), rows) for seed in range(5)]
    straight = engine_for(build_model(dtype, lora=lora), stage, dtype, info, **changes)
    stats = [straight.update(m, nll) for m in micros[:2]]
    tensors, scalars = straight.state_dict()
    file = folder / f"{stage}-{dtype}-{lora}.safetensors"
    if info.rank == 0:
        save_tensors(file, tensors)
    stats += [straight.update(m, nll) for m in micros[2:4]]
    after_four = weights(straight)
    stats.append(straight.update(micros[4], nll))
    after_five = weights(straight)
    straight.destroy()

    def bad_on_last(model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, sums = nll(model, micro)
        return loss * (math.nan if info.rank == info.world_size - 1 else 1.0), sums

    resumed = engine_for(build_model(dtype, seed=0 if lora else 1, lora=lora), stage, dtype, info, **changes)
    resumed.load_state(load_tensors(file), scalars)
    again, _ = resumed.state_dict()
    result: dict[str, object] = {"loaded state equals saved": same_bits(again, tensors)}
    assert bool(tensors) == (info.rank == 0), "the state is wanted on rank 0 and only there"
    for m in micros[2:4]:
        resumed.update(m, nll)
    result["exact after load"] = same_bits(weights(resumed), after_four)
    result["skipped"] = resumed.update(micros[4], bad_on_last).skipped
    result["nothing moved"] = same_bits(weights(resumed), after_four)
    none = dict(num_loss_tokens=0, num_loss_sequences=0)
    stats_of_none = resumed.update([m.replace(loss_mask=m.loss_mask & False, **none) for m in micros[4]], nll)
    result["empty step skipped"] = (stats_of_none.skipped, stats_of_none.empty, resumed.version) == (
        True,
        True,
        4,
    )
    result["empty step moved nothing"] = same_bits(weights(resumed), after_four) and resumed.updates == 6
    resumed.update(micros[4], nll)
    result["no trace of the skip"] = same_bits(weights(resumed), after_five)
    resumed.destroy()
    result |= {"losses": [s.loss for s in stats], "norms": [s.grad_norm for s in stats]}
    result["sums"] = {name: float(value) for name, value in stats[-1].sums.items()}
    if info.rank == 0:
        save_tensors(folder / f"{stage}-{dtype}-{lora}.weights", after_five)
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """The folder of the one-process runs, and `exercise` in this process, once for each (stage, dtype,
    lora)."""
    folder = tmp_path_factory.mktemp("one")
    return folder, functools.cache(
        lambda stage, dtype, lora=False: exercise(stage, dtype, ALONE, folder, lora)
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict]]]:
    """The folder of the two-process run, and what each rank found by "stage dtype"."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(port), str(folder)] for rank in range(2)]
    ranks = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_two_processes_resume_exactly_and_skip_together(two_processes, stage: int, dtype: str) -> None:
    """Would catch: a part of the state left on its rank, ranks that disagree about a bad gradient on one of
    them, and a step without a token in its loss that Adam's momentum turns into a move."""
    for rank in two_processes[1]:
        result = rank[f"{stage} {dtype}"]
        facts = (
            "exact after load",
            "skipped",
            "nothing moved",
            "no trace of the skip",
            "empty step skipped",
            "empty step moved nothing",
            "loaded state equals saved",
        )
        assert {fact: result[fact] for fact in facts} == dict.fromkeys(facts, True)


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_two_processes_give_the_curve_of_one(two_processes, alone, stage: int, dtype: str) -> None:
    """Would catch: averaging over processes left in, local counts, clipping by a local norm, local sums."""
    folder, (first, second) = two_processes
    result = first[f"{stage} {dtype}"]
    assert result == second[f"{stage} {dtype}"], "the ranks must agree"
    want = alone[1](stage, dtype)
    close = dict(rel=1e-5) if dtype == "float32" else dict(rel=2e-2)
    assert result["losses"] == pytest.approx(want["losses"], **close)
    assert result["norms"] == pytest.approx(
        want["norms"], **(dict(rel=1e-4) if dtype == "float32" else close)
    )
    assert result["sums"] == pytest.approx(want["sums"], **close)
    both = [load_tensors(f / f"{stage}-{dtype}-False.weights") for f in (folder, alone[0])]
    assert furthest(*both) < (5e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("stage", [0, 3])
def test_state_of_two_processes_goes_on_in_one(two_processes, stage: int) -> None:
    """Would catch: a state that knows how it was split. Saved under ZeRO-2 by two, continued by one without
    or with 3."""
    folder, (first, _) = two_processes
    engine = engine_for(build_model(seed=1), stage)
    engine.load_state(load_tensors(folder / "2-float32-False.safetensors"), {"version": 2, "updates": 2})
    losses = [engine.update(cut(build_batch(seed), WHOLE), nll).loss for seed in (2, 3, 4)]
    assert losses == pytest.approx(first["2 float32"]["losses"][2:], rel=1e-5)
    engine.destroy()


def test_two_processes_with_lora_and_zero_3(two_processes, alone) -> None:
    """Would catch: merging a part of a weight, gathering on one rank only."""
    folder, (first, _) = two_processes
    assert first["lora"]["exact after load"] and first["lora"]["skipped"]
    assert first["lora"]["losses"] == pytest.approx(alone[1](3, "float32", True)["losses"], rel=1e-5)
    assert furthest(*(load_tensors(f / "3-float32-True.weights") for f in (folder, alone[0]))) < 5e-6


@pytest.mark.parametrize(("stage", "optimizer"), OPTIMIZERS_OF_TWO)
def test_two_processes_with_other_optimizers(
    two_processes, stage: int, optimizer: str, tmp_path: Path
) -> None:
    """Would catch: state or average split unlike the weights they belong to."""
    folder, (first, second) = two_processes
    result = first[optimizer]
    assert result == second[optimizer] and result["exact after load"] and result["loaded state equals saved"]
    assert result["no trace of the skip"] and result["nothing moved"]
    want = exercise(0, "float32", ALONE, tmp_path, optimizer=optimizer, **OTHERS)
    assert result["losses"] == pytest.approx(want["losses"], rel=1e-5)
    for kind in ("weights", "safetensors"):  # the latter holds the average too
        both = [
            load_tensors(folder / optimizer / f"{stage}-float32-False.{kind}"),
            load_tensors(tmp_path / f"0-float32-False.{kind}"),
        ]
        assert furthest(*both) < 5e-5


def main(rank: int, port: int, folder: Path) -> None:
    """What each of the two processes runs."""
    info = ProcessInfo("train", rank, 2, rank, "127.0.0.1", port, "cpu")
    gc.freeze()
    results = {f"{stage} {dtype}": exercise(stage, dtype, info, folder) for stage, dtype in KINDS}
    results["lora"] = exercise(3, "float32", info, folder, lora=True)
    for stage, optimizer in OPTIMIZERS_OF_TWO:
        (folder / optimizer).mkdir(exist_ok=True)
        results[optimizer] = exercise(
            stage, "float32", info, folder / optimizer, optimizer=optimizer, **OTHERS
        )
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
