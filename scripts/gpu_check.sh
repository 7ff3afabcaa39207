#!/usr/bin/env bash
# The Triton kernels on this machine's GPU: right, the same bits, and how fast. Usage: scripts/gpu_check.sh [--out FOLDER]
# Needs a Python with torch and triton (PYTHON=/path/to/python3; default python3) and nothing else; about 8 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec env PYTHONPATH=. "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
