"""A run that learns from a cache."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.commands.distill.run import distill
from zoo.features import Batch
from zoo.teachers.cache import Cache, CachedTeacher, CacheManifest
from zoo.teachers.rule import RuleTeacher
from zoo.train.config import Every, Optim
from zoo.train.distill.caching import BreakEven, check_room
from zoo.train.distill.config import Distill, TeacherSpec


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A dozen noisy images of two colours."""
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for i in range(12):
        pixels = draws.integers(0, 255, (48, 48, 3), dtype=np.uint8) // 2
        pixels[:, :, i % 3] += 100
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def run_of(photos, out, **changes) -> Distill:
    return replace(
        Distill(
            data=str(photos), student="test_vit", size=32, batch=4, steps=8, view_epochs=1, out=out,
            teachers=(TeacherSpec(name="rule:colour@32"), TeacherSpec(name="rule:edges@32")),
            calibration=2, held_out=0.2, eval_images=2, device="cpu",
            optim=Optim(lr=1e-3, warmup=0.0), every=Every(log=1, checkpoint=99, evaluate=99),
        ),
        **changes,
    )  # fmt: skip


def losses(folder) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_a_student_of_a_cache_is_the_student_of_live_teachers(photos, tmp_path):
    distill(run_of(photos, tmp_path / "live"))
    live = np.array(losses(tmp_path / "live"))
    for stored, difference in (("bf16", 5e-3), ("int8", 1e-2)):
        cache = tmp_path / f"cache_{stored}"
        distill(run_of(photos, tmp_path / stored, cache=cache, cache_dtype=stored))
        mine = np.array(losses(tmp_path / stored))
        assert np.abs(mine / live - 1).max() < difference
        distill(run_of(photos, tmp_path / f"{stored}_again", cache=cache))
        assert losses(tmp_path / f"{stored}_again") == losses(tmp_path / stored)
    with pytest.raises(ValueError, match=r"stale: .*seed is 0 there and 1 here"):
        distill(run_of(photos, tmp_path / "other", cache=cache, seed=1))
    # an arm of another scale learns from the same cache
    distill(run_of(photos, tmp_path / "arms", cache=cache, compare=("none",)))
    plain = run_of(photos, tmp_path / "plain", normalise="none")
    distill(plain)
    theirs = np.array(losses(tmp_path / "plain"))
    mine = np.array(losses(tmp_path / "arms" / "compare" / "none"))
    assert np.abs(mine / theirs - 1).max() < 1e-2
    # and so does a student of a coarser grid, on the scale that it has there
    distill(run_of(photos, tmp_path / "coarse_live", size=16))
    distill(run_of(photos, tmp_path / "coarse", size=16, cache=cache))
    mine, theirs = (np.array(losses(tmp_path / name)) for name in ("coarse", "coarse_live"))
    assert np.abs(mine / theirs - 1).max() < 1e-2


@pytest.mark.slow
def test_teachers_see_a_held_out_image_once_and_never_again_in_a_second_run(
    photos, tmp_path, monkeypatch
):
    (photos_with_gap := tmp_path / "photos").mkdir()
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        (photos_with_gap / file.name).write_bytes(b"damaged" if i == 3 else file.read_bytes())
    seen = []
    plain = RuleTeacher.features
    monkeypatch.setattr(RuleTeacher, "features", lambda t, x: seen.append(len(x)) or plain(t, x))
    config = run_of(photos_with_gap, tmp_path / "live", eval_images=6, held_out=0.5)
    config = replace(config, every=Every(log=1, checkpoint=99, evaluate=2), compare=("none",))

    def fidelities(name, cache=None):
        seen.clear()
        distill(replace(config, out=tmp_path / name, cache=cache))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row["fidelity/edges"] for row in rows if "fidelity/edges" in row], sum(seen)

    live, often = fidelities("live")
    cache = tmp_path / "cache"
    first, once = fidelities("first", cache)
    second, never = fidelities("second", cache)
    assert len(live) > 6 and np.allclose(first, live, rtol=2e-2) and second == first
    # both teachers: what is left is calibration (2 x 4 images), six maps, one black image each
    assert often > once > never
    assert never <= 2 * (8 + 6 + 1)


@pytest.mark.slow
def test_a_filling_that_stopped_goes_on_and_reads_what_was_there(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.train.distill.caching.SHARD_BYTES", 400)
    config = run_of(photos, tmp_path / "run", cache=tmp_path / "cache", view_epochs=2)
    distill(config)
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.shards > 3 and not cache.missing()
    whole = CachedTeacher(cache, "colour")(Batch(torch.zeros(1, 3, 32, 32), positions=[3])).spatial
    kept = cache.shard_path(0).stat().st_mtime_ns
    cache.shard_path(1).unlink()
    distill(replace(config, out=tmp_path / "again"))
    assert not cache.missing() and cache.shard_path(0).stat().st_mtime_ns == kept
    again = CachedTeacher(cache, "colour")(Batch(torch.zeros(1, 3, 32, 32), positions=[3])).spatial
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_a_cache_pays_when_the_teachers_cost_more_than_the_disk():
    what = BreakEven(bytes=10, image_bytes=1, free=99, live=100, write=10, read=10, bandwidth=1,
                     views=2)  # fmt: skip
    # two epochs of teachers and writing, and reading in each, against teachers in each
    assert what.epochs == pytest.approx(2 * 110 / 90)
    assert "pays from epoch 3 on" in what.describe()[1]
    slow = replace(what, read=200.0)
    assert "never pays" in slow.describe()[1]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    about = dict(grid=[2, 2], summary_dim=6, spatial_dim=8)
    held = CacheManifest(
        images=10**15, data="", seed=0, views=1, view={}, normalise="none", stored="int8",
        shard=4, teachers=dict(colour=about),
    )  # fmt: skip
    cache = Cache.prepare(tmp_path, held, {})
    monkeypatch.setattr(Cache, "missing", lambda self: [0])
    monkeypatch.setattr(
        Cache, "positions_of", lambda self, number: range(self.manifest.num_positions)
    )
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GB more .*larger disk"):
        check_room(cache)


def test_a_cache_without_views_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"view_epochs is 0; a cache holds .*--view-epochs 1"):
        run_of(photos, tmp_path, view_epochs=0, cache=tmp_path / "c")
