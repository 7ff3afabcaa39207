"""The Triton forms without a GPU: other forms' tests of theirs in Triton's interpreter, and every kernel compiled.

Each in a process of its own: what Triton makes of a kernel is decided when it is imported. The interpreter is slow, so that
of tests over many rows or sizes a part is run; and the GPU check's own on small shapes, which has every kernel but the attention's once, its values, its gradients
and its rows' bits in fp32, bf16 and fp16, of odd sizes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

# of each file, what pytest's -k takes
INTERPRETED = {
    "test_matmul.py": "test",
    "test_linear.py": "bad_arguments",
    "test_linear_logprob.py": "dtype1-8-temperature2 or dtype2-8-0.6 or path[7-0.7 or frozen or long_rows or no_token or no_tensor",
    "test_logprob.py": "dtype1 or dtype2 or 1003 or impossible or far_below or beyond or in_a_block or masked_block",
    "test_norm.py": "stock_module or refused or addition or heads_beside or one_number",
    "test_rotary.py": "values or refused or in_place or apart",
    "test_activation.py": "geglu_values or swiglu_keeps or unlike",
    "test_sampling.py": "(slow_reference and (dtype0-0 or dtype1-1)) or (any_width and (dtype0-17 or dtype1-1023)) or does_not_depend "
    "or equal_scores or worst_noise or best_noise or parts_of_long or known_draws or (bit_for_bit and dtype1-0.7) or greedy or non_finite or nothing_can or probability_zero or (lies_together and (281 or 315)) or aligned_addr or (few_passes and (alike or ordered))",
    "test_attention.py": "(head_size_in_fp32 and 96 and sinks) or half_precision or (groups_and_bf16 and dtype1) or sinks_alone or far_apart or (segments and not dtype0) or begins_inside or (block_mask_values and 40) or hidden "
    "or (mixed_step and dtype1) or (does_not_see and (dtype1 or 17 or stored)) or wide_heads",
    "test_kv.py": "(nearest and 96) or zeros or (bits_of_their and not window and not softcap and not sinks and not given1-int8) or bytes or (one_pass and (96 or 256))",
    "../models/test_fused.py": "joined_products and qwen2",
    "../rollout/test_graphs.py": "mistral or cuts or two_segments or recorded",
    "test_quantized.py": "(product and float16) or (does_not_depend and 1-4-32) or nearest or no_rows or (part_of_a_weight and 4-32)",
}
# families of the GPU check; the attention's takes minutes, and its tests are above
CHECKED = ("rows", "matmul", "sampling", "quantized")


@pytest.mark.slow
@pytest.mark.parametrize("file", INTERPRETED)
def test_in_the_interpreter(file):
    """Would catch: what those tests would, in a kernel that no machine without a GPU runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / file), "-k", INTERPRETED[file]],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def alternatives(expression: str) -> list[str]:
    """What stands between the `or`s of a -k that are in no parentheses."""
    parts, depth = [[]], 0
    for word in re.split(r"(\(|\)|\bor\b)", expression):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == "or" and not depth:
            parts.append([])
        else:
            parts[-1].append(word)
    return ["".join(part).strip() for part in parts]


@pytest.mark.slow
def test_every_term_selects_a_test():
    """Would catch: a test that was given another name, and is not interpreted any more."""
    from _pytest.mark.expression import Expression

    folder = Path(__file__).parent
    files = [str((folder / file).resolve()) for file in INTERPRETED]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *files], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    collected = [line.lower() for line in done.stdout.splitlines() if "::" in line]
    for file, terms in INTERPRETED.items():
        found = [
            line.partition("::")[2]
            for line in collected
            if line.startswith(f"tests/{(folder / file).resolve().relative_to(ROOT / 'tests')}")
        ]
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        for term in alternatives(terms):
            chosen = Expression.compile(term)
            named = [
                f
                for f in found
                if chosen.evaluate(lambda word, f=f, **_: word.lower() in f or word == "test")
            ]
            assert named, f"{file}: -k {term!r} selects nothing"


@pytest.mark.slow
def test_the_gpu_check_in_the_interpreter():
    """Would catch: a check that itself is wrong, and fails or passes every kernel on the one machine that has a GPU."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--quick", "--minutes", "60", "--only", *CHECKED],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and " checks, 0 failed" in done.stdout, (
        done.stdout[-4000:] + done.stderr[-1000:]
    )
    assert "left out" not in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_and_keeps_to_its_registers():
    """Would catch: a kernel that the interpreter runs and a GPU's compiler refuses, and spills that nobody knows of."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and " 0 unlike what is promised" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-1000:]
    )
