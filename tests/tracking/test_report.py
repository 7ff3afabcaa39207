"""report.html: made from files alone, true to them, safe against what a model wrote, small for long runs."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.charts import Curve, Span, chart, format_value, nice_ticks, thin
from rlhf.report import build_report, heldout_changes
from rlhf.runlog import encode_record

EVIL = '" onfocus="x"><script>alert(1)</script><img src=x onerror=alert(2)>\'&lt;'


def write_run(run_dir, metrics, *, timings=(), samples=(), **changes):
    run = {
        "name": "test-run",
        "status": "finished",
        "reason": None,
        "recipe_source": "recipes/test.yaml",
        "stages": [
            {"name": "sft", "method": "sft", "first_step": 1, "last_step": 10},
            {"name": "grpo", "method": "grpo", "first_step": 11, "last_step": 20},
        ],
        "sessions": [{"started": 1e9, "updated": 1e9 + 75, "resume_step": None}],
        "versions": {},
        "facts": {},
        "warnings": [],
        "dropped": {},
        "recipe": {"model": {"path": "some/model"}},
        **changes,
    }
    (run_dir / "run.json").write_text(json.dumps(run))
    for name, records in (("metrics", metrics), ("timings", timings), ("samples", samples)):
        (run_dir / f"{name}.jsonl").write_bytes(b"".join(map(encode_record, records)))
    return build_report(run_dir).read_text("utf-8")


def two_stages():
    records = [{"step": 0, "stage": "sft", "eval/test/pass@1": 0.125}]
    for step in range(1, 21):
        stage = "sft" if step <= 10 else "grpo"
        values = {"sft/loss": 3 / step} if stage == "sft" else {"reward/mean": step / 20, "mismatch/kl": 0.0}
        if step in (10, 20):
            values["eval/test/pass@1"] = step / 25
        records.append({"step": step, "stage": stage, **values})
    return records


def sample(**changes):
    return {
        "step": 12,
        "stage": "grpo",
        "sample_id": "12/0/0",
        "prompt_id": "train/0",
        "prompt": "2+2=",
        "response": "4",
        "reward": 1.0,
        "reward_parts": {"a": 1.0, "b": 0.0},
        "reward_error": None,
        "finish_reason": "stop",
        "response_tokens": 2,
        **changes,
    }


def visible_text(page):
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def plot_data(page):
    return [json.loads(html.unescape(text)) for text in re.findall(r'data-c="([^"]*)"', page)]


def test_the_first_screen_answers_which_run_how_far_and_how_good(tmp_path):
    # Catches: a header that shows the wrong end of a metric, or hides how far the run came.
    text = visible_text(write_run(tmp_path, two_stages()))
    for words in (
        "test-run finished recipe recipes/test.yaml sft 10 steps → grpo 10 steps step 20 of 20",
        "1 min 15 s",
        "Held-out accuracy 12.5 % → 80.0 %",
        "pass@1 on test : 12.5 % at step 0, 40.0 % after sft, 80.0 % after grpo",
        "Training reward 0.55 → 1",
    ):
        assert words in text, words


def test_a_failed_run_says_why_and_how_far(tmp_path):
    page = write_run(tmp_path, two_stages()[:13], status="failed", reason="RewardError: <b>no</b>")
    text = visible_text(page)
    assert "test-run failed" in text and "step 12 of 20" in text and "RewardError: <b>no</b>" in text


def test_a_run_without_any_record_has_a_report(tmp_path):
    # Catches: a report that cannot be made before the first step, or after a failure at the start.
    text = visible_text(write_run(tmp_path, [], stages=[], status="failed", reason="no such dataset"))
    assert "No step has been recorded yet" in text and "no such dataset" in text
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        build_report(tmp_path / "elsewhere")


def test_text_from_models_and_datasets_is_escaped_everywhere(tmp_path):
    # Catches: a response, reward part, error, name or metric that becomes markup in the browser.
    metrics = [
        {"step": s, "stage": EVIL, "eval/<b>/pass@1": 0.1 * s, f"reward/{EVIL}/mean": s / 2} for s in (1, 2)
    ]
    odd = sample(
        stage=EVIL, prompt=EVIL, response=EVIL, reward=None, reward_parts={EVIL: EVIL, "b": 1.0}, reward_error=EVIL,
        finish_reason=EVIL,
    )  # fmt: skip
    page = write_run(
        tmp_path,
        metrics,
        samples=[odd],
        name=EVIL,
        reason=EVIL,
        recipe_source=EVIL,
        facts={EVIL: EVIL},
        warnings=[EVIL],
        dropped={EVIL: {"count": 1, "error": EVIL}},
        recipe={EVIL: EVIL, "nested": {"list": [EVIL]}},
        stages=[
            {"name": n + EVIL, "method": EVIL, "first_step": i, "last_step": i} for i, n in enumerate("ab", 1)
        ],
        timings=[{"step": 1, "stage": EVIL, f"time/{EVIL}_s": 1.0}],
        versions={EVIL: EVIL},
    )

    class Tags(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.found.append(tag)
            assert not any(name.startswith("on") for name, _ in attrs), attrs

    Tags().feed(page)
    assert Tags.found.count("script") == 1 and "img" not in Tags.found


def test_the_page_stands_alone(tmp_path):
    # Catches: a font or script from the network; a script edited without its hash, which browsers then refuse.
    page = write_run(tmp_path, two_stages(), samples=[sample()])
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", page)
    script = re.search(r"<script>(.*?)</script>", page, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page


@pytest.mark.parametrize(
    ("method", "metric", "title"),
    [("kto", "kto/loss", "Training loss"), ("prm", "prm/accuracy", "Training accuracy"),
     ("distill", "distill/divergence", "Distance to the teacher")],
)  # fmt: skip
def test_every_method_has_a_first_screen(tmp_path, method, metric, title):
    # Catches: "No step has been recorded yet" above the curves of a finished run without held-out sets.
    records = [{"step": s, "stage": method, metric: s / 4} for s in (1, 2)]
    stages = [{"name": method, "method": method, "first_step": 1, "last_step": 2}]
    text = visible_text(write_run(tmp_path, records, stages=stages))
    assert "No step" not in text and f"{title} 0.25 → 0.5" in text.replace("25.0 %", "0.25").replace(
        "50.0 %", "0.5"
    )


def test_the_facts_are_those_that_the_method_reads(tmp_path):
    # Catches: a KTO run that claims a group size and a KL coefficient.
    recipe = {"kto": {"beta": 0.3, "loss": "kto"}, "rollout": {"group_size": 8}}
    recipe |= {"algorithm": {"advantage": "grpo", "kl_coef": 0.0}, "preference": {"beta": 0.7}}
    texts = {}
    for method in ("kto", "grpo", "dpo"):
        folder = tmp_path / method
        folder.mkdir()
        stages = [{"name": "one", "method": method, "first_step": 1, "last_step": 2}]
        page = visible_text(
            write_run(folder, [{"step": 1, "stage": "one", "x": 1}], stages=stages, recipe=recipe)
        )
        texts[method] = page[page.index("Facts") : page.index("The whole recipe")]
    assert "beta 0.3" in texts["kto"] and not re.search("group size|advantage|KL", texts["kto"])
    assert (
        "group size 8" in texts["grpo"]
        and "KL coefficient 0.0" in texts["grpo"]
        and "beta" not in texts["grpo"]
    )
    assert "beta 0.7" in texts["dpo"]


def test_every_stage_has_the_same_width(tmp_path):
    # Catches: 36 steps of GRPO in the last 8 % of a chart, behind a warm-up of 400; points at another stage's place.
    stages = [
        {"name": "sft", "method": "sft", "first_step": 1, "last_step": 400},
        {"name": "grpo", "method": "grpo", "first_step": 401, "last_step": 440},
    ]
    records = [{"step": s, "stage": "sft", "eval/t/pass@1": s / 1000} for s in (0, 200, 400)]
    records += [{"step": s, "stage": "grpo", "eval/t/pass@1": s / 1000} for s in (420, 440)]
    data = plot_data(write_run(tmp_path, records, stages=stages))[0]
    assert (
        data["at"] == [0, 250, 500, 750, 1000]
        and data["k"] == [0, 0, 0, 1, 1]
        and data["n"] == ["sft", "grpo"]
    )


def family(count):
    """Stages of 10 steps after a warm-up of 100, each from the warm-up's model."""
    names = ["warmup", *(f"v{i}" for i in range(count - 1))]
    stages = [{"name": "warmup", "method": "sft", "first_step": 1, "last_step": 100}]
    records = [{"step": s, "stage": "warmup", "eval/t/pass@1": s / 200} for s in (0, 100)]
    for i, name in enumerate(names[1:]):
        first = 101 + 10 * i
        stages.append({"name": name, "method": "dpo", "first_step": first, "last_step": first + 9})
        records += [{"step": first + d, "stage": name, "eval/t/pass@1": 0.5 + i / 100} for d in (4, 9)]
    models = {name: {"model": {"path": None if name == "warmup" else "stage:warmup"}} for name in names}
    return records, {"stages": stages, "recipe": {"stages": models}}


def test_stages_side_by_side_are_numbered_listed_and_not_joined(tmp_path):
    # Catches: one sentence of twenty milestones, labels on top of each other, and a line from the end of one variant
    # to the start of the next, which began from the warm-up.
    records, run = family(20)
    page = write_run(tmp_path, records, **run)
    text = visible_text(page)
    assert "at step 0 0 % 1 warmup 50.0 % 2 v0 50.0 % 3 v1 51.0 %" in text and "20 v18 68.0 %" in text
    assert "after v3" not in text and 'class="s" style="left:0.0%;max-width:10.0%">1<' in page
    (line,) = set(re.findall(r'class="line" d="([^"]*)"', page[: page.index("Curves")]))
    assert line.count("M") == 19  # warm-up and the first variant are one line
    few, run = family(4)
    assert "50.0 % after warmup, 50.0 % after v0" in visible_text(write_run(tmp_path, few, **run))


def test_values_that_are_not_finite_are_shown(tmp_path):
    # Catches: NaN dropped from the curve, from the count, or breaking the page's data.
    records = [
        {"step": s, "stage": "grpo", "policy/loss": {5: math.nan, 6: math.inf}.get(s, s / 10)}
        for s in range(1, 11)
    ]
    page = write_run(tmp_path, records)
    assert "2 not finite" in page and "policy/loss = nan: not a finite number" in visible_text(page)
    (data,) = plot_data(page)
    assert data["y"][4:6] == [None, None] and page.count('class="broken"') == 1


def test_a_constant_metric_is_a_number_and_no_chart(tmp_path):
    page = write_run(tmp_path, two_stages())
    assert "mismatch/kl 0 at all 10 steps" in visible_text(page)


def test_missing_rewards_are_not_zeros(tmp_path):
    # Catches: a failed reward shown as a bad answer.
    rows = [
        sample(),
        sample(reward=None, reward_error="TimeoutError"),
        sample(reward="NaN"),
        sample(response=""),
    ]
    text = visible_text(write_run(tmp_path, two_stages(), samples=rows))
    assert "4 samples, mean reward 1 " in text and "missing" in text and "TimeoutError" in text
    assert "NaN" in text and "(empty)" in text


def test_a_long_run_gives_a_small_page_that_keeps_spikes(tmp_path):
    # Catches: a page of hundreds of megabytes, and thinning that hides a spike.
    records = [{"step": s, "stage": "grpo", "reward/mean": 0.5 + 0.1 * math.sin(s)} for s in range(1, 10_001)]
    records[7_000]["reward/mean"] = 40.0
    samples = [sample(step=s, response="x" * 50_000) for s in range(1, 10_001, 50)]
    stages = [{"name": "grpo", "method": "grpo", "first_step": 1, "last_step": 10_000}]
    page = write_run(tmp_path, records, samples=samples, stages=stages)
    assert len(page) < 300_000
    for data in plot_data(page):
        assert len(data["x"]) <= 320 and max(v for v in data["h"] if v is not None) == 40.0
    assert "step 1 " in visible_text(page) and "47,000 more characters" in page


def test_headline_prefers_pass_at_1():
    records = [{"step": 0, "stage": "a", "eval/t/mean@4": 0.1, "eval/t/pass@1": 0.2, "eval/t/pass@4": 0.9}]
    (change,) = heldout_changes(records)
    assert change.name == "eval/t/pass@1" and change.first == change.last == 0.2


finite = st.floats(-1e6, 1e6)


@given(st.lists(st.one_of(finite, st.just(math.nan), st.just(math.inf)), min_size=1, max_size=500))
def test_thinning_keeps_the_extremes_and_the_order(values):
    # Catches: points lost at a bucket's edge, a mean poisoned by one NaN.
    steps = list(range(1, len(values) + 1))
    points = thin(Curve("m", steps, values), 40)
    assert len(points.steps) <= 40 and points.steps == sorted(set(points.steps))
    known = [v for v in values if math.isfinite(v)]
    if known:
        assert min(v for v in points.low if not math.isnan(v)) == min(known)
        assert max(v for v in points.high if not math.isnan(v)) == max(known)
    assert chart(Curve("m", steps, values), spans=[Span(1, "s", 1, len(values))]).count("<svg") == 1


@given(finite, st.floats(1e-6, 1e6), st.integers(2, 6))
def test_ticks_are_few_round_and_inside(low, width, count):
    ticks = nice_ticks(low, low + width, count)
    assert 1 <= len(ticks) <= count + 2
    assert all(low - width * 1e-3 - 1e-9 <= t <= low + width * (1 + 1e-3) + 1e-9 for t in ticks)


@pytest.mark.parametrize(
    ("value", "share", "text"),
    [(0.0, True, "0 %"), (1.0, True, "100 %"), (0.9999, True, "100.0 %"), (0.356, True, "35.6 %"), (32, False, "32"),
     (3e-4, False, "3e-4"), (0.5287, False, "0.529"), (21_000.0, False, "21.0k"), (math.nan, False, "NaN"),
     (-math.inf, True, "-inf"), (None, False, "–"), (0, False, "0"), (-1.5, False, "-1.5"), (2.5e7, False, "2.5e7")],
)  # fmt: skip
def test_numbers_for_people(value, share, text):
    assert format_value(value, share=share) == text
