"""The section of a joined page that shows all models' predictions for the same images."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.eval.examples import RULE
from zoo.eval.report.gathered import Model
from zoo.eval.report.parts import Gallery, PageImage
from zoo.eval.results import Record


class Side(NamedTuple):
    """One model's prediction: an image, or words and whether they are right."""

    model: str
    picture: PageImage | None
    words: str
    right: bool | None
    score: str


class SameImage(NamedTuple):
    """An image, what is true of it, and what each model says."""

    key: str
    image: PageImage | None
    truth: PageImage | None
    words: str
    """The truth, if it is words."""
    sides: list[Side]


class Beside(NamedTuple):
    """All models on the images of one benchmark and data set."""

    title: str
    rule: str
    legend: list[tuple[str, str]]
    """Name and colour."""
    rows: list[SameImage]


def beside(models: Sequence[Model], gallery: Gallery, notes: list[str]) -> list[Beside]:
    """Return the predictions for the same images, by benchmark and data set.

    Of a model that was measured in several ways the first is shown, at its lowest seed.
    """
    groups: dict[tuple[str, str | None], list[tuple[str, Record, bool]]] = {}
    for model in models:
        own: dict[tuple[str, str | None], list[Record]] = {}
        for record in model.records:
            if record.examples:
                own.setdefault((record.benchmark, record.dataset), []).append(record)
        for key, records in own.items():
            first = min(records, key=lambda record: record.seed)
            groups.setdefault(key, []).append((model.name, first, len(records) > 1))
    return [
        _group(number, key[0], shown, gallery, notes)
        for number, (key, shown) in enumerate(groups.items())
    ]


def _group(
    number: int,
    benchmark: str,
    shown: Sequence[tuple[str, Record, bool]],
    gallery: Gallery,
    notes: list[str],
) -> Beside:
    several = any(many for _, _, many in shown)
    sizes = {record.size for _, record, _ in shown}
    legend: dict[str, str] = {}
    rows: dict[str, SameImage] = {}
    for place, (name, record, _) in enumerate(shown):
        for one in record.examples:
            key = str(one.get("key"))
            stem = f"same-{number}-{place}-{Path(key).name}"

            def page_image(part: str, one=one, record=record, stem=stem) -> PageImage | None:
                return _read(one.get(part), record, gallery, f"{stem}-{part}", notes)

            if key not in rows:
                image, truth = page_image("image"), page_image("truth")
                words = one["truth"] if isinstance(one.get("truth"), str) else ""
                rows[key] = SameImage(key, image, truth, words, [])
            said = one.get("prediction")
            score = str(one.get("score") or "")
            how = [score] if score else []
            how += [f"{record.size} px"] if len(sizes) > 1 and record.size else []
            side = Side(
                name, page_image("prediction"), said if isinstance(said, str) else "",
                one.get("right"), ", ".join(how),
            )  # fmt: skip
            rows[key].sides.append(side)
            legend |= {str(n): "#{:02x}{:02x}{:02x}".format(*c) for n, c in one["legend"]}
    data = shown[0][1].data
    rule = f"{RULE}."
    rule += " Of several seeds and settings of a model, the first of the lowest seed." * several
    title = f"{benchmark} on {Path(data).name}" if data else benchmark
    return Beside(title, rule, list(legend.items()), list(rows.values()))


def _read(
    part: Mapping[str, Any] | str | None,
    record: Record,
    gallery: Gallery,
    name: str,
    notes: list[str],
) -> PageImage | None:
    """Read what an evaluation kept, for embedding; `None` for words and what is lost."""
    from zoo.data.images import UnreadableImage, read_rgb

    if not isinstance(part, Mapping):
        return None
    path = (record.place or Path()) / str(part.get("file"))
    try:
        image = read_rgb(path)
    except (UnreadableImage, OSError) as error:
        notes.append(f"The image {path} could not be read: {error}.")
        return None
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return gallery.add_photo(out.getvalue(), image.size, name, path.stem)
