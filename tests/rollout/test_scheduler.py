"""The scheduler with a counting stand-in for the model: who runs when, and where the pages go."""

import numpy as np
import pytest

from rlhf.rollout.cache import PagePool
from rlhf.rollout.request import EngineConfig, Request, SamplingParams
from rlhf.rollout.samples import Samples
from rlhf.rollout.scheduler import Scheduler


def run(prompt_lengths, *, n=1, max_tokens=6, num_pages=64, check=None, pool=None, version=0, **config):
    """Schedule and commit to the end; every drawn token is its sample's row number. Returns all that
    happened.
    """
    config = {"page_tokens": 4, "max_batch_tokens": 64, "max_sequences": 32, "prefix_cache": False} | config
    config = EngineConfig(**config)
    params = SamplingParams(max_tokens=max_tokens)
    requests = [
        Request(f"r{i}", tuple(range(length)), params, (0,) * n) for i, length in enumerate(prompt_lengths)
    ]
    samples = Samples(page_tokens=config.page_tokens, context=10_000)
    if pool is None:
        pool = PagePool(0)
        pool.grow(num_pages)
    scheduler = Scheduler(samples, pool, config, version=version)
    for job in samples.add(requests):
        scheduler.add(job)
    steps = []
    while scheduler.has_work:
        step = scheduler.schedule()
        check_step(step, samples, pool, config)
        rows = step.drawing
        zeros = np.zeros(len(rows), np.float32)
        samples.record(rows, rows.copy(), zeros, zeros, version)
        copies = scheduler.commit(step)
        steps.append((step, copies))
        assert len(steps) < 10_000, "no progress"
    assert (samples.count == samples.limit).all()
    return steps, samples, pool, scheduler


def check_step(step, samples, pool, config):
    page_tokens = config.page_tokens
    num_tokens = len(step.decoding) + sum(c.end - c.start for c in step.chunks)
    assert 0 < num_tokens <= config.max_batch_tokens
    running = len(step.decoding) + sum(len(c.prefill.samples) for c in step.chunks)
    assert running <= config.max_sequences
    written = []  # the page that each decoding sample writes to must be its own
    for s in step.decoding:
        position = samples.position(s)
        assert position < samples.num_pages[s] * page_tokens
        written.append(samples.table[s, position // page_tokens])
    assert len(set(written)) == len(written) and (pool.references[written] == 1).all()


def test_a_group_is_prefilled_once_and_shares_full_pages():
    # catches a fork that prefills per sample, copies full pages, or shares the partial one
    steps, samples, pool, _ = run([10], n=4, max_tokens=2)
    assert [len(c.prefill.token_ids) for s, _ in steps for c in s.chunks] == [10]
    copies = steps[0][1]
    assert len(copies.sources) == len(set(copies.targets)) == 3
    assert len(set(copies.sources)) == 1 and copies.num_tokens == 2
    assert (samples.table[:, :2] == samples.table[0, :2]).all() and len(set(samples.table[:, 2])) == 4
    assert pool.peak_in_use == 2 + 4
    assert pool.num_in_use == 0 and (pool.references == 0).all()


def test_a_prompt_that_fills_its_pages_needs_no_copy():
    # catches a copy (and a wasted page) where the prompt ends on a page's border
    steps, _, pool, _ = run([8], n=3, max_tokens=1)
    assert steps[0][1].sources == []
    assert pool.peak_in_use == 2


def test_prefill_is_cut_to_the_budget_beside_decoding():
    # catches a prefill that exceeds the token budget or that stops decoding
    steps, _, _, _ = run([3, 40], max_tokens=20, max_batch_tokens=8)
    mixed = [s for s, _ in steps if len(s.decoding) and s.chunks]
    assert len(mixed) >= 4
    assert all(len(s.decoding) + sum(c.end - c.start for c in s.chunks) == 8 for s in mixed[:4])


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preemption_ends_with_all_work_done_and_no_page_held(prefix_cache):
    # catches a deadlock or a leak when pages run out; the oldest work must always go on
    _, _, pool, scheduler = run([5, 6, 7, 9], n=3, max_tokens=30, num_pages=14, prefix_cache=prefix_cache)
    assert scheduler.num_preempted > 0
    assert pool.num_in_use == 0
    assert (pool.num_cached > 0) == prefix_cache
    assert sorted(pool.take(14)) == list(range(14))  # what is cached can be evicted


def test_the_oldest_sample_is_never_preempted():
    # catches livelock: two samples that take each other's pages
    steps, _, _, scheduler = run([4, 4, 4], max_tokens=40, num_pages=12)
    assert scheduler.num_preempted > 0
    with_first = [0 in s.decoding for s, _ in steps]
    assert with_first[1:40] == [True] * 39


def test_a_preempted_sample_keeps_its_tokens():
    # catches a recompute from the prompt alone, which would write the response's keys of nothing
    steps, samples, _, _ = run([4, 4, 4], max_tokens=40, num_pages=12)
    again = [c.prefill for s, _ in steps for c in s.chunks if len(c.prefill.token_ids) > 4]
    assert again
    for prefill in again:
        (sample,) = prefill.samples
        assert prefill.token_ids[:4].tolist() == [0, 1, 2, 3]
        assert (prefill.token_ids[4:] == sample).all()


def test_a_group_larger_than_the_engine_is_split():
    # catches a wait for ever when group_size > max_sequences
    steps, _, _, _ = run([6], n=10, max_tokens=3, max_sequences=4)
    assert sum(c.is_last for s, _ in steps for c in s.chunks) == 3


def test_a_prefill_gives_way_to_decoding_and_starts_again():
    # catches pages lost with a long prefill that is interrupted because decoding samples grow
    steps, _, pool, scheduler = run([4, 60], max_tokens=40, num_pages=25, max_batch_tokens=2)
    assert scheduler.num_preempted > 0
    assert sum(c.start == 0 and len(c.prefill.token_ids) == 60 for s, _ in steps for c in s.chunks) == 2
    assert pool.num_in_use == 0


def test_a_cache_as_large_as_the_work_is_never_the_limit():
    # catches an admission that holds back more pages than the samples can use: everything must run at once
    own = -(-(10 + 6 - 1) // 4)
    steps, _, _, scheduler = run([10] * 5, n=4, num_pages=5 * 4 * own, max_batch_tokens=256)
    assert scheduler.num_preempted == 0 and len(steps) == 6
    steps, _, _, _ = run([5] * 5, n=4, num_pages=20, page_tokens=16, max_batch_tokens=20, max_tokens=11)
    assert max(len(s.decoding) for s, _ in steps) == 20


def test_prefix_cache_serves_full_pages_under_the_same_version_only():
    # catches stale keys and values after a weight update, and a hit that leaves no token to run
    _, _, pool, first = run([12, 12], n=2, max_tokens=2, prefix_cache=True, max_batch_tokens=12)
    assert first.hit_tokens == 8  # the second prompt equals the first: two of its three full pages
    _, _, _, same = run([12], max_tokens=2, prefix_cache=True, pool=pool)
    assert same.hit_tokens == 8
    _, _, _, longer = run([14], max_tokens=2, prefix_cache=True, pool=pool)
    assert longer.hit_tokens == 12
    _, _, _, newer = run([14], max_tokens=2, prefix_cache=True, pool=pool, version=1)
    assert newer.hit_tokens == 0


def test_finished_at_the_first_token_gives_everything_back():
    # catches a leak when no sample of a group goes on after the prefill
    for length in (7, 8):
        _, _, pool, _ = run([length], n=5, max_tokens=1)
        assert pool.num_in_use == 0
