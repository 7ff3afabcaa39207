"""Who is next: the orders in which waiting work is admitted.

Here: `Queue`, and what each policy sorts by. No order changes a result, only when it is there. Not here: whether there is
room (`rlhf.rollout.scheduler`), what is known of lengths (`rlhf.rollout.lengths`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlhf.rollout.scheduler import Prefill

Policy = Literal["fcfs", "priority", "shortest_first", "longest_first", "fair"]

# What waits with the smallest comes first; ties in order of arrival
ORDERS: dict[str, Callable[[Prefill], Any]] = {
    "fcfs": lambda work: 0,
    "priority": lambda work: -work.job.request.priority,
    # the mean latency of many requests (shortest job first), or the time until the last of them is there
    "shortest_first": lambda work: work.expected_tokens,
    "longest_first": lambda work: -work.expected_tokens,
    "fair": lambda work: 0,
}
_PROMPT_COST, _RESPONSE_COST = 1, 2  # of a token, as Sheng et al. weigh them


class Queue:
    """Waiting work in the order of a policy. What is put in front stays there: it was in work before.

    "fair" takes from the tenant that has been served least: counters of tokens by tenant, of which one who comes back after
    having nothing to do is lifted to the least of those who wait, so that idleness saves nothing up (the virtual token
    counter of Sheng et al. 2024, arXiv 2401.00588).
    """

    def __init__(self, policy: Policy) -> None:
        self._order, self._is_fair = ORDERS[policy], policy == "fair"
        self._front: deque[Prefill] = deque()
        self._heaps: dict[
            str, list[tuple[Any, int, int, Prefill]]
        ] = {}  # by tenant; "" for all where it is not fair
        self._served: dict[str, int] = {}
        self._number = 0
        self.num_samples = 0  # of all that waits

    def __len__(self) -> int:
        return len(self._front) + sum(map(len, self._heaps.values()))

    def __iter__(self) -> Iterator[Prefill]:
        """All that waits, in no order."""
        yield from self._front
        for heap in self._heaps.values():
            yield from (entry[-1] for entry in heap)

    def push(self, work: Prefill) -> None:
        self.num_samples += len(work.samples)
        tenant = work.job.request.tenant if self._is_fair else ""
        if not self._heaps.get(tenant):
            waiting = [self._served[t] for t, heap in self._heaps.items() if heap]
            self._served[tenant] = max(self._served.get(tenant, 0), min(waiting, default=0))
        self._number += 1
        entry = (self._order(work), work.job.number, self._number, work)
        heapq.heappush(self._heaps.setdefault(tenant, []), entry)

    def push_front(self, work: Prefill) -> None:
        self.num_samples += len(work.samples)
        self._front.appendleft(work)

    def pop(self) -> Prefill:
        """The next; raises IndexError where nothing waits."""
        work = self._front.popleft() if self._front else self._pop_heap()
        self.num_samples -= len(work.samples)
        return work

    def _pop_heap(self) -> Prefill:
        tenants = [t for t, heap in self._heaps.items() if heap]
        if not tenants:
            raise IndexError("nothing waits")
        tenant = min(tenants, key=lambda t: self._served[t]) if self._is_fair else tenants[0]
        work = heapq.heappop(self._heaps[tenant])[-1]
        if not self._heaps[tenant]:
            del self._heaps[tenant]
        return work

    def served(self, tenant: str, prompt_tokens: int, response_tokens: int) -> None:
        """Take note of what a tenant got."""
        if self._is_fair:
            cost = _PROMPT_COST * prompt_tokens + _RESPONSE_COST * response_tokens
            self._served[tenant] = self._served.get(tenant, 0) + cost

    def remove(self, number: int) -> list[Prefill]:
        """Take out all work of the request that arrived as `number`."""
        out = [work for work in self if work.job.number == number]
        self._front = deque(work for work in self._front if work.job.number != number)
        for tenant, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if entry[-1].job.number != number]
            if len(kept) != len(heap):
                heapq.heapify(kept)
                self._heaps[tenant] = kept
            if not kept:
                del self._heaps[tenant]
        self.num_samples -= sum(len(work.samples) for work in out)
        return out
