"""Features on disk."""

import dataclasses
import json
import random

import pytest
import torch

from zoo.features import Batch, Features
from zoo.teachers.cache import (
    Cache,
    CachedTeacher,
    CacheManifest,
    _open_shard,
    quantize_tokens,
)
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher

ABOUT = dict(
    name="rule:colour",
    fingerprint="f00",
    precision="auto",
    size=[32, 32],
    grid=[2, 2],
    summary_dim=6,
    spatial_dim=8,
)
MANIFEST = CacheManifest(
    images=5,
    data="abc",
    seed=0,
    views=2,
    view=dict(size=32),
    normalise="alpha_only",
    stored="int8",
    shard=4,
    teachers=dict(colour=ABOUT),
)


def spaces() -> dict[str, torch.Tensor]:
    return {
        "colour/mean": torch.full((8,), 3.0, dtype=torch.float64),
        "colour/weight": torch.full((8,), 0.5, dtype=torch.float64),
        "colour/inverse_weight": torch.full((8,), 2.0, dtype=torch.float64),
    }


def filled(path, manifest=MANIFEST) -> tuple[Cache, Features]:
    cache = Cache.prepare(path, manifest, spaces())
    every = Features(torch.randn(10, 6), torch.randn(10, 2, 2, 8))
    for number in cache.missing():
        rows = slice(cache.positions_of(number).start, cache.positions_of(number).stop)
        cache.write(number, dict(colour=Features(every.summary[rows], every.spatial[rows])))
    return cache, every


def test_what_was_written_is_read_by_position_over_shards_and_over_epochs(tmp_path):
    cache, every = filled(tmp_path)
    assert [len(cache.positions_of(n)) for n in range(3)] == [4, 4, 2]
    positions = [2, 3, 4, 9, 10, 11]  # 10 are stored: the tenth is the first again
    features = cache.read("colour", positions)
    wanted = every.spatial[[p % 10 for p in positions]]
    assert (features.spatial - wanted).abs().max() <= wanted.abs().max() / 254 + 1e-6
    torch.testing.assert_close(
        features.summary, every.summary[[p % 10 for p in positions]], rtol=2**-8, atol=0
    )


def test_int8_with_a_scale_a_token_loses_a_ten_thousandth():
    x = torch.randn(100, 1280)
    q, scale = quantize_tokens(x)
    lost = (q * scale[:, None] - x).square().mean() / x.square().mean()
    assert 1e-5 < float(lost) < 1e-4


def test_bf16_is_stored_as_it_is(tmp_path):
    cache, every = filled(tmp_path, dataclasses.replace(MANIFEST, stored="bf16"))
    features = cache.read("colour", range(10))
    torch.testing.assert_close(features.spatial, every.spatial.bfloat16(), rtol=0, atol=0)


def test_the_size_is_known_beforehand(tmp_path):
    for stored in ("int8", "bf16"):
        manifest = dataclasses.replace(MANIFEST, stored=stored)
        cache, _ = filled(tmp_path / stored, manifest)
        header = 2000  # safetensors' own, in each shard
        size = sum(cache.shard_path(n).stat().st_size for n in range(3))
        assert (
            manifest.num_positions * manifest.image_bytes
            <= size
            < manifest.num_positions * manifest.image_bytes + header
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=1), "seed is 0 there and 1 here"),
        (dict(view=dict(size=64)), "view.size is 32 there and 64 here"),
        (dict(data="xyz"), "data is abc there"),
        (dict(teachers=dict(colour={**ABOUT, "fingerprint": "bad"})), "colour.fingerprint is f00"),
        (dict(teachers=dict(colour={**ABOUT, "size": [64, 64]})), "colour.size is .32, 32. there"),
        (dict(teachers=dict(colour=ABOUT, edges=ABOUT)), "teachers.edges is None there"),
        (dict(normalise="phi_s"), "normalise is alpha_only there"),
    ],
)
def test_a_stale_cache_is_refused_and_says_what_differs(tmp_path, change, message):
    filled(tmp_path)
    with pytest.raises(ValueError, match=f"is stale: .*{message}"):
        Cache.prepare(tmp_path, dataclasses.replace(MANIFEST, **change), spaces())


def test_filling_continues_where_it_stopped(tmp_path):
    cache, _ = filled(tmp_path)
    cache.shard_path(1).unlink()
    again = Cache.prepare(tmp_path, dataclasses.replace(MANIFEST, shard=99), spaces())
    assert again.manifest.shard == 4 and again.missing() == [1]
    with pytest.raises(ValueError, match=r"shard_00001.* cannot be read .*fills it again"):
        again.read("colour", [5])


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="no feature cache"):
        Cache.prepare(tmp_path, MANIFEST, spaces())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_cache_is_opened_by_name_and_is_in_the_teachers_own_space(tmp_path):
    _, every = filled(tmp_path / "made")
    teacher = open_teacher(f"cache:{tmp_path / 'made'}")
    assert isinstance(teacher, Teacher) and isinstance(teacher, CachedTeacher)
    assert teacher.size == (32, 32) and teacher.grid == (2, 2)
    assert open_teacher(f"cache:{tmp_path / 'made'}/colour").spatial_dim == 8
    features = teacher(Batch(torch.zeros(2, 3, 32, 32), positions=[0, 1])).spatial
    torch.testing.assert_close(features, 2 * every.spatial[:2] + 3, rtol=0, atol=0.05)


def test_a_cache_has_features_of_training_views_alone(tmp_path):
    filled(tmp_path)
    teacher = open_teacher(f"cache:{tmp_path}")
    with pytest.raises(ValueError, match="views of a training run"):
        teacher(Batch(torch.zeros(2, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"no feature cache in .*--cache"):
        open_teacher(f"cache:{tmp_path / 'nothing' / 'here'}")
    with pytest.raises(ValueError, match="has the teachers colour"):
        open_teacher(f"cache:{tmp_path}/edges")


def test_a_flipped_byte_in_a_shard_is_refused_or_harmless(tmp_path):
    cache, _ = filled(tmp_path)
    whole = cache.read("colour", [0, 1, 2, 3])
    path, draw = cache.shard_path(0), random.Random(0)
    content, refused = path.read_bytes(), 0
    for place in draw.sample(range(len(content)), 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        _open_shard.cache_clear()
        try:
            for ours, theirs in zip(cache.read("colour", [0, 1, 2, 3]), whole, strict=True):
                assert torch.equal(ours, theirs)
        except ValueError as error:
            assert "shard_00000.safetensors of the feature cache cannot be read" in str(error)
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(images="five"), "field images, has another form"),
        (dict(shard=0), "below 1"),
        (dict(teachers=dict(colour=dict(ABOUT, size=[32, "32"]))), "field teachers"),
        (dict(teachers=dict(colour={})), "field teachers"),
        (dict(colour=1), "has a field 'colour'"),
    ],
)
def test_a_damaged_manifest_is_refused_with_its_file(tmp_path, change, said):
    filled(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps(MANIFEST.as_json() | change))
    with pytest.raises(ValueError, match=rf"cache\.json.* {said}"):
        Cache.open(tmp_path)
