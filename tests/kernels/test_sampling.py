import numpy as np
import pytest
import torch

from rlhf.kernels import sampling
from rlhf.kernels.random import uniform
from rlhf.kernels.sampling import sample

ROWS, VOCAB = 64, 50


def softmax64(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference_distribution(logits, temperature, top_k, top_p, banned=()):
    """The distribution that one row is drawn from, in float64, token by token as the definitions say."""
    scores = np.asarray(logits, np.float64) / (temperature or 1.0)
    scores[list(banned)] = -np.inf
    if temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    if 0 < top_k < len(scores):
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    probs = softmax64(scores)
    if top_p < 1:
        mass, kept = 0.0, np.zeros(len(probs), bool)
        for token in np.argsort(-probs, kind="stable"):
            if mass >= top_p:
                break
            kept[token] = True
            mass += probs[token]
        probs = np.where(kept, probs, 0)
    return probs / probs.sum()


def reference_draw(probs, u):
    """Index, and how far u is from the edges of that token's interval."""
    edges = np.cumsum(probs)
    token = int(np.searchsorted(edges, u, side="right"))
    return token, min(abs(edges - u))


def make_rows(seed, rows=ROWS, vocab=VOCAB):
    source = torch.Generator().manual_seed(seed)
    choose = np.random.default_rng(seed)
    return {
        "logits": torch.randn(rows, vocab, generator=source) * 3,
        "uniforms": torch.rand(rows, generator=source, dtype=torch.float64),
        "temperature": torch.tensor(choose.choice([0.0, 0.3, 0.7, 1.0, 1.5], rows), dtype=torch.float32),
        "top_k": torch.tensor(choose.choice([0, 1, 2, 10, vocab, vocab + 5], rows)),
        "top_p": torch.tensor(choose.choice([0.05, 0.5, 0.9, 0.999, 1.0], rows)),
    }


def take(rows, index):
    return {name: value[index] for name, value in rows.items()}


def call(rows, **more):
    rows = dict(rows)
    return sample(rows.pop("logits"), rows.pop("uniforms"), rows.pop("temperature"), **rows, **more)


@pytest.mark.parametrize("seed", range(8))
def test_equals_slow_reference(seed):
    # catches a wrong order of temperature, top-k, top-p; an off-by-one in the nucleus; a wrong normaliser
    rows = make_rows(seed)
    banned = (torch.arange(0, ROWS, 3), torch.arange(0, ROWS, 3) % VOCAB)
    drawn = call(rows, banned=banned)
    checked = 0
    for i in range(ROWS):
        ban = [i % VOCAB] if i % 3 == 0 else []
        logits, t = rows["logits"][i].double().numpy(), float(rows["temperature"][i])
        probs = reference_distribution(logits, t, int(rows["top_k"][i]), float(rows["top_p"][i]), ban)
        token, distance = reference_draw(probs, float(rows["uniforms"][i]))
        if distance < 1e-5:
            continue  # too close to an interval's edge for fp32
        assert int(drawn.tokens[i]) == token
        raw = np.log(softmax64(logits / (t or 1.0))[token])
        assert float(drawn.logprobs[i]) == pytest.approx(raw, abs=2e-5, rel=1e-5)
        assert float(drawn.processed_logprobs[i]) == pytest.approx(np.log(probs[token]), abs=2e-5, rel=1e-5)
        checked += 1
    assert checked > ROWS * 0.8


def test_nucleus_wider_than_the_first_look(monkeypatch):
    # catches a nucleus cut at the number of tokens looked at first
    rows = make_rows(0, rows=16, vocab=500)
    rows["logits"] *= 0.1
    rows["temperature"][:] = 1.0
    whole = call(rows)
    monkeypatch.setattr(sampling, "_NUCLEUS_TOKENS", 4)
    assert torch.equal(call(rows).tokens, whole.tokens)
    wide = sampling.keep_top_p(torch.zeros(1, 500), torch.tensor([0.9], dtype=torch.float64))
    assert torch.isfinite(wide).all()  # equal scores at the cut are all kept


def test_a_row_does_not_depend_on_the_others():
    # catches reductions or thresholds that see the batch; bit for bit
    rows = make_rows(1)
    together = call(rows)
    for i in range(ROWS):
        alone = take(rows, slice(i, i + 1))
        for name, unused in (("top_k", 0), ("top_p", 1.0)):
            if float(alone[name][0]) == unused:
                alone[name] = None  # the way the engine passes it when no row of the batch uses it
        single = call(alone)
        for field in ("tokens", "logprobs", "processed_logprobs"):
            assert getattr(single, field)[0] == getattr(together, field)[i], (i, field)


def test_draws_follow_the_distribution():
    # catches a bias of the inversion: 100,000 draws against the float64 distribution
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 100_000
    draws = uniform(torch.tensor([12345]), torch.arange(count))
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 12, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.7)]:
        drawn = sample(
            logits.expand(count, -1),
            draws,
            torch.full((count,), temperature),
            top_k=torch.full((count,), top_k),
            top_p=torch.full((count,), top_p, dtype=torch.float64),
        )
        observed = np.bincount(drawn.tokens.numpy(), minlength=VOCAB)
        probs = reference_distribution(logits.double().numpy(), temperature, top_k, top_p)
        assert observed[probs == 0].sum() == 0
        kept = probs > 0
        chi_square = ((observed - count * probs)[kept] ** 2 / (count * probs[kept])).sum()
        freedom = kept.sum() - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-52])
def test_the_ends_of_the_interval_never_draw_a_banned_token(u):
    # catches drawing token 0 or V - 1 at u = 0 or u near 1 although their probability is zero
    logits = torch.zeros(1, 8)
    banned = (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 7]))
    drawn = sample(logits, torch.tensor([u], dtype=torch.float64), torch.ones(1), banned=banned)
    assert int(drawn.tokens[0]) == (2 if u == 0 else 6)
    assert float(drawn.logprobs[0]) == pytest.approx(-np.log(8))
    assert float(drawn.processed_logprobs[0]) == pytest.approx(-np.log(5))


def test_greedy_reports_the_policy_at_temperature_one():
    # catches greedy log-probs of 0 or -inf in `logprobs`, which a trainer would take for the policy's
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    drawn = sample(logits, torch.tensor([0.99], dtype=torch.float64), torch.zeros(1))
    assert int(drawn.tokens[0]) == 1
    assert float(drawn.logprobs[0]) == pytest.approx(float(torch.log_softmax(logits, -1)[0, 1]))
    assert float(drawn.processed_logprobs[0]) == 0


def test_non_finite_logits_give_a_token_and_a_nan():
    # catches an index out of range, or a finite log-prob that hides a broken policy
    logits = torch.zeros(2, 5)
    logits[0, 3] = torch.nan
    drawn = sample(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), torch.ones(2))
    assert 0 <= int(drawn.tokens[0]) < 5 and torch.isnan(drawn.logprobs[0])
    assert torch.isfinite(drawn.logprobs[1])
