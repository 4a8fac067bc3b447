"""Planted students, backbones and heads whose answers are known; pages that run as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.eval.registry import Subject
from zoo.features import Batch, Features
from zoo.students.student import Student


class PlantedBackbone(nn.Module):
    """A backbone whose map is `features` of the images, and whose summary is the map's mean."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.feature_info = [dict(reduction=1, num_chs=3)]

    def forward_intermediates(self, x, **_):
        features = self.features(x)
        return features, [features]

    def forward_head(self, x, pre_logits=False):
        return x.mean(dim=(2, 3))


class Head(nn.Module):
    """A head that answers with `answer` of the backbone's features."""

    kind = "v2"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, out, intermediates):
        return self.answer(out)


class Images:
    """Labelled images in memory, as `Subject.open` returns them."""

    def __init__(self, images, labels=None, classes=(), batch=4):
        self.images, self.labels, self.classes, self.batch = images, labels, classes, batch

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        for first in range(0, len(self.images), self.batch):
            rows = slice(first, first + self.batch)
            keys = [str(i) for i in range(len(self.images))][rows]
            labels = None if self.labels is None else self.labels[rows]
            yield Batch(self.images[rows], keys, labels)


def plant(features=lambda x: x, heads=None, *, size=32, images=None, **more):
    """Make a subject of a planted backbone, with one head for each name in `heads`."""
    modules = {name: Head(answer) for name, answer in (heads or {}).items()}
    how = dict(mean=(0.0,) * 3, std=(1.0,) * 3, recipe=("planted", {}), head={})
    student = Student(PlantedBackbone(features), modules, size=(size, size), **how).eval()
    if images is not None:
        more["open"] = lambda data, split: images
    return Subject(name="planted", made=student, **more)


@pytest.fixture
def planted():
    """Make subjects whose answers are known: see `plant`."""
    return plant


@pytest.fixture
def pictures():
    """Hold images in memory: see `Images`."""
    return Images


@pytest.fixture
def colours():
    """Twelve plain images in three colours, and which each has."""
    labels = torch.arange(12) % 3
    images = torch.zeros(12, 3, 32, 32)
    images[torch.arange(12), labels] = 1.0
    return images, labels


def summary_of(rows):
    """Answer with the row of the image's strongest colour."""
    return lambda out: Features(rows[out.summary.argmax(dim=-1)], None)


@pytest.fixture
def answering():
    """Make a head's answer out of one row a colour: see `summary_of`."""
    return summary_of


DOCS = Path(__file__).parents[2] / "docs"


def run_page(name, place, *, commands):
    """Run a page's shell lines, then its Python; return what the last line and the code printed."""
    text = (DOCS / name).read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shell = [text for kind, text in blocks if kind == "sh" and "pip install" not in text]
    lines = [shlex.split(x) for x in "".join(shell).replace("\\\n", " ").splitlines()]
    assert len(lines) == commands
    for words in lines:
        words = ["-m", "zoo", *words[1:]] if words[0] == "zoo" else words[1:]
        printed = run_python("-W", "ignore", *words, cwd=place)
    (code,) = (text for kind, text in blocks if kind == "python")
    return printed, run_python("-W", "ignore", "-c", code, cwd=place)


def run_python(*words, cwd):
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(name="run_page")
def _run_page():
    return run_page
