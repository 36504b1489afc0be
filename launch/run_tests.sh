#!/usr/bin/env bash
# Set up, check the style, and run the tests: bash launch/run_tests.sh [pytest arguments].
#
# The first start installs the environment (about 2 minutes). Tests that need a GPU are skipped with a reason where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment
setup_accelerator

ruff check .
ruff format --check .
exec python -m pytest "$@"
