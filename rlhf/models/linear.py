"""Linears whose rows do not depend on the number of rows, inside a Hugging Face model.

Here: the module, which keeps a packed copy of its weight, and dropping the copies when weights change. Not here: the
product (`rlhf.kernels.linear`), and which modules become it (`rlhf.models.swap`). On CUDA nothing is packed: the product
there reads the weight as it lies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rlhf.kernels.linear import PackedWeight, linear, pack


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
