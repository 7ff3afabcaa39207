"""Guesses at coming tokens: they change how many passes a response takes, and nothing else."""

import dataclasses
import random

import numpy as np
import pytest

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams
from rlhf.rollout.drafts import _LONGEST, Drafts, Guesses, _Texts

VOCAB = 48


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


def make_requests(count=6, *, n=4, temperature=0.3, **params):
    """Prompts that repeat themselves, at a temperature at which responses do."""
    choose = random.Random(1)
    requests = []
    for i in range(count):
        words = [choose.randrange(VOCAB) for _ in range(choose.randint(2, 5))]
        fields = {
            "max_tokens": 30 + i % 9,
            "stop_ids": (11,),
            "min_tokens": 9,
            "temperature": temperature,
        } | params
        requests.append(
            Request(
                f"r{i}",
                tuple(words * 5),
                SamplingParams(**fields),
                tuple(key(2, "d", i, j) for j in range(n)),
            )
        )
    return requests


@pytest.fixture(scope="module")
def expected(models):
    return make_engine(models("qwen3")[0]).generate(make_requests())


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("most", [1, 5])
def test_guesses_change_no_bit(models, name, most):
    """Would catch: a token that was recorded after a wrong guess, noise of another place, keys of a wrong guess that stay,
    and a limit, a stop or min_tokens that several tokens at once step over."""
    requests = [
        *make_requests(),
        *(dataclasses.replace(r, id=f"one{r.id}", seeds=r.seeds[:1]) for r in make_requests()),
    ]
    plain, guessing = (make_engine(models(name)[0], draft_tokens=n, max_sequences=3) for n in (0, most))
    assert guessing.generate(requests) == plain.generate(requests)
    drafted, stood = (guessing.stats[f"rollout/{x}_tokens"] for x in ("drafted", "accepted"))
    assert 0 < stood <= drafted
    assert guessing.stats["rollout/forward_passes"] < plain.stats["rollout/forward_passes"]
    assert plain.stats["rollout/drafted_tokens"] == 0 and guessing.pages_in_use == 0


def test_the_next_epoch_is_guessed_from_the_last(models):
    """Would catch: responses that are not kept, or kept for another prompt."""
    engine, requests = make_engine(models("qwen3")[0], draft_tokens=8), make_requests(2, n=1, temperature=1.0)
    first = engine.generate(requests)
    passes = engine.stats["rollout/forward_passes"]
    engine.set_version(1)
    again = engine.generate(requests)
    assert [[c.token_ids for c in cs] for cs in again] == [[c.token_ids for c in cs] for cs in first]
    assert engine.stats["rollout/forward_passes"] < passes / 2


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_guesses_in_a_small_cache(models, preemption, kv_dtype):
    """Would catch: pages that guesses took from work, that were not given back, or that were saved half written."""
    small = {"cache_tokens": 176, "preemption": preemption, "prefix_cache": False, "kv_dtype": kv_dtype}
    requests = make_requests()
    plain, guessing = (make_engine(models("qwen3")[0], draft_tokens=n, **small) for n in (0, 6))
    assert guessing.generate(requests) == plain.generate(requests)
    assert guessing.stats["rollout/preempted"] > 0 < guessing.stats["rollout/accepted_tokens"]
    assert guessing.pages_in_use == 0


def test_requests_with_wishes_beside_guesses(models):
    """Would catch: logits of one row used for another where some rows have guesses and others are drawn apart."""
    wish = {"repetition_penalty": 1.2, "top_logprobs": 3}
    requests = make_requests(3, n=1) + [
        dataclasses.replace(r, id=f"w{r.id}", params=dataclasses.replace(r.params, **wish))
        for r in make_requests(3, n=1)
    ]
    order = [requests[i] for i in (0, 3, 1, 4, 5, 2)]
    plain, guessing = (make_engine(models("qwen3")[0], draft_tokens=n) for n in (0, 6))
    assert guessing.generate(order) == plain.generate(order)
    assert guessing.stats["rollout/accepted_tokens"] > 0


def test_a_stream_with_guesses_tells_every_token_once(models, expected):
    """Would catch: only the last of several new tokens being told."""
    engine = make_engine(models("qwen3")[0], draft_tokens=6, max_sequences=4)
    engine.add([dataclasses.replace(r, stream=True) for r in make_requests()])
    told, longest = {}, 0
    while engine.has_work:
        for update in engine.step():
            for delta in update.deltas:
                told.setdefault((update.request_id, delta.index), []).extend(delta.token_ids)
                longest = max(longest, len(delta.token_ids))
    assert {(c.request_id, c.index): list(c.token_ids) for cs in expected for c in cs} == told
    assert longest > 1


def test_aborts_and_new_weights_between_guesses(models, expected):
    """Would catch: guesses for a request that is gone, and guesses that a new version keeps in the cache."""
    engine, found = make_engine(models("qwen3")[0], draft_tokens=6, max_sequences=5), {}
    requests = make_requests()
    engine.add(requests)
    for i in range(12):
        found |= {u.request_id: u.completions for u in engine.step() if u.completions is not None}
        if i == 5:
            begun = tuple(engine.abort("r3"))
            engine.add([dataclasses.replace(requests[3], begun=begun)])
        if i == 8:
            engine.set_version(1)
    while engine.has_work:
        found |= {u.request_id: u.completions for u in engine.step() if u.completions is not None}
    assert [[c.token_ids for c in found[r.id]] for r in requests] == [
        [c.token_ids for c in cs] for cs in expected
    ]
    assert engine.pages_in_use == 0


# the parts


def test_the_longest_match_is_found():
    """Would catch: a shorter or an older match, a match with the text's own end, and places that run over another text."""
    choose = random.Random(0)
    for _ in range(200):
        prompt = [choose.randrange(3) for _ in range(choose.randint(1, 20))]
        earlier = [
            np.asarray([choose.randrange(3) for _ in range(choose.randint(0, 9))], np.int32) for _ in range(2)
        ]
        responses = [[choose.randrange(3) for _ in range(choose.randint(1, 9))] for _ in range(2)]
        texts = _Texts(prompt, earlier, 2)
        for i, response in enumerate(responses):
            for count in range(1, len(response) + 1):
                texts.extend(3 + i, np.asarray(response), count)
        got, following = texts.continuation(4, 4)
        tail = prompt[-_LONGEST:]
        all_texts = [prompt, *(tail + list(t) for t in (*earlier, *responses))]
        own = all_texts[4]

        def alike(text, at, own=own):
            n = 0
            while n < min(at, len(own), _LONGEST) and text[at - 1 - n] == own[-1 - n]:
                n += 1
            return n

        places = [(alike(t, at), t[at : at + 4]) for t in all_texts for at in range(1, len(t))]
        best = max((n for n, _ in places), default=0)
        if best < 3:
            assert got == 0 and following == []
        else:  # at most _PLACES places of a gram are looked at, the newest: here there can be more
            assert 3 <= got <= best and (got, following) in places
            if got < best:
                assert sum(n >= 3 for n, _ in places) > 8
    assert texts.num_earlier == 3


def test_guesses_that_stood():
    guesses = Guesses(
        np.asarray([[1, 2, 3], [0, 0, 0], [4, 9, 9], [5, 6, 0]]),
        np.asarray([3, 0, 1, 2]),
        np.zeros(4, np.int64),
    )
    drawn = [1, 2, 7, 8] + [0] + [4, 9] + [7, 6, 0]
    assert guesses.stood(np.asarray(drawn)).tolist() == [2, 0, 1, 0]


def test_only_guesses_worth_their_row_are_run():
    """Would catch: guesses in passes that are busy anyway, and rows beyond the budget."""
    drafts = Drafts(8, "cpu")
    matches, lengths = np.asarray([4, 12, 8]), np.asarray([8, 8, 8])
    assert drafts._choose(matches, lengths, 3, 100).tolist() == [8, 8, 8]  # nothing is known: all is hoped
    assert drafts._choose(matches, lengths, 3, 10).sum() == 10
    for length, chance in ((range(17), 0.5), (range(12, 17), 0.9)):
        drafts._tried[list(length)], drafts._stood[list(length)] = 100, 100 * chance
    few = drafts._choose(matches, lengths, 3, 100)
    assert few[1] > few[2] > 0 and few[0] > 0
    together = [0.9**n for n in range(1, 9)] + [0.5**n for n in range(1, 9)] * 2
    # one more as long as the likeliest left is likelier than rows / (rows + 16)
    rows = 3
    for chance in sorted(together, reverse=True):
        if chance <= rows / (rows + 16):
            break
        rows += 1
    assert few.sum() == rows - 3 or abs(few.sum() - (rows - 3)) <= 2  # 8 goes on into 12's chances
    assert drafts._choose(matches, lengths, 200, 100).sum() == 0


def test_what_never_stands_is_given_up_and_tried_again(models):
    """Would catch: rows spent for ever on guesses that are wrong, and guesses that never come back."""
    drafts = Drafts(4, "cpu")
    wrong = Guesses(np.zeros((1, 4), np.int64), np.asarray([4]), np.asarray([5]))
    for _ in range(200):
        drafts.learn(wrong, np.asarray([0]))
    assert drafts._choose(np.asarray([5]), np.asarray([4]), 1, 9).sum() == 0
    engine = make_engine(models("qwen3")[0], draft_tokens=4)
    engine._drafts._tried[:], engine._drafts._stood[:] = 400.0, 0.0
    requests = make_requests(300, n=1, max_tokens=1, min_tokens=0)
    assert engine.generate(requests[:1]) and engine._drafts._chances()[5] < 0.01
    assert engine.generate(requests) and engine._drafts._chances()[5] > 0.1


def test_what_is_refused():
    with pytest.raises(ValueError, match="draft_tokens=-1 is negative"):
        EngineConfig(page_tokens=16, max_batch_tokens=1, max_sequences=1, prefix_cache=True, draft_tokens=-1)
