"""All layers of a decoder of Llama's kind over a few new tokens, as one call into C++.

Here: `Layers`, made of the layers' weights as the CPU's products read them. It does what rlhf.models.fused does layer by
layer, by the same C++ functions in the same order, so the bits are the same; for one sequence, or some, calling them
from Python takes as long as their work. Not here: what is before and after the layers, and which models have such layers
(`rlhf.models.fused`); more tokens, whose products oneDNN does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.kernels import linear, native, threads
from rlhf.kernels.attention import MOST_GROUP, NATIVE_DIMS, Plan, check_paged, of_plan
from rlhf.kernels.form import NATIVE, took
from rlhf.kernels.kv import QUANTISED, KvScales, check_pages, inverse_of
from rlhf.kernels.layout import Noted
from rlhf.kernels.quantized import QuantizedWeight

MOST_TOKENS = linear.FEW_ROWS
_SILU = 0
_VECTOR = 16  # numbers that the functions over rows take at once
_OPERATIONS = {  # of `Operations` in decoder.cpp, and the library of each
    "rms_norm_forward": "norm",
    "linear_forward": "linear",
    "rotary": "rotary",
    "gated_forward": "activation",
    "write_rows": "attention",
    "write_quantised": "attention",
    "attention_forward": "attention",
}

Weight = torch.Tensor | QuantizedWeight  # a pack of (out, in), or rounded to 8 or 4 bits


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights, the model's own tensors or packs of them; biases (out,) or None."""

    input_norm: torch.Tensor  # (H,)
    post_norm: torch.Tensor  # (H,)
    head_norms: torch.Tensor | None  # (Hq + Hkv, D)
    qkv: tuple[Weight, torch.Tensor | None]  # ((Hq + 2 Hkv) D, H)
    out: tuple[Weight, torch.Tensor | None]  # (H, Hq D)
    gate_up: tuple[Weight, torch.Tensor | None]  # (2 I, H)
    down: tuple[Weight, torch.Tensor | None]  # (H, I)
    eps: tuple[float, float, float]  # of the three norms
    scale: float
    window: int | None


class Layers:
    """Layers that C++ can run; `build` says whether it can."""

    def __init__(self, layers: Sequence[LayerWeights], heads: int, kv_heads: int, dim: int) -> None:
        self._held, self._threads = layers, torch.get_num_threads()
        self._heads, self._kv_heads, self._dim = heads, kv_heads, dim
        self._dtype = layers[0].input_norm.dtype
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._pages: Noted | None = None  # what the layers' addresses are of
        self._operations = _Operations(
            *(
                ctypes.cast(getattr(native.library(file), name), ctypes.c_void_p)
                for name, file in _OPERATIONS.items()
            )
        )
        hidden, inner = len(layers[0].input_norm), max(layer.down.inputs for layer in self._layers)
        sizes = {
            "change": hidden,
            "normed": hidden,
            "projected": (heads + 2 * kv_heads) * dim,
            "rotated": (heads + kv_heads) * dim,
            "attended": heads * dim,
            "gate_up": 2 * inner,
            "gated": inner,
        }
        self._room = {
            name: torch.empty(MOST_TOKENS, size, dtype=self._dtype, device="cpu")
            for name, size in sizes.items()
        }
        for name in ("query", "out"):
            self._room[name] = torch.empty(MOST_TOKENS, heads * dim, dtype=torch.float32, device="cpu")
        self._call = _LayersCall(
            **{name: x.data_ptr() for name, x in self._room.items()},
            operations=ctypes.addressof(self._operations),
            layers=ctypes.addressof(self._layers),
            count=len(layers),
            hidden=hidden,
            is_bf16=self._dtype == torch.bfloat16,
            activation=_SILU,
            products_alone=linear.ALONE,
            numbers_alone=threads.SMALL,
            threads=self._threads,
        )

    def takes(self, num_tokens: int, plan: Plan, pages: torch.Tensor) -> bool:
        """Whether `__call__` serves a step of so many tokens, with pages (P, Hkv, page, D) of such a kind."""
        return (
            0 < num_tokens <= MOST_TOKENS
            and plan.page_table is not None
            and plan.block_mask is None
            and (pages.dtype == self._dtype or pages.dtype in QUANTISED)
            and pages.shape[1] == self._kv_heads
            and pages.shape[3] == self._dim
            and torch.get_num_threads() == self._threads  # how the products are cut depends on it
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: Plan,
        rows: torch.Tensor,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
        kv_scales: Sequence[KvScales] | None = None,
    ) -> torch.Tensor:
        """x (N, H), cos and sin (N, D), `rows` from `rlhf.kernels.kv.kv_rows`, pages (P, Hkv, page, D) and their scales for
        each layer, as `check_pages` and `check_slots` have seen them. Writes keys and values to the pages and adds to x in
        place; returns what the last layer's MLP adds to it next, (N, H), until the next call."""
        tokens, dim = len(x), self._dim
        if not cos.shape == sin.shape == (tokens, dim) or x.shape[1] != self._call.hidden:
            shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
            raise ValueError(f"{shapes} for layers of {self._call.hidden} numbers a token and {dim} a head")
        if any(t.dtype != self._dtype or not (t.is_cpu and t.is_contiguous()) for t in (x, cos, sin)):
            raise ValueError(
                f"x {x.dtype}, cos {cos.dtype} and sin {sin.dtype} must be {self._dtype}, on the CPU and without gaps"
            )
        alike = rows.dtype == torch.int64 and rows.is_contiguous() and rows.is_cpu
        if (
            not alike
            or rows.shape != (tokens * self._kv_heads,)
            or plan.num_tokens + plan.num_repeats != tokens
        ):
            raise ValueError(
                f"{tokens} tokens, rows {tuple(rows.shape)} {rows.dtype} for {self._kv_heads} heads of keys, and a plan of "
                f"{plan.num_tokens} and {plan.num_repeats} repeats"
            )
        self._note_pages(k_pages, v_pages, kv_scales)
        check_paged(plan, k_pages[0])
        _check_rows(rows, k_pages[0])
        attention = of_plan(plan, k_pages[0], self._heads, dim)
        call, stored = self._call, k_pages[0].dtype
        call.attention = ctypes.addressof(attention)
        call.x, call.cos, call.sin, call.rows = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows.data_ptr()
        call.tokens, call.repeats = tokens, plan.num_repeats
        if stored in QUANTISED:
            call.most, call.inverse = QUANTISED[stored], inverse_of(stored)
        took("decoder layers", NATIVE)
        native.function("decoder", "run_layers")(ctypes.addressof(call))
        return self._room["change"][:tokens]

    def _note_pages(
        self,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
        kv_scales: Sequence[KvScales] | None,
    ) -> None:
        given = [*k_pages, *v_pages, *(s for pair in kv_scales or () for s in pair)]
        if self._pages is not None and self._pages.hold(given):
            return
        self._check_pages(k_pages, v_pages, kv_scales)
        self._pages = Noted(given, written=False)
        for i, layer in enumerate(self._layers):
            layer.k_pages, layer.v_pages = k_pages[i].data_ptr(), v_pages[i].data_ptr()
            k, v = (None, None) if kv_scales is None else kv_scales[i]
            layer.k_scales, layer.v_scales = native.address(k), native.address(v)

    def _check_pages(
        self,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
        kv_scales: Sequence[KvScales] | None,
    ) -> None:
        count = len(self._layers)
        if {len(x) for x in (k_pages, v_pages, kv_scales) if x is not None} != {count}:
            raise ValueError(
                f"pages of {len(k_pages)} and {len(v_pages)} layers, and their scales if any, must be of {count}"
            )
        first = k_pages[0]
        for i, (k, v) in enumerate(zip(k_pages, v_pages, strict=True)):
            check_pages(k, v, None if kv_scales is None else kv_scales[i])
            alike = k.shape == v.shape == first.shape and k.dtype == first.dtype and k.is_cpu
            if not alike or k.shape[1] != self._kv_heads or k.shape[3] != self._dim:
                raise ValueError(
                    f"layer {i}: k_pages {tuple(k.shape)} {k.dtype} and v_pages {tuple(v.shape)} beside {tuple(first.shape)} "
                    f"{first.dtype}; they must be alike in all layers, with {self._kv_heads} heads of {self._dim}"
                )


def _check_rows(rows: torch.Tensor, pages: torch.Tensor) -> None:
    numbers = rows.numpy()
    if not 0 <= numbers.min() <= numbers.max() < pages.shape[0] * pages.shape[1] * pages.shape[2]:
        raise ValueError(
            f"rows from {numbers.min()} to {numbers.max()} for pages {tuple(pages.shape)}: beyond them"
        )


def build(layers: Sequence[LayerWeights], heads: int, kv_heads: int, dim: int) -> Layers | None:
    """`Layers` of them; None where one needs what C++ has not: fp32 or bf16, sizes that are multiples of 16, packs that lie
    as linear.cpp reads them."""
    if any(native.library(file) is None for file in (*_OPERATIONS.values(), "decoder")):
        return None
    if dim not in NATIVE_DIMS or heads % kv_heads or heads // kv_heads > MOST_GROUP:
        return None
    first = layers[0].input_norm
    if not all(_fits(x, len(first), heads, kv_heads, dim) and _is_served(x, first.dtype) for x in layers):
        return None
    return Layers(layers, heads, kv_heads, dim)


def _fits(layer: LayerWeights, hidden: int, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether all sizes are those that `Layers` has room for."""
    inner = layer.down[0].shape[1]
    products = (
        (layer.qkv, ((heads + 2 * kv_heads) * dim, hidden)),
        (layer.out, (hidden, heads * dim)),
        (layer.gate_up, (2 * inner, hidden)),
        (layer.down, (hidden, inner)),
    )
    return (
        layer.input_norm.shape == layer.post_norm.shape == (hidden,)
        and (layer.head_norms is None or layer.head_norms.shape == (heads + kv_heads, dim))
        and all(tuple(weight.shape) == shape for (weight, _), shape in products)
        and all(bias is None or bias.shape == shape[:1] for (_, bias), shape in products)
    )


def _is_served(layer: LayerWeights, dtype: torch.dtype) -> bool:
    norms = [n for n in (layer.input_norm, layer.post_norm, layer.head_norms) if n is not None]
    products = (layer.qkv, layer.out, layer.gate_up, layer.down)
    biases = [bias for _, bias in products if bias is not None]
    return (
        all(native.serves("norm", t.shape[-1], t) and t.is_contiguous() for t in (*norms, *biases))
        and all(t.dtype == dtype for t in (*norms, *biases))
        and all(_is_product(weight, dtype) for weight, _ in products)
    )


def _is_product(weight: Weight, dtype: torch.dtype) -> bool:
    if weight.shape[0] % _VECTOR or weight.shape[1] % _VECTOR:
        return False
    if isinstance(weight, QuantizedWeight):
        return weight.blocked
    return weight.dtype == dtype and linear.native_form(weight) is not None


# -- as decoder.cpp has them -----------------------------------------------------------------------------------------------


class _Operations(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _OPERATIONS]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "group", "bits")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "head_norms")),
        *((name, ctypes.c_void_p) for name in ("k_pages", "v_pages", "k_scales", "v_scales")),
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "head_eps", "scale")),
    ]


class _LayersCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("operations", "layers", "attention", "cos", "sin", "rows", "x", "change")),
        *((name, ctypes.c_void_p) for name in ("normed", "projected", "rotated", "attended", "gate_up", "gated")),
        *((name, ctypes.c_void_p) for name in ("query", "out")),
        *((name, ctypes.c_int64) for name in ("count", "tokens", "repeats", "hidden", "is_bf16", "activation")),
        *((name, ctypes.c_int64) for name in ("products_alone", "numbers_alone", "threads")),
        *((name, ctypes.c_float) for name in ("most", "inverse")),
    ]  # fmt: skip


def _layer(layer: LayerWeights) -> _Layer:
    return _Layer(
        **{name: native.address(getattr(layer, name)) for name in ("input_norm", "post_norm", "head_norms")},
        **{name: _product(*getattr(layer, name)) for name in ("qkv", "out", "gate_up", "down")},
        window=layer.window or 0,
        input_eps=layer.eps[0],
        post_eps=layer.eps[1],
        head_eps=layer.eps[2],
        scale=layer.scale,
    )


def _product(weight: Weight, bias: torch.Tensor | None) -> _Product:
    about: dict[str, Any]
    if isinstance(weight, QuantizedWeight):
        about = {"weights": weight.values.data_ptr(), "scales": weight.scales.data_ptr()}
        about |= {"group": weight.group, "bits": weight.bits}
    else:
        form = linear.native_form(weight)
        assert form is not None, "`build` asked before"
        about = {"weights": form[0], "group": form[1]}
    return _Product(outputs=weight.shape[0], inputs=weight.shape[1], bias=native.address(bias), **about)
