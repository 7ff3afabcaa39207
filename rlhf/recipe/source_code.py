"""What Python source defines, read without running it: a module's names, and how its functions are called.

Here: finding a module's file without importing it or its packages, and reading files with `ast`. Not here: what a
recipe wants of a function (`rlhf.recipe.functions`) or of a configuration class (`rlhf.recipe.architecture`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_MAX_HOPS = 5  # `from a import f` in b, `from b import f` in c, ...


class Opaque(Exception):
    """Only running the code would tell."""


@dataclass(frozen=True)
class Parameters:
    """How a function may be called."""

    positional: tuple[str, ...]  # those that can be given by position
    keyword_only: tuple[str, ...]
    defaults: Mapping[str, Any]  # names that may be left out; a default that is no literal is None
    any_positional: bool  # *args
    any_keyword: bool  # **kwargs


@dataclass(frozen=True)
class Source:
    """The names at a module's top level."""

    functions: Mapping[str, Parameters]  # plain `def`s, bound once, not decorated
    imported: Mapping[str, tuple[str, str]]  # name: (module, its name there)
    others: frozenset[str]  # bound in another way
    tables: Mapping[str, Mapping[str, str]]  # dict literals of names: {"gsm8k": gsm8k}
    is_open: bool  # `from x import *` or __getattr__: there may be more names

    def has(self, name: str) -> bool:
        return name in self.functions or name in self.imported or name in self.others


def module_file(name: str) -> Path | None:
    """A module's source file; None if there is no such module. Nothing is imported.

    Raises Opaque for a module that is not Python source, and inside a package that makes its own search path.
    """
    top, *rest = name.split(".")
    if not all(part.isidentifier() for part in (top, *rest)):
        return None
    try:
        spec = importlib.util.find_spec(top)
    except ValueError as error:  # a module that is loaded, but was made by hand
        raise Opaque(name) from error
    if name in sys.modules:  # it may have been put there by hand, as os.path is
        spec, rest = sys.modules[name].__spec__, []
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        child = PathFinder.find_spec(f"{spec.name}.{part}", _search_path(spec))
        if child is None and spec.name not in sys.modules and _makes_its_own_path(spec):
            raise Opaque(name)
        spec = child
    if spec is None:
        return None
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise Opaque(name)
    return Path(spec.origin)


def _search_path(package: ModuleSpec) -> list[str]:
    loaded = sys.modules.get(package.name)
    return list(loaded.__path__ if loaded is not None else package.submodule_search_locations or ())


def _makes_its_own_path(package: ModuleSpec) -> bool:
    origin = package.origin or ""
    return origin.endswith(".py") and "__path__" in Path(origin).read_text(encoding="utf-8", errors="replace")


@cache
def parse(file: Path) -> ast.Module:
    """Raises SyntaxError or ValueError for what is not Python, and OSError."""
    return ast.parse(file.read_bytes())


def read_source(file: Path) -> Source:
    """The names of a file. Raises SyntaxError or ValueError for what is not Python, and OSError."""
    functions: dict[str, Parameters] = {}
    imported: dict[str, tuple[str, str]] = {}
    others: set[str] = set()
    tables: dict[str, Mapping[str, str]] = {}
    is_open = False
    for node in _statements(parse(file)):
        names = set(_bound(node))
        is_open = is_open or names & {"*", "__getattr__"} != set()
        for name in names:
            if name in functions or name in imported or name in others:  # which one counts is not known
                functions.pop(name, None), imported.pop(name, None), others.add(name)
            elif isinstance(node, ast.FunctionDef) and not node.decorator_list:
                functions[name] = _parameters(node.args)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported[name] = (
                    node.module,
                    next(a.name for a in node.names if (a.asname or a.name) == name),
                )
            else:
                others.add(name)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            table = _table(node.value)
            tables.update(dict.fromkeys(names, table) if table is not None else {})
    return Source(functions, imported, frozenset(others), tables, is_open)


def follow(source: Source, name: str, hops: int = _MAX_HOPS) -> Parameters | None:
    """The parameters of a name, through the modules that it is imported from; None where they cannot be told."""
    if name in source.functions:
        return source.functions[name]
    if name not in source.imported or not hops:
        return None
    module, original = source.imported[name]
    try:
        file = module_file(module)
        return None if file is None else follow(read_source(file), original, hops - 1)
    except (Opaque, SyntaxError, ValueError, OSError):  # importing it will say what is wrong
        return None


def parameters_of(function: Callable) -> Parameters | None:
    """The same of a function in hand; None for one written in C without a signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return None
    return Parameters(
        positional=tuple(
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ),
        keyword_only=tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        defaults={p.name: p.default for p in parameters if p.default is not p.empty},
        any_positional=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        any_keyword=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def literal(node: ast.expr | None, otherwise: Any = None) -> Any:
    """The value of a literal expression; `otherwise` where it is none."""
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return otherwise


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run at import, those under `if`, `try`, `with` and loops too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(node)


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement itself binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.With):
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _parameters(args: ast.arguments) -> Parameters:
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    with_default = positional[len(positional) - len(args.defaults) :]
    defaults = dict(zip(with_default, map(literal, args.defaults), strict=True))
    defaults |= {
        a.arg: literal(d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None
    }
    return Parameters(
        positional=tuple(positional),
        keyword_only=tuple(a.arg for a in args.kwonlyargs),
        defaults=defaults,
        any_positional=args.vararg is not None,
        any_keyword=args.kwarg is not None,
    )


def _table(node: ast.Dict) -> Mapping[str, str] | None:
    pairs = list(zip(node.keys, node.values, strict=True))
    if not all(isinstance(k, ast.Constant) and isinstance(v, ast.Name) for k, v in pairs):
        return None
    return {k.value: v.id for k, v in pairs}
