"""RADIO: the reference's numbers, timm's contract, and what must hold for any image."""

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from zoo.layers.vitdet import VitDet
from zoo.radio import RELEASES, SIZES, Radio
from zoo.radio_weights import published

GOLDEN = Path(__file__).parent / "golden"
CARDS = sorted(path.stem for path in GOLDEN.glob("radio_vit_*.json"))
STEP = 8
TINY = dict(
    embed_dim=32, depth=4, num_heads=2, patch_size=STEP, img_size=32, max_img_size=64, reg_tokens=3
)
HEADS = dict(
    clip=dict(token=0, summary=dict(hidden=8, out_dim=6), feature=dict(hidden=8, out_dim=5)),
    sam=dict(token=3, feature=dict(hidden=8, out_dim=4, upsample=2)),
)


def tiny(**kwargs):
    return timm.create_model("radio_vit_base_patch16", **(TINY | kwargs)).eval()


@pytest.fixture
def lively(golden):
    """A tiny model whose every branch shows in the output: weights by the golden rule."""

    def build(**kwargs):
        model = tiny(**kwargs)
        golden.fill(model)
        return model

    return build


def images(rows=32, cols=48, batch=2):
    return torch.rand(batch, 3, rows, cols)


# -- the reference's numbers ---------------------------------------------------------------------


def _named(card, key):
    """Read what a card's constructor call says after a word, as JSON."""
    found = re.search(rf"; {key} (.*)$", card["call"])
    return json.JSONDecoder().raw_decode(found[1])[0] if found else None


def _head(sizes):
    factor = sizes.get("upsample_factor", 1)
    return dict(
        hidden=sizes["hidden_dim"],
        out_dim=sizes["output_dim"] // factor**2,
        num_inner=sizes["num_inner"],
        upsample=factor,
    )


def _arguments(card):
    """Translate the extras of a card's call: adaptors, windows."""
    kwargs = {}
    if windows := re.search(r"vitdet window (\d+), num_global (\d+)", card["call"]):
        kwargs["vitdet"] = dict(window=int(windows[1]), num_global=int(windows[2]))
    teachers = ("clip", "siglip2-g", "dino_v2", "sam")
    for name, heads in (_named(card, "adaptors") or {}).items() if "; adaptors" in card["call"] else ():
        kwargs.setdefault("adaptors", {})[name] = dict(
            token=teachers.index(name), **{part: _head(sizes) for part, sizes in heads.items()}
        )
    return kwargs
