"""Fixtures and the rule for marked tests."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from jaxtyping import install_import_hook

TEACHERS = [
    f"teachers.{path.stem}" for path in (Path(__file__).parent.parent / "teachers").glob("*.py")
]

# Shapes are checked here at every call; a training run pays nothing for them.
CHECKED = [
    f"zoo.{name}"
    for name in (
        *TEACHERS, "features", "students", "train.distill.step", "train.distill.losses",
        "train.distill.phi_s", "train.distill.shift", "train.distill.weighting", "data.crops",
        "eval.extract", "eval.fidelity", "eval.retrieval", "eval.zeroshot",
        "eval.dense.segment", "eval.dense.mean_iou", "eval.dense.upernet", "eval.dense.windows",
        "eval.dense.depth", "eval.dense.correspondence", "eval.dense.sam_masks",
        "eval.detect.backbone", "eval.detect.canvas", "eval.detect.draw",
        "eval.detect.torchvision_detector",
    )
]  # fmt: skip
if torch.__version__ >= "2.12":  # the compiler before cannot trace the checks
    install_import_hook(CHECKED, "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden():
    """The module that fills models by the golden rule and compares them with the cards."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    """A tiny Gemma 3 in a GGUF file; what is made of it is kept beside it."""
    pytest.importorskip("gguf")
    path = Path(__file__).parent / "tiny_gguf.py"
    spec = importlib.util.spec_from_file_location("tiny_gguf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    module.write(file)
    return file


@pytest.fixture(scope="session")
def interpret():
    """Run Python with Triton's interpreter, which takes kernels on a CPU: `interpret(FILE)`."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not there")
    new = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    if new and ".squeeze()" not in inspect.getsource(interpreter):
        pytest.skip("this Triton's interpreter needs a NumPy before 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return lambda *given: subprocess.run([sys.executable, *given], check=True, env=environment)


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """Run a file of cases on some processes: `on_ranks(FILE, WORLD)` is {case: difference}."""

    def run(cases: Path, world: int, device: str = "cpu") -> dict[str, float]:
        folder = tmp_path_factory.mktemp("ranks")
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths))
        script = Path(__file__).parent / "on_ranks.py"
        ranks = [
            subprocess.Popen(
                [sys.executable, script, cases, str(rank), str(world), folder, device],
                env=environment, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            errors = [process.communicate(timeout=300)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.communicate()  # closes its pipe, also after a time-out
        assert not any(process.returncode for process in ranks), "\n".join(
            error[-1500:] for error in errors
        )
        return json.loads((folder / "found.json").read_text())

    return run


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
