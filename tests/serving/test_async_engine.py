"""The engine behind asyncio: nothing is lost, told twice or left behind, whatever happens around a request."""

import asyncio
import itertools
import os
import random
import threading
from contextlib import aclosing
from dataclasses import dataclass

import pytest
import torch

from rlhf.rollout import Request, SamplingParams
from rlhf.serving.async_engine import AsyncEngine, EngineFailed, Overloaded, Stopping
from rlhf.serving.model import sample_seeds


def make_request(i, *, n=1, prompt=None, **params):
    choose = random.Random(i)
    prompt = prompt or tuple(choose.randrange(256) for _ in range(choose.randint(1, 60)))
    params = {"max_tokens": choose.randint(1, 24), "stop_ids": (258,)} | params
    return Request(f"r{i}", prompt, SamplingParams(**params), sample_seeds(i, n), stream=True)


class Told:
    """What the deltas of one request said, sample by sample."""

    def __init__(self, n):
        self.tokens, self.reasons = [[] for _ in range(n)], [None] * n

    def add(self, deltas):
        for d in deltas:
            assert self.reasons[d.index] is None, "news after the end"
            self.tokens[d.index] += d.token_ids
            self.reasons[d.index] = d.finish_reason


async def listen(engine, request, told=None):
    told = told or Told(len(request.seeds))
    async with aclosing(engine.generate(request)) as news:
        async for deltas in news:
            told.add(deltas)
    assert all(reason is not None for reason in told.reasons), "an end that was not told"
    return told


@dataclass
class Running:
    """`async with`: an engine that is closed at the end, with no page in use."""

    engine: AsyncEngine

    async def __aenter__(self):
        self.engine.start()
        return self.engine

    async def __aexit__(self, *error):
        await self.engine.close()
        if error[0] is None:
            assert self.engine._engine.pages_in_use == 0 and self.engine.num_open == 0
            assert not self.engine._engine.has_work


@pytest.fixture
def make(load):
    return lambda max_waiting=1000, **settings: Running(
        AsyncEngine(load(**settings).engine, max_waiting=max_waiting)
    )


def run(main):
    asyncio.run(asyncio.wait_for(main, 100))


async def soak(running, expected, count, seed):
    """Requests at random times; a part is cancelled, a part not read to the end; weights get new versions."""
    choose, outcomes = random.Random(seed), {"whole": 0, "cancelled": 0, "left": 0}

    async def one(i):
        await asyncio.sleep(choose.random() * count / 400)
        request, fate = make_request(i % 100, n=1 + i % 3), choose.random()
        request = Request(f"{i}", request.prompt_ids, request.params, request.seeds, stream=True)
        whole, told = expected[i % 100][: len(request.seeds)], Told(len(request.seeds))
        if fate < 0.6:
            await listen(engine, request, told)
            assert told.tokens == [list(c.token_ids) for c in whole]
            assert told.reasons == [c.finish_reason for c in whole]
            outcomes["whole"] += 1
        elif fate < 0.8:
            task = asyncio.create_task(listen(engine, request, told))
            await asyncio.sleep(choose.random() * 0.05)
            task.cancel()
            (error,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(error, (asyncio.CancelledError, Told)), error
            outcomes["cancelled"] += 1
        else:
            async with aclosing(engine.generate(request)) as news:
                async for deltas in news:
                    told.add(deltas)
                    if choose.random() < 0.3:
                        break
            outcomes["left"] += 1
        for tokens, c in zip(told.tokens, whole):
            assert tokens == list(c.token_ids[: len(tokens)])

    async def weights():
        for version in itertools.count(1):
            await asyncio.sleep(0.1)
            await engine.update_weights(lambda: None, version)
            if version % 5 == 0:
                await engine.pause()
                await asyncio.sleep(0.01)
                await engine.resume()

    async with running as engine:
        updating = asyncio.create_task(weights())
        await asyncio.gather(*(one(i) for i in range(count)))
        assert not updating.done()
        updating.cancel()
        await asyncio.sleep(0.05)
        metrics = engine.metrics
        assert engine.load.preempted > 0 and engine.load.version > 0
        assert sum(metrics.requests.values()) == count and sum(outcomes.values()) == count
        assert metrics.requests["finished"] >= outcomes["whole"] and not metrics.requests["failed"]
        print(
            f"{count} requests: {outcomes}, {dict(metrics.requests)}, {metrics.generated_tokens} tokens told,",
            end=" ",
        )
        print(f"gave way {engine.load.preempted} times, {engine.load.version} versions of the weights")


@pytest.mark.timeout(1800)
def test_many_come_and_go(load):
    """RLHF_SOAK_REQUESTS=10000 asks for that many (some minutes; -s shows what happened). Catches: news lost, told twice or in
    another order, pages kept by those who have gone, results that depend on what happens around."""
    count = int(os.environ.get("RLHF_SOAK_REQUESTS", "200"))
    quiet = load(cache_tokens=1024).engine
    expected = quiet.generate([make_request(i, n=3) for i in range(100)])
    running = Running(AsyncEngine(load(cache_tokens=240).engine, max_waiting=4 * count))
    asyncio.run(soak(running, expected, count, seed=0))


def test_pause_holds_all_work(make):
    """Catches: a step during the pause, and requests refused or lost by it."""

    async def main():
        async with make() as engine:
            await listen(engine, make_request(9, max_tokens=5))  # the first step takes longest
            before = engine.metrics.generated_tokens
            await engine.pause()
            tasks = [asyncio.create_task(listen(engine, make_request(i, max_tokens=5))) for i in range(3)]
            await asyncio.sleep(0.3)
            assert engine.num_open == 3 and engine.metrics.generated_tokens == before and engine.is_paused
            await engine.resume()
            await asyncio.gather(*tasks)

    run(main())


def test_new_weights_between_two_steps(make):
    """Catches: an update that waits for the requests in work, or that they do not see."""

    async def main():
        async with make() as engine:
            request = make_request(0, prompt=(1, 2, 3), max_tokens=200, stop_ids=())
            versions = []
            async with aclosing(engine.generate(request)) as news:
                async for deltas in news:
                    versions += [v for d in deltas for v in d.policy_versions]
                    if engine.load.version == 0:
                        assert await engine.update_weights(torch.get_num_threads, 7) > 0
            assert len(versions) == 200 and versions == sorted(versions) and set(versions) == {0, 7}
            with pytest.raises(ZeroDivisionError):
                await engine.update_weights(lambda: 1 / 0, 8)
            assert engine._engine.version == 8
            await listen(engine, make_request(1))

    run(main())


def test_a_change_that_nobody_waits_for(make):
    """Catches: an engine's thread that ends because whoever wanted new weights, or a pause, was cancelled."""

    async def main():
        async with make() as engine:
            at_work, go_on, ran = threading.Event(), threading.Event(), []
            first = asyncio.create_task(engine.update_weights(lambda: (at_work.set(), go_on.wait(20)), 1))
            await asyncio.to_thread(at_work.wait, 20)
            waiting = [
                asyncio.create_task(engine.update_weights(lambda: ran.append(1), 2)),
                asyncio.create_task(engine.pause()),
            ]
            await asyncio.sleep(0.01)
            for task in (first, *waiting):
                task.cancel()
            assert len(await asyncio.gather(first, *waiting, return_exceptions=True)) == 3
            go_on.set()
            await listen(engine, make_request(0))
            assert engine.is_healthy and not engine.is_paused and not ran and engine.load.version == 1

    run(main())


def test_a_failure_ends_what_is_in_work_alone(make, monkeypatch):
    """Catches: requests that wait for ever after a failure, and an engine that is dead after it."""

    async def main():
        async with make() as engine:
            inner, broken = engine._engine, []
            step = inner._step

            def failing():
                if broken:
                    raise RuntimeError(broken.pop())
                return step()

            monkeypatch.setattr(inner, "_step", failing)
            tasks = [asyncio.create_task(listen(engine, make_request(i, max_tokens=300, stop_ids=()))) for i in range(3)]  # fmt: skip
            await asyncio.sleep(0.1)
            broken.append("no memory")
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, EngineFailed) and "RuntimeError: no memory" in str(error)
            assert engine.is_healthy and engine.metrics.requests["failed"] == 3
            await listen(engine, make_request(4))
            for _ in range(3):
                broken.append("again")
                with pytest.raises(EngineFailed):
                    await listen(engine, make_request(5))
            assert not engine.is_healthy
            await listen(engine, make_request(6))
            assert engine.is_healthy

    run(main())


def test_a_request_that_is_refused_leaves_the_others_alone(make):
    async def main():
        async with make() as engine:
            good = asyncio.create_task(listen(engine, make_request(0, max_tokens=100)))
            with pytest.raises(ValueError, match="token id 999"):
                await engine.submit(make_request(1, prompt=(999,)))
            with pytest.raises(ValueError, match="leaves no room"):
                await engine.submit(make_request(2, prompt=(1,) * 1024))
            first = await engine.submit(make_request(3, max_tokens=400, stop_ids=()))
            with pytest.raises(ValueError, match="'r3' is in work"):
                await engine.submit(make_request(3))
            engine.abort(first)
            engine.abort(first)
            await good
            assert engine.metrics.requests == {"refused": 2, "aborted": 1, "finished": 1}

    run(main())


def test_too_many_are_refused(make):
    """Catches: a queue without an end."""

    async def main():
        async with make(max_waiting=3, max_sequences=2) as engine:
            await engine.pause()
            tasks = [asyncio.create_task(listen(engine, make_request(i, max_tokens=3))) for i in range(5)]
            await asyncio.sleep(0.05)
            with pytest.raises(Overloaded, match="5 samples run or wait and 1 more"):
                await engine.submit(make_request(6))
            await engine.resume()
            await asyncio.gather(*tasks)
            await listen(engine, make_request(7, n=4))

    run(main())


def test_the_end(make):
    """Catches: requests that hang when the engine stops, and ones that had time to finish and were cut."""

    async def main():
        running = make()
        async with running as engine:
            short = asyncio.create_task(listen(engine, make_request(0, max_tokens=20)))
            await asyncio.sleep(0.01)
            await asyncio.gather(engine.close(grace_s=20), short)
            with pytest.raises(Stopping):
                await engine.submit(make_request(1))
        running = make()
        async with running as engine:
            await engine.pause()
            long = asyncio.create_task(listen(engine, make_request(0, max_tokens=20)))
            await asyncio.sleep(0.05)
            await engine.close(grace_s=0.1)
            with pytest.raises(Stopping):
                await long

    run(main())
