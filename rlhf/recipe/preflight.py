"""What a recipe names, looked up before anything heavy loads: model folders, datasets, reward functions, architectures.

`look_up` goes to `rlhf.recipe.load` as its `look_up`, so that its faults stand in one report with the recipe's own.
Nothing here imports torch, executes a user's file or reaches the network: a name that may be the hub's passes. Not here:
how each thing is looked at (`functions`, `architecture`, `rlhf.model_files`, `rlhf.data.datasets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.datasets import HEAD_ROWS, BadRow, Head, Kind, column_faults, head_of, read_head, source_faults
from rlhf.model_files import check_tokenizer, local_folder, read_config_json, weight_files
from rlhf.recipe.architecture import architecture_faults, context_tokens
from rlhf.recipe.functions import reward_faults
from rlhf.recipe.outputs import MODEL_SECTIONS
from rlhf.recipe.problems import Fault, Key
from rlhf.recipe.rules import SAMPLING, stage_of
from rlhf.recipe.schema import BuildTokenizerConfig, DatasetConfig, Recipe, RewardConfig

# What the rows of a method's training set become; those of the others are prompts.
_KINDS: dict[str, Kind] = {
    "sft": "sft",
    "distill": "sft",
    "rm": "preferences",
    "dpo": "preferences",
    "kto": "labels",
    "prm": "steps",
}
SMALLEST_BPE = 3 + 256  # tokens: <|pad|>, <|bos|>, <|eos|>, and every byte


@dataclass(frozen=True)
class Given:
    """What the Python API hands over as objects: it is not looked for on the disk."""

    model: bool = False
    tokenizer: bool = False
    rows: Mapping[Key, Sequence[Any]] = field(default_factory=dict)  # by the dataset's key
    functions: Mapping[str, Callable] = field(default_factory=dict)  # reward functions by name


def look_up(recipe: Recipe, given: Given = Given()) -> list[Fault]:
    """Everything that is not as the recipe says."""
    heads: dict[Key, Head] = {}  # of each dataset that can be looked into
    faults = [*_model_faults(recipe, given), *_tokenizer_faults(recipe, given)]
    for key, config, kind in _datasets(recipe):
        faults += [fault.below(key) for fault in _dataset_faults(key, config, kind, given, heads)]
    for key, rewards, sees in _rewards(recipe):
        columns = {k: head.columns for k, head in heads.items() if sees(k)}
        for i, reward in enumerate(rewards):
            faults += [fault.below((*key, i)) for fault in reward_faults(reward, given.functions, columns)]
    return [*faults, *_length_faults(recipe, given), *_size_faults(recipe, heads)]


# --------------------------------------------------------------------------------------------------- models, tokenizers


def _model_faults(recipe: Recipe, given: Given) -> Iterator[Fault]:
    if recipe.model.build is not None:
        yield from (fault.below(("model", "build")) for fault in architecture_faults(recipe.model.build))
    trusted = recipe.model.trust_code is not None
    for section in MODEL_SECTIONS:
        config = getattr(recipe, section)
        if config is not None and config.path is not None and _is_source(config.path, given, section):
            yield from _folder_faults((section, "path"), config.path, trusted and section == "model")


def _is_source(path: str, given: Given, section: str) -> bool:
    """Whether a path must be there now: no object of the Python API's, nor what an earlier stage will write."""
    return stage_of(path) is None and not (given.model and section == "model")


def _folder_faults(key: Key, path: str, trusted: bool) -> Iterator[Fault]:
    """A model's folder: its configuration, and its weights, each with its own fault."""

    def fault_of(check: Callable[[], Any]) -> Iterator[Fault]:
        try:
            check()
        except (ValueError, OSError) as error:
            yield Fault((key,), str(error))

    missing = list(fault_of(lambda: local_folder(path)))
    yield from missing
    folder = None if missing else local_folder(path)
    if folder is not None:
        no_config = list(fault_of(lambda: read_config_json(folder, trusted=trusted)))
        yield from no_config
        if not no_config or (folder / "config.json").is_file():
            yield from fault_of(lambda: weight_files(folder))


def _tokenizer_faults(recipe: Recipe, given: Given) -> Iterator[Fault]:
    config, model = recipe.tokenizer, recipe.model
    if given.tokenizer:
        return
    if config.build is not None:
        yield from (fault.below(("tokenizer", "build")) for fault in tokenizer_build_faults(config.build))
        yield from _stop_faults(recipe, config.build)
        return
    path = config.path or model.path
    if stage_of(path) is not None:
        return
    key = ("tokenizer", "path") if config.path is not None else ("model", "path")
    try:
        folder = None if path is None else local_folder(path)
        is_model = folder is not None and (folder / "config.json").is_file()
        if folder is not None and (
            config.path is not None or is_model
        ):  # else the model's own fault says enough
            check_tokenizer(folder)
    except (ValueError, OSError) as error:
        if config.path is not None or path is None or Path(path).expanduser().is_dir():
            yield Fault((key, ("tokenizer", "path")), str(error))


def tokenizer_build_faults(config: BuildTokenizerConfig) -> Iterator[Fault]:
    """Why no tokenizer can be built; keys count from `tokenizer.build`."""
    if config.kind == "characters":
        twice = sorted({c for c in config.alphabet if config.alphabet.count(c) > 1})
        if not config.alphabet:
            yield Fault((("alphabet",), ("kind",)), "is empty", "list the characters of your data")
        if twice:
            yield Fault(
                (("alphabet",), ("kind",)), f"has {', '.join(map(repr, twice))} more than once", "keep one"
            )
        return
    if config.train_on is None:
        yield Fault((("train_on",), ("kind",)), "kind: bpe needs it", "name a text or JSON-lines file")
    elif not Path(config.train_on).is_file():
        hint = f"paths count from the working directory, {Path.cwd()}"
        yield Fault((("train_on",), ("kind",)), f"there is no file {config.train_on}", hint)
    if config.vocab_size < SMALLEST_BPE:
        message = f"{config.vocab_size} is too small for the 256 bytes and the special tokens"
        yield Fault((("vocab_size",), ("kind",)), message, f"use at least {SMALLEST_BPE}")


def _stop_faults(recipe: Recipe, build: BuildTokenizerConfig) -> Iterator[Fault]:
    if build.kind != "characters" or "rollout" not in recipe.roles:
        return
    for i, text in enumerate(recipe.rollout.stop):
        if text not in build.alphabet or len(text) != 1:
            message = f"{text!r} is no token of the characters in tokenizer.build.alphabet"
            keys: tuple[Key, ...] = (("rollout", "stop", i), ("tokenizer", "build", "alphabet"))
            yield Fault(keys, message, "a stop must be one of them")


# ------------------------------------------------------------------------------------------------------------- datasets


def _datasets(recipe: Recipe) -> Iterator[tuple[Key, DatasetConfig, Kind]]:
    """(key, section, what its rows become) of every dataset of the recipe."""
    own_responses = recipe.method == "distill" and recipe.distill.on_policy_frac == 1
    kind = "prompts" if own_responses else _KINDS.get(recipe.method, "prompts")
    for key, config in recipe.training_data.items():
        yield key, config, kind
    for name, config in recipe.evaluation.sets.items():
        yield ("evaluation", "sets", name), config, "prompts"
    for name, config in recipe.evaluation.pairs.items():
        yield ("evaluation", "pairs", name), config, "preferences"
    for name, config in recipe.evaluation.held_out.items():
        yield ("evaluation", "held_out", name), config, kind
    if recipe.ptx is not None:
        yield ("ptx", "data"), recipe.ptx.data, "sft"


def _dataset_faults(
    key: Key, config: DatasetConfig, kind: Kind, given: Given, heads: dict[Key, Head]
) -> Iterator[Fault]:
    """What is wrong with one dataset; keys count from its section. Puts what can be seen of it into `heads`."""
    source: tuple[Key, ...] = (("path",), ("task",))
    head = None
    if key in given.rows:
        head = head_of(given.rows[key][:HEAD_ROWS], len(given.rows[key]))
    elif stage_of(config.path) is None:  # else an earlier stage will write it
        try:
            faults = list(source_faults(config))
            yield from faults
            unreadable = faults and (config.task is not None or any(f.keys[0] == ("path",) for f in faults))
            head = None if unreadable else read_head(config)
        except (ValueError, OSError) as error:
            if config.task is not None:  # arguments that are right one by one make too few rows
                yield Fault((("task_args", "count"), ("task_args",), ("task",)), str(error))
            else:
                yield Fault(source, str(error), "mend the file, or name another")
    if head is not None and head.count == 0:
        yield Fault(source, f"{_source(config)} holds no rows", "give a dataset with some")
    elif head is not None:
        heads[key] = head
        yield from _row_faults(config, kind, head)


def _row_faults(config: DatasetConfig, kind: Kind, head: Head) -> Iterator[Fault]:
    rows = head.rows[: config.limit]
    bad = next((row for row in rows if isinstance(row, BadRow)), None)
    if bad is not None and config.bad_rows == "error":
        hint = "mend it, or set bad_rows: skip to leave such rows out"
        yield Fault((("path",), ("bad_rows",)), f"{_source(config)}: {bad.reason}", hint)
    seen_all = not rows or head.count == len(rows)  # of a Parquet file the columns are known without its rows
    if seen_all or config.bad_rows == "error":  # else a later row may have the column
        yield from column_faults(config, kind, head.columns)


def _source(config: DatasetConfig) -> str:
    return f"task {config.task}" if config.task is not None else repr(config.path)


def _rewards(recipe: Recipe) -> Iterator[tuple[Key, Sequence[RewardConfig], Callable[[Key], bool]]]:
    """Each list of reward functions, with which datasets' rows it sees."""
    own = recipe.evaluation.reward

    def of_evaluations(key: Key) -> bool:
        return key[:2] == ("evaluation", "sets")

    yield (
        ("reward",),
        recipe.reward,
        lambda key: _is_sampled(recipe, key) or own is None and of_evaluations(key),
    )
    if own is not None:
        yield ("evaluation", "reward"), own, of_evaluations


def _is_sampled(recipe: Recipe, key: Key) -> bool:
    """Whether a dataset's rows are prompts of the samples that are learned from."""
    return key in recipe.training_data and recipe.method in SAMPLING


# ------------------------------------------------------------------------------------------------------ lengths, numbers


def _length_faults(recipe: Recipe, given: Given) -> Iterator[Fault]:
    """Responses, and prompts of the length that the recipe names, must fit into the model's context."""
    context, key = (None, ("model", "path")) if given.model else _context(recipe)
    if context is None or "rollout" not in recipe.roles:
        return
    limits: list[tuple[Key, int]] = [(("rollout", "max_response_tokens"), recipe.rollout.max_response_tokens)]
    if recipe.evaluation.max_response_tokens is not None and recipe.evaluation.sets:
        limits.append((("evaluation", "max_response_tokens"), recipe.evaluation.max_response_tokens))
    for own, tokens in limits:
        if tokens >= context:
            message = f"{'.'.join(map(str, own[1:]))}={tokens} leaves no room for a prompt in the model's context of {context} tokens"
            yield Fault((own, key), message, f"lower it below {context}")
    response = recipe.rollout.max_response_tokens
    prompt = recipe.data.max_prompt_tokens
    is_chosen = prompt != DatasetConfig.model_fields["max_prompt_tokens"].default
    if is_chosen and _is_sampled(recipe, ("data",)) and response < context < prompt + response:
        message = f"max_prompt_tokens={prompt} and rollout.max_response_tokens={response} are more than the model's context of {context} tokens"
        keys: tuple[Key, ...] = (("data", "max_prompt_tokens"), ("rollout", "max_response_tokens"), key)
        yield Fault(keys, message, f"there is room for prompts of {context - response}")


def _context(recipe: Recipe) -> tuple[int | None, Key]:
    """The model's context in tokens, where it can be told, and the key that decides it."""
    if recipe.model.build is not None:
        return context_tokens(recipe.model.build), ("model", "build", "config", "max_position_embeddings")
    key: Key = ("model", "path")
    try:
        path = recipe.model.path
        folder = None if path is None or stage_of(path) is not None else local_folder(path)
        config = {} if folder is None else read_config_json(folder, trusted=True)
    except (ValueError, OSError):  # reported as the model's own fault
        return None, key
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    found = text.get("max_position_embeddings")
    return (found if isinstance(found, int) else None), key


def _size_faults(recipe: Recipe, heads: Mapping[Key, Head]) -> Iterator[Fault]:
    """A step must not be larger than the training sets together."""
    rows, counts = recipe.trainer.prompts_per_step, []
    for key, config in recipe.training_data.items():
        known = [n for n in (heads[key].count if key in heads else None, config.limit) if n is not None]
        if not known:
            return  # how many there are is not known
        counts.append(min(known) * recipe.training_weights[key])
    if sum(counts) < rows:
        count = int(sum(counts))
        message = f"prompts_per_step={rows} is more than the {count} rows of the training set"
        keys: tuple[Key, ...] = (
            ("trainer", "prompts_per_step"),
            ("data", "limit"),
            ("data", "path"),
            ("data", "task_args"),
            ("mix",),
        )
        yield Fault(keys, message, f"lower it to at most {count}, or add data")
