"""The CPU kernels against torch's own, one by one: which is faster, and by how much.

    python benchmarks/cpu_kernels.py [--threads 1 2] [--seconds 0.2] [--only linear] [--out benchmarks/results]

Both sides of a line are called in turn and medians are compared; 2.00 means that ours takes half the time. Weights are
packed beforehand, as an engine and a trainer have them, and what packing takes is a line of its own. A line's weights
are several copies used in turn, as many as fill the caches: in a model, too, each weight comes from memory again. No product
is faster than reading its weights, nor than its arithmetic: both rates are measured here, and beside each time stands
which share it is of the longer of the two. Ours at 80% and 1.6 times as fast can be 2.0 times as fast and no more.
Prints tables; writes files only with --out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.running import machine
from rlhf.kernels.activation import geglu, swiglu
from rlhf.kernels.attention import Plan, attend_packed, attend_paged
from rlhf.kernels.linear import pack, packed_linear
from rlhf.kernels.logprob import token_logprobs
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.quantized import quantize, quantized_linear
from rlhf.kernels.rotary import rotate
from rlhf.models.attention import PagedContext
from rlhf.models.build import build_tokenizer
from rlhf.models.fused import StepForward
from rlhf.models.load import load_model
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, ModelConfig

Run = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 100, 256, 1000, 4096)
FEW_ROWS = (1, 2, 4, 8, 16, 64, 256)
# (in, out) of a layer's joined products
LAYERS = {
    "5M": ((256, 512), (256, 1536), (768, 256)),
    "30M": ((512, 1024), (512, 3072), (1536, 512)),
    "120M": ((768, 1280), (768, 4608), (2304, 768)),
    "Qwen3-0.6B": ((1024, 4096), (1024, 6144), (3072, 1024)),
}
MODELS = {  # Qwen3's shape: width, layers, query heads, key heads, head, MLP
    "5M": (256, 5, 8, 4, 32, 768),
    "30M": (512, 8, 8, 4, 64, 1536),
}
_CACHES = 64 << 20  # bytes of weights that a line goes through in turn
_COPIES = 16  # at most
_MOST_WORK = 3e10  # multiplications of one call; larger ones are left out
_LIMIT_S = 1.0  # for each limit of the machine
_LIMIT_SIZE = 512  # of a product that is large, and short enough to be left alone at times
_EPS = 1e-6


@dataclass(frozen=True)
class Line:
    operation: str
    shape: str
    dtype: str
    threads: int
    rows: int
    ours_us: float
    against: str
    ratio: float  # the other's time by ours
    share: float | None = None  # the least time that the machine allows, by ours


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, measured."""

    bandwidth: float  # bytes read from memory in a microsecond
    products: dict[torch.dtype, float]  # additions and multiplications of a large product in a microsecond

    def share(self, us: float, num_bytes: int, dtype: torch.dtype, operations: float = 0.0) -> float:
        return max(num_bytes / self.bandwidth, operations / self.products[dtype]) / us

    def __str__(self) -> str:
        names = {dtype: name for name, dtype in DTYPES.items()}
        rates = (f"{names[dtype]} products {rate / 1e3:.0f} GFLOP/s" for dtype, rate in self.products.items())
        return f"memory {self.bandwidth / 1e3:.1f} GB/s, {', '.join(rates)}"


def medians(
    runs: dict[str, Run], seconds: float, of: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Microseconds of a call of each, called in turn for about that long; `of` those, the median or another one."""
    for run in (*runs.values(), *runs.values()):
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(found.values()))) < 5:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    return {name: of(times) * 1e6 for name, times in found.items()}


def limits(seconds: float) -> Limits:
    """The faster of a sum over more than the caches hold and a product of few rows; the faster of two large products. The
    fastest call counts: a limit that was measured while others worked would be passed."""
    seconds = max(seconds, _LIMIT_S)
    x, size = torch.ones(_CACHES // 4), 1024
    row, packs = made(1, size, dtype=torch.float32), [pack(w) for w in weights(size, size, torch.float32)]
    read = {"sum": x.sum, "product": lambda: [packed_linear(row, p) for p in packs]}
    times = medians(read, seconds, of=min)
    speed = max(x.nbytes / times["sum"], len(packs) * size * size * 4 / times["product"])
    products = {}
    for dtype in DTYPES.values():
        x, w = (
            made(_LIMIT_SIZE, _LIMIT_SIZE, dtype=dtype),
            made(_LIMIT_SIZE, _LIMIT_SIZE, dtype=dtype, seed=1),
        )
        packed = pack(w)
        runs = {
            "ours": lambda x=x, p=packed: packed_linear(x, p),
            "F.linear": lambda x=x, w=w: F.linear(x, w),
        }
        products[dtype] = 2 * _LIMIT_SIZE**3 / min(medians(runs, seconds, of=min).values())
    return Limits(speed, products)


# -- products ------------------------------------------------------------------------------------------------------------


def weights(inner: int, outs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    size = inner * outs * dtype.itemsize
    return [made(outs, inner, dtype=dtype) for _ in range(min(_COPIES, math.ceil(_CACHES / size)))]


def in_turn(call: Callable[[object], object], objects: list) -> Run:
    turn = itertools.cycle(objects)
    return lambda: call(next(turn))


def products(seconds: float, top: Limits) -> Iterator[Line]:
    for (model, layers), (name, dtype) in itertools.product(LAYERS.items(), DTYPES.items()):
        for inner, outs in layers:
            whole = weights(inner, outs, dtype)
            packs = [pack(w) for w in whole]
            size, shape = whole[0].nbytes, f"{model}: {inner} to {outs}"
            for rows in ROWS:
                if rows * inner * outs > _MOST_WORK:
                    continue
                x = made(rows, inner, dtype=dtype)
                runs = {
                    "ours": in_turn(lambda p, x=x: packed_linear(x, p), packs),
                    "F.linear": in_turn(lambda w, x=x: F.linear(x, w), whole),
                }
                us = medians(runs, seconds)
                share = top.share(us["ours"], size, dtype, 2.0 * rows * inner * outs)
                yield line("linear", shape, name, rows, us, "F.linear", share)
            us = medians({"ours": in_turn(pack, whole), "copy": in_turn(torch.clone, whole)}, seconds)
            yield line("packing a weight", shape, name, 0, us, "copy")


def quantized_products(seconds: float, top: Limits) -> Iterator[Line]:
    for name, dtype in DTYPES.items():
        for inner, outs in LAYERS["Qwen3-0.6B"]:
            whole = weights(inner, outs, dtype)
            packs, shape = [pack(w) for w in whole], f"Qwen3-0.6B: {inner} to {outs}"
            for bits in (8, 4):
                small = [quantize(w, bits) for w in (*whole, *whole)]
                for rows in FEW_ROWS:
                    x = made(rows, inner, dtype=dtype)
                    runs = {
                        "ours": in_turn(lambda q, x=x: quantized_linear(x, q), small),
                        "packed": in_turn(lambda p, x=x: packed_linear(x, p), packs),
                    }
                    us = medians(runs, seconds)
                    share = top.share(us["ours"], small[0].nbytes, dtype, 2.0 * rows * inner * outs)
                    yield line(f"linear, {bits} bits", shape, name, rows, us, "packed", share)
                us = medians({"ours": in_turn(lambda w, b=bits: quantize(w, b), whole), "pack": in_turn(pack, whole)}, seconds)  # fmt: skip
                yield line(f"quantising to {bits} bits", shape, name, 0, us, "pack")


# -- attention -----------------------------------------------------------------------------------------------------------


def attention(seconds: float, top: Limits) -> Iterator[Line]:
    heads, kv_heads, dim, page = 16, 8, 128, 64
    for name, dtype in DTYPES.items():
        for count, context in itertools.product((1, 16, 64), (128, 1024)):
            q, pages = made(count, heads, dim, dtype=dtype), context // page
            k, v = (made(count * pages, kv_heads, page, dim, dtype=dtype, seed=s) for s in (1, 2))
            table = torch.arange(count * pages).view(count, pages)
            plan = Plan([1] * count, [context] * count, page_table=table, page_tokens=page)
            of_torch = [made(count, kv_heads, context, dim, dtype=dtype, seed=s) for s in (1, 2)]
            runs = {
                "ours": lambda q=q, k=k, v=v, p=plan: attend_paged(q, k, v, p, scale=dim**-0.5),
                "sdpa": lambda q=q, kv=of_torch: F.scaled_dot_product_attention(
                    q[:, :, None], *kv, enable_gqa=True
                ),
            }
            us = medians(runs, seconds)
            shape = f"{heads} heads of {dim}, {kv_heads} of keys, {context} tokens"
            share = top.share(us["ours"], k.nbytes + v.nbytes, dtype)
            yield line("decode attention", shape, name, count, us, "sdpa", share)
        for lengths in ((512,) * 4, (512, 384, 256, 128, 128, 64, 64, 64)):
            us = medians(training_attention(lengths, dtype), seconds)
            shape = f"8 heads of 64, sequences of {min(lengths)} to {max(lengths)}"
            yield line("attention and its gradient", shape, name, sum(lengths), us, "padded sdpa")


def training_attention(lengths: tuple[int, ...], dtype: torch.dtype) -> dict[str, Run]:
    heads, dim, longest = 8, 64, max(lengths)
    packed = [made(sum(lengths), heads, dim, dtype=dtype, seed=s).requires_grad_() for s in range(3)]
    padded = [made(len(lengths), heads, longest, dim, dtype=dtype, seed=s).requires_grad_() for s in range(3)]
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = (
        None
        if real.all()
        else (real[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril())
    )

    def ours() -> object:
        out = attend_packed(*packed, Plan(lengths, lengths), scale=dim**-0.5)
        return torch.autograd.grad(out.sum(), packed)

    def stock() -> object:
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask, is_causal=mask is None)
        return torch.autograd.grad(out.sum(), padded)

    return {"ours": ours, "padded sdpa": stock}


# -- all layers ----------------------------------------------------------------------------------------------------------


def layers(seconds: float, top: Limits) -> Iterator[Line]:
    """Steps in which so many sequences of 256 tokens go on by one, in one call and layer by layer from Python."""
    for (name, dtype), (shape, (hidden, count, heads, kv_heads, dim, inner)) in itertools.product(
        DTYPES.items(), MODELS.items()
    ):
        config = {
            "hidden_size": hidden, "num_hidden_layers": count, "num_attention_heads": heads, "head_dim": dim,
            "num_key_value_heads": kv_heads, "intermediate_size": inner,
        }  # fmt: skip
        build = BuildModelConfig(model_type="qwen3", config=config)
        tokenizer = build_tokenizer(BuildTokenizerConfig())
        recipe = ModelConfig(build=build, dtype=str(dtype).removeprefix("torch."))
        forward = StepForward(load_model(recipe, tokenizer, seed=0, trainable=False))
        in_one_call = forward._decoder.native
        for rows in (1, 8, 32):
            step = decoding(forward, rows, count, kv_heads, dim, dtype)
            runs = {
                "ours": functools.partial(step, in_one_call),
                "layer by layer": functools.partial(step, None),
            }
            yield line("a decoding step", shape, name, rows, medians(runs, seconds), "layer by layer")


def decoding(
    forward: StepForward, rows: int, count: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> Callable[[object], torch.Tensor]:
    """A step, given what runs the layers in one call or None."""
    context, page = 256, 64
    shape = (rows * context // page, kv_heads, page, dim)
    k, v = ([torch.zeros(shape, dtype=dtype) for _ in range(count)] for _ in "kv")
    table = np.arange(shape[0]).reshape(rows, -1)
    slots = torch.from_numpy(table[:, -1] * page + page - 1)
    ids, positions = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), context - 1)

    def step(in_one_call: object) -> torch.Tensor:
        forward._decoder.native = in_one_call
        starts = np.arange(rows + 1)
        return forward(ids, positions, PagedContext(k, v, slots, table, np.full(rows, context), starts))

    return step


# -- rows ----------------------------------------------------------------------------------------------------------------


def rows(seconds: float, top: Limits) -> Iterator[Line]:
    for (name, dtype), count in itertools.product(DTYPES.items(), (1, 64, 1024)):
        for (operation, against), (ours, stock) in row_operations(count, dtype).items():
            us = medians({"ours": ours, against: stock}, seconds)
            yield line(operation, "as in Qwen3-0.6B", name, count, us, against)


def row_operations(count: int, dtype: torch.dtype) -> dict[tuple[str, str], tuple[Run, Run]]:
    x, w, zero = (
        made(count, 1024, dtype=dtype),
        made(1024, dtype=dtype),
        torch.zeros(count, 1024, dtype=dtype),
    )
    gate, up = made(count, 3072, dtype=dtype), made(count, 3072, dtype=dtype, seed=1)
    heads, cos, sin = (
        made(count, 24, 128, dtype=dtype),
        made(count, 128, dtype=dtype),
        made(count, 128, dtype=dtype),
    )
    logits, targets = made(count, 32000, dtype=dtype), torch.arange(count)
    return {
        ("rms_norm", "F.rms_norm"): (lambda: rms_norm(x, w, _EPS), lambda: F.rms_norm(x, (1024,), w, _EPS)),
        ("add_rms_norm", "add, F.rms_norm"): (
            lambda: add_rms_norm(x, zero, w, _EPS), lambda: F.rms_norm(x.add_(zero), (1024,), w, _EPS),
        ),
        ("swiglu", "F.silu(g) * u"): (lambda: swiglu(gate, up), lambda: F.silu(gate) * up),
        ("geglu", "F.gelu(g, tanh) * u"): (lambda: geglu(gate, up), lambda: F.gelu(gate, approximate="tanh") * up),
        ("rotary", "transformers' form"): (lambda: rotate(heads, cos, sin), lambda: stock_rotary(heads, cos, sin)),
        ("log-probs", "log_softmax, gather"): (
            lambda: token_logprobs(logits, targets),
            lambda: logits.float().log_softmax(-1).gather(1, targets[:, None]),
        ),
    }  # fmt: skip


def stock_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


# -- what is printed -----------------------------------------------------------------------------------------------------


def made(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def line(
    operation: str,
    shape: str,
    dtype: str,
    rows: int,
    us: dict[str, float],
    against: str,
    share: float | None = None,
) -> Line:
    return Line(operation, shape, dtype, torch.get_num_threads(), rows, us["ours"], against, us[against] / us["ours"], share)  # fmt: skip


def table(found: list[Line]) -> str:
    """One row for each operation, shape, dtype and number of threads; a column for each number of rows."""
    out = []
    for operation, part in itertools.groupby(found, key=lambda x: x.operation):
        lines = list(part)
        columns = sorted({x.rows for x in lines})
        out += [
            f"## {operation}: times as fast as {lines[0].against} (microseconds, share of the machine's limit)",
            "",
        ]
        out += ["| shape | dtype | threads | " + " | ".join(f"{c} rows" if c else "" for c in columns) + " |"]
        out += ["|" + "---|" * (3 + len(columns))]
        cells = {(x.shape, x.dtype, x.threads, x.rows): cell(x) for x in lines}
        for key in dict.fromkeys((x.shape, x.dtype, x.threads) for x in lines):
            out.append(f"| {' | '.join(map(str, key))} | " + " | ".join(cells.get((*key, c), "") for c in columns) + " |")  # fmt: skip
        out.append("")
    return "\n".join(out)


def cell(x: Line) -> str:
    share = "" if x.share is None else f", {x.share:.0%}"
    return f"{x.ratio:.2f} ({x.ours_us:,.0f}{share})"


def missed(found: list[Line]) -> list[str]:
    """Products that are not twice as fast for few rows, or slower for many, and what the machine would allow."""
    slow = [x for x in found if x.operation == "linear" and (x.ratio < 0.95 or x.rows <= 16 and x.ratio < 2)]
    few = sum(x.operation == "linear" and 0 < x.rows <= 16 for x in found)
    lines = [
        f"- {x.shape} {x.dtype}, {x.threads} threads, {x.rows} rows: {x.ratio:.2f}, {x.share:.0%} of the machine's limit, at which "
        f"it were {x.ratio / x.share:.2f}"
        for x in slow
    ]
    of_few = sum(x.rows <= 16 for x in slow)
    return [
        f"Below the goal (2.00 up to 16 rows: {of_few} of {few} lines; 0.95 beyond: {len(slow) - of_few}):",
        "",
        *lines,
    ]


KINDS = {
    "linear": products,
    "quantized": quantized_products,
    "attention": attention,
    "layers": layers,
    "rows": rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.2, help="of a line")
    parser.add_argument("--only", choices=KINDS, help="one kind of operation")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the tables")
    args = parser.parse_args()
    found: list[Line] = []
    top: dict[int, Limits] = {}
    for kind, threads in itertools.product([args.only] if args.only else KINDS, args.threads):
        torch.set_num_threads(threads)
        top[threads] = top.get(threads) or limits(args.seconds)
        with torch.set_grad_enabled(kind == "attention"):
            found += KINDS[kind](args.seconds, top[threads])
        print(f"{kind}, {threads} threads: done", flush=True)
    found.sort(key=lambda x: x.operation)
    text = table(found)
    speeds = "; ".join(f"{n} threads: {speed}" for n, speed in top.items())
    print(f"{text}\nLimits of {speeds}")
    below = "\n".join(missed(found))
    print(below)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"cpu_kernels-{time.strftime('%Y-%m-%d')}.json"
        report = {
            "benchmark": "cpu_kernels",
            "limits": {n: str(speed) for n, speed in top.items()},
            "machine": machine(),
        }
        file.write_text(json.dumps(report | {"lines": [asdict(x) for x in found]}, indent=1) + "\n")
        file.with_suffix(".md").write_text(f"{text}\nLimits of {speeds}.\n\n{below}\n")


if __name__ == "__main__":
    main()
