"""Figures published by papers and their authors, to show beside ours and marked as published."""

from typing import NamedTuple

from zoo.eval.speed.pareto import PUBLISHED_TOP1


class Published(NamedTuple):
    """A published figure: it was not measured here, and belongs to the released weights."""

    measure: str
    value: float
    source: str
    size: int | None = None
    """Side of the images in pixels, if the source states it."""


ZERO_SHOT, KNN = "ImageNet-1k zero-shot top-1, %", "ImageNet-1k kNN top-1, %"
ADE, VOC = "ADE20k linear mIoU, %", "VOC linear mIoU, %"
COLUMNS = (ZERO_SHOT, KNN, ADE, VOC)

_AM_RADIO = "AM-RADIO (2312.06709), Table 1"
_C_RADIO_V4 = "C-RADIOv4, Table 1"

PUBLISHED_DENSE: dict[str, tuple[str, int | None, tuple[float | None, ...]]] = {
    "eradio_large_fullres_ws16": (_AM_RADIO, 512, (80.73, 83.89, 48.22, 81.64)),
    "eradio": (_AM_RADIO, 512, (80.73, 83.89, 48.22, 81.64)),
    "vit_giant_patch14_reg4_dinov2.lvd142m": (_AM_RADIO, 224, (None, 83.41, 48.68, 82.78)),
    "radio_vit_huge_patch16.radio_v2_5": (_C_RADIO_V4, None, (82.51, 85.81, 51.58, 85.97)),
    "radio_vit_huge_patch16.c_radio_v3": (_C_RADIO_V4, None, (82.65, 86.23, 52.75, 86.41)),
    "radio_vit_so400m_patch16.c_radio_v4": (_C_RADIO_V4, None, (82.01, 85.76, 55.14, 87.22)),
    "radio_vit_huge_patch16.c_radio_v4": (_C_RADIO_V4, None, (83.09, 86.59, 55.20, 87.24)),
}
"""Source, size and one figure for each of `COLUMNS`. A name with a tag stands for those weights."""


def published(model: str, size: int | None = None) -> list[Published]:
    """Return the published figures of a model (a registered name, with or without a tag).

    Args:
        size: Side of the images in pixels. Figures for this size come first; those for other
            sizes follow.
    """
    base = model.partition(".")[0]
    found = [
        Published("ImageNet-1k top-1, %", value, source, side)
        for (name, side), (value, source) in PUBLISHED_TOP1.items()
        if name == base
    ]
    if model in PUBLISHED_DENSE or base in PUBLISHED_DENSE:
        source, side, figures = PUBLISHED_DENSE.get(model) or PUBLISHED_DENSE[base]
        found += [
            Published(measure, value, source, side)
            for measure, value in zip(COLUMNS, figures, strict=True)
            if value is not None
        ]
    return sorted(found, key=lambda figure: figure.size != size)  # those at our size first
