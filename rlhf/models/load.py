"""Loading models and tokenizers, preparing models for training and for the engine, saving them for anyone.

A prepared model is an ordinary Hugging Face model (peft's wrapper around it with LoRA) whose attention goes
through `rlhf.models.attention`, whose linears do not depend on the number of rows, and which has no dropout.
Weights are read from safetensors only, after a check of every file; a repository's own code runs only where
the recipe names model and commit. Not here: making models from nothing (`rlhf.models.build`).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.model_files import local_folder, read_config_json, weight_files
from rlhf.models import attention
from rlhf.models.build import build_model, build_tokenizer
from rlhf.models.head import prepare_head
from rlhf.models.linear import lay_together
from rlhf.models.parallel import TensorParallel, check_split, shard
from rlhf.models.swap import swap_modules
from rlhf.recipe.schema import LoraConfig, ModelConfig, TokenizerConfig
from rlhf.rng import key

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_own_tokens(
    model_config: ModelConfig, tokenizer_config: TokenizerConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError where the recipe gives a model on the disk or the hub other tokens than it was trained on: every
    one of its own must be there under its own number. A model without a tokenizer of its own takes any."""
    if model_config.path is None or (tokenizer_config.build is None and tokenizer_config.path is None):
        return
    try:
        own = load_tokenizer(model_config, TokenizerConfig()).get_vocab()
    except ValueError:
        return
    given = tokenizer.get_vocab()
    other = next((token for token, number in sorted(own.items()) if given.get(token) != number), None)
    if other is not None:
        key = (
            "tokenizer.build"
            if tokenizer_config.build is not None
            else f"tokenizer.path={tokenizer_config.path}"
        )
        raise ValueError(
            f"{key}: the model at {model_config.path} was trained on other tokens ({other!r} is number {own[other]} there and "
            f"{given.get(other, 'missing')} here), so that it would read nonsense; leave tokenizer out to take the model's own"
        )


def load_tokenizer(model_config: ModelConfig, tokenizer_config: TokenizerConfig) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: built, from `tokenizer.path`, or the model's own. A missing pad token becomes
    the end token: masks come from lengths, so nothing changes. Raises ValueError where there is none, or none
    with an end token.
    """
    if tokenizer_config.build is not None:
        return build_tokenizer(tokenizer_config.build)
    path = tokenizer_config.path or model_config.path
    if path is None:
        raise ValueError("a built model has no tokenizer of its own; set tokenizer.build or tokenizer.path")
    what = "model.path" if tokenizer_config.path is None else "tokenizer.path"
    own = path == model_config.path
    trusted = own and model_config.trust_code is not None
    folder = _folder(
        path, _revision(model_config) if own else None, _SMALL_FILES + (("*.py",) if trusted else ()), what
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what}: no tokenizer could be loaded from {path}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{what}: the tokenizer of {path} has no end token (eos_token); set one in its files"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(model_config: ModelConfig) -> int:
    """The longest sequence that the model takes, in tokens, without loading it."""
    if model_config.build is not None:
        config = AutoConfig.for_model(model_config.build.model_type, **model_config.build.config)
    else:
        config = read_config(model_config)
    return config.get_text_config().max_position_embeddings


def generation_stop_ids(model_config: ModelConfig, model: nn.Module | None = None) -> list[int]:
    """The tokens at which the model's own generation_config ends a response: a chat model may have others than its
    tokenizer's end of sequence. Empty for a built model and for one without that file."""
    if model is not None:
        return _as_ids(model.generation_config.eos_token_id)
    if model_config.path is None:
        return []
    folder = _folder(model_config.path, _revision(model_config), _SMALL_FILES, "model.path")
    if not (folder / "generation_config.json").is_file():
        return []
    return _as_ids(json.loads((folder / "generation_config.json").read_text()).get("eos_token_id"))


def _as_ids(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def load_model(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    trainable: bool,
    model: nn.Module | None = None,
    invariant: bool = True,
    parallel: TensorParallel | None = None,
) -> nn.Module:
    """The recipe's model, prepared. With `trainable`: in training mode, LoRA added if configured (its random
    part is a function of `seed`), gradient checkpointing if configured; otherwise the plain model, frozen.
    `model` is an object to start from instead (it is copied, never changed). `invariant=False` leaves linears
    and activations as they are. With `parallel` this process keeps its part of the model, which is for sampling only: the
    processes read one after another, so that of the whole model at most one copy is in the machine's memory at a time,
    beside what they keep; the device is given the part alone.

    Raises ValueError for a folder that is missing or damaged, an architecture that the attention does not
    cover, a tokenizer with more tokens than the model has embeddings, and, before weights are read, a model that cannot be
    split over so many processes.
    """
    dtype = getattr(torch, model_config.dtype)
    if parallel is not None and parallel.size > 1:
        if model is None:
            check_model_split(model_config, parallel.size)
        with parallel.in_turn("part of the model"):
            own = dict(seed=seed, trainable=trainable, model=model, invariant=invariant)
            part = shard(load_model(model_config, tokenizer, device="cpu", **own), parallel)
            if torch.device(device).type == "cuda":
                lay_together(part, device)
            return part.to(device)
    if model is not None:
        model = copy.deepcopy(model).to(dtype)
    elif model_config.build is not None:
        model = build_model(model_config.build, tokenizer, dtype=model_config.dtype, seed=seed)
    else:
        model, _ = read_folder(model_config, dtype)
    return prepare(
        model, model_config, tokenizer, seed=seed, device=device, trainable=trainable, invariant=invariant
    )


def prepare(
    model: nn.Module,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    device: torch.device | str,
    trainable: bool,
    invariant: bool,
    task: str = "CAUSAL_LM",
) -> nn.Module:
    """What `load_model` does to every model, however it was made: in place, and what it raises. `task` is peft's
    name for what the model does."""
    _check_vocabulary(model, tokenizer)
    _use_our_attention(model)
    _disable_dropout(model)
    if not trainable:
        model.requires_grad_(False)
    elif model_config.lora is not None:
        model = _add_lora(model, model_config.lora, seed, task)
    if invariant:
        swap_modules(model)
    if task == "CAUSAL_LM":
        prepare_head(model)
    if trainable and model_config.gradient_checkpointing:
        attention.enable_gradient_checkpointing(model)
    if invariant and torch.device(device).type == "cuda":
        lay_together(model, device)
    return model.to(device).train(trainable)


def check_model_split(model_config: ModelConfig, size: int) -> None:
    """Raise ValueError where the model in a folder or repository cannot be split over `size` processes; no weight is read."""
    if model_config.path is None:
        return
    config, trusted = read_config(model_config), model_config.trust_code is not None
    with torch.device("meta"):
        check_split(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted), size)


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder that plain transformers loads: weights, configuration, tokenizer. With LoRA
    the weights are merged and the adapter alone goes to adapter/.

    `weights` are the plain model's parameters by name, tied ones once (default: the model's own). Raises
    ValueError for weights that are missing or not finite, before anything is written.
    """
    path = Path(path)
    lora = _is_lora(model)
    if weights is None:
        whole = copy.deepcopy(model).merge_and_unload() if lora else model
        weights = dict(whole.named_parameters())
    base = model.get_base_model() if lora else model
    plain = _plain_copy(base, weights)
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if lora and not any("ds_id" in p.__dict__ for p in model.parameters()):
        model.save_pretrained(path / "adapter", save_embedding_layers=False)


# -- reading a folder ----------------------------------------------------------------------------------------


def _revision(config: ModelConfig) -> str | None:
    return config.trust_code.revision if config.trust_code is not None else config.revision


def _folder(path: str, revision: str | None, patterns: Sequence[str], what: str) -> Path:
    """A local folder as it is, or the wanted files of a hub repository (from the cache if HF_HUB_OFFLINE is
    set).
    """
    with _key(what):
        local = local_folder(path)
    if local is not None:
        return local
    try:
        return Path(
            snapshot_download(path, revision=revision, allow_patterns=list(patterns), etag_timeout=10)
        )
    except Exception as error:  # the hub's client raises from three libraries; the cause is kept
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{what}: there is no folder {path}, and the hub could not give it: {reason.rstrip('.')}; give a folder "
            f"(paths count from {Path.cwd()}), or a name that the hub has, with the network on and HF_TOKEN set for a "
            "gated one"
        ) from error


@contextmanager
def _key(name: str) -> Iterator[None]:
    """Put the recipe's key before what `rlhf.model_files` says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error.__cause__


def _read_config(folder: Path, model_config: ModelConfig) -> Any:
    with _key("model.path"):
        read_config_json(folder, trusted=model_config.trust_code is not None)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model_config.trust_code is not None)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.path: the configuration in {folder} cannot be used: {error}") from error


def read_config(model_config: ModelConfig) -> Any:
    """The configuration in the folder or repository `model_config.path`, without its weights."""
    folder = _folder(model_config.path, _revision(model_config), _SMALL_FILES, "model.path")
    return _read_config(folder, model_config)


def read_folder(
    model_config: ModelConfig,
    dtype: torch.dtype,
    auto: type = AutoModelForCausalLM,
    optional: Sequence[str] = (),
) -> tuple[nn.Module, set[str]]:
    """The model in a folder as `auto` makes it, and those of the `optional` weights that its files lack. Raises
    ValueError for files that are damaged or lack any other weight."""
    trusted = model_config.trust_code is not None
    patterns = (*_SMALL_FILES, "model*.safetensors", *(("*.py",) if trusted else ()))
    folder = _folder(model_config.path, _revision(model_config), patterns, "model.path")
    config = _read_config(folder, model_config)
    with _key("model.path"):
        weight_files(folder)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trusted,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"model.path: the weights in {folder} cannot be loaded: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(n) for n in info[problem] if n not in optional)
        if names:
            raise ValueError(
                f"model.path: {folder} has {len(names)} {problem.replace('_', ' ')}, {names[0]} first: these "
                "weights would be random; the files do not fit config.json"
            )
    return model, set(info["missing_keys"]).intersection(optional)


# -- preparing -----------------------------------------------------------------------------------------------


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, the model embeddings for {embeddings}: they do not belong "
            "together; use the model's own tokenizer"
        )


def _use_our_attention(model: nn.Module) -> None:
    config = model.config.get_text_config()
    name = type(model).__name__
    types = set(config.to_dict().get("layer_types") or ()) - _LAYER_TYPES
    if types:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(types))}; supported are {', '.join(_LAYER_TYPES)}"
        )
    if not model._supports_attention_backend:
        raise ValueError(f"{name} does not use transformers' attention interface and cannot be run here")
    model.set_attn_implementation(attention.NAME)
    if config._attn_implementation != attention.NAME:
        raise ValueError(f"{name} does not let its attention be chosen and cannot be run here")


def _disable_dropout(model: nn.Module) -> None:
    """Sampler and trainer must compute the same function; the saved configuration keeps its numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in module.__dict__:
            module.attention_dropout = 0.0


def _add_lora(model: nn.Module, config: LoraConfig, seed: int, task: str) -> nn.Module:
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type=task,
    )
    dtype = model.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "lora"))
        try:
            adapted = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules={targets}: {error}") from error
    return adapted.to(dtype)


def _is_lora(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # slow to import, and a model that it wraps cannot exist without it
    return peft is not None and isinstance(model, peft.PeftModel)


# -- writing -------------------------------------------------------------------------------------------------


def _plain_copy(base: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A stock model of the same class that holds these very tensors."""
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    wanted = plain.state_dict().keys()
    buffers = {name: b for name, b in base.named_buffers() if name in wanted}
    unknown = sorted(set(weights) - set(wanted))
    if unknown:
        raise ValueError(f"{unknown[0]} is no weight of {type(base).__name__}")
    broken = sorted(name for name, w in weights.items() if not torch.isfinite(w).all())
    if broken:
        raise ValueError(f"{len(broken)} weights are not finite, {broken[0]} first; the model is not saved")
    values = {name: w.detach() for name, w in {**buffers, **weights}.items()}
    plain.load_state_dict(values, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, w in plain.state_dict().items() if w.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} first; the model is not saved")
    if base.can_generate():
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain
