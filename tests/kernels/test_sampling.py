import os

import numpy as np
import pytest
import torch

from rlhf.kernels import sampling
from rlhf.kernels.logprob import token_logprobs
from rlhf.kernels.random import exponentials, random_bits, token_words
from rlhf.kernels.sampling import sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # takes long
if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter
ROWS, VOCAB = 12 if INTERPRETED else 64, 50
FIELDS = ("tokens", "logprobs", "processed_logprobs")
CUTS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and what does nothing


def softmax64(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference_distribution(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, banned=()):
    """The distribution that one row is drawn from, in float64, token by token as the definitions say."""
    scores = np.asarray(logits, np.float64) / (temperature or 1.0)
    scores[list(banned)] = -np.inf
    if temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    if 0 < top_k < len(scores):
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    probs = softmax64(scores)
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        larger = np.cumsum(probs[order]) - probs[order]  # what the likelier ones hold
        last = probs[order][larger < top_p].min()
        probs = np.where(probs >= last, probs, 0)
    probs = np.where(probs >= min_p * probs.max() * (1 - 1e-6), probs, 0)
    return probs / probs.sum()


def reference_draw(probs, key, position):
    """The token of the largest log-probability plus noise, and by how much."""
    bits = random_bits(torch.tensor([key]), torch.tensor([position]))
    noise = -np.log(exponentials(token_words(bits, torch.arange(len(probs)))).double().numpy())
    with np.errstate(divide="ignore"):
        scores = np.log(probs) + noise
    second, first = np.argsort(scores, kind="stable")[-2:] if len(probs) > 1 else (0, 0)
    return int(first), scores[first] - scores[second] if len(probs) > 1 else np.inf


def make_rows(seed, rows=ROWS, vocab=VOCAB, dtype=torch.float32, scale=3.0):
    source = torch.Generator().manual_seed(seed)
    choose = np.random.default_rng(seed)
    return {
        "logits": (torch.randn(rows, vocab, generator=source) * scale).to(dtype),
        "keys": torch.randint(1 << 62, (rows,), generator=source),
        "positions": torch.randint(5000, (rows,), generator=source),
        "temperature": torch.tensor(choose.choice([0.0, 0.3, 0.7, 1.0, 1.5], rows), dtype=torch.float32),
        "top_k": torch.tensor(choose.choice([0, 1, 2, 10, vocab, vocab + 5], rows)),
        "top_p": torch.tensor(choose.choice([0.05, 0.5, 0.9, 0.999, 1.0], rows)),
        "min_p": torch.tensor(choose.choice([0.0, 0.0, 0.01, 0.2, 1.0], rows)),
    }


def take(rows, index):
    return {name: value[index] for name, value in rows.items()}


def call(rows, **more):
    return sample(**rows, **more)


def bans_of(rows, count, vocab):
    """Every third row may not draw two of its tokens, in no order."""
    some = torch.arange(0, rows, 3)
    both = torch.cat([some.flip(0), some]), torch.cat([(some.flip(0) * 7) % vocab, (some * 5 + 1) % vocab])
    return both if count else None


def check_against_reference(rows, drawn, banned=None, tolerance=2e-5):
    """How many rows could be compared: where the first two are too close for fp32, none is wrong."""
    checked = 0
    for i in range(len(rows["logits"])):
        ban = [] if banned is None else [int(c) for r, c in zip(*banned) if r == i]
        logits, t = rows["logits"][i].double().numpy(), float(rows["temperature"][i])
        cuts = {name: rows[name][i].item() for name in CUTS if name in rows}
        probs = reference_distribution(logits, t, **cuts, banned=ban)
        token, distance = reference_draw(probs, int(rows["keys"][i]), int(rows["positions"][i]))
        if distance < 1e-4:
            continue
        assert int(drawn.tokens[i]) == token, i
        raw = np.log(softmax64(logits / (t or 1.0))[token])
        assert float(drawn.logprobs[i]) == pytest.approx(raw, abs=tolerance, rel=1e-5)
        processed = np.log(probs[token])
        assert float(drawn.processed_logprobs[i]) == pytest.approx(processed, abs=tolerance, rel=1e-5)
        checked += 1
    return checked


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_slow_reference(form, seed, dtype):
    # catches a wrong order of temperature, top-k, top-p, min-p; an off-by-one in the nucleus; a wrong normaliser; other
    # noise than the other forms have. bf16 has many equal scores
    rows = make_rows(seed, dtype=dtype)
    banned = bans_of(ROWS, seed % 2, VOCAB)
    assert check_against_reference(rows, call(rows, banned=banned), banned) > ROWS * 0.8


@pytest.mark.parametrize("vocab", [1, 5, 15, 16, 17, 63, 64, 65, 1000, 1023, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width(form, vocab, dtype):
    # catches a last vector or block that is left out, or read from the next row
    rows = make_rows(vocab, rows=4 if INTERPRETED else 24, vocab=vocab, dtype=dtype, scale=1.0)
    assert check_against_reference(rows, call(rows)) > 0
    plain = {name: x for name, x in rows.items() if name not in CUTS}
    assert check_against_reference(plain, call(plain)) > 0


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000, "top_p": 0.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_cuts_of_long_rows(form, cuts, scale):
    # catches the bounds that leave few tokens of a long row: of groups' largest scores, and of the mass by distance from
    # the top, on flat and on steep rows
    rows = make_rows(3, rows=6, vocab=40_000, scale=scale)
    dtypes = {name: rows[name].dtype for name in CUTS}
    rows |= {
        name: torch.full((6,), cuts.get(name, nothing), dtype=dtypes[name]) for name, nothing in CUTS.items()
    }
    rows["temperature"][:] = 0.9
    assert check_against_reference(rows, call(rows), tolerance=1e-4) > 3


def test_all_equal_scores_are_kept(form):
    # catches ties cut by their place, and a nucleus cut at the number of tokens looked at first
    logits, row = torch.zeros(1, 5000), torch.tensor([3])
    for cuts in (
        {"top_k": row},
        {"top_p": torch.tensor([0.9]).double()},
        {"min_p": torch.tensor([1.0]).double()},
    ):
        drawn = sample(logits, row, row, torch.ones(1), **cuts)
        assert float(drawn.processed_logprobs[0]) == pytest.approx(-np.log(5000), abs=1e-5)


def test_a_row_does_not_depend_on_the_others(form):
    # catches reductions, thresholds or noise that see the batch or the place in it; bit for bit
    rows = make_rows(1)
    banned = bans_of(ROWS, 1, VOCAB)
    together = call(rows, banned=banned)
    reversed_rows = call(take(rows, torch.arange(ROWS).flip(0)), banned=(ROWS - 1 - banned[0], banned[1]))
    for field in FIELDS:
        assert torch.equal(getattr(together, field), getattr(reversed_rows, field).flip(0))
    for i in range(0, ROWS, 3 if INTERPRETED else 1):
        alone = take(rows, slice(i, i + 1))
        for name, unused in CUTS.items():
            if float(alone[name][0]) == unused:
                alone[name] = None  # the way the engine passes it when no row of the batch uses it
        ban = banned[1][banned[0] == i]
        single = call(alone, banned=(torch.zeros_like(ban), ban) if len(ban) else None)
        for field in FIELDS:
            assert getattr(single, field)[0] == getattr(together, field)[i], (i, field)


def test_threads_and_chunks_change_nothing(shared_out, monkeypatch):
    # catches memory that two threads share, and chunks that begin at the wrong row
    rows = make_rows(2, rows=300, vocab=4000)
    rows["temperature"][:] = 1.0
    rows["top_k"][:] = 50
    banned = bans_of(300, 1, 4000)
    native = [call(rows, banned=banned) for _ in range(10)]
    monkeypatch.setattr(sampling.native, "library", lambda name: None)
    whole = call(rows, banned=banned)
    monkeypatch.setattr(sampling, "_CHUNK_ELEMENTS", 70_000)
    for field in FIELDS:
        assert torch.equal(getattr(call(rows, banned=banned), field), getattr(whole, field))
        for drawn in native:
            torch.testing.assert_close(getattr(whole, field), getattr(drawn, field), atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="rows are shared out among Triton programs")
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_parts_of_long_rows(form, programs, monkeypatch):
    # catches blocks that are passed over although a token in them wins, and parts put together in a wrong order
    from rlhf.kernels import sampling_triton

    monkeypatch.setattr(sampling_triton, "_PROGRAMS", programs)
    rows = {name: x for name, x in make_rows(6, rows=12, vocab=20_001, scale=1.0).items() if name not in CUTS}
    assert check_against_reference(rows, call(rows)) > 8


SHAPES = {  # of a row's scores, by their number
    "steep": lambda n, source: torch.randn(n, generator=source) * 6,
    "flat": lambda n, source: torch.randn(n, generator=source) * 0.3,
    "alike": lambda n, source: torch.randint(3, (n,), generator=source).float(),
    "far away": lambda n, source: torch.randn(n, generator=source).where(
        torch.arange(n) > 2, torch.tensor(-6e4)
    ),
    "ordered": lambda n, source: torch.linspace(-9, 9, n),
}


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton form")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [(40, 1.0), (0, 0.9), (0, 0.9999), (900, 0.8), (2500, 1.0)], ids=str)
def test_cuts_are_exact_and_take_few_passes(form, shape, cuts, monkeypatch):
    # catches a bound above the threshold, scores that are lost or counted twice between what lies together and the rest, and
    # a search that reads the row for every bit. Lanes are few: most of a row is not together
    from rlhf.kernels import sampling_triton

    monkeypatch.setattr(sampling_triton, "_LANES", 128)
    width, (k, p) = 3001, cuts
    logits = SHAPES[shape](width, torch.Generator().manual_seed(5)).half()[None]
    read, load = 0, interpreter.InterpreterBuilder.create_masked_load

    def counted(builder, pointers, *rest):
        nonlocal read
        read += pointers.data.size * (pointers.get_element_ty() == tl.float16)
        return load(builder, pointers, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
    warmth = torch.ones(1)
    floor, top, log_mass = sampling_triton.cut(
        logits, warmth, torch.tensor([k]), torch.tensor([p], dtype=torch.float64), None
    )
    wanted = torch.from_numpy(reference_distribution(logits[0].double().numpy(), 1.0, top_k=k, top_p=p))
    kept, scores = logits[0] >= floor, logits[0].double()
    exact = scores.sub(scores.max()).exp()
    # in fp32 the mass of a nucleus is that of one token more or less
    nearest = exact[(kept != (wanted > 0))].sum() <= 2e-6 * exact.sum()
    assert torch.equal(kept, wanted > 0) or (p < 1 and nearest)
    assert float(top) == scores.max() and float(log_mass) == pytest.approx(
        float(exact[kept].sum().log()), abs=1e-5
    )
    passes = read / (-(-width // 128) * 128)
    most = 2 if shape != "alike" and k == 40 else 8 if p == 1 or k == 0 else 14
    assert passes <= most + 5 * (shape == "far away" and k > 40)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton form")
@pytest.mark.parametrize("seed", [18, 26, 281, 315, 1])
def test_a_nucleus_that_ends_where_what_lies_together_ends(form, seed):
    # catches a floor above every score: in these rows (but the last) the likeliest tokens' mass is some ulps less where they lie
    # together than in the row, and where what is wanted lies between, a search looks for more among the others and finds none
    from rlhf.kernels import sampling_triton

    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(seed)) * 0.5
    scores = logits[0].double()
    mass = scores.sub(scores.max()).exp().sort(descending=True).values.cumsum(0)
    boundary = np.float32(mass[255] / mass[-1])  # half of the lanes' largest lie together
    below = above = boundary
    shares = [0.7052622820968829, boundary]
    for _ in range(6):
        below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(1))
        shares += [below, above]
    for share in shares:
        top_p = torch.tensor([share], dtype=torch.float64)
        floor, top, log_mass = sampling_triton.cut(logits, torch.ones(1), None, top_p, None)
        kept = logits[0] >= floor
        wanted = int((mass < float(share) * mass[-1]).sum()) + 1
        assert float(floor) <= float(top) == float(logits.max()), share
        assert abs(int(kept.sum()) - wanted) <= 1, share
        assert float(log_mass) == pytest.approx(float(mass[int(kept.sum()) - 1].log()), abs=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_read_from_aligned_addresses_only(form, dtype, monkeypatch):
    # catches sums in another order, with other bits, where the logits are a part of something that does not begin at 16 bytes
    from rlhf.kernels import sampling_triton

    rows, launch, read = make_rows(7, rows=2, dtype=dtype), sampling_triton.launch, []

    def seen(kernel, grid, first, *args, **options):
        read.append((kernel.fn.__name__, first.data_ptr() % 16))
        launch(kernel, grid, first, *args, **options)

    monkeypatch.setattr(sampling_triton, "launch", seen)
    whole = call(rows)
    moved = torch.zeros(2 * VOCAB + 1, dtype=dtype)[1:].view(2, VOCAB)
    shifted = call(rows | {"logits": moved.copy_(rows["logits"])})
    assert moved.data_ptr() % 16 and [at for name, at in read if name == "_cut"] == [0, 0]
    for field in FIELDS:
        assert torch.equal(getattr(shifted, field), getattr(whole, field))


def repeated(logits, count, key=12345, **cuts):
    """Draws from one row: one sample's, at positions 0, 1, ..."""
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    temperature = torch.full((count,), cuts.pop("temperature", 1.0))
    given = {name: torch.full((count,), x, dtype=dtypes[name]) for name, x in cuts.items()}
    return sample(
        logits.expand(count, -1), torch.full((count,), key), torch.arange(count), temperature, **given
    )


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.7},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(form, cuts):
    # catches noise that is not Gumbel's, or depends on the token: 100,000 draws against the float64 distribution
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 500 if INTERPRETED else 100_000
    observed = np.bincount(repeated(logits, count, **cuts).tokens.numpy(), minlength=VOCAB)
    probs = reference_distribution(logits.double().numpy(), cuts.pop("temperature", 1.0), **cuts)
    assert observed[probs == 0].sum() == 0
    likely = count * probs > 5
    chi_square = ((observed - count * probs)[likely] ** 2 / (count * probs[likely])).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_draws_of_many_keys_follow_the_distribution():
    # catches rows whose noise is alike: neighbouring keys at one position, and pairs of them together
    probs = torch.softmax(torch.arange(8.0) / 3, 0)
    count = 200_000
    given = probs.log().expand(count, -1), torch.arange(count), torch.zeros(count, dtype=torch.int64)
    tokens = sample(*given, torch.ones(count)).tokens.numpy()
    for observed, wanted in (
        (np.bincount(tokens, minlength=8), probs),
        (np.bincount(tokens[::2] * 8 + tokens[1::2], minlength=64), torch.outer(probs, probs).flatten()),
    ):
        wanted = wanted.double().numpy() * observed.sum()
        chi_square = ((observed - wanted) ** 2 / wanted).sum()
        assert chi_square < len(wanted) - 1 + 4 * np.sqrt(2 * len(wanted))


def test_rare_tokens_come_at_their_rate(form):
    # catches noise whose tail ends too early: 500 tokens with a probability of 1e-6 each, 150 draws of them expected
    if INTERPRETED:
        pytest.skip("needs many rows")
    logits = torch.full((512,), float(np.log(1e-6)))
    logits[::50] = float(np.log((1 - 501e-6) / 11))
    tokens = torch.cat([repeated(logits, 30_000, key=key).tokens for key in range(10)])
    expected = 300_000 * 501e-6
    assert abs(int((tokens % 50 != 0).sum()) - expected) < 4 * expected**0.5
    assert len(set(tokens[tokens % 50 != 0].tolist())) > 90


def test_a_token_with_the_worst_noise_is_drawn_where_it_is_the_only_one(form):
    # catches noise of -inf: at this key and position token 5's word is 2^32 - 8, and a banned token would win
    keys, positions = torch.tensor([7]), torch.tensor([3764565])
    word = token_words(random_bits(keys, positions), torch.tensor(5))
    assert int(word) == (1 << 32) - 8
    others = torch.tensor([c for c in range(16) if c != 5])
    drawn = sample(
        torch.zeros(1, 16), keys, positions, torch.ones(1), banned=(torch.zeros_like(others), others)
    )
    assert int(drawn.tokens[0]) == 5 and float(drawn.processed_logprobs[0]) == 0
    assert float(drawn.logprobs[0]) == pytest.approx(-np.log(16))


@pytest.mark.parametrize(("logit", "wins"), [(-14.0, True), (-25.0, False)])
def test_the_best_noise_is_neither_lost_nor_infinite(form, logit, wins):
    # catches 1 - x rounded to 1: at this key and position token 5's word is 20, its noise 19.2
    keys, positions = torch.tensor([7]), torch.tensor([55690326])
    assert int(token_words(random_bits(keys, positions), torch.tensor(5))) == 20
    logits = torch.zeros(1, 16)
    logits[0, 5] = logit
    assert (int(sample(logits, keys, positions, torch.ones(1)).tokens[0]) == 5) == wins


def test_known_draws(form):
    # catches a change of the noise, after which no run of before can be repeated
    drawn = sample(
        torch.zeros(6, 1000),
        torch.tensor([1, 1, 1, 2, 3, 1 << 62]),
        torch.tensor([0, 1, 2, 0, 0, 9]),
        torch.ones(6),
    )
    assert drawn.tokens.tolist() == [256, 960, 67, 953, 149, 44]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_probs_are_the_trainers_bit_for_bit(form, dtype, temperature):
    # catches a logsumexp of the sampler's own, or a temperature that is applied in another way
    rows = make_rows(4, rows=8, vocab=3001, dtype=dtype)
    rows["temperature"][:] = temperature
    drawn = call(rows)
    assert torch.equal(drawn.logprobs, token_logprobs(rows["logits"], drawn.tokens, temperature)[0])


def test_what_cuts_nothing_leaves_the_log_prob(form):
    # catches processed log-probs with another sum where they are the policy's, and cuts of rows that have none
    rows = make_rows(5, rows=6)
    for name, nothing in CUTS.items():
        rows[name][:] = nothing
    rows["temperature"][:] = 0.7
    rows["top_k"][0] = VOCAB
    rows["top_p"][1] = 0.5
    drawn = call(rows)
    assert torch.equal(drawn.processed_logprobs == drawn.logprobs, torch.arange(6) != 1)


def test_greedy_reports_the_policy_at_temperature_one(form):
    # catches greedy log-probs of 0 or -inf in `logprobs`, which a trainer would take for the policy's; noise in a greedy
    # row; of equal logits another than the first
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]]).expand(20, -1)
    keys = torch.arange(20)
    drawn = sample(logits, keys, keys, torch.zeros(20), top_k=torch.full((20,), 3))
    assert drawn.tokens.tolist() == [1] * 20
    assert torch.equal(drawn.logprobs, torch.log_softmax(logits, -1)[:, 1])
    assert (drawn.processed_logprobs == 0).all()


@pytest.mark.parametrize("cut", [False, True])
def test_non_finite_logits_give_a_token_and_a_nan(form, cut):
    # catches an index out of range, a search that never ends, or a finite log-prob that hides a broken policy
    logits = torch.zeros(5, 40)
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    row = torch.arange(5)
    cuts = dict(top_k=row + 3, top_p=torch.full((5,), 0.9).double(), min_p=torch.full((5,), 0.1).double())
    drawn = sample(logits, row, row, torch.ones(5), **(cuts if cut else {}))
    assert ((0 <= drawn.tokens) & (drawn.tokens < 40)).all()
    for found in (drawn.logprobs, drawn.processed_logprobs):
        assert found.isnan().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("cut", [False, True])
def test_where_nothing_can_be_drawn_both_log_probs_are_nan(form, cut):
    # catches a banned token that is returned with the log-prob of the policy, or a greedy one with 0, where no other was left:
    # all of row 0 and 1 are banned, of row 2 what has a probability; rows 3 and 4 keep one token
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    logits[2, :10] = -torch.inf
    kept = {0: [], 1: [], 2: range(10), 3: [7], 4: [8]}
    bans = [(row, column) for row in kept for column in range(20) if column not in kept[row]]
    row, temperature = torch.arange(5), torch.tensor([1.0, 0.0, 0.7, 1.3, 0.0])
    cuts = dict(top_k=row + 3, top_p=torch.full((5,), 0.9).double(), min_p=torch.full((5,), 0.1).double())
    banned = tuple(torch.tensor(bans).T)
    drawn = sample(logits, row, row, temperature, **(cuts if cut else {}), banned=banned)
    assert ((0 <= drawn.tokens) & (drawn.tokens < 20)).all() and drawn.tokens[3:].tolist() == [7, 8]
    for found in (drawn.logprobs, drawn.processed_logprobs):
        assert found.isnan().tolist() == [True] * 3 + [False] * 2
    assert drawn.processed_logprobs[3:].tolist() == [0, 0]


def test_a_token_of_probability_zero_is_never_drawn(form):
    # catches noise that lifts -inf, and a first token that is taken where nothing was better
    logits = torch.full((16, 20), -torch.inf)
    logits[:, 13] = -5.0
    row = torch.arange(16)
    assert sample(logits, row, row, torch.ones(16)).tokens.tolist() == [13] * 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(4)}, r"logits \(4,\)"),
        ({"logits": torch.zeros(4, 0)}, r"logits \(4, 0\)"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int64)}, r"logits \(4, 8\) torch.int64"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys \(3,\) .* logits \(4, 8\)"),
        ({"positions": torch.zeros(4)}, r"positions \(4,\) torch.float32 .* torch.int64"),
        ({"temperature": torch.ones(4, 1)}, r"temperature \(4, 1\) .* \(4,\) torch.float32"),
        ({"top_k": torch.ones(4)}, r"top_k \(4,\) torch.float32"),
        ({"top_p": torch.ones(4)}, r"top_p \(4,\) torch.float32 .* torch.float64"),
        ({"min_p": torch.ones(5).double()}, r"min_p \(5,\)"),
        ({"banned": (torch.tensor([0]), torch.tensor([1, 2]))}, r"rows \(1,\) and columns \(2,\)"),
        (
            {"temperature": torch.tensor([1.0, -1.0, 1.0, 1.0])},
            r"temperature \[1.0, -1.0, 1.0, 1.0\] .* in \[0, ",
        ),
        ({"temperature": torch.full((4,), torch.nan)}, r"temperature \[nan"),
        ({"top_k": torch.tensor([1, 2, -1, 0])}, r"top_k \[1, 2, -1, 0\]"),
        ({"top_p": torch.full((4,), 1.5).double()}, r"top_p \[1.5"),
        ({"min_p": torch.full((4,), 1.5).double()}, r"min_p \[1.5"),
        (
            {"banned": (torch.tensor([0]), torch.tensor([1], dtype=torch.int32))},
            r"torch.int64 and torch.int32: they",
        ),
        (
            {"banned": (torch.tensor([0], dtype=torch.int32), torch.tensor([1]))},
            r"torch.int32 and torch.int64: they",
        ),
        (
            {"banned": (torch.tensor([0]).int(), torch.tensor([1]).int())},
            r"torch.int32 and torch.int32: they",
        ),
        ({"banned": (torch.tensor([True]), torch.tensor([1]))}, r"torch.bool and torch.int64: they"),
        (
            {"banned": (torch.zeros(1, dtype=torch.int64, device="meta"), torch.tensor([1]))},
            r"on meta, cpu and cpu",
        ),
        (
            {"banned": (torch.tensor([0]), torch.zeros(1, dtype=torch.int64, device="meta"))},
            r"on cpu, meta and cpu",
        ),
        (
            {"banned": (torch.zeros(1, dtype=torch.int64, device="meta"),) * 2},
            r"on meta, meta and cpu",
        ),
        ({"banned": (torch.tensor([4]), torch.tensor([1]))}, r"4 to 4 is outside \[0, 4\)"),
        ({"banned": (torch.tensor([0, 1]), torch.tensor([1, -1]))}, r"-1 to 1 is outside \[0, 8\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, said):
    # catches a kernel that reads or writes beside its tensors
    count = torch.arange(4)
    rows = {"logits": torch.zeros(4, 8), "keys": count, "positions": count, "temperature": torch.ones(4)}
    with pytest.raises(ValueError, match=said):
        sample(**(rows | change))
