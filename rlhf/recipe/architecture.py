"""The architectures of transformers, read from its source: names, configuration keys, and values that contradict.

Importing a configuration class takes torch with it, which takes seconds; its file is read with `ast` instead. What
cannot be read that way is not judged here: `rlhf.models.build` has the last word.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.recipe.problems import Fault
from rlhf.recipe.schema import BuildModelConfig
from rlhf.recipe.source_code import literal, parse
from rlhf.recipe.suggest import closest, did_you_mean

# Set by us from the tokenizer, whatever the recipe says.
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
# Understood by every configuration class with rotary positions, and declared by few.
_UNDECLARED = ("head_dim", "rope_theta", "rope_scaling")
_SIMPLE = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
_UNREADABLE = object()  # a default that is no literal
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_SIZES = (*_SIZES, "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class ConfigClass:
    """The configuration class of an architecture."""

    fields: Mapping[
        str, tuple[frozenset[str] | None, Any]
    ]  # name: (types by name, None if not simple; default)
    names: frozenset[str]  # fields, attributes, and keys that it understands without declaring them

    def default(self, name: str) -> Any:
        return self.fields[name][1] if name in self.fields else None


def architecture_faults(build: BuildModelConfig) -> Iterator[Fault]:
    """What is wrong with `model.build`; keys count from there."""
    known = causal_architectures()
    if not known:
        return
    name = build.model_type
    if name not in known:
        every = _mapping("configuration_auto", "auto_mappings", "CONFIG_MAPPING_NAMES")
        what = "is no causal language model" if name in every else "is no architecture of transformers"
        hint = did_you_mean(closest(name, list(known)), "for example qwen3, llama, mistral, gpt_neox")
        yield Fault((("model_type",),), f"{name!r} {what}", hint)
        return
    described = config_class(name)
    if described is not None:
        faults = [*_unknown_keys(build, described), *_wrong_values(build, described)]
        yield from faults
        wrong = {fault.keys[0][-1] for fault in faults}
        yield from _contradictions(
            {k: v for k, v in build.config.items() if k not in wrong}, described, wrong
        )


def context_tokens(build: BuildModelConfig) -> int | None:
    """The longest sequence of a built model in tokens; None where it cannot be told."""
    if "max_position_embeddings" in build.config:
        value = build.config["max_position_embeddings"]
    else:
        described = config_class(build.model_type)
        value = described.default("max_position_embeddings") if described is not None else None
    return value if isinstance(value, int) else None


# ------------------------------------------------------------------------------------------------------------- the checks


def _unknown_keys(build: BuildModelConfig, described: ConfigClass) -> Iterator[Fault]:
    for name in build.config:
        key = (("config", name), ("model_type",))
        if name in FROM_TOKENIZER:
            yield Fault(key, "comes from the tokenizer", "leave it out")
        elif name not in described.names:
            near = closest(name, [f for f in (*described.fields, *_UNDECLARED) if f not in FROM_TOKENIZER])
            some = [f for f in described.fields if f in _SIZES]
            yield Fault(
                key,
                f"{build.model_type} has no such key",
                did_you_mean(near, f"it has {', '.join(some)}, ..."),
            )


def _wrong_values(build: BuildModelConfig, described: ConfigClass) -> Iterator[Fault]:
    for name, value in build.config.items():
        types, default = described.fields.get(name, (None, None))
        key = (("config", name), ("model_type",))
        if types is not None and not _is_one_of(value, types):
            wanted = " or ".join(sorted(types - {"None"}))
            own = f"{build.model_type}'s own is {default!r}"
            hint = own if isinstance(default, str | int | float) else "leave it out for its default"
            yield Fault(key, f"{value!r} is not {'an' if wanted.startswith('int') else 'a'} {wanted}", hint)
        elif name in _SIZES and isinstance(value, int) and value <= 0:
            yield Fault(key, f"{value} is not above 0")


def _is_one_of(value: Any, types: frozenset[str]) -> bool:
    if isinstance(value, bool):
        return "bool" in types
    return isinstance(value, tuple(_SIMPLE[t] for t in types)) or (
        isinstance(value, int) and "float" in types
    )


def _contradictions(
    config: Mapping[str, Any], described: ConfigClass, wrong: set[str | int]
) -> Iterator[Fault]:
    """Numbers that no model can have together. A default counts too: it is what the model would get."""

    def number(name: str) -> int | None:
        value = config.get(name, described.default(name))
        return value if isinstance(value, int) and name in described.names and name not in wrong else None

    def said(name: str) -> str:
        return f"{name}={number(name)}" + ("" if name in config else " (the default)")

    hidden, heads, groups = (number(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if (
        hidden
        and heads
        and hidden % heads
        and _splits_hidden_size(config, described)
        and "head_dim" not in wrong
    ):
        message = f"{said('hidden_size')} is not a multiple of {said('num_attention_heads')}"
        way = f"use hidden_size: {heads * max(1, round(hidden / heads))}"
        way += ", or set head_dim" if "head_dim" in described.fields else ""
        yield Fault(_keys(config, "hidden_size", "num_attention_heads", "head_dim"), message, way)
    if heads and groups and heads % groups:
        message = f"{said('num_attention_heads')} is not a multiple of {said('num_key_value_heads')}"
        way = f"set num_key_value_heads to a divisor of {heads}"
        yield Fault(_keys(config, "num_key_value_heads", "num_attention_heads"), message, way)
    types, layers = config.get("layer_types"), number("num_hidden_layers")
    if isinstance(types, list) and layers and len(types) != layers:
        message = f"layer_types has {len(types)} entries for {said('num_hidden_layers')}"
        yield Fault(_keys(config, "layer_types", "num_hidden_layers"), message, "give one per layer")


def _splits_hidden_size(config: Mapping[str, Any], described: ConfigClass) -> bool:
    """Whether a head's size is hidden_size / num_attention_heads: where no head_dim is, and the architecture's own
    numbers divide (some have heads of another size, under other names)."""
    hidden, heads = described.default("hidden_size"), described.default("num_attention_heads")
    divides = isinstance(hidden, int) and isinstance(heads, int) and hidden % heads == 0
    return divides and config.get("head_dim", described.default("head_dim")) is None


def _keys(config: Mapping[str, Any], *names: str) -> tuple[tuple[str, str], ...]:
    """The keys that a contradiction rests on, one that the recipe sets first: there it can be changed."""
    return tuple(("config", name) for name in sorted(names, key=lambda name: name not in config))


# ------------------------------------------------------------------------------------------- the source of transformers


@cache
def causal_architectures() -> Mapping[str, str]:
    """Architectures with a causal language model; empty where transformers cannot be read."""
    models = _mapping("modeling_auto", "auto_mappings", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    configs = _mapping("configuration_auto", "auto_mappings", "CONFIG_MAPPING_NAMES")
    return {name: configs[name] for name in models if name in configs}


def config_class(model_type: str) -> ConfigClass | None:
    """The configuration class of an architecture; None where it cannot be read."""
    class_name = causal_architectures().get(model_type)
    special = _mapping("configuration_auto", "auto_mappings", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    module = special.get(model_type, model_type.replace("-", "_"))
    folder = _transformers()
    if class_name is None or folder is None:
        return None
    read = _read_class(folder / "models" / module / f"configuration_{module}.py", class_name)
    return None if read is None else ConfigClass(read.fields, read.names | set(_UNDECLARED))


@cache
def _transformers() -> Path | None:
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def _tree(file: Path) -> ast.Module | None:
    try:
        return parse(file)
    except (OSError, SyntaxError, ValueError):
        return None


@cache
def _mapping(*places: str) -> Mapping[str, str]:
    """A table of names of transformers.models.auto, put together from the given modules; the last place is its name."""
    *modules, table = places
    found: dict[str, str] = {}
    for module in modules:
        folder = _transformers()
        tree = None if folder is None else _tree(folder / "models" / "auto" / f"{module}.py")
        for statement in [] if tree is None else tree.body:
            if any(isinstance(n, ast.Name) and n.id == table for n in ast.walk(_target(statement))):
                found.update(_pairs(statement))
    return found


def _target(statement: ast.stmt) -> ast.AST:
    """What a statement assigns to or calls: `X = ...` and `X.update(...)` both name X."""
    if isinstance(statement, ast.Assign):
        return statement.targets[0]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return statement.value.func
    return ast.Pass()


def _pairs(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            pairs = [tuple(node.elts)]
        elif isinstance(node, ast.Dict):
            pairs = list(zip(node.keys, node.values, strict=True))
        else:
            continue
        for key, value in pairs:
            name, target = literal(key), literal(value)
            if isinstance(name, str) and isinstance(target, str | tuple):
                yield name, target if isinstance(target, str) else target[0]


@cache
def _read_class(file: Path, name: str) -> ConfigClass | None:
    """A class with what it inherits; None if a configuration class among its bases cannot be read."""
    tree = _tree(file)
    nodes = [] if tree is None else [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    if not nodes:
        return None
    fields: dict[str, tuple[frozenset[str] | None, Any]] = {}
    names: set[str] = set()
    for base in reversed(nodes[-1].bases):
        at = _where(tree, file, ast.unparse(base))
        inherited = None if at is None else _read_class(*at)
        if inherited is None:
            if ast.unparse(base).endswith("Config"):
                return None
            continue  # methods only
        fields.update(inherited.fields)
        names |= inherited.names
    for statement in nodes[-1].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = (
                _types(statement.annotation),
                literal(statement.value, _UNREADABLE),
            )
    return ConfigClass(fields, frozenset(names | set(fields) | set(_mentioned(nodes[-1]))))


def _where(tree: ast.Module, file: Path, base: str) -> tuple[Path, str] | None:
    """The file and name of a base class: of this file, or from a relative import."""
    if any(isinstance(n, ast.ClassDef) and n.name == base for n in tree.body):
        return file, base
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == base:
                    return file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(
                        ".py"
                    ), alias.name
    return None


def _mentioned(node: ast.ClassDef) -> Iterator[str]:
    """Every name that a class's attributes, methods and the texts in them mention: a key that is among them may be
    meant, one that is not among them cannot be."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    for part in (n for statement in body for n in ast.walk(statement)):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name | ast.arg | ast.FunctionDef):
            yield (
                part.id
                if isinstance(part, ast.Name)
                else part.arg
                if isinstance(part, ast.arg)
                else part.name
            )
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            yield part.value


def _types(annotation: ast.expr) -> frozenset[str] | None:
    """{"int", "None"} of `int | None`; None where it holds anything but plain types."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        left, right = _types(annotation.left), _types(annotation.right)
        return None if left is None or right is None else left | right
    name = ast.unparse(annotation)
    return frozenset({name}) if name in _SIMPLE else None
