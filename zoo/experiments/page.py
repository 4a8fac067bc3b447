"""An experiment's result as one page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zoo.eval.report.parts import template_of
from zoo.files import written_whole


class Part(NamedTuple):
    """A table with its title."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


def write_page(
    path: Path,
    title: str,
    text: Sequence[str],
    parts: Sequence[Part],
    figures: Mapping[str, str],
) -> None:
    """Write a page of paragraphs, figures and tables, in light and dark.

    Args:
        figures: PNGs beside the page, which are embedded in it, and what each shows.
    """
    images = [
        (base64.b64encode((path.parent / name).read_bytes()).decode(), alt)
        for name, alt in figures.items()
    ]
    page = template_of("experiment.html.j2").render(
        title=title, text=text, parts=parts, images=images
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
