"""The card of an exported model: README.md as the Hub reads it, with what the run knows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.benchmarks import headlines
from zoo.eval.paired import COUNTS_AT_ONCE, DRAWS
from zoo.eval.registry import Parts, Scores, ratio_of_sums
from zoo.eval.results import Record, latest
from zoo.files import read_json
from zoo.students.export import read_heads

NO_LICENCE = "other"
"""The Hub's word where a licence has no identifier of its own."""


def card_of(export: Path, *, records: Sequence[Record] = (), repo: str = "") -> str:
    """Return README.md for the folder of an export; data and command are of the run around it.

    Args:
        records: Results of `zoo eval` of this export; their headlines stand in the card with 95 %
            intervals over images, and in the Hub's own form (`model-index`).
        repo: Name of the repository, for the examples; the folder by default.

    Raises:
        ValueError: the folder holds no export.
    """
    from huggingface_hub import EvalResult, ModelCardData

    heads, config = read_heads(export), read_json(export / "config.json")
    known = {name: _read(export.parent / name) for name in ("config.json", "about.json")}
    trained, about = known["config.json"], known["about.json"]
    name = repo or export.resolve().parent.name
    own = config.get("pretrained_cfg") or {}
    licence = own.get("license") or NO_LICENCE
    rows = list(_rows(latest(list(records))))
    found = [
        EvalResult(
            task_type="image-classification" if "top1" in key else "image-feature-extraction",
            task_name=capability,
            dataset_type=data or "unknown",
            dataset_name=data or "unknown",
            metric_type=key,
            metric_name=f"{capability}, %",
            metric_value=round(value, 3),
        )
        for capability, key, data, value, _, _ in rows
    ]
    data = ModelCardData(
        license=licence,
        library_name="timm",
        tags=["timm", "zoo", "feature-extraction", "knowledge-distillation"],
        pipeline_tag="image-feature-extraction",
        datasets=None,
        model_name=name,
        eval_results=found or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"`{heads['student']}`, {_count(export)} M parameters, for images of {heads['size']} px. "
        "It returns a summary and a spatial map, and was distilled by "
        "[zoo](https://pypi.org/project/backbone-zoo/) from frozen teachers.\n",
        _teachers(heads),
        _training(trained, about),
        _metrics(rows),
        _loading(str(config.get("architecture", heads["student"])), repo, export),
        _licence(own.get("license"), heads),
    ]
    return "\n".join(part for part in parts if part)


def interval(parts: Parts) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a number over the choice of images.

    `None` for an average precision, whose ranking each draw would make anew.
    """
    if isinstance(parts, AveragePrecision):
        return None
    top, bottom = parts.sums()
    both = np.concatenate([top, bottom], axis=1)
    kinds, count = np.unique(both, axis=0, return_counts=True)
    chance, found, images = np.random.default_rng(0), [], int(count.sum())
    at_once = max(1, COUNTS_AT_ONCE // len(kinds))
    for start in range(0, DRAWS, at_once):
        taken = chance.multinomial(images, count / images, size=min(at_once, DRAWS - start))
        ours, whole = np.split(taken @ kinds, [top.shape[1]], axis=1)
        found.append(ratio_of_sums(ours, whole))
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _rows(records: Sequence[Record]) -> Any:
    """Yield capability, number's name, data, value, interval and record of each headline."""
    known = headlines()
    for record in records:
        scores = record.scores()
        for key, value in record.values.items():
            if key in known and value is not None:
                own = scores.get(key)
                ends = interval(own) if isinstance(own, Scores) else None
                data = Path(record.data).name if record.data else ""
                yield known[key].capability, key, data, value, ends, record


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any]) if path.is_file() else {}


def _count(export: Path) -> str:
    from safetensors import safe_open

    with safe_open(export / "model.safetensors", "np") as file:
        sizes = [np.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    return f"{sum(sizes) / 1e6:,.2f}"


def _teachers(heads: Mapping[str, Any]) -> str:
    licences = (heads.get("about") or {}).get("licenses") or {}
    lines = [
        "## Teachers\n",
        "| teacher | summary | map | licence |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, widths in heads["teachers"].items():
        own = " | ".join("–" if width is None else str(width) for width in widths)
        lines.append(f"| {name} | {own} | {licences.get(name) or 'not stated'} |")
    return "\n".join(lines) + "\n"


def _training(trained: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    facts = {
        "data": trained.get("data"),
        "steps": trained.get("steps"),
        "images a step": trained.get("batch"),
        "seed": trained.get("seed"),
        "command": about.get("command"),
        "commit": about.get("commit"),
        "machine": about.get("machine"),
    }
    lines = [f"- {name}: `{value}`" for name, value in facts.items() if value not in (None, "")]
    return "## Training\n\n" + "\n".join(lines) + "\n" if lines else ""


def _metrics(rows: Sequence[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    lines = [
        "## Results\n",
        "| benchmark | data | value | 95 % interval over images | images | seed |",
        "| --- | --- | ---: | --- | --- | ---: |",
    ]
    for capability, key, data, value, ends, record in rows:
        about = f"[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "–"
        side = f"{record.size} px" if record.size else "–"
        line = f"{capability} (`{key}`) | {data or '–'} | {value:,.2f} | {about} | {side}"
        lines.append(f"| {line} | {record.seed} |")
    return "\n".join(lines) + "\n"


def _loading(architecture: str, repo: str, export: Path) -> str:
    name = f"hf-hub:{repo}" if repo else f"local-dir:{export.name}"
    return (
        "## Loading\n\n```python\nimport timm\nimport zoo  # registers the models\n\n"
        f'model = timm.create_model("{name}", pretrained=True)  # {architecture}\n'
        "summary = model(images)  # normalised as model.pretrained_cfg says\n```\n\n"
        "In transformers, as an encoder of images (`zoo export --to transformers` writes it):\n\n"
        "```python\nimport zoo.multimodal\nfrom transformers import AutoModel\n\n"
        'tower = AutoModel.from_pretrained("FOLDER")\n```\n'
    )


def _licence(licence: str | None, heads: Mapping[str, Any]) -> str:
    licences = sorted(
        {str(x) for x in ((heads.get("about") or {}).get("licenses") or {}).values() if x}
    )
    told = f"The weights started from ones under {licence}. " if licence else ""
    theirs = f" (here: {', '.join(licences)})" if licences else ""
    return (
        f"## Licence\n\n{told}Those of the teachers{theirs} may bind what was learnt from them: "
        "check them before use.\n"
    )
