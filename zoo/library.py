"""The commands as functions: `zoo.distill`, `zoo.evaluate`, `zoo.embed`.

As the command line does, they look up what carries a command out by its name, when they are called.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.eval.results import Record
    from zoo.train.distill.config import Distill
    from zoo.train.run import Run


def distill(
    recipe: "str | Distill | Mapping[str, Distill] | None" = None,
    *,
    resume: str | Path | None = None,
    tiny: bool = False,
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> "Run":
    """Distill many frozen teachers into one student, as `zoo distill` does.

        run = zoo.distill(data="photos", teachers=["timm:resnet18.a1_in1k"], student="resnet18",
                          out="runs/mine", steps=5000, optim=dict(lr=3e-4))
        backbone = timm.create_model(f"local-dir:{run.path}/export", pretrained=True)

    Args:
        recipe: A recipe's name (`zoo list recipes`), a whole `Distill`, or several by the names of
            their stages (`zoo.train.distill.stages`). By default `custom` where `data` or
            `teachers` are given, and `quickstart`, which needs neither, otherwise.
        resume: Folder of a run to continue, in place of a recipe; its settings are the defaults.
        tiny: Shrink the recipe to a laptop, as `--tiny` does, before `fields` are set.
        stages: Stage -> fields of that stage alone, where a recipe has stages; `fields` are those
            of all of them.
        fields: Any field of `zoo.train.distill.config.Distill`, as on the command line: `data` (a
            folder, shards), `teachers` (a list of texts such as
            `"timm:vit_small_patch14_dinov2.lvd142m@224,summary=0.5"` or `TeacherSpec`s),
            `student`, `size` (pixels), `batch` (images), `steps`, `out`, `device`, ... Parts take
            a mapping of the fields to change: `optim=dict(lr=3e-4)` for `--optim.lr 3e-4`.

    Returns:
        The run, of stages the last one. `run.path` holds `export/`, `metrics.jsonl`, `report.html`
        and the checkpoints.

    Raises:
        ValueError: there is no such field, recipe, model or data (the nearest name is in the
            message); or the loss became NaN. A wrong request writes nothing.
        Interrupted: Ctrl-C or SIGTERM; `resume=` continues.
    """
    return _command("zoo.commands.distill.args:call")(recipe, resume, tiny, stages or {}, fields)


def evaluate(
    target: str | Path | None = None,
    *,
    on: str | Sequence[str] = (),
    data: "str | Path | Sequence[str | Path] | Mapping[str, Any] | None" = None,
    show: bool = False,
    **fields: Any,
) -> "list[Record]":
    """Measure a run, an export or a registered model on benchmarks, as `zoo eval` does.

        for record in zoo.evaluate("runs/mine", on="knn,linear", data="photos", knn=dict(k=9)):
            print(record.benchmark, record.values)

    Args:
        target: A run's folder, an export's folder or a model's name; none with `features`.
        on: Names of benchmarks, in a list or separated by commas. Without any, a run is compared
            with its teachers on its own held-out images, anything else measured by kNN and
            linear probe.
        data: Labelled images for all of them, one or several, or a mapping of benchmark -> images.
        show: Print the table that the command prints.
        fields: `features` (a folder of `zoo.embed`, read instead of images), `size` (pixels),
            `batch` (images), `precision`, `seed`, `workers`, `out` (a .jsonl file that each
            result is appended to); and by a benchmark's name a mapping of its settings.

    Returns:
        One record for each benchmark and data set. `record.values` are in the field's unit, per
        cent for accuracies and IoU.

    Raises:
        ValueError: there is no such target, benchmark, setting or data, or a package is missing.
    """
    return _command("zoo.commands.evaluate.run:call")(target, on, data, show, fields)


def embed(data: str | Path, out: str | Path, *, model: str | Path, **fields: Any) -> Path:
    """Write a model's features of many images in shards, as `zoo embed` does.

        zoo.embed("photos", "features/mine", model="runs/mine/export", workers=8)
        zoo.evaluate(features="features/mine", on="knn")

    Args:
        data: Images: a folder, tar shards or a .npz; parts called train and val are kept apart.
        out: The folder to write; an incomplete one is resumed.
        model: A run's folder, an export's folder, or a registered model.
        fields: `size` (pixels), `batch` (images), `workers`, `precision` (`float32`, `amp`),
            `rows` (images a shard), `half` (keep float16), `kind` (`auto`, `parquet`, `npz`).

    Returns:
        `out`. Its shards hold `key`, `label` (-1 for none) and `summary` [rows, C].

    Raises:
        ValueError: there is no such model, data or field, or `out` holds features of something
            else.
        Interrupted: Ctrl-C or SIGTERM; full shards are kept, and the same call continues.
    """
    return _command("zoo.commands.embed:call")(data, out, model, fields)


def _command(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
