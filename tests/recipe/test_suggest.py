"""Did you mean: typos of every kind, keys in the wrong section, other frameworks' names."""

from __future__ import annotations

import random
import string

import pytest

from rlhf.recipe.load import RecipeError, plan_from_dict
from rlhf.recipe.schema import Recipe
from rlhf.recipe.suggest import SYNONYMS, distance, meant, schema

PLACES = [path for path in schema() if "*" not in path]


def _swap(word, rng):
    at = rng.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _drop(word, rng):
    at = rng.randrange(len(word))
    return word[:at] + word[at + 1 :]


def _double(word, rng):
    at = rng.randrange(len(word))
    return word[:at] + word[at] + word[at:]


def _insert(word, rng):
    at = rng.randrange(len(word) + 1)
    return word[:at] + rng.choice(string.ascii_lowercase) + word[at:]


def _replace(word, rng):
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :]


def _camel(word, rng):
    first, *rest = word.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _hyphens(word, rng):
    return word.replace("_", "-")


def _plural(word, rng):
    return word[:-1] if word.endswith("s") else word + "s"


def _elsewhere(word, rng):
    return word


SLIPS = [_swap, _drop, _double, _insert, _replace, _camel, _hyphens, _plural]


def _typos(count, seed):
    """(path as written, the path that was meant): typos in place, and right names in a wrong section."""
    rng = random.Random(seed)
    sections = sorted({path[:-1] for path in PLACES if path[:-1]})
    made = []
    while len(made) < count:
        path = rng.choice(PLACES)
        slip = rng.choice([*SLIPS, _elsewhere])
        parent = rng.choice(sections) if slip is _elsewhere else path[:-1]
        if len(path[-1]) < 3 and slip in (_drop, _replace):
            continue  # one letter is left of `lr`
        written = (*parent, slip(path[-1], rng))
        if written not in schema():
            made.append((written, path))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_typos_are_understood(seed):
    """Catches: the nearest word of the whole schema instead of the neighbour's, hyphens counted as distance, ..."""
    typos = _typos(200, seed)
    # A name that several sections have may name any of them: all of them are shown.
    wrong = [(w, m, meant(w)) for w, m in typos if m not in meant(w)]
    assert len(wrong) <= 10, wrong


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        (
            "trainer.temperature",
            "it belongs elsewhere: did you mean rollout.temperature or distill.temperature or evaluation.temperature?",
        ),
        ("rollout.kl_coef", "it belongs elsewhere: did you mean algorithm.kl_coef?"),
        ("lr", "it belongs elsewhere: did you mean critic.lr or trainer.lr?"),
        ("trainer.learning_rate", "did you mean trainer.lr?"),
        ("rollout.num_generations", "did you mean rollout.group_size?"),
        ("algorithm.beta", "did you mean algorithm.kl_coef?"),
        ("evaluation.sets.test.pth", "did you mean evaluation.sets.test.path?"),
        ("placement.a.gpu", "did you mean placement.a.gpus?"),
        ("model.lora.r", "known here: rank, alpha, target_modules"),
        ("trainer.rollout", "it belongs elsewhere: did you mean rollout?"),
        (
            "qwertyuiop",
            f"known here: {', '.join(Recipe.model_fields)}",
        ),
    ],
)
def test_hints(written, hint):
    data: dict = {}
    *parents, name = written.split(".")
    at = data
    for parent in parents:
        at = at.setdefault(parent, {})
    at[name] = 1
    with pytest.raises(RecipeError) as caught:
        plan_from_dict(data)
    (problem,) = [p for p in caught.value.problems if p.key == written and p.message == "unknown key"]
    assert problem.hint == hint


def test_synonyms_point_at_keys_that_exist():
    assert {tuple(target.split(".")) for target in SYNONYMS.values()} <= set(schema())


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("lr", "rl", 1), ("steps", "stop", 2), ("ca", "abc", 3)],
)
def test_distance(a, b, steps):
    assert distance(a, b) == distance(b, a) == steps
