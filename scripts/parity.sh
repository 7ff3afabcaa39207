#!/usr/bin/env bash
# Sets up .venv with the test extras and TRL, and holds the losses against TRL's. Usage: scripts/parity.sh [pytest arguments ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev,parity
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# TRL's trainers report their use to the hub.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
exec .venv/bin/python -m pytest tests/parity "$@"
