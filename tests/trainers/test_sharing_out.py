"""How the roles share a batch out among processes, and put what comes back in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf.batching import PreferenceExample, SftExample, make_batch, make_preference_batch, make_sft_batch
from rlhf.models import build_tokenizer, load_model
from rlhf.recipe.schema import BuildTokenizerConfig, ModelConfig
from rlhf.records import Batch, Prompt, Rollout
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.roles import Actor, Clock, Critic, Reference, RewardModel, Teacher
from rlhf.trainers.worker import Worker
from tests.e2e.running import TINY

BUDGET = 100


class Processes:
    """Two processes that answer with the tokens that they were given."""

    size = 2

    def __init__(self) -> None:
        self.given: list[list[Batch]] = []  # micro-batches of each process in the last call

    def call_each(self, method, args_per_rank):
        if method == "update":
            self.given = [[micro for micro, _ in share] for _, share, _ in args_per_rank]
            return [UpdateStats(loss=1.0, grad_norm=1.0, lr=0.1, skipped=False, sums={})] * 2
        self.given = [args[0] for args in args_per_rank]
        return [[self.answer(method, micro) for micro in micros] for micros in self.given]

    def answer(self, method, micro):
        seen = micro.token_ids.float()
        if method == "teacher_top":  # two tokens, and the rest
            return torch.stack([micro.token_ids] * 2, -1), torch.stack([-seen, -2 * seen, -3 * seen], -1)
        if method == "score_with_values":
            return torch.stack([seen, -seen], -1)
        return seen[:, 0] if method == "score_rewards" else seen

    @property
    def together(self) -> list[list[str]]:
        return [list(micro.sample_ids) for micros in self.given for micro in micros]


@pytest.fixture
def batch() -> Batch:
    """Four groups of three responses to a prompt of 40 tokens, the rows of the groups mixed."""
    rollouts, group_ids = [], []
    for j in range(3):
        for i in range(4):
            n = 2 + (5 * i + 7 * j) % 9
            prompt = Prompt(str(i), tuple(10 + (i + k) % 50 for k in range(40)), "")
            ids = tuple(100 + 10 * i + j for _ in range(n))
            rollouts.append(
                Rollout(f"{i}/{j}", prompt, ids, (True,) * n, (-1.0,) * n, (0,) * n, "stop", reward=1.0)
            )
            group_ids.append(i)
    return make_batch(rollouts, group_ids=group_ids)


def role(kind, processes, **options):
    return kind(processes, Clock(), micro_batch_tokens=BUDGET, **options)


GROUPS = sorted([f"{i}/{j}" for j in range(3)] for i in range(4))


def test_a_group_s_responses_are_scored_together_and_come_back_in_row_order(batch):
    """Would catch: the responses to a prompt dealt out among micro-batches, each of which runs the prompt again; scores
    in the order in which they were made."""
    processes = Processes()
    policy = {"sharing": ("policy",)}
    seen = torch.where(batch.attention_mask, batch.token_ids, 0).float()
    for kind, options in ((Actor, policy), (Reference, {}), (Teacher, {}), (Critic, {})):
        assert torch.equal(role(kind, processes, **options).score(batch), seen)
        assert sorted(map(sorted, processes.together)) == GROUPS
    logprobs, values = role(Actor, processes, **policy).score_with_values(batch)
    assert torch.equal(logprobs, seen) and torch.equal(values, -seen)
    assert sorted(map(sorted, processes.together)) == GROUPS


def test_updates_share_what_their_loss_runs_once(batch):
    """Would catch: a budget that counts a prompt once for a loss that runs it for each response; a critic whose groups
    are dealt out."""
    processes = Processes()
    role(Actor, processes, sharing=("policy",)).update((batch, "policy"), kl_coef=0.0)
    assert sorted(map(sorted, processes.together)) == GROUPS
    role(Critic, processes).update(batch)
    assert sorted(map(sorted, processes.together)) == GROUPS
    by_row = (
        lambda: role(Actor, processes, sharing=()).update((batch, "policy"), kl_coef=0.0),
        lambda: role(RewardModel, processes).score(batch),
    )
    for act in by_row:
        act()
        assert sorted(name for names in processes.together for name in names) == sorted(batch.sample_ids)
        assert all(int(micro.lengths.sum()) <= BUDGET for micros in processes.given for micro in micros)


def test_the_teacher_s_tokens_come_with_the_rest_s_log_prob(batch):
    """Would catch: a column that is lost, rows exchanged."""
    taught = role(Teacher, Processes()).top(batch)
    seen = torch.where(batch.attention_mask, batch.token_ids, 0)
    assert torch.equal(taught.teacher_ids, torch.stack([seen] * 2, -1))
    assert torch.equal(taught.teacher_logprobs, torch.stack([-seen, -2 * seen, -3 * seen], -1).float())


def test_a_teacher_without_a_row_has_nothing_to_say():
    """Would catch: a process that runs its teacher on an empty micro-batch, as there is where rows are fewer than
    processes."""
    teacher = load_model(
        ModelConfig(**TINY["model"]), build_tokenizer(BuildTokenizerConfig()), seed=0, trainable=False
    )
    distill = SimpleNamespace(temperature=1.0, top_k=3)
    worker = SimpleNamespace(
        recipe=SimpleNamespace(distill=distill),
        info=SimpleNamespace(device="cpu"),
        _frozen={"teacher": teacher},
    )
    batch = make_sft_batch([SftExample("a", (3, 4), (5, 6))])
    ((ids, logprobs),) = Worker.teacher_top(worker, [batch, batch.select([])])
    assert ids.shape == (1, 4, 3) and logprobs.shape == (1, 4, 4)
    torch.testing.assert_close(logprobs[0, 2:].exp().sum(-1), torch.ones(2))
    assert Worker.teacher_top(worker, [batch.select([])]) == []


def test_pairs_stay_together():
    """Would catch: a pair that is treated as a group, which may be parted."""
    pairs = [PreferenceExample(str(i), (3,) * 45, (5,) * (9 - i), (6,) * (3 + i), None) for i in range(3)]
    batch, processes = make_preference_batch(pairs), Processes()
    role(Actor, processes, sharing=("policy",)).score(batch)
    want = [sorted((f"{i}/chosen", f"{i}/rejected")) for i in range(3)]
    assert sorted(sorted(names) for names in processes.together if names) == want
