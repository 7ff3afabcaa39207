"""Layers whose weights stay in host memory and are on the device only while the layer runs.

A model that is too large for its GPU runs with some of its layers so: two buffers of one layer each lie on the device, and
while a layer runs from one of them, the next such layer's weights are copied into the other by a stream of their own. What a
pass costs more is what copying takes longer than the layers between. Parameters lie in host memory at rest, where they may be read and
written; the numbers are those of a model that is on the device as a whole. Not here: training, and the engine's own forward
(`rlhf.models.fused`), which enters a layer as its hooks here do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.linear import InvariantLinear, lay_together

_LEAST = 3  # layers, of which two are in the buffers


def offload_layers(model: PreTrainedModel, count: int, device: torch.device | str) -> None:
    """Bring a frozen model to the device without the weights of `count` layers' linears, which go to pinned host memory; the layers
    lie evenly among the others, so that each copy has as many to hide behind. Call it once, on a model that `load_model`
    brought to the CPU. On the CPU as the device it saves nothing and costs the copies.

    Raises ValueError for a model that is trained, one without a list of layers, and a count that saves nothing or is too large.
    """
    device = torch.device(device)
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"offload_layers={count}: {type(model).__name__} has no list of layers; use 0, or weights of fewer bits"
        )
    if not _LEAST <= count <= len(layers):
        raise ValueError(
            f"offload_layers={count} is outside {_LEAST}..{len(layers)}: the model has {len(layers)} layers, and the buffers on "
            "the device are as large as two"
        )
    if any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"offload_layers={count}: the model is trained; its backward needs weights that have gone"
        )
    chosen = [(i + 1) * len(layers) // count - 1 for i in range(count)]
    host = HostLayers([layers[i] for i in chosen], device)
    if device.type == "cuda":
        for i in sorted(set(range(len(layers))) - set(chosen)):
            lay_together(layers[i], device)
    _bring_others(model, host, device)


class HostLayers:
    """Some layers of a model, in the order in which they run."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers = [_HostLayer(layer, pinned=device.type == "cuda") for layer in layers]
        dtypes = {layer.memory.dtype for layer in self._layers}
        if len(dtypes) > 1:
            raise ValueError(f"layers of {sorted(map(str, dtypes))}; those that are offloaded need one dtype")
        size = max(layer.memory.numel() for layer in self._layers)
        dtype = dtypes.pop()
        self.buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._held: list[tuple[int, tuple[int, ...]] | None] = [
            None,
            None,
        ]  # a layer and its state, by buffer
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_there, self._is_free = (
            [torch.cuda.Event() for _ in self.buffers] if self._copying is not None else [] for _ in range(2)
        )
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(Arrival(self, i))
            layer.register_forward_hook(Departure(self, i), always_call=True)

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Those in host memory."""
        return {linear.weight for layer in self._layers for linear in layer.linears}

    @contextmanager
    def present(self, index: int) -> Iterator[None]:
        """Within it, the layer's weights are on the device."""
        self.arrive(index)
        try:
            yield
        finally:
            self.depart(index)

    def arrive(self, index: int) -> None:
        """Let the layer's weights be on the device, and those of the next one come."""
        wanted = (index, self._layers[index].state)
        if wanted not in self._held:  # the first of all, or one that was written meanwhile
            self._copy(index, 0)
        at = self._held.index(wanted)
        if self._copying is not None:
            torch.cuda.current_stream(self.buffers[at].device).wait_event(self._is_there[at])
        following = (index + 1) % len(self._layers)
        if (following, self._layers[following].state) not in self._held:
            self._copy(following, 1 - at)
        self._layers[index].lie_in(self.buffers[at])

    def depart(self, index: int) -> None:
        """The layer has run, or failed; its parameters are those in host memory again."""
        layer = self._layers[index]
        layer.lie_in(layer.memory)
        held = [i for i, held in enumerate(self._held) if held is not None and held[0] == index]
        if self._copying is not None:
            for at in held:
                self._is_free[at].record(torch.cuda.current_stream(self.buffers[at].device))

    def forget(self) -> None:
        """What is in the buffers is stale: after writes that leave no trace."""
        self._held = [None, None]

    def _copy(self, index: int, at: int) -> None:
        layer = self._layers[index]
        self._held[at] = (index, layer.state)
        target = self.buffers[at][: layer.memory.numel()]
        if self._copying is None:
            target.copy_(layer.memory)
            return
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._is_free[at])
            target.copy_(layer.memory, non_blocking=True)
            self._is_there[at].record(self._copying)


class _HostLayer:
    """One layer's linears, whose weights lie one after another in one piece of host memory."""

    def __init__(self, layer: nn.Module, *, pinned: bool) -> None:
        self.linears = [m for m in layer.modules() if type(m) is InvariantLinear]
        dtypes = {m.weight.dtype for m in self.linears}
        if len(dtypes) != 1:
            raise ValueError(
                f"a layer with plain linears of {sorted(map(str, dtypes)) or 'no'} dtypes; one that is offloaded needs one"
            )
        size = sum(m.weight.numel() for m in self.linears)
        self.memory = torch.empty(size, dtype=dtypes.pop(), pin_memory=pinned)
        torch.cat([m.weight.detach().flatten().cpu() for m in self.linears], out=self.memory)
        self.lie_in(self.memory)

    @property
    def state(self) -> tuple[int, ...]:
        """Another one after every write that can be seen."""
        return tuple(m.weight._version for m in self.linears)

    def lie_in(self, memory: torch.Tensor) -> None:
        """Let the parameters be views of `memory`, which holds their values or will before they are read."""
        start = 0
        for linear in self.linears:
            size = linear.weight.numel()
            linear.weight.data = memory[start : start + size].view(linear.weight.shape)
            linear._packed.clear()
            start += size


class Arrival:
    """Before a layer's forward."""

    def __init__(self, host: HostLayers, index: int) -> None:
        self.host, self.index = host, index

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.host.arrive(self.index)


class Departure:
    """After it."""

    def __init__(self, host: HostLayers, index: int) -> None:
        self._host, self._index = host, index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._host.depart(self._index)


def home_of(layer: nn.Module) -> Arrival | None:
    """Where an offloaded layer's weights come from; None for every other."""
    return next((hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, Arrival)), None)


def _bring_others(model: nn.Module, host: HostLayers, device: torch.device) -> None:
    """All parameters and buffers to the device but those of `host`."""
    stay = host.parameters
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in stay:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
