"""A step measured part by part."""

import json
from dataclasses import replace

import pytest
import torch

from zoo.commands.bench.distill import TINY, measure_steps, part_table
from zoo.commands.bench.step_parts import (
    ModelPool,
    best_parts,
    measure,
    pink_noise,
    spread_layer_scale,
)
from zoo.teachers.open import open_teacher

SMALL = replace(TINY, teachers=("timm:test_vit/random@64",), size=64, batch=2, alone=True)


@pytest.fixture(scope="module")
def row():
    torch.manual_seed(0)
    return measure(SMALL, ModelPool(torch.device("cpu")), rounds=2, warmup=1)


def test_every_part_is_measured_and_modelled(row):
    assert list(row.parts) == ["test_vit", "student", "backbone", "heads", "resize", "rest"]
    assert all(ms > 0 for name, ms in row.parts.items() if name != "rest")
    whole = row.parts["test_vit"] + row.parts["student"]
    assert row.efficiency == pytest.approx(whole / row.milliseconds)
    rest = row.milliseconds - whole - row.parts["resize"]
    assert row.parts["rest"] == pytest.approx(rest)
    assert set(row.model) == {"test_vit", "student", "step"}
    assert row.model["step"] == pytest.approx(row.model["test_vit"] + row.model["student"])
    assert row.as_json()["images_per_s"] == pytest.approx(1e3 / row.milliseconds)


def test_the_fastest_form_of_a_part_is_what_the_engine_is_held_against(row):
    slow, fast = replace(row, parts=dict(row.parts)), replace(row, parts=dict(row.parts))
    fast.parts["test_vit"] = row.parts["test_vit"] / 2
    best = best_parts([slow, fast])
    assert min(best.values()) <= fast.parts["test_vit"]
    assert fast.parts["test_vit"] in best.values() and row.parts["test_vit"] not in best.values()


@pytest.mark.slow
def test_the_command_writes_rows_with_their_circumstances(tmp_path, capsys):
    out = tmp_path / "run.json"
    eight = replace(SMALL, precision="int8", name="eight")
    measure_steps([SMALL, eight], device="cpu", rounds=2, out=out)
    run = json.loads(out.read_text())
    assert run["versions"]["torch"] == torch.__version__ and run["date"]
    assert [r["name"] for r in run["rows"]] == ["tiny", "eight"]
    assert run["rows"][1]["fidelity"]["test_vit"]["fidelity"] > 1000
    shown = capsys.readouterr().out
    assert "engine efficiency" in shown and "model/measured" in shown and "fidelity" in shown


def test_the_table_shows_each_part(row):
    table = part_table(row)
    assert table.row_count == len(row.parts) + 1


def test_fresh_layer_scales_are_opened_so_that_blocks_count():
    teacher = open_teacher("timm:vit_tiny_patch16_224/random@32")
    assert not [n for n, _ in teacher.network.named_parameters() if "gamma" in n]
    import timm

    network = timm.create_model("vit_tiny_patch16_224", init_values=1e-5, depth=1)
    spread_layer_scale(network)
    assert network.blocks[0].ls1.gamma.eq(1).all()


def test_test_images_have_the_spectrum_of_photographs():
    images = pink_noise(2, 64, torch.device("cpu")).images
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 64, 64)
    x = images.float() - images.float().mean()
    power = torch.fft.rfft2(x).abs().square().mean((0, 1))
    assert power[1:4, 1:4].mean() > 20 * power[16:24, 16:24].mean()
