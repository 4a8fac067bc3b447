"""The report of a model of images and text: questions, pictures and answers side by side."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.data.image_text import ImageTextSource
from zoo.eval.multimodal.answers import Answered, generate_answers
from zoo.eval.report import figures
from zoo.eval.report.figures import short_number
from zoo.eval.report.parts import Cell, Gallery, Row, Table, template_of
from zoo.eval.report.run_folder import read_lines, series
from zoo.files import read_json, written_whole

SHOWN = 12
"""Questions of each side, right and wrong."""
FILE = "questions.json"
LONGEST = 256
"""Longer side of a picture on the page, in pixels."""


def show_questions(
    folder: Path,
    source: ImageTextSource,
    answers: Sequence[Answered],
    model: Any,
    device: torch.device,
) -> Path:
    """Let a model say its answers to some questions, right and wrong, and write the page.

    They are spread over the kinds of questions, wrong ones first where there are fewer.
    """
    numbers = {source.key(i): i for i in range(len(source))}
    chosen = [
        one
        for right in (False, True)
        for one in _spread([a for a in answers if a.right == right], SHOWN)
    ]
    spoken = generate_answers(model, source, [numbers[one.key] for one in chosen], device)
    shown = []
    for one, said in zip(chosen, spoken, strict=True):
        sample = source.sample(numbers[one.key])
        turn = sample.turns[0]
        shown.append(
            dict(
                key=one.key, kind=one.kind, right=one.right, said=said, answer=turn.answer,
                question=turn.question.replace("<image>", "").strip(),
                images=[_png(source.conversations.read(image)) for image in sample.images],
            )
        )  # fmt: skip
    with written_whole(folder / FILE) as path:
        path.write_text(json.dumps(shown) + "\n")
    return build_questions(folder)


def _spread(answers: Sequence[Answered], most: int) -> list[Answered]:
    """Take some of each kind in turn."""
    kinds: dict[str, list[Answered]] = {}
    for one in answers:
        kinds.setdefault(one.kind, []).append(one)
    found, depth = [], 0
    while len(found) < most and any(depth < len(group) for group in kinds.values()):
        found += [group[depth] for group in kinds.values() if depth < len(group)]
        depth += 1
    return found[:most]


def _png(image: Any) -> str:
    image = image.copy()
    image.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def is_image_text(folder: Path) -> bool:
    """Tell whether a folder is a run of `zoo distill --image-text` with answers to show."""
    return (folder / FILE).is_file()


def build_questions(folder: Path) -> Path:
    """Write `report.html` of a finished run; return its path.

    Raises:
        ValueError: what the run wrote is damaged.
    """
    about = read_json(folder / "about.json")
    shown = read_json(folder / FILE, list[dict[str, Any]])
    notes: list[str] = []
    rows = [r for r in read_lines(folder / "metrics.jsonl", notes) if r.get("kind") == "eval"]
    steps, values = series(rows, "exact")
    gallery, curves = Gallery(folder / "figures"), []
    if len(values) > 1:
        png = figures.curves(
            "right answers, in per cent",
            [("exact", steps, values, figures.STUDENT_COLOUR)], log=False,
        )  # fmt: skip
        curves.append(
            gallery.add(png, "exact", f"from {values[0]:.1f} to {values[-1]:.1f} per cent")
        )
    config = about["config"]
    page = template_of("questions.html.j2").render(
        title=f"{' + '.join(config['tower']) or config['start']} on {config['data']}",
        cards=_cards(about),
        scores=_scores(about),
        curves=curves,
        wrong=[one for one in shown if not one["right"]],
        right=[one for one in shown if one["right"]],
        config=json.dumps(config, indent=2, ensure_ascii=False),
    )
    target = folder / "report.html"
    with written_whole(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _cards(about: Mapping) -> list[tuple[str, str, str]]:
    sizes = ", ".join(
        f"{name} {short_number(count / 1e6)} M" for name, count in about["parameters"].items()
    )
    return [
        (f"{about['after']['exact']:.1f} %", "answers exactly right", f"of {about['questions']:,}"),
        (f"{about['shuffled']['exact']:.1f} %", "with shuffled pictures", "no sight is worth this"),
        (
            f"{about['question_alone']:.1f} %",
            "from the question alone",
            "commonest answer to its words",
        ),
        (f"{about['image_tokens']:,}", "tokens an image", sizes),
    ]


def _scores(about: Mapping) -> Table:
    names = [key for key in about["after"] if key.endswith("exact")]
    columns = ("after", "shuffled", "blind")
    rows = [
        Row(
            name.removesuffix("/exact").replace("exact", "all"),
            [Cell(f"{about[column].get(name, float('nan')):.1f}") for column in columns],
            strong=name == "exact",
        )
        for name in names
    ]
    return Table(["question", "its picture", "shuffled pictures", "grey pictures"], rows)
