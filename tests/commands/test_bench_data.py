"""What reading an image costs, by stage; and which decoder a run goes on with."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from zoo.commands.bench.args import main
from zoo.train.config import differences
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.setup import with_decoder
from zoo.train.run import Run

CONFIG = Distill(teachers=(TeacherSpec(name="timm:test_vit/random@64"),))


def test_each_stage_of_both_decoders_is_timed(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for number in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    main(["data", str(tmp_path), "--size", "224", "--images", "4"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    number = re.compile(r"\d+\.\d{3}")
    rows = [row for row in rows if len(row) > 2 and all(map(number.fullmatch, row[-2:]))]
    found = {" ".join(row[:-2]): list(map(float, row[-2:])) for row in rows}
    stages = ["read", "decode, crop, resize", "copy", "collect"]
    for column in range(2):
        whole = sum(found[stage][column] for stage in stages)
        assert found["all"][column] == pytest.approx(whole, abs=0.01)
        # the whole image is decoded before a part of it is resized
        assert found["decode (whole)"][column] > 0.3


def test_a_run_goes_on_with_the_decoder_that_it_began_with(tmp_path):
    config = with_decoder(CONFIG, resume=False)
    assert config.decoder == "pillow"  # on a CPU
    for began in ("torch", "pillow", None):  # None: by a version that had no other
        folder = tmp_path / str(began)
        folder.mkdir()
        content = dict(kind="distill", student="test_vit") | ({"decoder": began} if began else {})
        (folder / "config.json").write_text(json.dumps(content))
        again = with_decoder(Distill(teachers=CONFIG.teachers, out=folder), resume=True)
        assert again.decoder == (began or "pillow")
        other = "torch" if again.decoder == "pillow" else "pillow"
        asked = Distill(decoder=other, out=folder)
        assert "decoder" in differences(Run(folder).config(Distill), asked)
