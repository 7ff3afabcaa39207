"""The reward functions that a recipe names: is there such a function, and would it take these arguments?

Read from source, without importing: the built-in rules' module needs nothing heavy, but its package does, and a
user's module may do anything. Not here: finding and calling them in a run (`rlhf.reward`), which has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

from rlhf.recipe.problems import Fault, Key
from rlhf.recipe.schema import RewardConfig
from rlhf.recipe.source_code import (
    Opaque,
    Parameters,
    Source,
    follow,
    module_file,
    parameters_of,
    parse,
    read_source,
)
from rlhf.recipe.suggest import closest, did_you_mean

BUILT_IN = ("rlhf.reward.functions", "FUNCTIONS")  # the module, and its table of rules by name
_FORMS = 'write "package.module:function" or "file.py:function"'


def reward_faults(
    reward: RewardConfig, handed_over: Mapping[str, Callable], columns: Mapping[Key, Collection[str]]
) -> Iterator[Fault]:
    """What is wrong with one entry of `reward`; keys count from the entry.

    `handed_over`: functions by name that the Python API was given. `columns`: those of each data set that the reward
    will see, by the set's key; a set whose columns are not known is left out.
    """
    rules = built_in()
    name = reward.function
    if name in handed_over:
        parameters, is_rule = parameters_of(handed_over[name]), False
    elif name in rules:
        parameters, is_rule = rules[name], True
    else:
        missing = list(_missing(name, [*rules, *handed_over]))
        yield from missing
        parameters, is_rule = (None if missing else _find(name)), False
    if parameters is not None:
        yield from _wrong_arguments(reward, parameters, is_rule)
        yield from _absent_columns(reward, parameters, is_rule, columns)


@cache
def built_in() -> Mapping[str, Parameters | None]:
    """The built-in rules by name, with their parameters."""
    module, table = BUILT_IN
    file = module_file(module)
    assert file is not None, module
    source = read_source(file)
    return {name: follow(source, function) for name, function in source.tables[table].items()}


def _missing(name: str, known: list[str]) -> Iterator[Fault]:
    """Why there is no function of this name, if there is none."""
    where, colon, attribute = name.rpartition(":")
    if not colon:
        ways = f"there are {', '.join(sorted(known))}; or {_FORMS}"
        yield _at_name(f"there is no reward function {name!r}", closest(name, known), ways)
        return
    try:
        source = _source(where)
    except Opaque:
        return
    except SyntaxError as error:
        yield _at_name(f"{where} is not valid Python: {error.msg} (line {error.lineno})", None, "mend it")
        return
    except ValueError as error:
        yield _at_name(str(error), None, "")
        return
    if not source.has(attribute) and not source.is_open:
        there = sorted(n for n in source.functions if not n.startswith("_"))
        has = f"it has {', '.join(there)}" if there else "it defines none"
        yield _at_name(f"{where} has no function {attribute!r}", closest(attribute, there), has)


def _at_name(message: str, near: str | None, otherwise: str) -> Fault:
    return Fault((("function",),), message, did_you_mean(near, otherwise))


def _source(where: str) -> Source:
    """The source of "file.py" or "package.module". Raises ValueError where there is none, and Opaque."""
    if where.endswith(".py"):
        file = Path(where).expanduser()
        if not file.is_file():
            near = (
                closest(file.name, [p.name for p in file.parent.glob("*.py")])
                if file.parent.is_dir()
                else None
            )
            hint = did_you_mean(near, f"paths count from the working directory, {Path.cwd()}")
            raise ValueError(f"there is no file {where}; {hint}")
    else:
        found = module_file(where)
        if found is None:
            raise ValueError(
                f"there is no module {where}; put the folder that holds it on PYTHONPATH, or write the file's path: "
                '"file.py:function"'
            )
        file = found
    try:
        parse(file)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    return read_source(file)


def _find(name: str) -> Parameters | None:
    where, _, attribute = name.rpartition(":")
    try:
        return follow(_source(where), attribute)
    except Opaque:
        return None


def _wrong_arguments(reward: RewardConfig, parameters: Parameters, is_rule: bool) -> Iterator[Fault]:
    if len(parameters.positional) < 2 and not parameters.any_positional:
        takes = ", ".join(parameters.positional) or "nothing"
        message = f"{reward.function!r} takes {takes} by position"
        yield Fault(
            (("function",),), message, "a reward function is called as f(prompts, responses, **columns)"
        )
        return
    given_by_us, named = parameters.positional[:2], _named(parameters)
    for key in reward.args:
        if key in given_by_us or (key not in named and (is_rule or not parameters.any_keyword)):
            otherwise = f"it takes {', '.join(named)}" if named else "it takes none"
            message = f"{reward.function!r} has no argument {key!r}"
            yield Fault((("args", key), ("function",)), message, did_you_mean(closest(key, named), otherwise))


def _absent_columns(
    reward: RewardConfig, parameters: Parameters, is_rule: bool, columns: Mapping[Key, Collection[str]]
) -> Iterator[Fault]:
    """Columns without which the first call would fail: a rule's `..._column` options, and a function's own names."""
    if is_rule:
        options = [n for n in _named(parameters) if n.endswith("_column")]
        wanted = {n: reward.args.get(n, parameters.defaults.get(n)) for n in options}
    else:
        wanted = {n: n for n in _named(parameters) if n not in parameters.defaults and n not in reward.args}
    for option, column in wanted.items():
        lacking = [dataset for dataset, there in columns.items() if column not in there]
        if not isinstance(column, str) or not lacking:
            continue
        key: Key = ("args", option) if option in reward.args else ("function",)
        where = " and ".join(".".join(map(str, dataset)) for dataset in lacking)
        message = f"{reward.function!r} reads the column {column!r}, which {where} {'has' if len(lacking) == 1 else 'have'} not"
        there = columns[lacking[0]]
        way = f"; name the column: args: {{{option}: ...}}" if is_rule and key == ("function",) else ""
        has = (
            f"it has {', '.join(sorted(there))}"
            if len(lacking) == 1
            else "mend the data, or name another column"
        )
        yield Fault((key,), message, did_you_mean(closest(column, list(there)), has) + way)


def _named(parameters: Parameters) -> list[str]:
    return [*parameters.positional[2:], *parameters.keyword_only]
