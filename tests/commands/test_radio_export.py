"""The export of the recipe with the most parts: spectral norms, average, MESA, attention heads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from zoo.commands.distill.run import distill
from zoo.features import Batch
from zoo.layers.spectral import SpectralScale, baked
from zoo.students.export import load_export
from zoo.train.checkpoint import read_checkpoint
from zoo.train.distill.calibrate import fit_normalizers
from zoo.train.distill.fold import folded
from zoo.train.distill.recipes import RECIPES
from zoo.train.distill.setup import new_student, prepare
from zoo.train.distill.tiny import tiny


@pytest.mark.slow
def test_c_radio_v4_exports_the_student_that_it_describes(tmp_path, monkeypatch):
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    asked = replace(
        tiny(RECIPES["c_radio_v4"]()), out=tmp_path / "run", device="cpu",
        steps=8, eval_images=16, probe_images=32,
    )  # fmt: skip
    assert asked.spectral and asked.optim.ema and asked.losses.mesa
    run = distill(asked)
    weights = run.read_json("about.json", dict)["student"]["weights"]
    saved = read_checkpoint(run.checkpoints()[-1])

    # in both forms the norms are what the scales say, as far as one power step a forward goes
    setup = prepare(asked)
    calibration = fit_normalizers(run, setup)[asked.normalise]
    student = new_student(setup, calibration.normalizers).eval()
    for form in ("model", "ema"):
        student.load_state_dict(saved[form])
        scales = [part for part in student.modules() if isinstance(part, SpectralScale)]
        wanted = torch.cat([F.softplus(scale.raw.detach()[0]) + 0.05 for scale in scales])
        norms = [
            torch.linalg.matrix_norm(part, 2)
            for name, weight in baked(student.backbone.state_dict()).items()
            if f"{name.removesuffix('.weight')}.parametrizations.weight.original"
            in student.backbone.state_dict()
            for part in weight.chunk(3 if ".qkv." in name else 1)
        ]
        torch.testing.assert_close(torch.stack(norms), wanted, rtol=0.2, atol=0)

    # the better form comes out, as an ordinary model, with the teachers' own spaces in its heads
    student.load_state_dict(saved[dict(average="ema", raw="model")[weights]])
    back = load_export(run.path / "export")
    assert {head.kind for head in back.heads.values()} == {"attn"}
    assert not [name for name in back.state_dict() if "parametrizations" in name]
    batch = Batch(torch.rand(2, 3, 96, 96))
    for size in asked.sizes:
        with torch.no_grad():
            ours = folded(student, calibration.normalizers)(batch, size=(size, size))
            theirs = back(batch, size=(size, size))
        assert ours.keys() == theirs.keys() == set(asked.labels)
        for label in ours:
            for mine, other in zip(ours[label], theirs[label], strict=True):
                if mine is not None:
                    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
