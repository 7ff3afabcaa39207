"""The attention that every model is run with, registered in transformers as "rlhf".

Here: the bridge between a Hugging Face attention layer and `rlhf.kernels.attention`. Which sequences a
forward holds is said by a context around it: `packed_attention` (training, scoring; differentiable) or
`paged_attention` (the engine). Without a context the layer is ordinary attention with transformers' own
masks, so that padded batches and `model.generate` work. Not here: the arithmetic, and where pages come from.

One forward runs at a time in a process; the current context is a module variable, not a thread-local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.kernels.attention import Plan, attend_packed, attend_paged
from rlhf.kernels.decoder import Layers
from rlhf.kernels.kv import (
    KvScales,
    check_pages,
    check_slots,
    kv_rows,
    norm_rotate_write,
    write_rows,
    writes_in_one_pass,
)

NAME = "rlhf"


class Packed(Protocol):
    """What `packed_attention` reads: `rlhf.batching.PackedSequences` has it."""

    cu_seqlens: torch.Tensor  # (S+1,) int, where the sequences' tokens begin and end


class SharedPacked(Packed, Protocol):
    """A pack in which sequences go on from one before them."""

    prefix_starts: (
        torch.Tensor | None
    )  # (S,) int, the place of the first token of what a sequence goes on from
    prefix_lens: torch.Tensor | None  # (S,) int, how many tokens that is; 0: nothing


class StepContext(Protocol):
    """How the attention of a forward is done; `PackedContext` and `PagedContext` are."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """q (N, Hq, D), k and v (N, Hkv, D) -> (N, Hq, Dv); options as `rlhf.kernels.attention` takes them."""
        ...


@dataclass
class PackedContext:
    """One packed batch; its plan is shared by all layers."""

    plan: Plan

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        return attend_packed(q, k, v, self.plan, **options)


@dataclass
class PagedContext:
    """One step of the engine: N new tokens of S sequences, and the pages of every layer. Used for one
    forward.

    The new tokens' keys and values are written by each layer before it attends. Where N' > N, the last token
    is there N' - N times more, to fill a bucket of rows (`rlhf.kernels.linear.row_bucket`).
    """

    k_pages: Sequence[torch.Tensor]  # per layer (P, Hkv, page, D), allocated with zeros
    v_pages: Sequence[torch.Tensor]  # per layer (P, Hkv, page, Dv)
    slots: torch.Tensor  # (N',) int64, page * page_tokens + place of each new token
    page_table: np.ndarray | torch.Tensor  # (S, max pages) int, pages of each sequence in order
    context_lens: np.ndarray | torch.Tensor | Sequence[int]  # (S,) positions, new tokens included
    query_starts: np.ndarray | torch.Tensor | Sequence[int]  # (S+1,), where each sequence's new tokens begin
    kv_scales: Sequence[KvScales] | None = None  # per layer, of int8 and fp8 pages
    made_plan: Plan | None = None  # a plan of what the three before it say, if there is one
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        starts = self.query_starts
        starts = starts.cpu().numpy() if isinstance(starts, torch.Tensor) else np.asarray(starts)
        check_pages(self.k_pages[0], self.v_pages[0], self._scales(0))
        _, heads, page_tokens, _ = self.k_pages[0].shape
        self.plan = self.made_plan or Plan(
            np.diff(starts),
            self.context_lens,
            page_table=self.page_table,
            page_tokens=page_tokens,
            num_repeats=len(self.slots) - int(starts[-1]),
            device=self.slots.device,
        )
        if self.slots.device.type == "cpu":  # elsewhere it would wait for the device
            check_slots(self.slots, self.k_pages[0])
        self._rows = {heads: kv_rows(self.slots, heads, page_tokens)}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        k_pages, v_pages, scales = self.k_pages[layer], self.v_pages[layer], self._scales(layer)
        write_rows(k_pages, v_pages, k, v, self._rows_of(k.shape[1]), kv_scales=scales)
        return attend_paged(q, k_pages, v_pages, self.plan, kv_scales=scales, **options)

    def takes_heads(
        self, layer: int, q: torch.Tensor, cos: torch.Tensor, norm_weights: torch.Tensor | None
    ) -> bool:
        """Whether `attend_heads` serves the layer."""
        return writes_in_one_pass(q, self.k_pages[layer], cos, norm_weights)

    def attend_heads(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm_weights: torch.Tensor | None,
        eps: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """`attend` of heads that are still to be normed, where there are weights, and rotated: in one kernel with the writing
        of k and v. Shapes as `rlhf.kernels.kv.norm_rotate_write` has them."""
        k_pages, v_pages, scales = self.k_pages[layer], self.v_pages[layer], self._scales(layer)
        rows, angles = self._rows_of(k.shape[1]), {"cos": cos, "sin": sin}
        norm = {"norm_weights": norm_weights, "eps": eps}
        q = norm_rotate_write(q, k, v, k_pages, v_pages, rows, kv_scales=scales, **angles, **norm)
        return attend_paged(q, k_pages, v_pages, self.plan, kv_scales=scales, **options)

    def run(
        self, layers: Layers, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor | None:
        """All layers at once, as `Layers` has it; None where it does not serve the step."""
        pages = self.k_pages[0]
        if not layers.takes(len(x), self.plan, pages):
            return None
        rows = self._rows_of(pages.shape[1])
        return layers(x, cos, sin, self.plan, rows, self.k_pages, self.v_pages, self.kv_scales)

    def _scales(self, layer: int) -> KvScales | None:
        return None if self.kv_scales is None else self.kv_scales[layer]

    def forget_rows(self) -> None:
        """Before another run, for slots that were written anew."""
        self._rows.clear()

    def _rows_of(self, heads: int) -> torch.Tensor:
        if heads not in self._rows:
            self._rows[heads] = kv_rows(self.slots, heads, self.k_pages[0].shape[2])
        return self._rows[heads]


_current: StepContext | None = None


@contextmanager
def use_context(context: StepContext | None) -> Iterator[None]:
    """Within it, the attention of a forward is the context's; None: ordinary attention."""
    global _current
    before, _current = _current, context
    try:
        yield
    finally:
        _current = before


def packed_attention(packed: Packed | SharedPacked) -> AbstractContextManager[None]:
    """Within it, a forward's input_ids (1, N) are the sequences of `packed` one after another."""
    lens, device = np.diff(packed.cu_seqlens.cpu().numpy()), packed.cu_seqlens.device
    starts = getattr(packed, "prefix_starts", None)
    if starts is None:
        return use_context(PackedContext(Plan(lens, lens, device=device)))
    contexts = lens + packed.prefix_lens.cpu().numpy()
    return use_context(PackedContext(Plan(lens, contexts, prefix_starts=starts, device=device)))


def paged_attention(context: PagedContext) -> AbstractContextManager[None]:
    """Within it, a forward's input_ids (1, N') are the new tokens of `context`. Use it under
    `torch.no_grad()`.
    """
    return use_context(context)


def in_context() -> bool:
    """Whether the forward that runs now is a packed or paged one."""
    return _current is not None


def kv_shapes(model: torch.nn.Module) -> list[tuple[int, int, int]]:
    """(Hkv, D, Dv) of every layer, as one token shows them: configurations say it in too many ways."""
    shapes = _shown(model).of_layer
    return [shapes[layer] for layer in range(len(shapes))]


def widest_window(model: torch.nn.Module) -> int | None:
    """The most positions that a query sees in any layer, itself included, as one token shows it; None: all of them, in one
    layer at least."""
    windows = _shown(model).windows.values()
    return None if None in windows else max(windows, default=None)


def _shown(model: torch.nn.Module) -> _Shapes:
    shapes = _Shapes()
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad(), use_context(shapes):
        model(input_ids=token, position_ids=token, use_cache=False)
    return shapes


class _Shapes:
    def __init__(self) -> None:
        self.of_layer: dict[int, tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        self.of_layer[layer] = (k.shape[1], k.shape[2], v.shape[2])
        self.windows[layer] = options["window"]
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Recompute activations in the backward, under the context that the forward had."""
    older = model.gradient_checkpointing_enable  # its name until transformers 5.23, deprecated since
    enable = getattr(model, "activation_checkpointing_enable", older)
    enable({"use_reentrant": False, "context_fn": _same_context})


def _same_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), use_context(_current)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, Hq, T, D), key and value (B, Hkv, T, D) -> (B, T, Hq,
    D).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _current is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
            )
        return _plain(query, key, value, attention_mask, scale, softcap, s_aux), None
    if query.shape[0] != 1:
        raise ValueError(f"a packed or paged forward has batch size 1, not {query.shape[0]}")
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported; load models with rlhf.models.load_model"
        )
    options = {"scale": scale, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _current.attend(module.layer_idx, q, k, v, options)[None], None


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-capped scores or sinks, which torch's own does not know. (B, Hq, T, D) -> (B, T,
    Hq, D).
    """
    batch, heads, num_queries, dim = query.shape
    grouped = query.view(batch, key.shape[1], -1, num_queries, dim).float()
    scores = grouped @ key[:, :, None].float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = mask.tril(scores.shape[-1] - num_queries)
    else:
        mask = mask[:, :, None]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        probs = scores.softmax(-1)
    else:
        extra = sinks.view(1, key.shape[1], -1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    out = probs @ value[:, :, None].float()
    return out.flatten(1, 2).transpose(1, 2).to(query.dtype)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **kwargs) if _current is None else None


def _register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


_register(_attention, _mask)
