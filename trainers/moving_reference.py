"""A reference that follows the actor: reference <- mix * actor + (1 - mix) * reference (TR-DPO, arXiv 2404.09656).

The average is kept in fp32 on the host and rounded into the model that scores: in bfloat16 a share below 1/256 of the way
would be rounded off in every update, and the reference would never move. It is one of whole weights, LoRA merged: the
average of two products B A is not the product of the averages. Not here: how the actor's weights get to this process
(`rlhf.trainers.weights`), and when (`rlhf.trainers.stage`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from rlhf.models.linear import weights_changed
from rlhf.trainers.weights import WeightSink


class MovingReference:
    """The average behind `model`, which is plain, frozen, and starts it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._average = {
            name: p.detach().to("cpu", torch.float32, copy=True) for name, p in model.named_parameters()
        }
        self._landing: dict[str, torch.Tensor] = {}

    def land(self) -> WeightSink:
        """Where a publish may put another process's weights, in fp32, for the next `mix_landed`."""
        self._landing = {name: torch.empty_like(average) for name, average in self._average.items()}
        return WeightSink(self._landing)

    def mix_landed(self, mix: float) -> None:
        """Move towards what was published, and let it go."""
        self.mix(self._landing.items(), mix)
        self._landing = {}

    @torch.no_grad()
    def mix(self, named_weights: Iterable[tuple[str, torch.Tensor]], mix: float) -> None:
        """Move by the share `mix` of the way to these weights, which must be all of the model's."""
        missing = set(self._average)
        for name, weight in named_weights:
            self._average[name].lerp_(weight.detach().to("cpu", torch.float32), mix)
            missing.discard(name)
        assert not missing, f"the actor has no weight {sorted(missing)[0]!r}, which its reference has"
        self._round()

    @property
    def state_bytes(self) -> int:
        return 4 * sum(average.numel() for average in self._average.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average by parameter name, fp32 on the host, live."""
        return self._average

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave. Raises KeyError for that of another model."""
        for name, average in self._average.items():
            average.copy_(tensors[name])
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for name, p in self._model.named_parameters():
            p.copy_(self._average[name].to(p.dtype))
        weights_changed(self._model)
