"""A judge's verdicts against plain transformers, comparisons in both orders, and what it cannot read."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from rlhf.models import build_model, build_tokenizer, load_model, load_tokenizer
from rlhf.recipe.schema import (
    BuildModelConfig,
    BuildTokenizerConfig,
    JudgeConfig,
    ModelConfig,
    TokenizerConfig,
)
from rlhf.records import Prompt, Rollout
from rlhf.reward import Judge, JudgeReader, RewardError
from rlhf.trainers.rewarding import ModelPart, RewardSum
from rlhf.verdicts import verdict_probabilities, win_rates

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 40, "initializer_range": 0.3}
ALONE = "Q {prompt} A {response} ok?"
PAIR = "{prompt}:{first}|{second}?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("judge")
    tokenizer = build_tokenizer(BuildTokenizerConfig(alphabet="QABok yn0123456789+:|?"))
    build = BuildModelConfig(config={**SIZES, **GQA})
    build_model(build, tokenizer, dtype="float32", seed=7).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def reader(folder):
    def make(template=ALONE, **settings):
        config = JudgeConfig(path=folder, template=template, **{"verdicts": ("y", "n"), **settings})
        model_config = ModelConfig(path=folder, dtype="float32")
        tokenizer = load_tokenizer(model_config, TokenizerConfig())
        judge = JudgeReader(tokenizer, config)
        model = load_model(model_config, tokenizer, seed=0, trainable=False)
        return config, lambda texts, max_tokens=100: judge.ask(
            model, texts, max_tokens=max_tokens, device="cpu"
        )

    return make


def group(number: int, *texts: str) -> list[Rollout]:
    prompt = Prompt(id=str(number), token_ids=(1,), text=f"{number}+1")
    return [
        Rollout(f"0/{number}/{i}", prompt, (2,), (True,), (0.0,), (0,), "stop", text)
        for i, text in enumerate(texts)
    ]


def plain_probability(folder, text, good="y", bad="n", special=True) -> tuple[float, float]:
    """p(good) and p(good) + p(bad) from stock transformers, in float64."""
    tokenizer = load_tokenizer(ModelConfig(path=folder), TokenizerConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    with torch.no_grad():
        p = (
            model(torch.tensor([tokenizer.encode(text, add_special_tokens=special)]))
            .logits[0, -1]
            .softmax(-1)
        )
    p_good, p_bad = (float(p[tokenizer.convert_tokens_to_ids(t)]) for t in (good, bad))
    return p_good / (p_good + p_bad), p_good + p_bad


def test_a_verdict_is_the_probability_after_the_text(folder, reader):
    """Would catch: the distribution after the verdict instead of before it, another text's verdict, p(good) without p(bad),
    fields of the template exchanged."""
    config, ask = reader()
    rollouts = group(1, "2", "34", "5" * 9) + group(7, "8")
    judge = Judge(config, ask)
    got = judge.score(rollouts)
    want = [plain_probability(folder, f"Q {r.prompt.text} A {r.response_text} ok?") for r in rollouts]
    assert got == pytest.approx([p for p, _ in want], abs=1e-5)
    assert judge.stats["judge/verdict_mass"] == pytest.approx(sum(mass for _, mass in want) / 4, abs=1e-5)
    assert len({round(p, 6) for p in got}) == 4


def test_packing_changes_no_bit(reader):
    """Would catch: verdicts that depend on what else is judged."""
    texts = ["Q 1 A 2 ok?", "Q 12345 A 6 ok?", "Q 7 A 89 ok?"]
    _, ask = reader()
    together = ask(texts)
    assert torch.equal(ask(texts, 1), together) and torch.equal(ask(texts[::-1]).flip(0), together)


def test_pairs_are_compared_in_both_orders(folder, reader):
    """Would catch: one order only, a rate of the other response, groups mixed up, a lone response scored."""
    config, ask = reader(PAIR, verdicts=("A", "B"))
    texts = ["2", "34", "5"]
    judge = Judge(config, ask)
    rates = judge.score(group(1, *texts) + group(2, "0", "9"))

    def p(number, first, second):
        return plain_probability(folder, f"{number}+1:{first}|{second}?", "A", "B")[0]

    def beats(number, one, other):
        return (p(number, one, other) + 1 - p(number, other, one)) / 2

    want = [sum(beats(1, a, b) for b in texts if b != a) / 2 for a in texts] + [
        beats(2, "0", "9"),
        beats(2, "9", "0"),
    ]
    assert rates == pytest.approx(want, abs=1e-5)
    assert sum(rates[:3]) == pytest.approx(1.5) and sum(rates[3:]) == pytest.approx(1.0)
    gaps = [abs(p(1, a, b) + p(1, b, a) - 1) for a, b in (("2", "34"), ("2", "5"), ("34", "5"))]
    gaps.append(abs(p(2, "0", "9") + p(2, "9", "0") - 1))
    assert judge.stats["judge/order_gap"] == pytest.approx(sum(gaps) / 4, abs=1e-5)
    with pytest.raises(ValueError, match="needs two responses"):
        judge.score(group(1, "2"))


def test_a_judge_that_prefers_a_place_prefers_no_response():
    """Would catch: the place counted as merit."""
    assert win_rates(3, {(i, j): 0.9 for i in range(3) for j in range(3)}) == pytest.approx([0.5] * 3)


def test_probabilities_survive_extreme_logits():
    """Would catch: 0 / 0 where both verdicts are unlikely."""
    logits = torch.tensor([[200.0, -200.0, -201.0]])
    probability, mass = verdict_probabilities(logits, 1, 2)[0].tolist()
    assert probability == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item())) and mass == 0.0


def test_a_text_beyond_the_context_is_a_missing_reward(reader):
    """Would catch: a truncated text judged as if it were whole, a missing verdict counted as 0."""
    config, ask = reader()
    judge = Judge(config, ask)
    part = ModelPart("judge", 2.0, judge.score, judge.missing, lambda: judge.stats)
    rewards = RewardSum(None, [part])
    fitting = [r for n in range(30) for r in group(n, "1")]
    *scored, last = rewards.score(fitting + group(31, "5" * 50))
    assert last.reward is None and "longer than the judge's context" in last.reward_error
    assert all(r.reward == 2.0 * r.reward_parts["judge"] for r in scored)
    assert rewards.stats["reward/error_frac"] == pytest.approx(1 / 31)
    assert rewards.stats["reward/judge/mean"] == pytest.approx(sum(r.reward for r in scored) / 60)
    with pytest.raises(RewardError, match="2 of 2 rewards are missing"):
        rewards.score(group(1, "5" * 50, "6" * 50))


def test_verdicts_must_be_two_tokens(reader):
    with pytest.raises(ValueError, match="'yn' is 2 tokens"):
        reader(verdicts=("yn", "n"))
    with pytest.raises(ValueError, match="the same token"):
        reader(verdicts=("y", "y"))


def test_the_text_is_a_turn_of_the_judge_s_own_chat_template(folder, reader):
    """Would catch: the bare text, special tokens added twice, no prompt for the judge's turn."""
    tokenizer = load_tokenizer(ModelConfig(path=folder), TokenizerConfig())
    config, ask = reader(chat_template=True)
    turn = [{"role": "user", "content": "Q 1"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    bare = reader()[1]
    assert ask(["Q 1"])[0, 0].item() == pytest.approx(
        plain_probability(folder, rendered, special=False)[0], abs=1e-5
    )
    assert not torch.equal(ask(["Q 1"]), bare(["Q 1"]))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"judge\.chat_template"):
        JudgeReader(tokenizer, config)


@pytest.mark.parametrize(
    "template",
    ["{prompt}", "{prompt} {response} {first}", "{prompt} {response.x}", "{prompt", "{prompt} {response!r}"],
)
def test_templates_that_are_refused(template):
    """Would catch: a template that never shows the response, and attributes of objects in it."""
    with pytest.raises(ValidationError, match="braces|expected '}'"):
        JudgeConfig(path="x", template=template)
