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
from rlhf.process import ProcessInfo
from rlhf.recipe.schema import TrainerConfig
from rlhf.records import Batch
from rlhf.trainers import deepspeed_engine
from rlhf.trainers.deepspeed_engine import TrainingEngine, init_process, lr_at

REPO = Path(__file__).resolve().parent.parent.parent
ALONE = ProcessInfo("train", 0, 1, 0, "127.0.0.1", 0, "cpu")
KINDS = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]
VOCABULARY, ROWS, WIDTH = 37, 8, 12
CONFIG = dict(steps=10, lr=1e-2, eps=1e-3, max_grad_norm=0.5, weight_decay=0.1)
WHOLE = [[0, 1, 2, 3, 4, 5, 6, 7]]
SINGLE = [[row] for row in range(ROWS)]
RAGGED = [[0, 1, 2], [], [3], [4, 5, 6, 7]]
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
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0)
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
    return TrainingEngine(model, config, dtype=dtype, total_updates=10, info=info)


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
    inner, master = weakref.ref(engine.model), weakref.ref(next(iter(engine._adam.state.values()))["exp_avg"])
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


def test_bad_calls_are_refused() -> None:
    engine = engine_for(build_model(), 0)
    with pytest.raises(ValueError, match="no micro-batch"):
        engine.update([], nll)
    engine.destroy()
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        engine_for(build_model().requires_grad_(False), 0)
    with pytest.raises(ValueError, match="2 processes need a master port"):
        ProcessInfo("train", 0, 2, 0, "127.0.0.1", 0, "cpu")


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
    """Five updates; then the same from a save after the second, with a step in between that is bad on the
    last rank."""
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
    """Would catch: a part of the state left on its rank, and ranks that disagree about a bad gradient on one
    of them."""
    for rank in two_processes[1]:
        result = rank[f"{stage} {dtype}"]
        facts = (
            "exact after load",
            "skipped",
            "nothing moved",
            "no trace of the skip",
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


def main(rank: int, port: int, folder: Path) -> None:
    """What each of the two processes runs."""
    info = ProcessInfo("train", rank, 2, rank, "127.0.0.1", port, "cpu")
    gc.freeze()
    results = {f"{stage} {dtype}": exercise(stage, dtype, info, folder) for stage, dtype in KINDS}
    results["lora"] = exercise(3, "float32", info, folder, lora=True)
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
