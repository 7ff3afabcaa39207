"""A step of the engine through the live model, with fewer and larger operations than its modules make.

Here: `StepForward`, the logits of a step's tokens. Where the model is a decoder of the Llama kind (Llama, Mistral,
Qwen2, Qwen3 and what else is built like them) it runs their modules' arithmetic itself: one product for q, k and
v, one for gate and up, q and k normed and rotated together, no masks, caches or output objects. The parameters
stay the modules' own; linears that are not plain (adapters) are called as they are. It is used only where it gave
the bits of the model's own forward when it was built, layer by layer and with all layers in one call; every other model runs as transformers wrote it. Its layers'
linears can run from copies of 8 or 4 bits, made when the weights have changed (embeddings and head stay whole). Not here:
training and scoring, which always go through the modules; attention (`rlhf.models.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.kernels.activation import swiglu
from rlhf.kernels.attention import Plan
from rlhf.kernels.decoder import MOST_TOKENS, Layers, LayerWeights, Weight, build
from rlhf.kernels.layout import Noted
from rlhf.kernels.linear import can_join, joined_linear, one_below_another, pack, packed_linear
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.quantized import QuantizedWeight, can_quantize, quantize, quantized_linear
from rlhf.kernels.rotary import rotate_
from rlhf.models.adapters import AdapterRows, add_changes
from rlhf.models.attention import PackedContext, PagedContext, StepContext, use_context
from rlhf.models.linear import InvariantLinear
from rlhf.models.offload import Arrival, Departure, home_of
from rlhf.models.parallel import ExchangedLinear, SplitEmbedding, SplitLinear, whole_outputs
from rlhf.models.swap import FastRMSNorm, GatedMLP
from rlhf.models.value_head import NAME as VALUE_HEAD

_PAGE = 16  # of the trial in pages
_TRIAL_TOKENS = (1, 7, 40, 300)  # lengths of the sequences that the two forwards are compared on
_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class StepForward:
    """Logits of packed tokens under a context of `rlhf.models.attention`; the model is read, never changed."""

    def __init__(self, model: nn.Module, bits: int | None = None) -> None:
        """`bits` 8 or 4: of the layers' weights. Raises ValueError where the model's cannot have so few."""
        self._model = model
        self._decoder = _decoder(model)
        if bits is not None and (self._decoder is None or not self._decoder.quantize(bits)):
            raise ValueError(
                f"weights of {bits} bits: the model is not a decoder of Llama's kind with plain linears (adapters are not) that are "
                "on the device, for 4 bits of sizes that are multiples of 64; "
                "set rollout.weights: auto"
            )
        self.refresh()

    @property
    def is_fused(self) -> bool:
        return self._use_decoder

    @property
    def adapted(self) -> dict[str, nn.Linear]:
        """Linears that an adapter may change for some rows only, by their path; none where the model's own forward runs."""
        if self._decoder is None:
            return {}
        joined = [j for layer in self._decoder.layers for j in layer.joined]
        found = {path: m for j in joined for (path, _), m in zip(j.paths, j.linears, strict=True)}
        return found if all(isinstance(m, InvariantLinear) for m in found.values()) else {}

    @property
    def brings_weights(self) -> bool:
        """Whether weights of some layers come to the device as these run (`rlhf.models.offload`): no two passes read them at the
        same addresses."""
        return any(home_of(module) is not None for module in self._model.modules())

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the weights that a forward reads, joined ones among them: while they stay, a CUDA graph of one may be run again."""
        own = [x.data_ptr() for x in (*self._model.parameters(), *self._model.buffers())]
        made = [] if self._decoder is None else [x.data_ptr() for x in self._decoder.made]
        return (*own, *made)

    def refresh(self) -> None:
        """Take note of weights that were written in the open, and of hooks. Call it before a series of steps."""
        self._use_decoder = self._decoder is not None and _is_plain(self._model)
        if self._use_decoder:
            self._decoder.refresh()

    def forget(self) -> None:
        """Drop the joined weights: after writes that leave no trace, and to give the memory back. Until the next
        `refresh` the model's own forward runs."""
        self._use_decoder = False
        if self._decoder is not None:
            self._decoder.drop_packs()

    @torch.no_grad()
    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: StepContext,
        keep: torch.Tensor | None = None,
        adapters: AdapterRows = (),
    ) -> torch.Tensor:
        """token_ids, positions (N,) int64 -> logits (N, V), or those of the tokens in `keep` (L,)."""
        if self._use_decoder:
            return self._decoder(token_ids, positions, context, keep, adapters)
        if adapters:
            raise RuntimeError(
                "the model got hooks or other parameters while requests with adapters were in work"
            )
        return _own_forward(self._model, token_ids, positions, context, keep)


def _own_forward(
    model: nn.Module,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    context: StepContext,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    with use_context(context):
        output = model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            logits_to_keep=0 if keep is None else keep,  # 0: all
            use_cache=False,
        )
    return output.logits[0]


# -- the decoder -------------------------------------------------------------------------------------------------


class _Decoder:
    """The arithmetic of Llama's modules over a step's tokens, one row each."""

    def __init__(self, model: PreTrainedModel, options: Sequence[dict[str, Any]]) -> None:
        decoder = model.model
        self.embed_tokens, self.rotary, self.norm, self.head = (
            decoder.embed_tokens,
            decoder.rotary_emb,
            decoder.norm,
            model.lm_head,
        )
        self.layers = [
            _Layer(i, layer, o) for i, (layer, o) in enumerate(zip(decoder.layers, options, strict=True))
        ]
        self.native: Layers | None = None  # all of them in one call, for few tokens
        self.can_run_at_once = True
        self._noted: Noted | None = None  # the weights that `refresh` saw
        self._threads = 0

    def refresh(self) -> None:
        weights = [p for layer in self.layers for m in layer.modules for p in m.parameters()]
        threads = torch.get_num_threads()
        if self._noted is not None and self._threads == threads and self._noted.hold(weights):
            return
        for layer in self.layers:
            layer.refresh()
        self.native = self._native() if self.can_run_at_once else None
        self._noted, self._threads = Noted(weights, written=True), threads

    def drop_packs(self) -> None:
        self.native = self._noted = None
        for layer in self.layers:
            layer.drop_packs()

    @property
    def made(self) -> list[torch.Tensor]:
        """What `refresh` made of the weights."""
        of_layers = [
            x
            for layer in self.layers
            for x in (layer.head_weights, *(t for j in layer.joined for t in j.made))
        ]
        return [x for x in of_layers if x is not None]

    def quantize(self, bits: int) -> bool:
        """From the next `refresh` on the layers' linears have so many bits; False where one cannot."""
        return all([layer.quantize(bits) for layer in self.layers])

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: StepContext,
        keep: torch.Tensor | None = None,
        adapters: AdapterRows = (),
    ) -> torch.Tensor:
        x = self.embed_tokens(token_ids)  # (N, H), from here on written in place
        cos, sin = (a[0] for a in self.rotary(x[None], positions[None]))  # (N, D)
        change = None  # what is added to x next, by the norm that reads the sum
        if self.native is not None and isinstance(context, PagedContext) and not adapters:
            change = context.run(self.native, x, cos, sin)
        if change is None:
            for layer in self.layers:
                run = layer if layer.home is None else layer.from_host
                change = run(x, change, cos, sin, context, adapters)
        if keep is not None:
            x, change = x.index_select(0, keep), change.index_select(0, keep)
        return self.head(_normed(x, self.norm, change))

    def _native(self) -> Layers | None:
        if any(layer.home is not None for layer in self.layers):
            return None
        weights, first = [layer.weights() for layer in self.layers], self.layers[0]
        shapes = {(layer.heads, layer.kv_heads, layer.head_dim) for layer in self.layers}
        if len(shapes) > 1 or any(w is None for w in weights):
            return None
        return build([w for w in weights if w is not None], first.heads, first.kv_heads, first.head_dim)


class _Layer:
    """One decoder layer; heads of q, k and v lie side by side in one tensor."""

    def __init__(self, index: int, layer: nn.Module, options: dict[str, Any]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.options = index, options
        self.norms: tuple[FastRMSNorm, FastRMSNorm] = (layer.input_layernorm, layer.post_attention_layernorm)
        at = f"model.layers.{index}"
        self.qkv = _Joined(
            f"{at}.self_attn", q_proj=attention.q_proj, k_proj=attention.k_proj, v_proj=attention.v_proj
        )
        self.gate_up = _Joined(f"{at}.mlp", gate_proj=mlp.gate_proj, up_proj=mlp.up_proj)
        self.o_proj = _Joined(f"{at}.self_attn", o_proj=attention.o_proj)
        self.down_proj = _Joined(f"{at}.mlp", down_proj=mlp.down_proj)
        self.joined = [self.qkv, self.gate_up, self.o_proj, self.down_proj]
        self.head_dim: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.head_norms = (attention.q_norm, attention.k_norm) if "q_norm" in attention._modules else None
        self.head_weights: torch.Tensor | None = None  # (Hq + Hkv, D), of the two norms
        self.home = home_of(layer)  # of weights that are on the device only while it runs

    @property
    def modules(self) -> list[nn.Module]:
        """Those with weights."""
        return [*self.norms, *(self.head_norms or ()), *(m for joined in self.joined for m in joined.linears)]

    def quantize(self, bits: int) -> bool:
        if self.home is not None:
            return False
        for joined in self.joined:
            joined.bits = bits
        return all(joined.can_join() for joined in self.joined)

    def refresh(self) -> None:
        if self.home is None:
            self._join()
        if self.head_norms is not None:
            q, k = (norm.weight.detach() for norm in self.head_norms)
            self.head_weights = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])

    def drop_packs(self) -> None:
        for joined in self.joined:
            joined.drop_pack()
        if self.home is not None:
            self.home.host.forget()

    def from_host(self, *args: Any) -> torch.Tensor:
        """`__call__`, while the weights are on the device."""
        assert self.home is not None, "its weights are on the device"
        with self.home.host.present(self.home.index):
            self._join()
            try:
                return self(*args)
            finally:
                for joined in self.joined:
                    joined.drop_pack()

    def _join(self) -> None:
        for joined in self.joined:
            joined.refresh()

    def weights(self) -> LayerWeights | None:
        """As the kernels for few tokens take them; None where they do not."""
        if self.options["softcap"] is not None or self.options["sinks"] is not None:
            return None
        forms = {"qkv": self.qkv, "out": self.o_proj, "gate_up": self.gate_up, "down": self.down_proj}
        found = {name: form for name, joined in forms.items() if (form := joined.form()) is not None}
        if len(found) < len(forms):
            return None
        norms = [norm.weight.detach() for norm in self.norms]
        eps = [norm.variance_epsilon for norm in self.norms]
        return LayerWeights(
            input_norm=norms[0],
            post_norm=norms[1],
            head_norms=self.head_weights,
            eps=(*eps, 0.0 if self.head_norms is None else self.head_norms[0].variance_epsilon),
            scale=self.options["scale"],
            window=self.options["window"],
            **found,
        )

    def __call__(
        self,
        x: torch.Tensor,
        change: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: StepContext,
        adapters: AdapterRows = (),
    ) -> torch.Tensor:
        """x (N, H) += change, += attention; returns the MLP's change."""
        heads = self.qkv(_normed(x, self.norms[0], change), adapters).view(len(x), -1, self.head_dim)
        both = self.heads + self.kv_heads
        rotated, v = heads[:, :both], heads[:, both:]
        eps = 0.0 if self.head_norms is None else self.head_norms[0].variance_epsilon
        if isinstance(context, PagedContext) and context.takes_heads(
            self.index, heads, cos, self.head_weights
        ):
            q, k = rotated[:, : self.heads], rotated[:, self.heads :]
            out = context.attend_heads(self.index, q, k, v, cos, sin, self.head_weights, eps, self.options)
        else:
            if self.head_norms is not None:
                rotated = rms_norm(rotated, self.head_weights, eps)
            rotate_(rotated, cos, sin)
            q, k = rotated[:, : self.heads], rotated[:, self.heads :]
            out = context.attend(self.index, q, k, v, self.options)
        change = self.o_proj(out.view(len(x), -1), adapters)
        gate, up = self.gate_up(_normed(x, self.norms[1], change), adapters).chunk(2, -1)
        return self.down_proj(swiglu(gate, up), adapters)


class _Joined:
    """Linears of one input as one product: (N, in) -> (N, sum of outs). What cannot be joined runs one by one."""

    def __init__(self, at: str, **linears: nn.Module) -> None:
        """`at` is the path of the module that they are in."""
        self.linears = list(linears.values())
        self.paths = [(f"{at}.{name}", m.out_features) for name, m in linears.items()]
        self.bits: int | None = None  # 8 or 4: of a copy that is made of the weights; None: all of theirs
        self._packed: torch.Tensor | None = None  # on a CPU
        self._weight: torch.Tensor | None = None  # on a GPU; no copy of weights that `lay_together` laid
        self._quantized: QuantizedWeight | None = None
        self._bias: torch.Tensor | None = None
        self._noted: Noted | None = None  # what it was made of
        first = self.linears[0]
        self._exchanged = first if isinstance(first, ExchangedLinear) else None  # of a model that is split

    def refresh(self) -> None:
        """Join the weights again if one of them changed."""
        tensors = [t for m in self.linears for t in (m.weight, m.bias) if t is not None]
        if self._noted is not None and self._noted.hold(tensors):
            return
        self.drop_pack()
        if self.can_join():
            weight = one_below_another([m.weight for m in self.linears])
            if self.bits is not None:
                self._quantized = quantize(weight, self.bits)
            elif (packed := pack(weight)) is not None:
                self._packed = packed
            else:
                self._weight = weight
            if self.linears[0].bias is not None:
                self._bias = torch.cat([m.bias.detach() for m in self.linears])
            self._noted = Noted(tensors, written=True)

    def drop_pack(self) -> None:
        self._packed = self._weight = self._quantized = self._bias = self._noted = None

    @property
    def made(self) -> list[torch.Tensor | None]:
        few = () if self._quantized is None else (self._quantized.values, self._quantized.scales)
        return [self._weight, self._bias, *few]

    def form(self) -> tuple[Weight, torch.Tensor | None] | None:
        """The weight that the product reads on a CPU, and the bias; None where there is more to it than that."""
        if self._exchanged is not None:
            return None
        weight: Weight | None = self._quantized if self._quantized is not None else self._packed
        bias = self._bias
        if weight is None and len(self.linears) == 1 and type(self.linears[0]) is InvariantLinear:
            weight, bias = self.linears[0].packed_weight(), self.linears[0].bias
        return None if weight is None else (weight, None if bias is None else bias.detach())

    def __call__(self, x: torch.Tensor, adapters: AdapterRows = ()) -> torch.Tensor:
        if self._exchanged is not None:
            x = self._exchanged.parallel.gather(x)
        out = self._product(x)
        if adapters:
            add_changes(out, x, adapters, self.paths)
        return out if self._exchanged is None else self._exchanged.gathered(out)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._quantized is not None:
            return quantized_linear(
                x, self._quantized, self._bias, whole=sum(map(whole_outputs, self.linears))
            )
        if self._packed is not None:
            return packed_linear(x, self._packed, self._bias)
        if self._weight is not None:
            return joined_linear(x, self._weight, self._bias, whole=whole_outputs(self.linears[0]))
        outs = [m.product(x) if isinstance(m, SplitLinear) else m(x) for m in self.linears]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def can_join(self) -> bool:
        first, bits = self.linears[0], self.bits
        if bits is None and len(self.linears) == 1:
            return False  # the module has its own pack
        if not all(
            isinstance(m, InvariantLinear)
            and m.weight.dtype == first.weight.dtype
            and (m.bias is None) == (first.bias is None)
            for m in self.linears
        ):
            return False
        weights, wholes = [m.weight for m in self.linears], [whole_outputs(m) for m in self.linears]
        if bits is None:
            return can_join(weights, wholes=wholes)
        return all(can_quantize(tuple(w.shape), bits) for w in weights)


def _normed(x: torch.Tensor, norm: FastRMSNorm, change: torch.Tensor | None) -> torch.Tensor:
    """x += change, if there is one, and the norm of x."""
    if change is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    return add_rms_norm(x, change, norm.weight, norm.variance_epsilon)


# -- which models ------------------------------------------------------------------------------------------------


def _decoder(model: nn.Module) -> _Decoder | None:
    """A decoder for the model if it has the structure and its own forward's bits, else None."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)  # below peft's wrapper
    if inner is None or not _has_structure(inner) or not _is_plain(model):
        return None
    trials = [_Trial(model, n) for n in _TRIAL_TOKENS]
    if any(o["sinks"] is not None for o in trials[0].options):
        return None
    decoder = _Decoder(inner, trials[0].options)
    decoder.refresh()
    same = all(trial.passes(decoder) for trial in trials)
    decoder.can_run_at_once = same and all(trial.passes_at_once(decoder) for trial in trials)
    decoder.drop_packs()
    return decoder if same else None


def _has_structure(model: nn.Module) -> bool:
    """Whether the model consists of exactly the modules whose arithmetic `_Decoder` knows: a parameter that it
    would leave out cannot be."""
    if not _consists_of(model, _MODEL, beside={VALUE_HEAD}) or not _consists_of(model.model, _DECODER):
        return False
    decoder = model.model
    norms = [decoder.norm]
    for layer in decoder.layers:
        if not _consists_of(layer, _LAYER):
            return False
        if not _consists_of(layer.mlp, _MLP) or type(layer.mlp) is not GatedMLP:
            return False
        attention = layer.self_attn
        if _consists_of(attention, _ATTENTION | _HEAD_NORMS):
            norms += [attention.q_norm, attention.k_norm]
            if any(n.weight.shape != (attention.head_dim,) for n in norms[-2:]):
                return False
            if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
                return False
        elif not _consists_of(attention, _ATTENTION):
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    return type(decoder.embed_tokens) in (nn.Embedding, SplitEmbedding) and all(
        type(n) is FastRMSNorm for n in norms
    )


def _consists_of(module: nn.Module, children: set[str], beside: Set[str] = frozenset()) -> bool:
    """`beside` are children that take no part in its forward."""
    return set(module._modules) - beside == children and not module._parameters


def _is_plain(model: nn.Module) -> bool:
    """Whether calling the modules does nothing beside their forward (hooks, patched forwards, ZeRO-3's parameters
    that are whole only inside their module)."""
    return not any(
        any(type(hook) not in (Arrival, Departure) for hook in _hooks(m))
        or "forward" in m.__dict__
        or any("ds_id" in p.__dict__ for p in m._parameters.values() if p is not None)
        for m in model.modules()
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


class _Trial:
    """A sequence of random tokens and the model's own logits for it."""

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        limit = model.config.get_text_config().max_position_embeddings
        generator = torch.Generator().manual_seed(num_tokens)
        vocab = model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocab, (min(num_tokens, limit),), generator=generator)
        self.token_ids, self.positions = ids.to(model.device), torch.arange(len(ids), device=model.device)
        self.context = _Recorder(Plan([len(ids)], [len(ids)], device=model.device))
        with torch.no_grad():
            self._logits = _own_forward(model, self.token_ids, self.positions, self.context)

    @property
    def options(self) -> list[dict[str, Any]]:
        """Of the attention of every layer."""
        return [self.context.options[layer] for layer in sorted(self.context.options)]

    def passes(self, decoder: _Decoder) -> bool:
        with torch.no_grad():
            return torch.equal(decoder(self.token_ids, self.positions, self.context), self._logits)

    def passes_at_once(self, decoder: _Decoder) -> bool:
        """With all layers in one call, where that takes so many tokens."""
        count = len(self.token_ids)
        if decoder.native is None or count > MOST_TOKENS:
            return True
        pages, dtype = -(-count // _PAGE), self._logits.dtype
        shapes = [(pages, layer.kv_heads, _PAGE, layer.head_dim) for layer in decoder.layers]
        k, v = ([torch.zeros(shape, dtype=dtype) for shape in shapes] for _ in "kv")
        context = PagedContext(k, v, torch.arange(count), np.arange(pages)[None], [count], [0, count])
        with torch.no_grad():
            return torch.equal(decoder(self.token_ids, self.positions, context), self._logits)


class _Recorder(PackedContext):
    """Attention over the pack, which takes down how each layer asks for it."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.options: dict[int, dict[str, Any]] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        self.options[layer] = options
        return super().attend(layer, q, k, v, options)
