"""Where one process stands in its group. No torch here: a launcher describes processes before any has loaded
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a group. Written by the launcher, read by everything that talks to the group's other
    processes."""

    group: str  # the group's name in the recipe's placement
    rank: int  # 0 .. world_size - 1 within the group
    world_size: int  # processes of the group
    local_rank: int  # index of this process's device among the devices that it sees
    master_addr: str  # where rank 0 listens
    master_port: int  # 0 = none needed, which a group of one may say
    device: Literal["cpu", "cuda"]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"group {self.group!r}: rank {self.rank} is outside 0 .. {self.world_size - 1}")
        if self.world_size > 1 and not self.master_port:
            raise ValueError(f"group {self.group!r}: {self.world_size} processes need a master port, got 0")
