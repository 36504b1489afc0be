"""Imported before any test and before torch: OpenMP reads its settings when torch is loaded."""

import os

# As launch/common.sh: threads that wait sleep, so that a busy machine slows the tests no more than its share.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
