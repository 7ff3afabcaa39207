"""What losses on a shared trunk are made of, and what is run for a group of responses."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.batching import SftExample, make_batch, make_sft_batch
from rlhf.losses import reduction
from rlhf.models import load_model, load_tokenizer
from rlhf.models.scalar import load_scalar_model
from rlhf.models.value_head import add_value_head
from rlhf.recipe.load import plan_from_dict
from rlhf.records import Prompt, Rollout
from rlhf.trainers.forward import loss_function, sharing_losses
from rlhf.value import value_loss
from rlhf.values import batch_logprobs_and_values, batch_values
from tests.e2e.running import TINY


@pytest.fixture(scope="module")
def recipe():
    changed = copy.deepcopy(TINY)
    changed.pop("stages")
    changed["data"].pop("response_column")
    changed |= {
        "method": "ppo",
        "critic": {"shared": True, "coef": 0.7},
        "algorithm": {"entropy_coef": 0.01, "ptx_coef": 0.2},
        "ptx": {"data": {"task": "chain_arithmetic", "response_column": "response"}},
        "trainer": {"steps": 1, "prompts_per_step": 8},
    }
    return plan_from_dict(changed).stages[0].recipe


@pytest.fixture
def model(recipe):
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    model = load_model(recipe.model, tokenizer, seed=0, trainable=True)
    add_value_head(model, None)
    model.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def batch():
    return batch_of([(5, 6, 7 + i) for i in range(3)])


def batch_of(prompts):
    rollouts = []
    for i, (token_ids, n) in enumerate(zip(prompts, (3, 5, 2), strict=True)):
        ids = tuple(range(4, 4 + n))
        prompt = Prompt(id=str(i), token_ids=token_ids, text="")
        rollouts.append(
            Rollout(f"0/{i}/0", prompt, ids, (True,) * n, (-3.0,) * n, (0,) * n, "stop", reward=1.0)
        )
    made = make_batch(rollouts, group_ids=range(3))
    noise = torch.Generator().manual_seed(2)
    fields = {
        name: torch.randn(made.token_ids.shape, generator=noise)
        for name in ("advantages", "returns", "values")
    }
    return made.replace(**{name: torch.where(made.response_mask, x, 0.0) for name, x in fields.items()})


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def test_shared_loss_is_the_policy_s_plus_coef_times_the_critic_s(recipe, model, batch):
    """Would catch: a coefficient that is not applied or applied twice, values of other tokens, numbers of one loss lost."""
    loss, sums = loss_function("policy_and_value", recipe, kl_coef=0.0)(model, batch)
    got = gradients(model, loss)
    policy, policy_sums = loss_function("policy", recipe, kl_coef=0.0)(model, batch)
    policy_gradients = gradients(model, policy)
    values = batch_logprobs_and_values(model, batch, temperature=1.0)[2]
    critic, critic_sums = value_loss(batch, values, value_clip=recipe.critic.value_clip)
    critic_gradients = gradients(model, critic)
    assert loss.item() == pytest.approx(policy.item() + 0.7 * critic.item())
    for name, gradient in got.items():
        want = policy_gradients[name] + 0.7 * critic_gradients[name]
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
    assert sums.keys() == policy_sums.keys() | critic_sums.keys()
    assert all(sums[name] == value for name, value in (policy_sums | critic_sums).items())


def test_values_are_read_at_the_token_before(model, batch):
    """Would catch: a value that has already seen the token whose choice it judges."""
    with torch.no_grad():
        _, _, values = batch_logprobs_and_values(model, batch, temperature=1.0)
        last = batch.lengths - 1
        rows = torch.arange(len(batch))
        changed = batch.token_ids.clone()
        changed[rows, last] = 9
        _, _, others = batch_logprobs_and_values(model, batch.replace(token_ids=changed), temperature=1.0)
    assert torch.equal(values, others) and values[rows, last].ne(0).all()
    assert not values[~batch.response_mask].any()


def test_ptx_touches_the_value_head_and_does_not_move_it(recipe, model):
    """Would catch: a tensor without a gradient in a step's last micro-batch, which ZeRO would then not reduce."""
    texts = make_sft_batch([SftExample("a", (5, 6), (7, 8))])
    loss, _ = loss_function("ptx", recipe)(model, texts)
    model.zero_grad()
    loss.backward()
    assert model.value_head.weight.grad is not None and not model.value_head.weight.grad.any()


def tokens_run(loss, model, batch):
    """Tokens of all forward passes of a loss, and the loss."""
    counts = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, ids: counts.append(ids[0].numel())
    )
    try:
        return loss(model, batch), sum(counts)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["policy", "policy_and_value"])
def test_a_group_s_prompt_is_run_once_and_nothing_else_changes(recipe, model, name):
    """Would catch: a prompt run for each response of its group; a value, a log-prob or a gradient that another row of the
    group changes; noise that is a row's own and drawn once for all."""
    prompt = tuple(4 + i % 7 for i in range(20))
    batch = batch_of([prompt] * 3)
    assert name in sharing_losses(recipe)
    loss = loss_function(name, recipe, kl_coef=0.0)
    (together, sums), tokens = tokens_run(loss, model, batch)
    assert tokens == 20 + 3 + 5 + 2
    got = gradients(model, together)
    parts = [loss(model, batch.select([row])) for row in range(3)]
    assert together.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-5)
    want = gradients(model, sum(part for part, _ in parts))
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, want[parameter], rtol=1e-4, atol=1e-5)
    assert all(
        value.item() == pytest.approx(sum(s[key].item() for _, s in parts), rel=1e-5)
        for key, value in sums.items()
        if reduction(key) is torch.sum
    )
    noisy = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"neftune_alpha": 5.0})})
    assert name not in sharing_losses(noisy)
    assert tokens_run(loss_function(name, noisy, kl_coef=0.0), model, batch)[1] == 3 * 20 + 3 + 5 + 2


def test_a_critic_runs_a_group_s_prompt_once(recipe):
    """Would catch: a value of the first response token read at another row's last token."""
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    critic = load_scalar_model(recipe.model, tokenizer, head="new", seed=0, trainable=True)
    batch = batch_of([tuple(4 + i % 7 for i in range(20))] * 3)
    loss = loss_function("value", recipe)
    (together, _), tokens = tokens_run(loss, critic, batch)
    assert tokens == 20 + 3 + 5 + 2
    got = gradients(critic, together)
    want = gradients(critic, sum(loss(critic, batch.select([row]))[0] for row in range(3)))
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, want[parameter], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        values = batch_values(critic, batch)
        for row in range(3):
            alone = batch_values(critic, batch.select([row]))
            torch.testing.assert_close(values[row : row + 1, : alone.shape[1]], alone, rtol=0, atol=0)
