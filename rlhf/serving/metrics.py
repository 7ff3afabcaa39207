"""What a server counts, and Prometheus' text of it.

Here: counters, histograms and their format (prometheus.io, text exposition 0.0.4). Not here: who counts
(`rlhf.serving.async_engine`), and a run's metrics (`rlhf.tracking`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.serving.async_engine import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600)


class Histogram:
    """Counts of seconds up to each of the bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Written by the engine's event loop alone."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = 0
        self.requests: Counter[str] = Counter()  # by how they ended: finished, aborted, refused, failed
        self.samples: Counter[str] = Counter()  # finished ones, by their reason
        self.time_to_first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token = Histogram(_BETWEEN_TOKENS_S)
        self.request = Histogram(_REQUEST_S)

    def text(self, load: Load) -> str:
        """Everything, with what the engine is at."""
        gauges = {
            "requests_running": (load.num_running, "Samples in work."),
            "requests_waiting": (load.num_waiting, "Samples that wait for their turn."),
            "cache_used_ratio": (load.pages_in_use / max(load.num_pages, 1), "Pages of the cache that samples use."),
            "weight_version": (load.version, "Optimiser steps in the weights."),
        }  # fmt: skip
        counters = {
            "prompt_tokens_total": (self.prompt_tokens, "Tokens of accepted prompts."),
            "generated_tokens_total": (self.generated_tokens, "Tokens sampled."),
            "prefill_tokens_total": (load.prefill_tokens, "Tokens brought into the cache."),
            "prefix_hit_tokens_total": (load.hit_tokens, "Tokens of these that were in the cache already."),
            "preemptions_total": (load.preempted, "Times that work gave way because the cache was full."),
            "drafted_tokens_total": (load.drafted, "Tokens that were guessed and checked."),
            "accepted_tokens_total": (load.accepted, "Tokens of these that stood."),
        }
        lines = []
        for kind, group in (("gauge", gauges), ("counter", counters)):
            for name, (value, what) in group.items():
                lines += [*_head(name, kind, what), f"rlhf_{name} {value:g}" if kind == "gauge" else f"rlhf_{name} {value}"]  # fmt: skip
        for name, label, counter, what in (
            ("requests_total", "outcome", self.requests, "Requests by how they ended."),
            ("samples_total", "reason", self.samples, "Finished samples by their reason."),
        ):
            lines += _head(name, "counter", what)
            lines += [f'rlhf_{name}{{{label}="{key}"}} {value}' for key, value in sorted(counter.items())]
        for name, histogram, what in (
            ("time_to_first_token_seconds", self.time_to_first_token, "From submission to a request's first token."),
            ("inter_token_seconds", self.inter_token, "Between two deliveries of a sample's tokens."),
            ("request_seconds", self.request, "From submission to the end."),
        ):  # fmt: skip
            lines += [*_head(name, "histogram", what), *histogram.lines(f"rlhf_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP rlhf_{name} {what}", f"# TYPE rlhf_{name} {kind}"]
