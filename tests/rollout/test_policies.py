"""Orders of admission, and what is remembered of lengths."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlhf.rollout.lengths import Lengths
from rlhf.rollout.policies import Queue
from rlhf.rollout.request import EngineConfig


def work(number, *, priority=0, tenant="", expected=0.0):
    request = SimpleNamespace(priority=priority, tenant=tenant, id=str(number))
    job = SimpleNamespace(number=number, request=request)
    return SimpleNamespace(job=job, expected_tokens=expected, samples=np.arange(number + 1))


def drained(queue):
    return [queue.pop().job.number for _ in range(len(queue))]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", [0, 1, 2, 3]),
        ("priority", [2, 1, 3, 0]),
        ("shortest_first", [1, 3, 0, 2]),
        ("longest_first", [2, 0, 1, 3]),
    ],
)
def test_order(policy, order):
    """Would catch: a policy that sorts the wrong way round, or that turns the order of equals."""
    queue = Queue(policy)
    for number, (priority, expected) in enumerate([(0, 20.0), (1, 10.0), (5, 30.0), (1, 10.0)]):
        queue.push(work(number, priority=priority, expected=expected))
    assert drained(queue) == order


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_what_was_in_work_comes_first(policy):
    """Would catch: preempted work behind what has not begun, which would hold its place for nothing."""
    queue = Queue(policy)
    queue.push(work(5, priority=9))
    queue.push_front(work(2))
    queue.push_front(work(1))
    assert drained(queue) == [1, 2, 5]


def test_fair_share_by_tokens_served():
    """Would catch: turns by requests, with which a tenant of long ones takes nearly all."""
    queue = Queue("fair")
    for number in range(40):
        queue.push(work(number, tenant="large"))
        queue.push(work(100 + number, tenant="small"))
    served = {"large": 0, "small": 0}
    for _ in range(40):
        tenant = queue.pop().job.request.tenant
        cost = 90 if tenant == "large" else 10
        queue.served(tenant, cost, 0)
        served[tenant] += cost
    assert abs(served["large"] - served["small"]) <= 90


def test_a_tenant_who_was_away_has_saved_nothing_up():
    """Would catch: a new tenant, or one who comes back, that shuts the others out until it has caught up."""
    queue = Queue("fair")
    for number in range(20):
        queue.push(work(number, tenant="old"))
    for _ in range(10):
        queue.served(queue.pop().job.request.tenant, 100, 0)
    for number in range(20, 40):
        queue.push(work(number, tenant="new"))
    turns = []
    for _ in range(10):
        turns.append(queue.pop().job.request.tenant)
        queue.served(turns[-1], 100, 0)
    assert turns.count("old") == turns.count("new") == 5


def test_removal_keeps_the_others_in_order():
    queue = Queue("longest_first")
    for number in range(6):
        queue.push(work(number, expected=float(number)))
    queue.push_front(work(9))
    assert [w.job.number for w in queue.remove(4)] == [4]
    assert [w.job.number for w in queue.remove(9)] == [9]
    assert queue.num_samples == sum(len(w.samples) for w in queue) == 6 + 4 + 3 + 2 + 1
    assert queue.remove(4) == [] and drained(queue) == [5, 3, 2, 1, 0] and queue.num_samples == 0


def test_an_empty_queue():
    with pytest.raises(IndexError, match="nothing waits"):
        Queue("fair").pop()


def test_an_unknown_policy_is_refused():
    sizes = dict(page_tokens=16, max_batch_tokens=16, max_sequences=1, prefix_cache=True)
    with pytest.raises(ValueError, match="policy='lifo' is unknown; choose from fcfs, priority"):
        EngineConfig(**sizes, policy="lifo")


def test_lengths_follow_what_was_seen():
    """Would catch: lengths of another prompt, guesses beyond the limit, and a memory that only grows."""
    lengths, prompt, other = Lengths(most=2), np.arange(5), np.arange(6)
    assert lengths.expected(prompt, 100) == 100
    lengths.observe(prompt, [40])
    assert lengths.expected(prompt, 100) == 40 and lengths.expected(prompt, 30) == 30
    lengths.observe(prompt, [20])
    assert lengths.expected(prompt, 100) == 30 and lengths.expected(other, 100) == 100
    lengths.observe(other, [1])
    lengths.observe(np.arange(7), [1])
    assert len(lengths) == 2 and lengths.expected(prompt, 100) == 100
