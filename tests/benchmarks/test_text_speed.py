"""benchmarks/text_speed.py, at the size that a CPU can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_is_measured_once_and_its_error_is_kept(tmp_path):
    command = [sys.executable, "-m", "benchmarks.text_speed", "--tiny", "--json", "speed.json"]
    environment = dict(PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path), PATH="/usr/bin:/bin")
    environment |= dict(OMP_NUM_THREADS="1", HOME=str(tmp_path))

    def call(*rows: str) -> dict:
        done = subprocess.run(
            [*command, "--rows", *rows], cwd=tmp_path, env=environment, capture_output=True
        )
        assert not done.returncode, done.stderr[-2000:]
        return json.loads((tmp_path / "speed.json").read_text())["rows"]

    first = call("small:plain")
    assert first["small:plain"]["tok_s"] > 0 and len(first["small:plain"]["losses"]) == 6
    folder = next(tmp_path.glob("text_speed*"))
    (folder / "hyena" / "config.json").write_text("no JSON")
    both = call("small:plain", "hyena:plain")
    assert both["small:plain"] == first["small:plain"]
    assert "hyena" in both["hyena:plain"]["error"]
