"""The benchmark of start times."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "start_times.py"


def test_a_command_is_measured_beside_what_is_promised():
    command = [sys.executable, SCRIPT, "--runs", "1", "zoo --version", "import zoo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, _, version, package = done.stdout.splitlines()
    assert head == "| command | now CPU s | now wall s | promised |"
    assert version.startswith("| `zoo --version` | 0.") and version.endswith("| 0.5 |")
    assert package.startswith("| `import zoo` | 0.") and package.endswith("| - |")
