#!/usr/bin/env bash
# Set up the environment and nothing else: bash launch/setup.sh. Once, where there is internet, such as on a cluster's login node.
#
# Creates .venv in the repository and installs the packages of setup.cfg (several GB, about 2 minutes). The other scripts do the
# same at their first start; the SLURM scripts only use what is there, because compute nodes often have no internet and many
# nodes must not install into one folder at a time. See launch/common.sh for LATTE_FLOW_PYTHON and LATTE_FLOW_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment
say "the environment is ready: $(command -v python), $(python --version)"
