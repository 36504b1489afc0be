#!/usr/bin/env bash
# Only set up the environment: bash launch/setup.sh. Run it once where there is internet, such as a cluster's login node.
#
# Creates .venv in the repository and installs the packages of setup.cfg (several GB, about 2 minutes). The other scripts do the
# same at their first start, except the SLURM scripts: compute nodes often have no internet, and many nodes must not install into
# one folder concurrently. See launch/common.sh for LATTE_FLOW_PYTHON and LATTE_FLOW_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment
say "the environment is ready: $(command -v python), $(python --version)"
