"""The house's own rules: order of imports, what may be imported where, no dangerous calls, packaging."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings this one
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
PARTS = ("kernels", "reward", "rollout", "trainers")  # imported as rlhf.NAME
SOURCES = sorted(
    path
    for folder in ("rlhf", *PARTS)
    for path in (REPO / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)

# Imports go from later to earlier entries only. The longest matching prefix counts.
ORDER = {
    "rlhf.kernels": 0,
    "rlhf": 1,
    "rlhf.reward": 2,
    "rlhf.rollout": 2,
    "rlhf.trainers": 3,
    "rlhf.runtime": 4,
    "rlhf.serving": 4,
    "rlhf.cli": 4,
    "rlhf.api": 4,
}
AGAINST_THE_ORDER: dict[tuple[str, str], str] = {}

# The mathematics: usable with torch, transformers, numpy and pydantic alone.
MATHEMATICS = (
    "rlhf.records",
    "rlhf.rng",
    "rlhf.logprobs",
    "rlhf.kl",
    "rlhf.advantages",
    "rlhf.objectives",
    "rlhf.aggregate",
    "rlhf.losses",
    "rlhf.mismatch",
    "rlhf.corrections",
    "rlhf.value",
    "rlhf.values",
    "rlhf.overlong",
    "rlhf.sequences",
    "rlhf.preference",
    "rlhf.kto",
    "rlhf.reward_loss",
    "rlhf.divergence",
    "rlhf.settings",
    "rlhf.batching",
    "rlhf.models",
    "rlhf.kernels",
    "rlhf.rollout",
)
HEAVY = ("ray", "deepspeed", "datasets", "wandb", "peft")
HEAVY_ALLOWED = {
    ("rlhf.models", "peft"): "inside functions, for LoRA only",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = parts if parts[0] == "rlhf" else ("rlhf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer(module: str) -> tuple[str, int]:
    prefix = max((p for p in ORDER if within(module, p)), key=len)
    return prefix, ORDER[prefix]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, those inside functions too; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write rlhf.PART.MODULE"
            assert node.module is not None
            if node.module == "rlhf":
                yield from ((f"rlhf.{name.name}", node.lineno) for name in node.names)
            else:
                yield node.module, node.lineno
        else:
            yield from imports(node)


@cache
def all_imports() -> list[tuple[str, str, str]]:
    """(importing module, imported module, file:line)."""
    return [
        (module_of(path), imported, f"{path.relative_to(REPO)}:{line}")
        for path in SOURCES
        for imported, line in imports(ast.parse(path.read_text()))
    ]


def run(*args: str, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120
    )


def test_imports_go_one_way():
    """Catches: a formula that needs a trainer, an engine that needs a reward, data that needs Ray."""
    wrong = []
    for module, imported, where in all_imports():
        if not within(imported, "rlhf") or (module, imported) in AGAINST_THE_ORDER:
            continue
        own, own_level = layer(module)
        other, level = layer(imported)
        if level > own_level or (
            level == own_level and own != other and {own, other} <= {"rlhf.reward", "rlhf.rollout"}
        ):
            wrong.append(f"{where}: {module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_are_still_needed():
    """Catches: an exception that outlives its reason, and would let the next such call through unseen."""
    there = {(module, imported) for module, imported, _ in all_imports()}
    assert set(AGAINST_THE_ORDER) <= there
    for part, library in HEAVY_ALLOWED:
        assert any(within(m, part) and i.partition(".")[0] == library for m, i in there), (part, library)
    for file, call in DANGEROUS_ALLOWED:
        assert call in {name for name, _ in dangerous(ast.parse((REPO / file).read_text()))}, (file, call)


def test_parts_are_imported_through_the_package():
    """Catches: `import kernels`, which is Hugging Face's package or nothing."""
    wrong = [f"{where}: {name}" for _, name, where in all_imports() if name.partition(".")[0] in PARTS]
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_names_no_heavy_library():
    """Catches: an import inside a function, which a test of importing alone would not see."""
    wrong = []
    for module, imported, where in all_imports():
        top = imported.partition(".")[0]
        if top in HEAVY and any(within(module, m) for m in MATHEMATICS):
            if not any(within(module, m) and top == library for m, library in HEAVY_ALLOWED):
                wrong.append(f"{where}: {imported}")
    assert not wrong, "\n".join(wrong)


def test_kernels_rollout_and_the_mathematics_import_without_the_heavy_libraries():
    """Catches: an engine that cannot be used on a machine with torch and transformers only."""
    modules = [module_of(p) for p in SOURCES if any(within(module_of(p), m) for m in MATHEMATICS)]
    modules = [m for m in modules if not m.endswith("_triton")]  # imported where there is triton
    code = (
        f"import sys, importlib\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_kernels_has_no_init():
    """Catches: a package `kernels` on sys.path that shadows Hugging Face's and breaks transformers."""
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_no_module_is_a_drawer_for_everything():
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_every_module_says_what_it_is():
    silent = [
        str(p.relative_to(REPO))
        for p in SOURCES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


# ------------------------------------------------------------------------------------------------------------- security

DANGEROUS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "shell=True",
    "allow_pickle=True",
    "trust_remote_code=True",
    "torch.load without weights_only=True",
}
DANGEROUS_ALLOWED = {
    (
        "reward/child.py",
        "Connection.recv",
    ): "arguments of a call (rows may hold dates), from the run that has started it, over a pipe that no other process has",
    (
        "rlhf/serving/parallel.py",
        "Connection.recv",
    ): "calls of the engine, from the process that has started it, over a pipe that no other process has",
}


def dangerous(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in DANGEROUS:
            yield name, node.lineno
        if name.endswith(".recv") and not node.args and not node.keywords:  # a socket's takes a size
            yield "Connection.recv", node.lineno
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True", node.lineno
        for argument in ("shell", "allow_pickle", "trust_remote_code"):
            if given.get(argument) == "True":
                yield f"{argument}=True", node.lineno


def test_no_call_runs_what_it_reads():
    """Catches: pickle, eval, a shell, foreign model code."""
    files = [*SOURCES, *(REPO / "scripts").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")]
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {call}"
        for path in files
        for call, line in dangerous(ast.parse(path.read_text()))
        if (str(path.relative_to(REPO)), call) not in DANGEROUS_ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "connection.recv()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_what_it_should(line):
    assert list(dangerous(ast.parse(line)))


def test_the_scan_leaves_the_harmless_alone():
    assert not list(
        dangerous(
            ast.parse(
                "model.eval(); torch.load(p, weights_only=True); yaml.safe_load(t); f(shell=False); c.recv_bytes(); s.recv(9)"
            )
        )
    )


def test_no_path_of_somebodys_machine():
    """Catches: a file that works on one machine only."""
    own = re.compile("|".join("/" + name + "/" for name in ("work", "root", "home", "Users", "tmp/build")))
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ".svg", ""}
    skipped = {".git", ".venv", "runs", "wandb", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    wrong = []
    for folder, folders, files in os.walk(REPO):
        folders[:] = [f for f in folders if f not in skipped and not f.endswith(".egg-info")]
        for name in files:
            path = Path(folder) / name
            if path.suffix in suffixes and path.stat().st_size < 1_000_000:
                match = own.search(path.read_text(errors="ignore"))
                if match:
                    wrong.append(f"{path.relative_to(REPO)}: {match.group()}")
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------------------------ packaging


def test_every_folder_with_modules_is_packaged():
    """Catches: a new folder that works in the checkout and is missing from the wheel."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    folders = {module_of(p) if p.name == "__init__.py" else module_of(p).rpartition(".")[0] for p in SOURCES}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_the_constraints_pin_every_dependency():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names = [
        re.match(r"[\w-]+", item).group()
        for item in project["dependencies"] + project["optional-dependencies"]["dev"]
    ]
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0] for line in lines}
    assert all(
        re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; python_version (<|>=) \"3\.11\")?", line) for line in lines
    )
    assert set(names) - {"triton"} <= pinned  # that one a GPU build of torch pins itself


@pytest.fixture
def installed(tmp_path):
    """The tree as a wheel lays it out: the parts inside the package, nothing else."""
    site = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "rlhf", site / "rlhf", ignore=ignore)
    for part in PARTS:
        shutil.copytree(REPO / part, site / "rlhf" / part, ignore=ignore)
    return site


def test_it_runs_as_installed(installed, tmp_path):
    """Catches: a module found only because the repository's root is on the path."""
    code = (
        "import importlib.util, rlhf.recipe.load, rlhf.kernels\n"
        "names = ['rlhf.recipe', 'rlhf.models', 'rlhf.kernels', 'rlhf.rollout', 'rlhf.reward', 'rlhf.trainers']\n"
        "specs = [importlib.util.find_spec(name) for name in names]\n"
        "print(*rlhf.__path__, *(p for s in specs for p in s.submodule_search_locations), sep='\\n')"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    places = done.stdout.split("\n")[:-1]
    assert len(places) == 7 and all(Path(p).is_relative_to(installed) for p in places), done.stdout


def test_it_runs_from_a_checkout_without_installation(tmp_path):
    done = run("-m", "rlhf.cli", "--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("rlhf "), done.stderr
