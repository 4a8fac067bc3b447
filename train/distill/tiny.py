"""Shrink a recipe to a laptop: the same road with small networks, embedded images, few steps."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.files import cache_dir
from zoo.teachers.name import TeacherName
from zoo.train.config import Every
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.stages import Stages

SIDE = 64
"""Pixels of teachers and student."""
TIMM = ("test_vit", "test_vit2", "test_vit3", "test_convnext")
"""timm's own models for tests, a third of a million parameters each."""
STUDENTS = {"eradio": "eradio_nano", "convnext": "test_convnext"}
"""Small student by the beginning of the large one's name; a ViT for all others."""
RADIO = ("embed_dim=64", "depth=3", "num_heads=4")

PROCESSOR: dict[str, Any] = dict(
    image_processor_type="BitImageProcessor", do_resize=True, do_center_crop=False,
    do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True, resample=3,
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    size=dict(height=SIDE, width=SIDE),
)  # fmt: skip


def _open_clip(width: int) -> dict[str, Any]:
    vision = dict(image_size=SIDE, layers=2, width=width, head_width=16, patch_size=8)
    text = dict(context_length=16, vocab_size=64, width=16, heads=2, layers=1)
    return dict(
        model_cfg=dict(embed_dim=32, vision_cfg=vision, text_cfg=text),
        preprocess_cfg=dict(interpolation="bicubic"),
    )


def _dinov2(width: int) -> dict[str, Any]:
    return dict(
        model_type="dinov2", architectures=["Dinov2Model"], hidden_size=width,
        num_hidden_layers=2, num_attention_heads=width // 16, image_size=SIDE, patch_size=8,
    )  # fmt: skip


def tiny(recipe: Distill) -> Distill:
    """Return a recipe of the same heads, losses and kinds of teachers that runs in under a minute.

    Teachers are small networks with random weights, drawn alike each time; what they say depends
    on the image, so there is something to learn, and nothing is downloaded.
    """
    student, options = _student(recipe.student)
    return replace(
        recipe,
        data="embedded",
        labelled=None,
        view_epochs=0,
        cache=None,
        teachers=tuple(
            replace(_teacher(spec, number), at=_side(spec.at, recipe) if spec.at else 0)
            for number, spec in enumerate(recipe.teachers)
        ),
        student=student,
        student_options=options,
        pretrained=False,
        size=SIDE,
        sizes=(SIDE // 2, SIDE) if recipe.sizes else (),
        attention_windows=(0, 2) if recipe.attention_windows else (),
        batches=(8, 4) if recipe.batches else (),
        batch=8,
        slices="auto",
        steps=20,
        calibration=4,
        eval_images=64,
        probe_images=256,
        heads=replace(recipe.heads, hidden=64),
        losses=replace(recipe.losses, shift=min(recipe.losses.shift, 1)),
        every=Every(log=5, checkpoint=20, evaluate=20),
        out=recipe.out.with_name(f"{recipe.out.name}_tiny"),
    )


def _side(size: int, recipe: Distill) -> int:
    """Return a side of the tiny form for one of a recipe's: the largest one, or the other."""
    return SIDE if size == max(recipe.sizes, default=size) else SIDE // 2


def tiny_stages(stages: Stages) -> dict[str, Distill]:
    """Return the tiny form of each stage; stages of smaller images have smaller ones here too."""
    largest = max(stage.size for stage in stages.values())
    return {
        name: replace(tiny(stage), size=SIDE if stage.size == largest else SIDE // 2)
        for name, stage in stages.items()
    }


def _student(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a small student of the same family, and the keywords that make it small."""
    if name.startswith("radio_vit"):
        return "radio_vit_base_patch16", RADIO
    return next((s for key, s in STUDENTS.items() if name.startswith(key)), "test_vit"), ()


def _teacher(spec: TeacherSpec, number: int) -> TeacherSpec:
    """Name a small teacher out of the same library; what needs no weights stays as it is."""
    kind = TeacherName.parse(spec.name).kind
    if "{" in spec.name:  # the student of an earlier stage
        return replace(spec, name=re.sub(r"@\d+$", f"@{SIDE}", spec.name))
    width = 48 + 16 * number  # two teachers of one size would be drawn alike
    if kind == "open_clip":
        folder = _written(f"clip_{width}", {"open_clip_config.json": _open_clip(width)})
        name = f"open_clip:local-dir:{folder}/random"
    elif kind == "hf":
        files = {"config.json": _dinov2(width), "preprocessor_config.json": PROCESSOR}
        name = f"hf:{_written(f'dinov2_{width}', files)}/random"
    elif kind == "timm":
        name = f"timm:{TIMM[number % len(TIMM)]}/random@{SIDE}"
    elif kind == "zoo":
        name = f"zoo:eradio_nano/random@{SIDE}"
    else:
        return spec
    return replace(spec, name=name)


def _written(name: str, files: dict[str, dict[str, Any]]) -> Path:
    """Write the configuration of a small model where its library can open it."""
    folder = cache_dir() / "tiny" / f"tiny_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return folder
