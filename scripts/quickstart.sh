#!/usr/bin/env bash
# Sets up .venv and trains the quickstart recipe. Usage: scripts/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m rlhf.cli train recipes/quickstart.yaml "$@"
