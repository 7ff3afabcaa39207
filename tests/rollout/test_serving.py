"""Requests that come and go: the engine step by step. Whatever happens around a sample, its tokens are those of a quiet run."""

import dataclasses
import random

import pytest
import torch

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams
from rlhf.rollout.request import Completion

VOCAB = 48
STOPS = (11, 23, 37)


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


def make_requests(count=8, *, n=2, seed=0, max_tokens=24, **fields):
    choose = random.Random(seed)
    return [
        Request(
            f"r{i}",
            tuple(choose.randrange(VOCAB) for _ in range(choose.randint(1, 50))),
            SamplingParams(max_tokens=max_tokens + 3 * i, stop_ids=STOPS, min_tokens=4 + 2 * i),
            tuple(key(seed, "serving", i, j) for j in range(n)),
            **fields,
        )
        for i in range(count)
    ]


def drain(engine, found=None):
    found = {} if found is None else found
    while engine.has_work:
        found |= {u.request_id: list(u.completions) for u in engine.step() if u.completions is not None}
    return found


@pytest.fixture(scope="module")
def expected(models):
    """What a quiet engine writes."""
    requests = make_requests()
    return dict(zip((r.id for r in requests), make_engine(models("qwen3")[0]).generate(requests)))


def test_requests_that_come_one_by_one(models, expected):
    """Would catch: rows of one request used by another, and results that depend on who was there first."""
    engine, found = make_engine(models("qwen3")[0]), {}
    for request in make_requests():
        engine.add([request])
        for _ in range(3):
            found |= {u.request_id: list(u.completions) for u in engine.step() if u.completions is not None}
    assert drain(engine, found) == expected
    assert engine.pages_in_use == 0 and engine.num_running == engine.num_waiting == 0 and engine.step() == []


def test_a_stream_tells_every_token_once(models, expected):
    """Would catch: tokens lost or told twice, and an end that is not told."""
    engine = make_engine(models("qwen3")[0], max_batch_tokens=40)
    engine.add(make_requests(stream=True))
    told, ends = {}, {}
    while engine.has_work:
        for update in engine.step():
            for delta in update.deltas:
                entry = told.setdefault((update.request_id, delta.index), ([], [], [], []))
                for column, more in zip(
                    entry,
                    (delta.token_ids, delta.logprobs, delta.processed_logprobs, delta.policy_versions),
                ):
                    column += more
                if delta.finish_reason is not None:
                    ends[update.request_id, delta.index] = delta.finish_reason
    for name, completions in expected.items():
        for c in completions:
            columns = (c.token_ids, c.logprobs, c.processed_logprobs, c.policy_versions)
            assert tuple(map(tuple, told[name, c.index])) == columns
            assert ends[name, c.index] == c.finish_reason


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_abort_leaves_the_others_alone(models, expected, after):
    """Would catch: pages kept by, or shared with, one that is gone; and a result that an abort changes."""
    engine = make_engine(models("qwen3")[0], max_batch_tokens=40, prefix_cache=False)
    engine.add(make_requests())
    found = {}
    for _ in range(after):
        found |= {u.request_id: list(u.completions) for u in engine.step() if u.completions is not None}
    gone = [name for name in ("r1", "r4", "r7") if name not in found]
    for name in gone:
        for c, whole in zip(engine.abort(name), expected[name]):
            assert c.token_ids == whole.token_ids[: len(c.token_ids)]
            assert c.finish_reason == "aborted" or c == whole
    with pytest.raises(KeyError, match="'r1' is not in work"):
        engine.abort("r1")
    assert drain(engine, found) == {k: v for k, v in expected.items() if k not in gone}
    assert engine.pages_in_use == 0


def test_partial_samples_go_on_to_the_same_end(models, expected):
    """Would catch: a continuation that draws with noise from the start, or forgets what was written."""
    engine, requests = make_engine(models("qwen3")[0]), make_requests()
    first = engine.generate(requests, enough=3)
    reasons = [[c.finish_reason for c in group] for group in first]
    assert any("aborted" in r for r in reasons) and sum("aborted" not in r for r in reasons) >= 3
    assert any(c.token_ids and c.finish_reason == "aborted" for group in first for c in group)
    again = [dataclasses.replace(r, begun=tuple(group)) for r, group in zip(requests, first)]
    assert dict(zip((r.id for r in requests), engine.generate(again))) == expected


def test_new_weights_in_the_middle(fresh_model):
    """Would catch: tokens written under new weights from keys of the old, and versions that tell another story."""
    engine, requests = make_engine(fresh_model), make_requests(4, n=2, max_tokens=12)
    requests = [dataclasses.replace(r, params=SamplingParams(max_tokens=12)) for r in requests]  # no stop
    engine.add(requests)
    for _ in range(5):
        engine.step()
    with torch.no_grad():
        for p in fresh_model.parameters():
            p.mul_(1.1)
    engine.set_version(7)
    found = drain(engine)
    for request in requests:
        for c, seed in zip(found[request.id], request.seeds):
            n = c.policy_versions.index(7)
            assert 0 < n < 12 and c.policy_versions == (0,) * n + (7,) * (12 - n)
            # the rest is what a new engine, given the beginning, writes under the new weights
            begun = Completion(
                request.id, 0, *(x[:n] for x in (c.token_ids, c.logprobs, c.processed_logprobs, c.policy_versions)), "aborted"
            )  # fmt: skip
            anew = Engine(fresh_model, engine.config, version=7)
            ((rest,),) = anew.generate([dataclasses.replace(request, seeds=(seed,), begun=(begun,))])
            assert dataclasses.replace(rest, index=c.index) == c


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_changes_nothing(models, expected, preemption):
    """Would catch: pages brought back into the wrong places, or without the newest token's."""
    engine = make_engine(models("qwen3")[0], cache_tokens=112, preemption=preemption, prefix_cache=False)
    requests = make_requests()
    assert dict(zip((r.id for r in requests), engine.generate(requests))) == expected
    assert engine.stats["rollout/preempted"] > 0
    assert (engine._scheduler.num_swapped > 0) == (preemption == "swap")
    assert engine.pages_in_use == 0 and engine._scheduler._pages_saved == 0


@pytest.mark.parametrize("policy", ["priority", "shortest_first", "longest_first", "fair"])
def test_no_policy_changes_a_result(models, expected, policy):
    engine = make_engine(models("qwen3")[0], policy=policy, cache_tokens=112, max_sequences=3)
    requests = [
        dataclasses.replace(r, priority=i % 3, tenant="ab"[i % 2]) for i, r in enumerate(make_requests())
    ]
    for _ in range(2):  # the second time lengths are known
        assert dict(zip((r.id for r in requests), engine.generate(requests))) == expected


def test_the_urgent_comes_first(models):
    """Would catch: a priority that nobody reads."""
    engine = make_engine(models("qwen3")[0], policy="priority", max_sequences=2)
    requests = [dataclasses.replace(r, priority=i) for i, r in enumerate(make_requests(6, n=1))]
    engine.add(requests)
    engine.step()
    order = []
    while engine.has_work:
        order += [u.request_id for u in engine.step() if u.completions is not None]
    assert set(order[:2]) <= {"r5", "r4", "r3"} and order[-1] in ("r0", "r1")


def test_what_begins_alike_is_prefilled_once(models):
    """Would catch: requests of one prompt that arrive together and are each prefilled from the start."""
    prompt = tuple(range(40))
    requests = [
        Request(f"r{i}", (*prompt, i), SamplingParams(max_tokens=3), (key(0, "alike", i),)) for i in range(6)
    ]
    engine = make_engine(models("qwen3")[0])
    out = engine.generate(requests)
    assert engine.stats["cache/hit_frac"] == pytest.approx(5 * 32 / (6 * 41))
    assert out == make_engine(models("qwen3")[0], prefix_cache=False).generate(requests)


def test_a_turn_of_a_chat_finds_the_turns_before(models):
    """Would catch: responses that are computed again when they come back in the next prompt."""
    engine = make_engine(models("qwen3")[0], cache_responses=True)
    first = Request("a", tuple(range(20)), SamplingParams(max_tokens=28), (1,))  # the last token fills a page
    ((c,),) = engine.generate([first])
    second = Request("b", (*first.prompt_ids, *c.token_ids, 1, 2, 3), SamplingParams(max_tokens=4), (2,))
    out = engine.generate([second])
    assert engine.stats["cache/hit_frac"] == pytest.approx(32 / 51)
    assert out == make_engine(models("qwen3")[0], prefix_cache=False).generate([second])


def test_what_was_cached_is_told_once(models):
    """Would catch: hits of work that gave way and was prefilled again taken for the prompt's, and news that repeat them."""
    engine = make_engine(models("qwen3")[0], cache_tokens=112, max_sequences=3)

    def told(requests):
        engine.add([dataclasses.replace(r, stream=True) for r in requests])
        found = {r.id: [] for r in requests}
        while engine.has_work:
            for update in engine.step():
                found[update.request_id] += [d.cached_tokens for d in update.deltas]
        return found

    requests = make_requests(5, n=4)  # more than run at once: what comes later finds the prompt
    assert {n for counts in told(requests).values() for n in counts} == {0}
    assert engine.counts["preempted"] > 0 and engine.counts["hit_tokens"] > 0
    request = max(make_requests(n=1), key=lambda r: len(r.prompt_ids))
    first, again = (told([dataclasses.replace(request, id=name)])[name] for name in "ab")
    tokens = (len(request.prompt_ids) - 1) // 16 * 16
    assert tokens and again[0] == tokens and not any(first[1:] + again[1:])


def test_sleep_in_the_middle(models, expected):
    """Would catch: samples in work that go on from a cache that is gone."""
    engine = make_engine(models("qwen3")[0])
    engine.add(make_requests())
    for _ in range(4):
        engine.step()
    engine.sleep()
    assert engine._pages.num_pages == 0
    engine.wake()
    assert drain(engine) == expected


def test_what_is_refused(models):
    """Would catch: requests half taken in, and batches mixed with single ones."""
    engine, requests = make_engine(models("qwen3")[0]), make_requests(3)
    engine.add(requests[:1])
    with pytest.raises(ValueError, match="'r0'; ids of those in work must be unique"):
        engine.add([requests[1], requests[0]])
    with pytest.raises(RuntimeError, match="generate with 1 added requests in work"):
        engine.generate(requests[1:])
    assert list(drain(engine)) == ["r0"]
    with pytest.raises(ValueError, match="goes on from 1 samples and has 2 seeds"):
        dataclasses.replace(requests[0], begun=(Completion("r0", 0, (), (), (), (), "aborted"),))


def test_an_abort_of_what_was_done_when_it_came(models, expected):
    """Would catch: a request told as finished after its abort, or an engine that fails over it."""
    engine, requests = make_engine(models("qwen3")[0]), make_requests(2)
    engine.add([dataclasses.replace(r, begun=tuple(expected[r.id])) for r in requests])
    assert engine.abort("r0") == expected["r0"]
    assert drain(engine) == {"r1": expected["r1"]}
