"""Policy-gradient losses and advantages against TRL's GRPOTrainer, GMPOTrainer and RLOOTrainer.

TRL's trainers are given the responses in place of what they would sample; they tokenise the prompts, score, and take
rewards, advantages, reference and loss with their own code. Where a test is off policy both sides are given the same
old log-probs, far enough from the policy's that the clip acts on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("trl")

from rlhf.advantages import STD_EPS, with_advantages  # noqa: E402
from rlhf.batching import make_batch  # noqa: E402
from rlhf.data import load_prompts  # noqa: E402
from rlhf.recipe import rules  # noqa: E402
from rlhf.records import Rollout  # noqa: E402

GROUP = 4
MAX_RESPONSE = 24
RESPONSES = {  # response, reward; the last of each prompt does not end by itself
    "1+2=": [("3#", 1.0), ("4, 3, 5#", 0.0), ("1+2=3, that is 3", 0.5), ("33333333333", 0.0)],
    "(5-1)*2+3*3=": [("8+9=17", 1.0), ("17", 1.0), ("8+9=16, 16-1=15", 0.25), ("1+1+1+1+1+1", 0.0)],
}
# Name of a row: our algorithm section, TRL's settings. Advantages are rewards minus the group's mean in all.
CASES = {
    "grpo": (
        {"aggregation": "sequence_mean", "kl_coef": 0.04},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "bnpo": ({"aggregation": "token_mean"}, {"loss_type": "bnpo"}),
    "dapo, clip-higher": (
        {"aggregation": "token_mean", "clip_high": 0.5},
        {"loss_type": "dapo", "epsilon_high": 0.5},
    ),
    "dapo, entropy_coef": (
        {"aggregation": "token_mean", "entropy_coef": 0.3},
        {"loss_type": "dapo", "entropy_coef": 0.3},
    ),
    "dr_grpo": ({"aggregation": "constant_length"}, {"loss_type": "dr_grpo"}),
    "grpo, dual_clip (two-sided)": (
        {"aggregation": "sequence_mean", "dual_clip": 1.5},
        {"loss_type": "grpo", "delta": 1.5},
    ),
    "cispo": (  # TRL bounds the ratio itself
        {"objective": "cispo", "aggregation": "token_mean", "clip_low": 1.0, "clip_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "sapo": (
        {"objective": "sapo", "aggregation": "sequence_mean", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.4},
        {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.4},
    ),
    "gspo": (
        {"objective": "gspo", "aggregation": "sequence_mean", "clip_low": 0.05, "clip_high": 0.08},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    ),
    "gmpo": (
        {"objective": "gmpo", "aggregation": "sequence_mean", "clip_low": 0.4, "clip_high": 0.3},
        {"epsilon": 0.4, "epsilon_high": 0.3},
    ),
}
# Sampler and policy differ: our correction, TRL's mode and bounds.
CORRECTIONS = {
    "tis": (
        {"correction": "tis", "correction_cap": 1.4},
        {"mode": "token_truncate", "clip_max": 1.4},
    ),
    "icepop": (
        {"correction": "icepop", "correction_low": 0.7, "correction_high": 1.6},
        {"mode": "token_mask", "clip_min": 0.7, "clip_max": 1.6},
    ),
    "sequence_tis": (
        {"correction": "sequence_tis", "correction_cap": 2.5},
        {"mode": "sequence_truncate", "clip_max": 2.5},
    ),
}


@dataclass
class Sampled:
    """The same responses in both forms; per-token values of one form in the other's places."""

    rollouts: list[Rollout]
    rows: list[dict]  # TRL's

    def completions(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T), token-aligned -> (B, C), a response's tokens from column 0."""
        starts = [len(r.prompt.token_ids) for r in self.rollouts]
        parts = [
            v[s : s + len(r.response_ids)] for v, s, r in zip(values, starts, self.rollouts, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def aligned(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The way back: (B, C) -> (B, T), 0 elsewhere."""
        out = torch.zeros(like.shape, dtype=values.dtype)
        for row, r in enumerate(self.rollouts):
            start, length = len(r.prompt.token_ids), len(r.response_ids)
            out[row, start : start + length] = values[row, :length]
        return out


@pytest.fixture(scope="module")
def sampled(ours) -> Sampled:
    texts = [[{"role": "user", "content": text}] for text in RESPONSES]
    recipe = ours.recipe("grpo")
    prompts = load_prompts(
        recipe.data, ours.tokenizer, name="train", max_context=100, rows=[{"prompt": t} for t in texts]
    )
    rollouts, rows = [], []
    for prompt, text, responses in zip(prompts, texts, RESPONSES.values(), strict=True):
        for i, (response, reward) in enumerate(responses):
            ids = tuple(ours.tokenizer.encode(response, add_special_tokens=False))
            ids += (ours.tokenizer.eos_token_id,) * (i < GROUP - 1)
            rollouts.append(
                Rollout(
                    sample_id=f"0/{prompt.id}/{i}",
                    prompt=prompt,
                    response_ids=ids,
                    response_mask=(True,) * len(ids),
                    rollout_logprobs=(0.0,) * len(ids),
                    policy_versions=(0,) * len(ids),
                    finish_reason="stop" if i < GROUP - 1 else "length",
                    reward=reward,
                )
            )
            rows.append({"prompt": text, "score": reward})
    batch = make_batch(rollouts, group_ids=[0] * len(rollouts))
    return Sampled(with_sampler_logprobs(rollouts, off_policy(ours, batch, seed=0)), rows)


@pytest.fixture
def recipe_of(ours):
    def make(**algorithm):
        return ours.recipe(
            "grpo",
            algorithm={"advantage": "dr_grpo", **algorithm},
            rollout={"group_size": GROUP, "max_response_tokens": MAX_RESPONSE},
        )

    return make


@pytest.fixture
def batch_of(ours, sampled):
    """batch_of(recipe) -> the step's batch with the reference's log-probs and the advantages."""

    def make(recipe, **fields):
        groups = [i // GROUP for i in range(len(sampled.rollouts))]
        batch = make_batch(sampled.rollouts, group_ids=groups)
        if recipe.algorithm.kl_coef:
            batch = batch.replace(ref_logprobs=ours.logprobs("reference", batch))
        return with_advantages(batch.replace(**fields), rules.decided(recipe))

    return make


@pytest.fixture
def ours_on(ours):
    def run(recipe, batch):
        return ours.loss("policy", recipe, batch, kl_coef=recipe.algorithm.kl_coef)

    return run


@pytest.fixture
def trainer_on(theirs, sampled):
    """trainer_on(kind, config, **settings) -> one of TRL's online trainers and what it makes of the responses."""
    from datasets import Dataset

    def score(completions, score, **columns):
        return score

    def make(kind, config, *, sampler=False, **settings):
        arguments = theirs.arguments(
            per_device_train_batch_size=len(sampled.rows),
            num_generations=GROUP,
            max_completion_length=MAX_RESPONSE,
            **settings,
        )
        trainer = kind(
            theirs.model(),
            reward_funcs=score,
            args=config(**arguments),
            train_dataset=Dataset.from_list(sampled.rows),
            processing_class=theirs.tokenizer,
        )
        if trainer.ref_model is not None:
            trainer.ref_model.load_state_dict(theirs.model("reference").state_dict())
        trainer.use_vllm = sampler  # its corrections need the sampler's log-probs only
        ids = [list(r.response_ids) for r in sampled.rollouts]
        logprobs = [list(r.rollout_logprobs) for r in sampled.rollouts] if sampler else None
        responses = ids if kind.__name__ == "RLOOTrainer" else (ids, logprobs)
        trainer._generate_single_turn = lambda *args, **kwargs: responses
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer._generate_and_score_completions(sampled.rows)
        check_tokens(sampled, inputs)
        return trainer, inputs

    return make


@pytest.fixture
def grpo_on(trainer_on):
    from trl import GRPOConfig, GRPOTrainer

    def make(**settings):
        return trainer_on(GRPOTrainer, GRPOConfig, **{"scale_rewards": "none", **settings})

    return make


def check_tokens(sampled, inputs):
    for i, rollout in enumerate(sampled.rollouts):
        for ids, which in ((rollout.prompt.token_ids, "prompt"), (rollout.response_ids, "completion")):
            assert inputs[f"{which}_ids"][i][inputs[f"{which}_mask"][i].bool()].tolist() == list(ids)


def with_sampler_logprobs(rollouts, batch):
    """The rollouts, as if the batch's old policy had sampled them."""
    starts = [len(r.prompt.token_ids) for r in rollouts]
    rows = [row[s:].tolist() for row, s in zip(batch.old_logprobs, starts, strict=True)]
    return [
        r.replace(rollout_logprobs=tuple(row[: len(r.response_ids)]))
        for r, row in zip(rollouts, rows, strict=True)
    ]


def off_policy(ours, batch, seed=1):
    """The batch with the policy's log-probs and noise in place of the old policy's."""
    noise = torch.Generator().manual_seed(seed)
    old = ours.logprobs("policy", batch) + 0.5 * torch.randn(batch.token_ids.shape, generator=noise)
    return batch.replace(old_logprobs=torch.where(batch.loss_mask, old, 0.0))


def loss_of(trainer, inputs):
    return trainer.model, trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("name", CASES)
def test_policy_loss(name, ours, sampled, recipe_of, batch_of, ours_on, grpo_on, trainer_on, agree):
    """Catches: a bound at the wrong side, a mean over other tokens, a KL or an entropy with another sign."""
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    algorithm, settings = CASES[name]
    recipe = recipe_of(**algorithm)
    batch = off_policy(ours, batch_of(recipe))
    if name == "gmpo":
        trainer, inputs = trainer_on(GMPOTrainer, GMPOConfig, scale_rewards="none", **settings)
    else:
        trainer, inputs = grpo_on(**settings)
    inputs["old_per_token_logps"] = sampled.completions(batch.old_logprobs)
    assert torch.allclose(inputs["advantages"], sampled.completions(batch.advantages)[:, 0], atol=1e-6)

    mine, sums = ours_on(recipe, batch)
    clipped = [float(sums[f"policy/clip_frac_{side}"]) for side in ("low", "high")]
    if name not in ("sapo", "cispo"):
        assert all(clipped), "no token is clipped at one side: nothing is tested there"
    agree(name, mine, loss_of(trainer, inputs))


@pytest.mark.parametrize(("estimator", "corrected"), [("k3", False), ("k3_k2", True)])
def test_grpo_on_policy(estimator, corrected, ours, recipe_of, batch_of, ours_on, grpo_on, agree):
    """Catches: log-probs at another temperature; a ratio of 1 that loses its gradient.

    TRL multiplies k3 by the ratio (DeepSeek-V3.2): at ratio 1 that has k3's value and k2's gradient.
    """
    recipe = recipe_of(aggregation="sequence_mean", kl_coef=0.3, kl_estimator=estimator)
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"temperature": 0.7})})
    batch = batch_of(recipe)
    batch = batch.replace(ref_logprobs=ours.logprobs("reference", batch, temperature=0.7))
    trainer, inputs = grpo_on(loss_type="grpo", beta=0.3, temperature=0.7, use_bias_correction_kl=corrected)
    mine, _ = ours_on(recipe, batch)
    agree(f"grpo, on policy, temperature 0.7, {estimator}", mine, loss_of(trainer, inputs))


def test_the_kl_off_policy_differs(ours, sampled, recipe_of, batch_of, ours_on, grpo_on, measure):
    """TRL multiplies the KL by the ratio by default."""
    recipe = recipe_of(aggregation="sequence_mean", kl_coef=0.04, kl_estimator="k3_k2")
    batch = off_policy(ours, batch_of(recipe))
    trainer, inputs = grpo_on(loss_type="grpo", beta=0.04)
    inputs["old_per_token_logps"] = sampled.completions(batch.old_logprobs)
    mine, _ = ours_on(recipe, batch)
    assert measure("grpo, k3_k2, off policy", mine, loss_of(trainer, inputs), differs=True).loss > 1e-4


def test_grpo_skips_a_tools_tokens(ours, sampled, recipe_of, batch_of, ours_on, grpo_on, agree):
    """Catches: tokens of a tool in the loss or in its denominators."""
    recipe = recipe_of(aggregation="sequence_mean")
    batch = off_policy(ours, batch_of(recipe))
    written = batch.loss_mask.clone()
    for row, rollout in enumerate(sampled.rollouts):
        written[row, len(rollout.prompt.token_ids) + 1] = False
    batch = batch.replace(response_mask=written, loss_mask=written)
    trainer, inputs = grpo_on(loss_type="grpo")
    inputs["old_per_token_logps"] = sampled.completions(batch.old_logprobs)
    inputs["tool_mask"] = sampled.completions(written.long())
    agree("grpo, a tool's tokens", ours_on(recipe, batch)[0], loss_of(trainer, inputs))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections(name, sampled, recipe_of, batch_of, ours_on, grpo_on, agree):
    """Catches: sampler over policy in place of policy over sampler, a bound on the wrong one, a weight with a
    gradient. The old log-probs are TRL's: a product over a sequence adds up the rounding of its log-probs."""
    algorithm, bounds = CORRECTIONS[name]
    recipe = recipe_of(aggregation="token_mean", **algorithm)
    settings = {f"vllm_importance_sampling_{key}": value for key, value in bounds.items()}
    trainer, inputs = grpo_on(loss_type="dapo", sampler=True, **settings)
    batch = batch_of(recipe)
    old = sampled.aligned(inputs["old_per_token_logps"], batch.token_ids)
    mine, sums = ours_on(recipe, batch.replace(old_logprobs=old))
    assert 0.5 < float(sums["policy/correction_kept_frac"] / sums["num_tokens"])  # not all are dropped
    agree(f"correction: {name}", mine, loss_of(trainer, inputs))


def test_sequence_mask_differs(recipe_of, batch_of, ours_on, grpo_on, measure):
    """TRL bounds the product of a sequence's weights and multiplies by it; ours bounds their geometric mean and only
    keeps or drops the sequence."""
    recipe = recipe_of(
        aggregation="token_mean", correction="sequence_mask", correction_low=0.9, correction_high=1.2
    )
    trainer, inputs = grpo_on(
        loss_type="dapo",
        sampler=True,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_min=0.9,
        vllm_importance_sampling_clip_max=1.2,
    )
    mine, _ = ours_on(recipe, batch_of(recipe))
    assert measure("correction: sequence_mask", mine, loss_of(trainer, inputs), differs=True).loss > 1e-3


def test_normalised_advantages_differ_by_what_is_added_to_the_std(
    sampled, recipe_of, batch_of, grpo_on, note
):
    """1e-4 in TRL, 1e-6 here; the paper adds nothing."""
    batch = batch_of(recipe_of(advantage="grpo"))
    _, inputs = grpo_on(scale_rewards="group")
    ours = sampled.completions(batch.advantages)[:, 0].double()
    theirs = inputs["advantages"].double()
    difference = float((ours - theirs).norm() / theirs.norm())
    note("advantage: grpo (values)", difference, differs=True)
    assert 1e-5 < difference < 1e-3
    std = batch.rewards.double().view(-1, GROUP).std(-1).repeat_interleave(GROUP)
    same = float((ours * (std + STD_EPS) / (std + 1e-4) - theirs).norm() / theirs.norm())
    note("advantage: grpo, the same added (values)", same)
    assert same <= 1e-6


def test_the_entropy_bonus_of_sequence_means_differs(
    ours, sampled, recipe_of, batch_of, ours_on, grpo_on, measure
):
    """TRL's is a mean over tokens whatever the loss is; ours follows the aggregation."""
    recipe = recipe_of(aggregation="sequence_mean", entropy_coef=0.3)
    batch = off_policy(ours, batch_of(recipe))
    trainer, inputs = grpo_on(loss_type="grpo", entropy_coef=0.3)
    inputs["old_per_token_logps"] = sampled.completions(batch.old_logprobs)
    mine, _ = ours_on(recipe, batch)
    assert measure("grpo, entropy_coef", mine, loss_of(trainer, inputs), differs=True).loss > 1e-5


def test_k3_is_limited(ours, sampled, recipe_of, batch_of, ours_on, grpo_on, measure):
    """One token at which the reference is far above the policy: k3 is at most 10 here, unlimited in TRL."""
    recipe = recipe_of(aggregation="sequence_mean", kl_coef=0.04)
    batch = off_policy(ours, batch_of(recipe))
    ref_logprobs = batch.ref_logprobs.clone()
    ref_logprobs[0, len(sampled.rollouts[0].prompt.token_ids)] += 4
    batch = batch.replace(ref_logprobs=ref_logprobs)
    trainer, inputs = grpo_on(loss_type="grpo", beta=0.04, use_bias_correction_kl=False)
    inputs["old_per_token_logps"] = sampled.completions(batch.old_logprobs)
    inputs["ref_per_token_logps"] = sampled.completions(ref_logprobs)
    mine, _ = ours_on(recipe, batch)
    row = measure("grpo, a token with k3 above 10", mine, loss_of(trainer, inputs), differs=True)
    assert row.loss > 1e-3


@pytest.mark.parametrize("aggregation", ["constant_length", "token_mean"])
def test_rloo(aggregation, ours, sampled, recipe_of, batch_of, ours_on, trainer_on, agree, note):
    """Advantages with the KL in the reward, and the gradient at ratio 1, on the same scale.

    Catches: a baseline with the response's own reward in it, a KL that is a mean over tokens, a length that weighs.
    The value of the loss says nothing: a group's advantages add up to 0.
    """
    from trl import RLOOConfig, RLOOTrainer

    kl = {"kl_coef": 0.05, "kl_estimator": "k1"}
    recipe = recipe_of(advantage="rloo", objective="reinforce", aggregation=aggregation, **kl)
    groups = [i // GROUP for i in range(len(sampled.rollouts))]
    scored = ours.logprobs("policy", make_batch(sampled.rollouts, group_ids=groups))
    batch = batch_of(recipe, old_logprobs=scored)
    trainer, inputs = trainer_on(RLOOTrainer, RLOOConfig, beta=0.05, normalize_advantages=False)
    advantages = sampled.completions(batch.advantages)[:, 0]
    difference = float((advantages - inputs["advantages"]).norm() / inputs["advantages"].norm())
    note(f"advantage: rloo, KL in the reward, {aggregation} (values)", difference)
    assert difference <= 1e-5

    rows, tokens = len(batch), batch.num_loss_tokens
    scale = {"constant_length": MAX_RESPONSE, "token_mean": tokens / rows}[aggregation]
    (model, loss), _ = ours_on(recipe, batch)
    trl_model, trl_loss = loss_of(trainer, inputs)
    assert abs(float(trl_loss.detach())) < 1e-5
    agree(f"rloo at ratio 1, {aggregation}", (model, scale * loss), (trl_model, trl_loss), value=False)


def test_rloo_off_policy_differs(ours, sampled, recipe_of, batch_of, ours_on, trainer_on, measure):
    """TRL clips the ratio of whole responses, the product over their tokens; ours that of each token."""
    from trl import RLOOConfig, RLOOTrainer

    recipe = recipe_of(advantage="rloo", aggregation="constant_length")
    batch = off_policy(ours, batch_of(recipe))
    trainer, inputs = trainer_on(RLOOTrainer, RLOOConfig, beta=0.0, normalize_advantages=False)
    inputs["old_logps"] = batch.old_logprobs.sum(-1)
    (model, loss), _ = ours_on(recipe, batch)
    mine, theirs = (model, MAX_RESPONSE * loss), loss_of(trainer, inputs)
    assert measure("rloo, off policy", mine, theirs, differs=True, value=False).gradient > 1e-2
