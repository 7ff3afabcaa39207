"""Loading, preparing and saving: round trips, LoRA, and every damaged folder named."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models import build_tokenizer, context_length, load_model, load_tokenizer, save_model
from rlhf.models.attention import packed_attention
from rlhf.recipe.schema import BuildTokenizerConfig, LoraConfig, ModelConfig, TokenizerConfig
from tests.models.conftest import ARCHITECTURES, model_config


def run(model, pack):
    with torch.no_grad(), packed_attention(pack):
        return model(
            input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False
        ).logits


def weights(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path, prepared, tokenizer):
    save_model(prepared("qwen3"), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def load(folder, tokenizer, **options):
    return load_model(
        ModelConfig(path=str(folder), dtype="float32"), tokenizer, seed=0, trainable=False, **options
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_exact_and_plain_transformers_loads_it(name, prepared, tokenizer, tmp_path):
    """Would catch: weights lost or renamed on the way to disk, a config that only we can read."""
    model = prepared(name)
    save_model(model, tokenizer, tmp_path)
    assert "rlhf" not in (tmp_path / "config.json").read_text()
    ours, plain = load(tmp_path, tokenizer), AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (ours, plain):
        assert {k: v.tolist() for k, v in weights(other).items()} == {
            k: v.tolist() for k, v in weights(model).items()
        }
    assert plain.config._attn_implementation != "rlhf" and plain.dtype == torch.float32
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id


def test_saved_folder_generates_in_a_process_without_us(folder):
    """Would catch: a saved folder that needs our package."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; f = sys.argv[1];"
        "m = AutoModelForCausalLM.from_pretrained(f); t = AutoTokenizer.from_pretrained(f);"
        "print(m.generate(**t('1+1=', return_tensors='pt'), max_new_tokens=3, do_sample=False).shape[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0 and 4 < int(done.stdout) <= 7, done.stderr


def test_tied_embeddings_stay_tied(tokenizer, tmp_path):
    """Would catch: an output head saved as a copy, which then drifts from its embedding."""
    model = load_model(
        model_config("qwen2", config={"tie_word_embeddings": True}), tokenizer, seed=0, trainable=True
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save_model(model, tokenizer, tmp_path, weights=dict(model.named_parameters()))
    for other in (load(tmp_path, tokenizer), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_a_model_object_is_copied_not_changed(stock, tokenizer):
    """Would catch: actor and reference sharing tensors, or a user's model that changes under them."""
    theirs = stock("qwen3")
    options = dict(seed=0, model=theirs)
    config = ModelConfig(path="in-memory", dtype="bfloat16")
    actor = load_model(config, tokenizer, trainable=True, **options)
    reference = load_model(config, tokenizer, trainable=False, **options)
    assert (
        theirs.dtype == torch.float32
        and theirs.config._attn_implementation == "eager"
        and actor.dtype == torch.bfloat16
    )
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (theirs, actor, reference)]
    assert not pointers[0] & pointers[1] and not pointers[1] & pointers[2]


def test_training_mode_freezing_and_dropout(tokenizer, prepared):
    """Would catch: a reference that trains, an actor that drops units which the sampler keeps."""
    config = {"attention_dropout": 0.3, "hidden_dropout": 0.2}
    actor = prepared("gpt_neox", trainable=True, config=config)
    assert actor.training and all(p.requires_grad for p in actor.parameters())
    ids = torch.randint(3, 25, (1, 12))
    assert torch.equal(actor(ids).logits, actor(ids).logits) and actor.config.attention_dropout == 0.3
    reference = prepared("gpt_neox")
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())


class TestLora:
    def make(self, prepared, seed=0, **changes):
        return prepared("qwen3", trainable=True, lora=LoraConfig(rank=4, alpha=8, **changes))

    def test_starts_as_the_base_model_and_trains_only_the_adapter(self, prepared, pack):
        """Would catch: an adapter that changes the policy before the first step, or a base that is not
        frozen.
        """
        model, sequences = self.make(prepared), pack([9, 20])
        assert torch.equal(run(model, sequences), run(prepared("qwen3"), sequences))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained)

    def test_initial_adapter_is_a_function_of_the_seed(self, prepared):
        """Would catch: processes whose adapters start apart."""
        torch.manual_seed(1)
        one = weights(self.make(prepared))
        torch.manual_seed(2)
        two = weights(self.make(prepared))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_saved_merged_and_as_adapter(self, prepared, tokenizer, pack, tmp_path):
        """Would catch: a merged model without its adapter, or one with it twice."""
        import peft

        model, sequences = self.make(prepared), pack([9, 20])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        expected = run(model, sequences)
        save_model(model, tokenizer, tmp_path)
        assert torch.allclose(run(load(tmp_path, tokenizer), sequences), expected, atol=1e-4)
        base = peft.PeftModel.from_pretrained(prepared("qwen3"), tmp_path / "adapter")
        assert torch.allclose(run(base, sequences), expected, atol=1e-4)
        assert torch.equal(run(model, sequences), expected)  # saving changed nothing

    def test_unknown_module_is_named(self, prepared):
        """Would catch: a misspelt module that trains nothing."""
        with pytest.raises(ValueError, match="target_modules=.*nope"):
            self.make(prepared, target_modules=["nope"])


def test_loading_reads_the_recipe_seed_only_for_lora(folder, tokenizer):
    """Would catch: loaded weights that depend on the seed."""
    config = ModelConfig(path=str(folder), dtype="float32")
    one, two = (load_model(config, tokenizer, seed=s, trainable=False).state_dict() for s in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)


class TestDamage:
    """Would catch: a run that starts from random weights, or an error from deep inside a library."""

    def refuse(self, folder, tokenizer, message):
        with pytest.raises(ValueError, match=message) as error:
            load(folder, tokenizer)
        assert "\n" not in str(error.value)

    def test_no_folder(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refuse(tmp_path / "nowhere", tokenizer, "there is no folder .*nowhere")
        self.refuse(
            "no-such/model-here", tokenizer, "there is no folder no-such/model-here, and the hub could not"
        )

    def test_a_file_instead_of_a_folder(self, tokenizer, folder):
        self.refuse(folder / "config.json", tokenizer, "config.json is a file")

    def test_no_config(self, tokenizer, tmp_path):
        self.refuse(tmp_path, tokenizer, "has no config.json")

    def test_damaged_config(self, tokenizer, folder):
        (folder / "config.json").write_text("{")
        self.refuse(folder, tokenizer, "config.json is damaged")

    def test_code_of_its_own(self, tokenizer, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
        )
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        self.refuse(folder, tokenizer, "auto_map.*model.trust_code")
        assert not (folder / "ran").exists()

    def test_pickle_only(self, tokenizer, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refuse(folder, tokenizer, "only pytorch_model.bin, a pickle")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_cut_off(self, tokenizer, folder, keep):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:keep])
        self.refuse(folder, tokenizer, "cut off|damaged")

    def test_missing_shard_and_shard_outside(self, tokenizer, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        load(folder, tokenizer)
        shards = sorted(folder.glob("model-*.safetensors"))
        shards[1].rename(folder / "elsewhere")
        self.refuse(folder, tokenizer, f"misses 1 of {len(shards)} weight files, {shards[1].name} first")
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shards[1].name, "../elsewhere"))
        self.refuse(folder, tokenizer, "points outside its folder: ../elsewhere")

    def test_weights_that_do_not_fit(self, tokenizer, folder):
        config = json.loads((folder / "config.json").read_text())
        for change in ({"num_hidden_layers": 3}, {"intermediate_size": 96}):
            changed = {**config, **change}
            if "num_hidden_layers" in change:
                changed["layer_types"] = ["full_attention"] * 3
            (folder / "config.json").write_text(json.dumps(changed))
            with pytest.raises(ValueError, match="missing keys|mismatched|cannot be loaded"):
                load(folder, tokenizer)

    def test_tokenizer_of_another_model(self, folder):
        larger = build_tokenizer(BuildTokenizerConfig(alphabet="".join(map(chr, range(33, 126)))))
        self.refuse(folder, larger, "tokenizer has 96 tokens, the model embeddings for 25")

    def test_architecture_that_is_not_covered(self, tokenizer, folder, monkeypatch):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["chunked_attention"] * 2}))
        self.refuse(folder, tokenizer, "layers of type chunked_attention|cannot be used")


def test_save_refuses_what_would_ruin_a_model(prepared, tokenizer, tmp_path):
    """Would catch: NaN weights, or half of the weights, written over good ones."""
    model = prepared("qwen3")
    good = {name: p.clone() for name, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    for bad, message in (
        ({**good, name: good[name] * float("nan")}, f"1 weights are not finite, {name}"),
        ({k: v for k, v in good.items() if k != name}, f"1 weights are missing, {name}"),
        ({**good, "extra": torch.zeros(1)}, "extra is no weight of Qwen3ForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(model, tokenizer, tmp_path / "out", weights=bad)
    assert not (tmp_path / "out").exists()


def test_tokenizer_comes_from_where_the_recipe_says(folder, tmp_path):
    """Would catch: the model's own tokenizer in place of the one that was asked for, and a missing end
    token.
    """
    model = ModelConfig(path=str(folder))
    assert load_tokenizer(model, TokenizerConfig()).encode("1") == [4]
    other = build_tokenizer(BuildTokenizerConfig(alphabet="91"))
    other.save_pretrained(tmp_path / "other")
    assert load_tokenizer(model, TokenizerConfig(path=str(tmp_path / "other"))).encode("1") == [4]
    assert load_tokenizer(model, TokenizerConfig(path=str(tmp_path / "other"))).encode("9") == [3]
    assert load_tokenizer(model, TokenizerConfig(build=BuildTokenizerConfig(alphabet="x"))).encode("x") == [3]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "other" / name
        if file.exists():
            entries = json.loads(file.read_text())
            file.write_text(
                json.dumps({k: v for k, v in entries.items() if k not in ("eos_token", "pad_token")})
            )
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(model, TokenizerConfig(path=str(tmp_path / "other")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer.path: no tokenizer could be loaded"):
        load_tokenizer(model, TokenizerConfig(path=str(tmp_path / "empty")))


def test_context_length_without_loading(folder):
    """Would catch: a data check against a default length."""
    assert context_length(ModelConfig(path=str(folder))) == 512
    assert context_length(model_config("llama", config={"max_position_embeddings": 77})) == 77
