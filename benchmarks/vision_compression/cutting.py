"""The children: by `zoo prune`, and by Torch-Pruning where it can."""

import copy
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from benchmarks.vision_compression.cells import ParentSpec
from zoo.commands.prune.args import main as prune
from zoo.files import read_json

SHARE = 0.5
"""Of the parent's FLOPs."""
CLOSE = 0.005
"""How far below its budget Torch-Pruning's child may stay, as a share of the parent's FLOPs."""


def costs(model: nn.Module, size: int) -> dict[str, int]:
    """Count parameters, and the FLOPs of one image; a multiply-add is two."""
    alone = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        alone(torch.zeros(1, 3, size, size, device="meta"))
    params = sum(p.numel() for p in alone.parameters())
    return dict(params=params, flops=int(counter.get_total_flops()))


def backbone_of(name: str) -> Any:
    """Open a model without its classifier: a name with weights of the index, or a folder."""
    model: Any = zoo.create_model(name, pretrained=True)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
    return model.eval()


def cut_by_zoo(
    spec: ParentSpec, parent: str, cut: str, folder: Path, data: Path, options: list[str]
) -> dict[str, Any]:
    """Run `zoo prune` to half the FLOPs, or at random to sizes that were found before.

    Args:
        parent: As `zoo prune` takes it.
        folder: Of the child; that of `both` stands beside it.
        options: Further words of `zoo prune`.

    Returns:
        What stayed: the words of the plan, the size of each axis, and the layers.
    """
    if cut == "random":
        found = read_json(folder.with_name(folder.name.replace("random", "both")) / "prune.json")
        words = next(c["to"] for c in found["search"]["candidates"] if c["chosen"])
        options = [*options, "--score", "random"]
    else:
        words = ",".join(filter(None, (f"flops={SHARE}", spec.words[cut])))
    if not folder.is_dir():
        own = ["--to", words, "--form", spec.form, "--data", str(data), "--out", str(folder)]
        prune([parent, *own, *options])
    about = read_json(folder / "prune.json")
    chosen = [c["to"] for c in about.get("search", {}).get("candidates", ()) if c["chosen"]]
    return dict(
        to=chosen[0] if chosen else words,
        score=about["score"],
        kept={axis: len(_row(kept["kept"])) for axis, kept in about["kept"].items()},
        before=about["before"]["sizes"],
        layers=about["layers"],
    )


def _row(kept: list) -> list:
    """Return the units that stay; under each of an outer axis there are as many."""
    while kept and isinstance(kept[0], list):
        kept = kept[0]
    return kept


def cut_by_torch_pruning(parent: nn.Module, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """Cut a parent's widths by Torch-Pruning's group magnitude, one ratio for all layers.

    The ratio is bisected until the FLOPs are at most half. The output of an EfficientNet's last
    convolution stays, as it does in `zoo prune`, since it is what others read.

    Returns:
        The child, and how it was made: with the first error, where it does not run as the library
        leaves it.
    """
    goal, low, high = SHARE * costs(parent, size)["flops"], 0.2, 0.5
    best: tuple[nn.Module, float] | None = None
    about: dict[str, Any] = {}
    for _ in range(9):
        ratio = (low + high) / 2
        child, error = _pruned(parent, size, ratio)
        about |= dict(error=error, repaired=bool(error)) if error else {}
        if (flops := costs(child, size)["flops"]) > goal:
            low = ratio
            continue
        high, best = ratio, (child, ratio)
        if goal - flops < CLOSE * goal / SHARE:
            break
    if best is None:
        raise ValueError("Torch-Pruning reaches no half of the FLOPs with a ratio of up to 0.5.")
    return best[0], dict(about, ratio=best[1], version=version("torch-pruning"))


def _pruned(parent: nn.Module, size: int, ratio: float) -> tuple[nn.Module, str | None]:
    """Cut at one ratio; return the child and what it raised before its attention was repaired."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    child: Any = copy.deepcopy(parent).cpu().eval()
    image = torch.zeros(1, 3, size, size)
    heads = {m.qkv: m.num_heads for m in child.modules() if hasattr(m, "qkv")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters in no module, which it cuts as it should
        tp.pruner.BasePruner(
            child,
            image,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            num_heads=heads,
            ignored_layers=[m for name, m in child.named_modules() if name == "conv_head"],
        ).step()
    try:
        with torch.no_grad():
            child(image)
        return child, None
    except RuntimeError as error:
        _repair(child)
        return child, " ".join(str(error).split())[:200]


def _repair(child: nn.Module) -> None:
    """Set the numbers that timm's attention keeps beside its weights, as a user would by hand."""
    for module in child.modules():
        if hasattr(module, "qkv"):
            own: Any = module
            own.head_dim = own.qkv.out_features // 3 // own.num_heads
            own.attn_dim, own.scale = own.num_heads * own.head_dim, own.head_dim**-0.5
