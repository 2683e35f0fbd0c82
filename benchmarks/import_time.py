"""Time of ``import timm_faim`` after ``import timm``: registering every twin, in fresh processes.

python benchmarks/import_time.py
"""

import platform
import statistics
import subprocess
import sys

import timm

CODE = "import time, timm; t = time.perf_counter(); import timm_faim; print(time.perf_counter() - t)"


def main(runs: int = 15) -> None:
    times = [float(subprocess.check_output([sys.executable, "-W", "ignore", "-c", CODE])) * 1e3 for _ in range(runs)]
    print(f"Python {platform.python_version()}, timm {timm.__version__}; command: `python benchmarks/import_time.py`\n")
    print("| runs | median, ms | fastest | slowest |\n|---|---|---|---|")
    print(f"| {runs} | {statistics.median(times):.0f} | {min(times):.0f} | {max(times):.0f} |")


if __name__ == "__main__":
    main()
