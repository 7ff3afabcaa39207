"""A worker that holds a model, for the tests of publishing; it is imported by the actors too."""

from __future__ import annotations

import torch

from rlhf.trainers.weights import WeightMethods, WeightSink, WeightSource, bytes_of


class Model(torch.nn.Module):
    """About 2.2 MiB in two types: three buckets of 1 MiB."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(700, 700, generator=g))
        self.lower = torch.nn.Parameter(torch.randn(300, 500, generator=g).bfloat16())
        self.scale = torch.nn.Parameter(torch.randn((), generator=g))


class Holder(WeightMethods):
    """`trained` names the weights that `nudge` changes; () = all."""

    def __init__(self, info, *, seed: int, trained: tuple[str, ...] = ()) -> None:
        self.info = info
        self.model = Model(seed)
        self._trained = {n: p for n, p in self.model.named_parameters() if n in trained or not trained}
        named_trained = self._trained.items if trained else None
        source = WeightSource(self.model.named_parameters, rank=info.rank, named_trained=named_trained)
        self._sources = {"rollout": source}
        self._sinks = {"rollout": WeightSink(self.model)}
        self._versions: list[int] = []

    def set_version(self, version: int) -> None:
        self._versions.append(version)

    def versions(self) -> list[int]:
        return self._versions

    def generate(self) -> None:
        self._sink.check_clean()

    def fingerprint(self) -> bytes:
        return b"".join(bytes_of(p.data).numpy().tobytes() for p in self.model.parameters())

    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def nudge(self) -> None:
        with torch.no_grad():
            for p in self._trained.values():
                p += 1

    def default_group(self) -> bool:
        return torch.distributed.is_initialized()
