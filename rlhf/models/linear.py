"""Linears whose rows do not depend on the number of rows, inside a Hugging Face model.

Here: the module, which keeps a packed copy of its weight, and dropping the copies when weights change. On CUDA nothing is
packed: the product there reads the weight as it lies, and weights of one input are laid so that one product reads them all.
Not here: the product (`rlhf.kernels.linear`), and which modules become it (`rlhf.models.swap`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rlhf.kernels.linear import PackedWeight, linear, pack

_OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class InvariantLinear(nn.Linear):
    """`nn.Linear` whose rows do not depend on the number of rows. Made by `swap_modules`, never
    directly.
    """

    _packed: PackedWeight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias, self.packed_weight())

    def packed_weight(self) -> torch.Tensor | None:
        """The pack of the weight as it is now; None where there is no kernel for it."""
        weight = self.weight
        if "ds_id" in weight.__dict__:  # ZeRO-3: the weight is whole during this forward only
            return pack(weight)
        return self._packed.update(weight)


def weights_changed(model: nn.Module) -> None:
    """Drop every packed copy. Call it after an optimiser step, a load or any other write to the weights:
    writes through `.data` cannot be seen from here."""
    for module in model.modules():
        if isinstance(module, InvariantLinear):
            module._packed.clear()


@torch.no_grad()
def lay_together(model: nn.Module, device: torch.device | str) -> None:
    """Bring the model's linears that read one input to the device, each such family's weights one after another in one piece
    of memory of which they are views: the engine multiplies them as one without a copy (`rlhf.models.fused`). Whoever moves
    them later is free to: ZeRO's flat buffers keep their order, since the optimiser's groups have matrices by themselves; a
    deepcopy takes them apart, after which the engine multiplies by a joined copy. torch.save of one weight writes its family
    with it. What else the model has stays where it is."""
    for module in model.modules():
        for names in _OF_ONE_INPUT:
            linears = [module._modules.get(name) for name in names]
            if not all(isinstance(m, InvariantLinear) for m in linears):
                continue
            weights = [m.weight for m in linears]
            if len({(w.dtype, w.shape[1:], w.device) for w in weights}) > 1 or len(set(weights)) < len(
                weights
            ):
                continue
            joined = torch.cat(weights).to(device)
            for linear_, part in zip(linears, joined.split([len(w) for w in weights]), strict=True):
                linear_.weight.data = part
                linear_._packed.clear()
