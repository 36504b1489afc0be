"""training/main.py with a moment of it made long and announced (tools/faults/moments.py); takes the same command line.

The fault campaign starts this in place of training/main.py where it wants to put a fault into that moment.
"""

import runpy
import sys
from pathlib import Path

from latte_flow.tools.faults.moments import Moments, Watch

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    moments = Moments(Watch.of_environment())
    moments.announce("start")
    moments.install()
    sys.argv[0] = str(ROOT / "training" / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
