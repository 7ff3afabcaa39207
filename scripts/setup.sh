#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints.txt. Does nothing when that was done before for the same
# pyproject.toml, constraints.txt and folder.
# Usage: scripts/setup.sh [EXTRAS]    for example: scripts/setup.sh dev
# PYTHON=/path/to/python3 chooses the interpreter; without it the first of python3, python3.14 ... python3.10 that fits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
venv=.venv

fail() {
  echo "setup: $*" >&2
  exit 1
}

# The mark of a finished set-up: what was asked for and where, as one number.
fingerprint() {
  { cat pyproject.toml constraints.txt; pwd -P; } | cksum | tr ' ' '-'
}

is_ready() { # is_ready EXTRAS
  [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.ready-${1:-plain}" 2>/dev/null)" = "$(fingerprint)" ] \
    && "$venv/bin/python" -c ''
}

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python >= 3.10 ($("$PYTHON" -V 2>&1 || true))"
    echo "$PYTHON"
    return
  fi
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null 2>&1 && fits "$name"; then
      echo "$name"
      return
    fi
  done
  fail "needs Python >= 3.10; python3 here is $(python3 -V 2>&1 || echo missing)." \
    "Install a newer one, or name it: PYTHON=/path/to/python3.12 $0"
}

make_venv() {
  local python
  if [ -x "$venv/bin/python" ] && fits "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  python=$(find_python)
  rm -rf "$venv"
  if "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$venv"
  elif "$python" -c 'import venv' >/dev/null 2>&1 && "$python" -m pip --python "$python" --version >/dev/null 2>&1; then
    # Debian ships ensurepip apart from Python; pip itself can fill the environment.
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check pip
  else
    fail "$python ($("$python" -V 2>&1)) has neither ensurepip nor pip >= 22.3, so no environment can be made." \
      "On Debian or Ubuntu: apt-get install python3-venv"
  fi
}

install() {
  local target=. progress=()
  [ -z "$extras" ] || target=".[$extras]"
  [ -t 1 ] || progress=(--quiet)
  echo "setup: installing into $PWD/$venv (2 GB, with CUDA 6 GB; some minutes)"
  # compat: a path to this folder. The default, a finder, loses against a folder named rlhf beside the script that runs.
  "$venv/bin/python" -m pip install ${progress[@]+"${progress[@]}"} --disable-pip-version-check \
    --config-settings editable_mode=compat -c constraints.txt -e "$target" || fail "pip could not install the packages; its message is above"
  fingerprint >"$venv/.ready-${extras:-plain}"
  fingerprint >"$venv/.ready-plain"
}

if ! is_ready "$extras"; then
  make_venv
  install
fi
