"""How much `import zoo` adds to `import timm`: median of several fresh processes.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

CODE = (
    "import time, timm; began = time.perf_counter(); import zoo; print(time.perf_counter() - began)"
)


def main(runs: int = 7) -> None:
    seconds = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout)
        for _ in range(runs)
    ]
    print(f"import zoo after timm: median {statistics.median(seconds):.3f} s of {runs} runs")


if __name__ == "__main__":
    main()
