#!/usr/bin/env bash
# The Triton kernels on this machine's GPU: right, the same bits, and how fast. Usage: scripts/gpu_check.sh [--out FOLDER]
# Needs a Python with torch and triton (PYTHON=/path/to/python3; default python3) and, for the attention,
# numpy; 8 minutes. --plan says what it would do, on any machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec env PYTHONPATH=. "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
