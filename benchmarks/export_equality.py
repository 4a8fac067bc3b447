"""Compare the logits of exported and compiled models: one size of each family, on the CPU.

    python benchmarks/export_equality.py [NAME ...] [--deploy] [--backend inductor]

An error is the largest difference of a logit over the largest logit, in float32, with random
weights. `torch.export` and ONNX have a dynamic batch; ONNX is run by onnxruntime.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from torch import Tensor, nn

import zoo
from zoo.deploy import deploy

OPSET = 18
BATCHES = (1, 3)
"""Neither is 2, the batch of the export."""


class Case(NamedTuple):
    """A registered model, the side of its images, and options."""

    name: str
    size: int
    kwargs: Mapping[str, Any] = {}


CASES = (
    Case("eradio_xxxtiny", 256, dict(return_full_features=True)),
    Case("fastervit_0", 224),
    Case("mambavision_t", 224),
    Case("radio_vit_base_patch16", 224, dict(depth=4, num_classes=1000)),
)


def lively(model: nn.Module) -> nn.Module:
    """Randomise what starts as a constant, so that a lost branch or statistic shows."""
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.ndim == 1 and len(value.unique()) == 1:
                value.add_(0.2 * torch.rand_like(value))
    return model.eval()


def tensors(outputs: Any) -> list[Tensor]:
    """Return a model's outputs as a list: one, or E-RADIO's pair."""
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def error(ours: Any, theirs: Any) -> float:
    """Return the largest difference relative to the largest value, over all outputs."""
    pairs = zip(tensors(ours), tensors(theirs), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def worst(run: Callable[[Tensor], Any], model: nn.Module, size: int) -> str:
    """Compare `run` with `model` at each batch size."""
    images = [torch.randn(batch, 3, size, size) for batch in BATCHES]
    return " ".join(f"{error(run(x), model(x)):.1e}" for x in images)


def onnx_runner(model: nn.Module, size: int, folder: Path) -> Callable[[Tensor], list[Tensor]]:
    """Export to ONNX and load it again."""
    path = folder / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        model,
        (torch.randn(2, 3, size, size),),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


def exported(model: nn.Module, size: int) -> nn.Module:
    """Export with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    x = torch.randn(2, 3, size, size)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()


def row(case: Case, *, deployed: bool, backend: str) -> list[str]:
    """Measure one model."""
    began = time.perf_counter()
    plain = lively(zoo.create_model(case.name, **case.kwargs))
    model = deploy(plain) if deployed else plain
    with torch.no_grad():
        export = worst(exported(model, case.size), plain, case.size)
        with tempfile.TemporaryDirectory() as folder:
            onnx = worst(onnx_runner(model, case.size, Path(folder)), plain, case.size)
        compiled = worst(torch.compile(model, fullgraph=True, backend=backend), plain, case.size)
    options = ", ".join(f"{key}={value}" for key, value in case.kwargs.items())
    seconds = f"{time.perf_counter() - began:.0f} s"
    family = type(plain).__name__
    return [family, f"{case.name}({options})", str(case.size), export, onnx, compiled, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--deploy", action="store_true", help="export the deploy form")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the exporters warn about themselves
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, opset {OPSET}"
    form = "deploy form" if args.deploy else "plain form"
    print(f"{versions}; {form}; batches {BATCHES}; compile: fullgraph, {args.backend}")
    print("| family | model | size | torch.export | onnxruntime | compile | took |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in [case for case in CASES if case.name in args.names]:
        cells = row(case, deployed=args.deploy, backend=args.backend)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
