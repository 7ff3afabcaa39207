#!/usr/bin/env bash
# Sets up .venv with the test extras and runs the tests. Usage: scripts/test.sh [pytest arguments ...]
# Two files are tested at a time; RLHF_TEST_PROCESSES=0 gives one process and its output as it comes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
# One thread a process: several processes with spinning threads on few cores slow each other down many times.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "${RLHF_TEST_PROCESSES:-2}" --dist loadfile "$@"
