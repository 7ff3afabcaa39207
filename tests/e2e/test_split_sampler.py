"""A run whose engine is split over two processes is the run of one engine, to the bit."""

import pytest

from tests.e2e.running import assert_same_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_split_engine_changes_nothing(tiny, train):
    """Would catch: a request that only one process is given, weights of which a process has another's rows, and completions
    that are taken twice."""
    tiny["model"]["build"]["config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    runs = []
    for processes, size in ((1, 1), (4, 2)):
        placement = {
            "train": {"roles": ["actor", "reference"]},
            "sample": {"roles": ["rollout"], "processes": processes},
        }
        recipe = tiny | {"placement": placement, "runtime": {"backend": "ray", "threads": 1}}
        recipe["rollout"] = tiny["rollout"] | {"tensor_parallel": size}
        done, folder = train(recipe, name=f"over-{processes}")
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(folder)
    assert_same_run(*runs)
