"""Scalar models against plain transformers: every token's score, round trips, heads, and what is refused."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.models import load_model, load_scalar_model, save_model
from rlhf.models.attention import packed_attention
from rlhf.models.scalar import is_scalar_model, reward_scale, scale_of_scores, store_reward_scale
from rlhf.recipe.schema import BuildModelConfig, LoraConfig, ModelConfig
from tests.models.conftest import ARCHITECTURES, model_config

LENGTHS = [9, 20, 1, 70]


def scores(model, pack):
    with packed_attention(pack):
        return model(input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False)


def of_plain(folder, pack):
    """Every token's score from stock transformers, which gives one per row: one row per prefix, no padding."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        prefixes = (ids[None, :end] for ids in pack.split(pack.token_ids) for end in range(1, len(ids) + 1))
        return torch.cat([plain(input_ids=prefix).logits[0] for prefix in prefixes])


@pytest.fixture
def made(tokenizer):
    def make(name="qwen3", *, head="new", trainable=True, seed=0, **changes):
        config = model_config(name, **changes)
        return load_scalar_model(config, tokenizer, head=head, seed=seed, trainable=trainable)

    return make


def loaded(folder, tokenizer, *, head="load", trainable=False, **changes):
    config = ModelConfig(path=str(folder), dtype="float32", **changes)
    return load_scalar_model(config, tokenizer, head=head, seed=0, trainable=trainable)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_token_has_the_score_of_plain_transformers(name, made, tokenizer, pack, tmp_path):
    """Would catch: a trunk without its final norm, sequences of a pack that see each other, a head lost or
    renamed on the way to disk, a folder that only we can read."""
    model, sequences = made(name), pack(LENGTHS)
    got = scores(model, sequences)
    assert got.shape == (sum(LENGTHS),) and got.dtype == torch.float32
    save_model(model, tokenizer, tmp_path)
    torch.testing.assert_close(got.detach(), of_plain(tmp_path, sequences), rtol=1e-4, atol=1e-4)
    again = loaded(tmp_path, tokenizer)
    assert torch.equal(scores(again, sequences), got) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    config = json.loads((tmp_path / "config.json").read_text())
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert config["architectures"] == [type(stock).__name__] and list(config["id2label"]) == ["0"]


def test_gradients_are_those_of_plain_transformers(made, tokenizer, pack, tmp_path):
    """Would catch: a head or a trunk cut off from the loss, with checkpointing too."""
    sequences = pack(LENGTHS)
    model = made(gradient_checkpointing=True)
    save_model(model, tokenizer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    weights = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    last = sequences.cu_seqlens[1:] - 1
    (scores(model, sequences)[last] * weights).sum().backward()
    rows = sequences.split(sequences.token_ids)
    sum(w * plain(input_ids=ids[None]).logits[0, 0] for w, ids in zip(weights, rows)).backward()
    want = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-4, atol=1e-4)


def test_a_score_depends_on_its_own_sequence_only(made, pack):
    """Would catch: values that change in the last bit with the company in the micro-batch."""
    model, whole = made(), pack(LENGTHS)
    with torch.no_grad():
        together = whole.split(scores(model, whole))
        for ids, want in zip(whole.split(whole.token_ids), together, strict=True):
            alone = pack([len(ids)])
            alone.token_ids.copy_(ids)
            assert torch.equal(scores(model, alone), want)


def test_scores_are_float32_from_bfloat16_weights(made, pack):
    """Would catch: rewards rounded to bfloat16, which has 8 bits."""
    got = scores(made(dtype="bfloat16"), pack(LENGTHS))
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())


def test_outside_a_pack_it_is_transformers_own(made, tokenizer):
    """Would catch: a forward that no longer serves a padded batch, and a built model without a pad token."""
    model = made(trainable=False)
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 4, 5, 6]])
    padded = torch.cat([torch.nn.functional.pad(short, (0, 2), value=tokenizer.pad_token_id), long])
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits
        want = torch.cat([model(input_ids=row).logits for row in (short, long)])
    torch.testing.assert_close(got, want)


def test_a_critic_predicts_what_becomes_of_the_scores(made, pack, tokenizer, tmp_path):
    """Would catch: a critic that starts from a reward model on that model's own scale, where rewards are normalised or
    weighed; a scale that is added up by saving and loading."""
    own = made(head="new", seed=5)
    store_reward_scale(own, mean=2.0, std=4.0)
    save_model(own, tokenizer, tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    scale, shift = scale_of_scores(config, weight=0.5, normalize=True)
    assert (scale, shift) == (0.125, -0.25) and scale_of_scores(config, weight=3.0, normalize=False) == (
        3.0,
        0.0,
    )
    critic = load_scalar_model(
        config, tokenizer, head="load", seed=0, trainable=True, scale=scale, shift=shift
    )
    sequences = pack(LENGTHS)
    torch.testing.assert_close(scores(critic, sequences), 0.5 * (scores(own, sequences) - 2.0) / 4.0)


class TestHeads:
    def test_new_is_drawn_by_the_seed_at_the_published_scale(self, made):
        """Would catch: processes whose heads start apart, a head at torch's own scale."""
        torch.manual_seed(1)
        one = made(seed=3, config={"hidden_size": 256}).score.weight.detach()
        torch.manual_seed(2)
        assert torch.equal(one, made(seed=3, config={"hidden_size": 256}).score.weight)
        assert not torch.equal(one, made(seed=4, config={"hidden_size": 256}).score.weight)
        assert float(one.std()) == pytest.approx(257**-0.5, rel=0.15)

    def test_zero_scores_zero_and_trains(self, made, pack):
        model = made(head="zero")
        got = scores(model, pack(LENGTHS))
        assert not got.any()
        got.sum().backward()
        assert model.score.weight.grad.any()

    def test_trunk_is_that_of_the_language_model(self, made, prepared, tokenizer, tmp_path):
        """Would catch: a critic on random weights beside an actor that was loaded; the same from an object, which
        stays as it was."""
        policy = prepared("qwen3")
        save_model(policy, tokenizer, tmp_path)
        object_config = ModelConfig(path="in-memory", dtype="float32")
        of_object = load_scalar_model(
            object_config, tokenizer, head="new", seed=0, trainable=True, model=policy
        )
        for model in (made(), loaded(tmp_path, tokenizer, head="new"), of_object):
            for name, p in policy.model.named_parameters():
                assert torch.equal(p, model.model.get_parameter(name)), name
        assert policy.config.num_labels == 2 and type(policy).__name__ == "Qwen3ForCausalLM"
        assert not {p.data_ptr() for p in policy.parameters()} & {
            p.data_ptr() for p in of_object.parameters()
        }

    def test_a_critic_from_a_reward_model(self, made, tokenizer, pack, tmp_path):
        """Would catch: a critic that forgets the reward model's head, or that keeps it where a new one is asked."""
        reward_model, sequences = made(seed=5), pack(LENGTHS)
        save_model(reward_model, tokenizer, tmp_path)
        critic = loaded(tmp_path, tokenizer, trainable=True)
        assert torch.equal(scores(critic, sequences), scores(reward_model, sequences))
        fresh = loaded(tmp_path, tokenizer, head="zero", trainable=True)
        assert not scores(fresh, sequences).any()
        assert torch.equal(fresh.model.norm.weight, reward_model.model.norm.weight)

    def test_unknown(self, made):
        with pytest.raises(ValueError, match="head 'nwe' is unknown; choose one of load, new, zero"):
            made(head="nwe")


def test_a_folder_says_what_it_is(made, prepared, tokenizer, tmp_path):
    """Would catch: a critic that takes a language model for a reward model, or the other way round."""
    for name, model in (("policy", prepared()), ("reward", made())):
        save_model(model, tokenizer, tmp_path / name)
        path = str(tmp_path / name)
        assert is_scalar_model(ModelConfig(path=path)) == (name == "reward")


def test_a_pad_token_is_taken_from_the_tokenizer_unless_it_ends_texts(made, tokenizer, tmp_path):
    """Would catch: a saved reward model that plain transformers cannot run on a padded batch, or one that it reads
    at the token before the end."""
    save_model(made(), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert loaded(tmp_path, tokenizer).config.pad_token_id == tokenizer.pad_token_id
    padded_with_eos = copy.deepcopy(tokenizer)
    padded_with_eos.pad_token = padded_with_eos.eos_token
    assert loaded(tmp_path, padded_with_eos).config.pad_token_id is None


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_scale_of_rewards_travels_with_the_model(lora, made, tokenizer, tmp_path):
    """Would catch: a scale that is lost on disk, mean and std swapped, a division by 0."""
    model = made(lora=lora)
    with pytest.raises(ValueError, match="no reward_mean and reward_std.*normalize: false"):
        reward_scale(model)
    for std in (0.0, float("nan")):
        with pytest.raises(ValueError, match="give no scale"):
            store_reward_scale(model, mean=1.0, std=std)
    store_reward_scale(model, mean=-1.5, std=0.25)
    save_model(model, tokenizer, tmp_path)
    assert reward_scale(loaded(tmp_path, tokenizer)) == (-1.5, 0.25)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.reward_mean == -1.5


class TestLora:
    @pytest.fixture
    def model(self, made):
        model = made(lora=LoraConfig(rank=4, alpha=8))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        return model

    def test_trains_adapters_and_the_whole_head(self, model):
        """Would catch: a head that stays random, or one with a low-rank adapter of its own."""
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        heads = [name for name in trained if "lora_" not in name]
        assert len(heads) == 1 and heads[0].endswith("score.modules_to_save.default.weight")
        assert not any("score" in name for name in trained if "lora_" in name)

    def test_saved_merged_and_as_adapter(self, model, made, tokenizer, pack, tmp_path):
        """Would catch: the untrained head in the saved model, or no head in the adapter."""
        import peft

        sequences = pack(LENGTHS)
        want = scores(model, sequences).detach()
        save_model(model, tokenizer, tmp_path)
        torch.testing.assert_close(scores(loaded(tmp_path, tokenizer), sequences), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_plain(tmp_path, sequences), want, rtol=1e-4, atol=1e-4)
        adapted = peft.PeftModel.from_pretrained(made(trainable=False), tmp_path / "adapter")
        torch.testing.assert_close(scores(adapted, sequences), want, rtol=1e-4, atol=1e-4)


class TestRefused:
    """Would catch: rewards from a random head, which look like rewards."""

    @pytest.fixture
    def folder(self, made, tokenizer, tmp_path):
        save_model(made(), tokenizer, tmp_path / "model")
        return tmp_path / "model"

    def refuse(self, folder, tokenizer, message):
        with pytest.raises(ValueError, match=f"no reward model with a trained head: .*{message}") as error:
            loaded(folder, tokenizer)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)

    def rewrite(self, folder, change):
        """Save the classifier again after a change, which may give it another number of labels."""
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        change(plain)
        shutil.rmtree(folder)
        plain.save_pretrained(folder)

    def test_a_language_model(self, prepared, tokenizer, tmp_path):
        save_model(prepared(), tokenizer, tmp_path)
        self.refuse(tmp_path, tokenizer, "names Qwen3ForCausalLM")
        with pytest.raises(ValueError, match="Qwen3ForCausalLM has no linear layer named score"):
            config = model_config()
            load_scalar_model(config, tokenizer, head="load", seed=0, trainable=False)

    def test_a_language_model_that_calls_itself_a_classifier(self, prepared, tokenizer, tmp_path):
        save_model(prepared(), tokenizer, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        self.refuse(tmp_path, tokenizer, "its files lack score.weight")
        assert not loaded(tmp_path, tokenizer, head="zero").score.weight.any()

    def test_two_labels(self, folder, tokenizer):
        def change(plain):
            plain.score = torch.nn.Linear(64, 2, bias=False)
            plain.config.num_labels = 2

        self.rewrite(folder, change)
        self.refuse(folder, tokenizer, "its head has 2 labels")

    @pytest.mark.parametrize(("value", "message"), [(0.0, "only zeros"), (float("nan"), "not finite")])
    def test_an_empty_head(self, folder, tokenizer, value, message):
        self.rewrite(folder, lambda plain: plain.score.weight.data.fill_(value))
        self.refuse(folder, tokenizer, message)

    def test_missing_weights_of_the_trunk(self, folder, tokenizer):
        """Would catch: a check of the head that lets the rest be random."""
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="missing keys, model.layers.2"):
            loaded(folder, tokenizer)

    def test_architecture_without_a_classifier(self, tokenizer):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = ModelConfig(build=BuildModelConfig(model_type="granite", config=sizes), dtype="float32")
        load_model(config, tokenizer, seed=0, trainable=False)
        with pytest.raises(ValueError, match="no sequence-classification model for granite"):
            load_scalar_model(config, tokenizer, head="new", seed=0, trainable=False)
