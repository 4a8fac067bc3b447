"""Named protocols of papers: the settings of a benchmark, and in what they depart from the source.

Importing this imports no torch. A protocol is a function; its departures are what an evaluation
here does otherwise than the source, so that a number is not taken for what it is not.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from zoo.eval.settings import (
    ClassifySettings,
    DepthSettings,
    KnnSettings,
    LinearSettings,
    SegmentSettings,
    ZeroShotSettings,
)


class Protocol(NamedTuple):
    """How a paper measures."""

    on: str
    """The benchmark."""
    settings: Any
    source: str
    departures: tuple[str, ...] = ()
    size: int | None = None
    """Side of the images in pixels, where the source states it."""


SQUARE = "the largest centred square is resized; the source crops 87.5 % of it"
SUMMARY = "the model's summary is read; the source concatenates tokens and means of several blocks"
NO_JITTER = "no photometric distortion of the training images"
SLIDING = "images are tested by sliding windows of one size, short side resized to the crop"


def imagenet_knn() -> Protocol:
    """Weighted nearest neighbours, k = 20: DINO (2104.14294, 4.1) and AM-RADIO."""
    source = "DINO (2104.14294), section 4.1; AM-RADIO (2312.06709), section 4.1"
    return Protocol("knn", KnnSettings(k=20, temperature=0.07), source, (SQUARE,), 224)


def dinov2_linear() -> Protocol:
    """A linear classifier by SGD over a grid of rates: DINOv2 (2304.07193, B.3)."""
    rates = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    settings = LinearSettings(
        solvers=("sgd",), rates=rates, epochs=10, batch=1024, least_steps=12_500
    )
    departures = (
        "features are computed once of centre crops; the source crops at random and mirrors",
        SUMMARY,
        "features are standardised, channel by channel",
        "a held-out tenth of the training images chooses the rate; the source takes ImageNet's val",
        SQUARE,
    )
    return Protocol("linear", settings, "DINOv2 (2304.07193), appendix B.3", departures, 224)


def _dinov2_segmentation(what: str) -> Protocol:
    settings = SegmentSettings(crop=512, steps=40_000, batch=16, lr=1e-3)
    departures = (
        NO_JITTER,
        "crops of 512 px; with patches of 14 px the source takes multiples of them",
        SLIDING,
    )
    return Protocol("segment", settings, f"DINOv2 (2304.07193), section 7.4, {what}", departures)


def dinov2_ade20k() -> Protocol:
    """A linear layer on frozen patches, ADE20k: DINOv2 (2304.07193, 7.4)."""
    return _dinov2_segmentation("ADE20k")


def dinov2_voc() -> Protocol:
    """A linear layer on frozen patches, Pascal VOC 2012: DINOv2 (2304.07193, 7.4)."""
    return _dinov2_segmentation("Pascal VOC 2012")


def _radio_segmentation(what: str) -> Protocol:
    settings = SegmentSettings(crop=512, steps=80_000, batch=16, lr=1e-3, weight_decay=0.0)
    departures = (
        NO_JITTER,
        "crops of 512 px and sliding windows; the source tests whole images, ViTs at 518 px",
        "the warm-up and the fall of the rate are those of DINOv2's linear probe",
    )
    return Protocol("segment", settings, f"AM-RADIO (2312.06709), {what}", departures)


def radio_ade20k() -> Protocol:
    """A linear layer on frozen patches, ADE20k, 80,000 steps: AM-RADIO (2312.06709)."""
    return _radio_segmentation("ADE20k")


def radio_voc() -> Protocol:
    """A linear layer on frozen patches, Pascal VOC 2012, 80,000 steps: AM-RADIO (2312.06709)."""
    return _radio_segmentation("Pascal VOC 2012")


def dinov2_nyud() -> Protocol:
    """Depth by a linear layer over 256 bins, NYU Depth v2: DINOv2 (2304.07193, 7.4)."""
    departures = (
        "the last block's map alone; the source's lin. 1 also joins the class token",
        "the scale-invariant loss without the source's gradient loss",
        "square crops of 480 px; the source crops 416 x 544",
        SLIDING,
    )
    source = "DINOv2 (2304.07193), section 7.4, NYU Depth v2"
    return Protocol("depth", DepthSettings(), source, departures)


def clip_zeroshot() -> Protocol:
    """80 sentences a class: CLIP (2103.00020, 3.1.4)."""
    settings = ZeroShotSettings(templates="openai")
    return Protocol("zeroshot", settings, "CLIP (2103.00020), section 3.1.4", (SQUARE,))


def timm_imagenet() -> Protocol:
    """A model's own head under its own transform: timm's results-imagenet.csv."""
    departures = ("timm's tables also test some models at sizes of their own (test_input_size)",)
    return Protocol("classify", ClassifySettings(), "timm, validate.py", departures)


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    "imagenet-knn": imagenet_knn,
    "dinov2-linear": dinov2_linear,
    "dinov2-ade20k": dinov2_ade20k,
    "dinov2-voc": dinov2_voc,
    "radio-ade20k": radio_ade20k,
    "radio-voc": radio_voc,
    "dinov2-nyud": dinov2_nyud,
    "clip-zeroshot": clip_zeroshot,
    "timm-imagenet": timm_imagenet,
}
"""Name on the command line -> protocol."""


def find_protocols(names: Sequence[str]) -> dict[str, Protocol]:
    """Return protocols by their benchmark.

    Raises:
        ValueError: there is no protocol of that name, or two are of one benchmark.
    """
    found: dict[str, Protocol] = {}
    for name in names:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(PROTOCOLS)
            raise ValueError(f"There is no protocol {name!r}; there are {known}.{hint}")
        protocol = PROTOCOLS[name]()
        if protocol.on in found:
            raise ValueError(f"Two of the protocols are of {protocol.on}; give one a command.")
        found[protocol.on] = protocol
    return found


def departures_of(
    protocol: Protocol, settings: Any, size: int | None = None, *, neutral: Sequence[str] = ()
) -> list[str]:
    """Return the protocol's departures, and those of settings that were changed.

    Args:
        size: The side of the images, where one was asked for.
        neutral: Settings that change no number.
    """
    own = [
        f"{name} {ours} instead of {theirs}"
        for name, ours, theirs in _changes(settings, protocol.settings)
        if name not in neutral
    ]
    if size and protocol.size and size != protocol.size:
        own.append(f"images of {size} px instead of {protocol.size}")
    return [*protocol.departures, *own]


def _changes(ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    if not is_dataclass(ours):
        return []
    pairs = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours)]
    return [(name, a, b) for name, a, b in pairs if a != b]
