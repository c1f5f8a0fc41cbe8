"""Kill a training run by SIGKILL at random moments, resume it, compare: python scripts/kill_and_resume.py --help"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose evaluate.py would hide the library of that name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent / "benchmarks")
    runpy.run_module("kill_and_resume", run_name="__main__")
