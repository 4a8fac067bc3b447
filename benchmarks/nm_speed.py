"""2:4 weights on one GPU: dense with zeros, torch's two sparse forms, xformers' sp24.

python3 benchmarks/nm_speed.py                  # layers of Gemma 3 270M, Llama 8B and ViT-B
python3 benchmarks/nm_speed.py --json FILE --tokens 1 64 4096

One linear layer in bf16 and inference, by tokens. "ms" is a call from Python; "graph" is the same
in a CUDA graph, without what the host does, small weights in the cache. The error is against
float64's product of the same 2:4 weights. xformers thins a weight anew, in tiles of 4 x 4 so that
its transpose is 2:4 as well: its error says what that costs a mask along the inputs. What cannot
run says why, and is left out.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from zoo.students.prune.nm import Pattern
from zoo.students.prune.sparse import kinds

LAYERS = {
    "gemma-270m q": (1024, 640),
    "gemma-270m k": (256, 640),
    "gemma-270m o": (640, 1024),
    "gemma-270m up": (2048, 640),
    "gemma-270m down": (640, 2048),
    "llama-8b q": (4096, 4096),
    "llama-8b up": (14336, 4096),
    "llama-8b down": (4096, 14336),
    "vit-b qkv": (2304, 768),
    "vit-b fc1": (3072, 768),
    "vit-b fc2": (768, 3072),
}
"""Outputs and inputs."""
TOKENS = (1, 16, 128, 1024, 4096, 8192)
CHECKED = 256
"""Rows that are compared with float64."""

Form = Callable[[Tensor], Tensor]


def xformers_kinds() -> dict[str, Form]:
    """Return xformers' two forms, if the package and its operator load."""
    try:
        from xformers.ops import sp24  # pyright: ignore[reportMissingImports]

        sp24.sparsify24(torch.ones(128, 128, device="cuda", dtype=torch.bfloat16))
    except Exception as error:  # a build for another torch raises whatever its stub does
        print(f"xformers is left out: {type(error).__name__}: {first_line(error)}")
        return {}

    def form(backend: str) -> Form:
        return lambda weight: sp24.sparsify24(weight, backend=backend)

    return {f"xformers {name}": form(name) for name in ("cutlass", "cusparselt")}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def forms() -> dict[str, Form]:
    """Return every way to hold a weight."""
    torchs = {f"torch {name}": form for name, form in kinds().items()}
    return {"dense": lambda weight: weight} | torchs | xformers_kinds()


def measure(x: Tensor, weight: Tensor, exact: Tensor, *, graphs: bool) -> dict[str, float | None]:
    """Time a product, and hold its first rows against float64's."""
    found = F.linear(x, weight)[: len(exact)].double()
    error = ((found - exact).norm() / exact.norm()).item()
    ms: Any = do_bench(lambda: F.linear(x, weight), warmup=10, rep=40, return_mode="median")
    graph = in_graph(lambda: F.linear(x, weight)) if graphs else None
    return dict(error=error, ms=ms, graph_ms=graph)


def in_graph(call: Callable[[], Tensor]) -> float | None:
    """Time a call without the host's part; `None` if it cannot be captured."""
    try:
        found: Any = do_bench_cudagraph(call, rep=10, return_mode="median")
        return found
    except Exception:  # an operator that waits for the host ends the capture in many ways
        torch.cuda.synchronize()
        return None


def rows(
    name: str,
    size: tuple[int, int],
    tokens: Iterable[int],
    ways: dict[str, Form],
    *,
    graphs: bool,
) -> Iterator[dict[str, Any]]:
    """Measure one layer in every form, for each number of tokens."""
    torch.manual_seed(0)
    weight = torch.randn(*size, device="cuda") / size[1] ** 0.5
    weight = (weight * Pattern(2, 4).mask(weight.abs())).bfloat16()
    inputs = {n: torch.randn(n, size[1], device="cuda", dtype=torch.bfloat16) for n in tokens}
    exact = {n: x[:CHECKED].double() @ weight.double().T for n, x in inputs.items()}
    dense: dict[int, dict[str, float | None]] = {}
    for way, form in ways.items():
        for n, x in inputs.items():
            try:
                found = measure(x, form(weight), exact[n], graphs=graphs)
            except Exception as error:  # say which operator does not load, and go on
                print(f"{name:16} {way:20} {n:6,} tokens: {first_line(error)[:150]}")
                yield dict(layer=name, size=size, way=way, tokens=n, why=first_line(error))
                continue
            dense.setdefault(n, found)
            times = {k: ratio(dense[n][k], found[k]) for k in ("ms", "graph_ms")}
            print(
                f"{name:16} {way:20} {n:6,} tokens {found['ms']:8.4f} ms ({shown(times['ms'])}), "
                f"graph {shown(found['graph_ms'], 4)} ms ({shown(times['graph_ms'])}), "
                f"error {found['error']:.1e}"
            )
            yield dict(
                found, layer=name, size=size, way=way, tokens=n,
                faster=times["ms"], graph_faster=times["graph_ms"],
            )  # fmt: skip


def ratio(dense: float | None, found: float | None) -> float | None:
    return dense / found if dense and found else None


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}" + ("x" if digits == 2 else "")


def main() -> None:
    """Measure every layer, and write the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="parts of their names")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
    lt = torch.backends.cusparselt
    about = dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__,
        cusparselt=lt.version() if lt.is_available() else None,
    )  # fmt: skip
    print(about)
    ways, found = forms(), []
    with torch.no_grad():
        for name, size in LAYERS.items():
            if any(part in name for part in args.layers):
                found += rows(name, size, args.tokens, ways, graphs=args.graphs)
                if args.json:
                    args.json.write_text(json.dumps(dict(about, rows=found), indent=1) + "\n")


if __name__ == "__main__":
    main()
