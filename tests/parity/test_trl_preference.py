"""Losses on pairs against TRL's DPOTrainer, CPOTrainer and ORPOTrainer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from rlhf.batching import make_preference_batch  # noqa: E402
from rlhf.data import load_preferences  # noqa: E402
from rlhf.preference import PREFERENCE_LOSSES, with_baselines  # noqa: E402

BETA = 0.3
SMOOTHING = 0.1

# Name of a row: our settings, TRL's settings.
DPO = {
    "dpo": ({"losses": {"dpo": 1}}, {"loss_type": ["sigmoid"]}),
    # TRL has no cDPO; it is 2 (1 - e) DPO - (1 - 2 e) robust, both of which TRL has.
    "dpo, label_smoothing (cDPO)": (
        {"losses": {"dpo": 1}, "label_smoothing": SMOOTHING},
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - SMOOTHING), -(1 - 2 * SMOOTHING)],
            "label_smoothing": SMOOTHING,
        },
    ),
    "robust": (
        {"losses": {"robust": 1}, "label_smoothing": SMOOTHING},
        {"loss_type": ["robust"], "label_smoothing": SMOOTHING},
    ),
    "ipo": ({"losses": {"ipo": 1}}, {"loss_type": ["ipo"]}),
    "hinge": ({"losses": {"hinge": 1}}, {"loss_type": ["hinge"]}),
    "exo_pair": (
        {"losses": {"exo_pair": 1}, "label_smoothing": 1e-3},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    ),
    "nca_pair": ({"losses": {"nca_pair": 1}}, {"loss_type": ["nca_pair"]}),
    "sppo_hard": ({"losses": {"sppo_hard": 1}}, {"loss_type": ["sppo_hard"]}),
    "apo_zero": ({"losses": {"apo_zero": 1}}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"losses": {"apo_down": 1}}, {"loss_type": ["apo_down"]}),
    "aot, one batch": (
        {"losses": {"aot": 1}, "label_smoothing": SMOOTHING},
        {"loss_type": ["aot"], "label_smoothing": SMOOTHING},
    ),
    "aot_unpaired, one batch": (
        {"losses": {"aot_unpaired": 1}, "label_smoothing": SMOOTHING},
        {"loss_type": ["aot_unpaired"], "label_smoothing": SMOOTHING},
    ),
    "discopop": ({"losses": {"discopop": 1}}, {"loss_type": ["discopop"]}),
    "sigmoid_norm": ({"losses": {"sigmoid_norm": 1}}, {"loss_type": ["sigmoid_norm"]}),
    "dpo, f_divergence: forward_kl": (
        {"losses": {"dpo": 1}, "f_divergence": "forward_kl"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    ),
    "dpo, f_divergence: js": (
        {"losses": {"dpo": 1}, "f_divergence": "js"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    ),
    "dpo, f_divergence: alpha, TRL's coefficient 1 - alpha": (
        {"losses": {"dpo": 1}, "f_divergence": "alpha", "f_alpha": 0.3},
        {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "dpo, wpo": ({"losses": {"dpo": 1}, "wpo": True}, {"loss_type": ["sigmoid"], "use_weighting": True}),
    "dpo, ld_alpha": ({"losses": {"dpo": 1}, "ld_alpha": 0.4}, {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
    "dpo + apo_zero + ipo, weighted": (
        {"losses": {"dpo": 0.8, "apo_zero": 0.2, "ipo": 0.05}},
        {"loss_type": ["sigmoid", "apo_zero", "ipo"], "loss_weights": [0.8, 0.2, 0.05]},
    ),
}

# CPOTrainer with cpo_alpha = 0, so that only the preference term is compared.
CPO = {
    "simpo": ({"losses": {"simpo": 1}, "simpo_gamma": 0.5}, {"loss_type": "simpo", "simpo_gamma": 0.5}),
    "cpo, preference term": ({"losses": {"cpo": 1}, "nll_coef": 0.0}, {"loss_type": "sigmoid"}),
}


@pytest.fixture
def ours_on(ours):
    """ours_on(rows, **settings) -> ((model, loss), batch) of the preference loss, with the coupling as in a run."""

    def run(rows, **settings):
        beta = {} if set(settings["losses"]) <= {"orpo", "sft"} else {"beta": BETA}
        recipe = ours.recipe("dpo", preference={**beta, **settings})
        examples = load_preferences(recipe.data, ours.tokenizer, name="train", rows=rows).items
        batch = make_preference_batch(examples)
        batch = batch.replace(ref_logprobs=ours.logprobs("reference", batch))
        batch = with_baselines(batch, ours.logprobs("policy", batch), recipe.preference)
        return ours.loss("preference", recipe, batch)[0], batch

    return run


@pytest.fixture
def dpo_on(theirs):
    """dpo_on(rows, **settings) -> ((model, loss), ids of the rows) of TRL's DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def run(rows, **settings):
        trainer = DPOTrainer(
            theirs.model(),
            ref_model=theirs.model("reference"),
            args=DPOConfig(**theirs.arguments(beta=BETA, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=theirs.tokenizer,
        )
        features = list(trainer.train_dataset)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(features))
        ids = [f["prompt_ids"] + f[side] for f in features for side in ("chosen_ids", "rejected_ids")]
        lengths = [len(f[side]) for f in features for side in ("chosen_ids", "rejected_ids")]
        return (trainer.model, loss), (ids, lengths)

    return run


@pytest.fixture
def cpo_on(theirs):
    """cpo_on(rows, **settings) -> (trainer, collated rows) of TRL's CPOTrainer, or of its ORPOTrainer."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def make(rows, *, orpo=False, **settings):
        kind, config = (ORPOTrainer, ORPOConfig) if orpo else (CPOTrainer, CPOConfig)
        trainer = kind(
            theirs.model(),
            args=config(**theirs.arguments(max_length=200, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=theirs.tokenizer,
        )
        return trainer, trainer.data_collator(list(trainer.train_dataset))

    return make


def rows_of(batch):
    """(ids, number of loss tokens) of each row."""
    ids = [
        row[:n].tolist()
        for row, n in zip(batch.token_ids, batch.attention_mask.sum(-1).tolist(), strict=True)
    ]
    return ids, batch.loss_mask.sum(-1).tolist()


def cpo_rows(collated):
    """The same of what CPOTrainer collates."""
    ids, lengths = [], []
    for i in range(len(collated["chosen_input_ids"])):
        for side in ("chosen", "rejected"):
            real = collated[f"{side}_attention_mask"][i].bool()
            ids.append(collated[f"{side}_input_ids"][i][real].tolist())
            lengths.append(int((collated[f"{side}_labels"][i] != -100).sum()))
    return ids, lengths


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_its_relatives(name, pairs, ours_on, dpo_on, agree):
    """Catches: a sign, a sum where a mean belongs, a setting that does not reach its formula, other tokens."""
    ours, batch = ours_on(pairs, **DPO[name][0])
    theirs, rows = dpo_on(pairs, **DPO[name][1])
    assert rows_of(batch) == rows
    if name.startswith("aot"):
        assert not in_order(batch), "every pair has its own rank on both sides: nothing is matched"
    agree(name, ours, theirs)


def in_order(batch):
    """Whether a pair's baselines are what its own rows would give."""
    ref = torch.where(batch.loss_mask, batch.ref_logprobs, 0.0).sum(-1)
    return torch.allclose(batch.baselines[::2], ref[::2] - ref[1::2], atol=1e-4)


@pytest.mark.parametrize("name", CPO)
def test_losses_without_a_reference(name, pairs, ours_on, cpo_on, agree):
    ours, batch = ours_on(pairs, **CPO[name][0])
    trainer, collated = cpo_on(pairs, beta=BETA, cpo_alpha=0.0, **CPO[name][1])
    assert rows_of(batch) == cpo_rows(collated)
    agree(name, ours, (trainer.model, trainer.compute_loss(trainer.model, collated)))


def test_every_loss_of_ours_is_compared():
    """Catches: a new loss that nobody holds against TRL."""
    compared = {loss for settings, _ in [*DPO.values(), *CPO.values()] for loss in settings["losses"]}
    assert compared | {"bco_pair", "orpo", "sft"} == set(PREFERENCE_LOSSES)


def test_bco_differs_by_its_shift(pairs, ours, ours_on, dpo_on, measure, agree):
    """TRL 1 leaves out delta, the mean of the rewards that the paper subtracts."""
    settings = {"losses": {"bco_pair": 1}}
    mine, batch = ours_on(pairs, **settings)
    theirs, _ = dpo_on(pairs, loss_type=["bco_pair"])
    shifted = measure("bco_pair", mine, theirs, differs=True)
    assert shifted.loss > 1e-3
    unshifted = batch.replace(baselines=torch.zeros_like(batch.baselines))
    recipe = ours.recipe("dpo", preference={"beta": BETA, **settings})
    theirs, _ = dpo_on(pairs, loss_type=["bco_pair"])
    agree("bco_pair, delta = 0", ours.loss("preference", recipe, unshifted)[0], theirs)


@pytest.mark.parametrize(
    ("name", "mine", "trl"),
    [
        ("preference sft", {"losses": {"sft": 1}}, {"loss_type": ["sft"]}),
        (
            "dpo, nll_coef (RPO)",
            {"losses": {"dpo": 1}, "nll_coef": 0.7},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        ),
    ],
)
def test_nll_is_a_mean_over_responses(name, mine, trl, pairs, ours_on, dpo_on, measure, agree):
    """TRL divides by the micro-batch's tokens: a pair's weight then depends on its neighbours' lengths. Pair by pair
    the two are the same."""
    measured = measure(name, ours_on(pairs, **mine)[0], dpo_on(pairs, **trl)[0], differs=True)
    assert measured.loss > 1e-4
    agree(f"{name}, one pair", ours_on(pairs[1:2], **mine)[0], dpo_on(pairs[1:2], **trl)[0])


def test_cpo_with_its_nll(pairs, ours_on, cpo_on, measure, agree):
    """As above: TRL's mean is over the micro-batch's tokens."""
    mine, trl = {"losses": {"cpo": 1}, "nll_coef": 1.0}, {"beta": BETA, "cpo_alpha": 1.0}

    def both(rows):
        trainer, collated = cpo_on(rows, **trl)
        return ours_on(rows, **mine)[0], (trainer.model, trainer.compute_loss(trainer.model, collated))

    assert measure("cpo, nll_coef", *both(pairs), differs=True).loss > 1e-4
    agree("cpo, nll_coef, one pair", *both(pairs[1:2]))


def test_orpo_differs_by_its_nll(pairs, ours_on, cpo_on, measure, agree):
    """TRL's NLL counts the prompt's tokens too, over the micro-batch. Without the NLL the two are the same."""
    weight = 0.5
    mine, batch = ours_on(pairs, losses={"orpo": 1}, orpo_lambda=weight)
    trainer, collated = cpo_on(pairs, orpo=True, beta=weight)
    assert rows_of(batch) == cpo_rows(collated)
    theirs = (trainer.model, trainer.compute_loss(trainer.model, collated))
    assert measure("orpo", mine, theirs, differs=True).loss > 1e-3

    mine, _ = ours_on(pairs, losses={"orpo": 1, "sft": -1}, orpo_lambda=weight)
    chosen, rejected = trainer.concatenated_forward(trainer.model, collated)[:2]
    odds = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    agree("orpo, odds-ratio term", mine, (trainer.model, odds))


def test_alpha_is_the_papers(pairs, ours_on, dpo_on, measure):
    """TRL writes (u^(a - 1) - 1) / (a - 1): its coefficient is 1 - alpha, and 0.5 means the same in both."""
    mine = {"losses": {"dpo": 1}, "f_divergence": "alpha", "f_alpha": 0.3}
    trl = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    row = measure(
        "dpo, f_divergence: alpha, same number",
        ours_on(pairs, **mine)[0],
        dpo_on(pairs, **trl)[0],
        differs=True,
    )
    assert row.loss > 1e-4
