#!/usr/bin/env bash
# Set up, check style and types, and run the tests: bash launch/run_tests.sh [pytest arguments].
#
#   bash launch/run_tests.sh                  all tests
#   bash launch/run_tests.sh -m "not slow"    only tests that start no processes and train nothing
#
# The first start installs the environment (about 2 minutes). Tests that need a GPU are skipped with a reason if there is none,
# and those that need SLURM if it is not installed; as root, LATTE_FLOW_INSTALL_SLURM=1 installs it (Debian).
# LATTE_FLOW_TEST_PROCESSES=N runs N test files in parallel (default 2; 0: all in one process, for a debugger).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment
setup_accelerator

ruff check .
ruff format --check .

# Beside the tests: without a cache it takes a minute and a half.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy >"$types" 2>&1 &
mypy_process=$!

status=0
python -m pytest --numprocesses "${LATTE_FLOW_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder \
    --durations=15 "$@" || status=$?
if ! wait "$mypy_process"; then
    cat "$types"
    status=1
fi
exit "$status"
