"""Models that share the run's token ids must read them alike."""

from __future__ import annotations

import copy

import pytest

from rlhf.models import build_model, build_tokenizer, check_own_tokens, save_model
from rlhf.process import ProcessInfo
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, ModelConfig, TokenizerConfig
from rlhf.trainers.worker import Worker
from tests.e2e.running import TINY

HERE = ProcessInfo("train", 0, 1, 0, "127.0.0.1", 0, "cpu")
ALPHABET = BuildTokenizerConfig().alphabet
TASK = {"task": "chain_arithmetic", "task_args": {"count": 20, "terms": 3}}
DISTILL = {"method": "distill", "data": TASK | {"response_column": "response"}}
PPO = {"method": "ppo", "data": TASK, "reward": TINY["reward"]}
# By role: a recipe that has it, and the key of its model.
CASES = {
    "critic": (PPO, "critic.path"),
    "reference": (PPO | {"algorithm": {"kl_coef": 0.1}}, "reference.path"),
    "reward": (PPO, "reward_model.path"),
    "teacher": (DISTILL, "teacher.path"),
}


def folder_with(alphabet: str, folder) -> str:
    tokenizer = build_tokenizer(BuildTokenizerConfig(alphabet=alphabet))
    model = build_model(BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=1)
    save_model(model, tokenizer, folder)
    return str(folder)


def worker_with(role: str, path: str) -> Worker:
    changes, key = CASES[role]
    section, name = key.split(".")
    recipe = {key: copy.deepcopy(TINY[key]) for key in ("model", "tokenizer", "runtime", "tracking")}
    recipe |= changes | {section: {name: path}, "trainer": {"steps": 1, "zero_stage": 0}}
    recipe = plan_from_dict(recipe).stages[0].recipe
    return Worker(HERE, recipe=recipe, roles=(role,), threads=1, total_updates=1)


@pytest.mark.parametrize("role", CASES)
def test_a_model_with_its_tokens_in_another_order_is_refused(role: str, tmp_path) -> None:
    """Would catch: a critic (a teacher, a reference, a reward model) that reads every token as another one: no error, and
    numbers that mean nothing."""
    path = folder_with(ALPHABET[::-1], tmp_path / "other")
    with pytest.raises(
        ValueError, match=f"{CASES[role][1]}={path} has another tokenizer than the model that is trained"
    ):
        worker_with(role, path)


def test_a_critic_with_the_same_tokens_is_taken(tmp_path) -> None:
    """Would catch: a check that refuses what belongs together."""
    worker_with("critic", folder_with(ALPHABET, tmp_path / "same")).close()


def test_the_trained_model_keeps_its_own_tokens(tmp_path) -> None:
    """Would catch: a model that is given a tokenizer of other numbers, and learns from nonsense to the end."""
    model = ModelConfig(path=folder_with(ALPHABET, tmp_path / "model"))
    for build, fits in ((ALPHABET, True), (ALPHABET + "~", True), (ALPHABET[::-1], False)):
        config = TokenizerConfig(build=BuildTokenizerConfig(alphabet=build))
        tokenizer = build_tokenizer(config.build)
        if fits:
            check_own_tokens(model, config, tokenizer)
            continue
        with pytest.raises(ValueError, match="tokenizer.build: the model at .* was trained on other tokens"):
            check_own_tokens(model, config, tokenizer)
    check_own_tokens(model, TokenizerConfig(), build_tokenizer(BuildTokenizerConfig(alphabet="ab")))
