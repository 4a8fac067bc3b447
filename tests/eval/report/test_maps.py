"""Feature maps: what is kept, and that a colour means the same on both sides."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zoo.eval.report.maps import collect_maps, colour, load_maps, save_maps
from zoo.features import Batch, Features


def teacher(batch, scale=1.0, offset=0.0):
    x = F.avg_pool2d(batch.images.float(), 4).permute(0, 2, 3, 1)
    x = torch.cat([x, x.square(), x[..., :1] * x[..., 1:2]], dim=-1)
    return Features(None, x * scale + offset)


def tokens(*shape, seed=0):
    """Tokens with one strong, one middling, one weak direction and a little noise."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(8, 3)))[0].T * np.array([[9.0], [4.0], [2.0]])
    noise = 0.01 * rng.normal(size=(*shape, 8))
    return (rng.normal(size=(*shape, 3)) @ directions + noise).astype(np.float32)


def batch(count=3):
    return Batch(torch.rand(count, 3, 16, 24), [f"photo {i}" for i in range(count)])


def test_the_file_gives_back_what_was_collected_whatever_the_teachers_are_called(tmp_path):
    teachers = {"timm:a/b@224": teacher, "file": teacher, "none": lambda b: Features(None, None)}
    maps = collect_maps(lambda b: {name: t(b) for name, t in teachers.items()}, teachers, batch())
    names = {"timm:a/b@224", "file"}
    assert set(maps) == {"images", "keys"} | {
        f"{who}/{n}" for who in ("ours", "theirs") for n in names
    }
    assert maps["images"].shape == (3, 16, 24, 3) and maps["images"].dtype == np.uint8
    assert maps["ours/file"].shape == (3, 4, 6, 7) and maps["ours/file"].dtype == np.float16
    save_maps(maps, tmp_path / "maps.npz")
    again = load_maps(tmp_path / "maps.npz")
    assert set(again) == set(maps)
    for key in maps:
        np.testing.assert_array_equal(again[key], maps[key])
    assert list(again["keys"]) == ["photo 0", "photo 1", "photo 2"]


def test_maps_with_a_large_offset_or_a_tiny_scale_survive_half_precision():
    given = batch()
    plain = collect_maps(lambda b: {"t": teacher(b)}, {"t": teacher}, given)
    for scale, offset in ((1e-9, 0.0), (0.1, 50.0), (1e6, 0.0)):

        def moved(b, scale=scale, offset=offset):
            return teacher(b, scale, offset)

        maps = collect_maps(lambda b: {"t": moved(b)}, {"t": moved}, given)
        np.testing.assert_allclose(maps["ours/t"], plain["ours/t"], atol=5e-3)


def test_a_damaged_file_is_refused_with_its_name(tmp_path):
    path = tmp_path / "maps.npz"
    with pytest.raises(ValueError, match=r"maps\.npz is not a readable"):
        load_maps(path)
    save_maps({"images": np.zeros((1, 2, 2, 3), np.uint8)}, path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"maps\.npz is not a readable"):
        load_maps(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"maps\.npz holds no images"):
        load_maps(path)
    images, maps = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 2, 2, 5), np.float16)
    for wrong in ({"theirs/t": maps[:1]}, {"theirs/t": maps, "ours/t": maps[..., :4]}):
        save_maps({"images": images} | wrong, path)
        with pytest.raises(ValueError, match=r"theirs/t has (the shape|another width)"):
            load_maps(path)
    save_maps({"else": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no images"):
        load_maps(path)


def test_a_perfect_student_has_its_teachers_colours_and_they_use_the_whole_range():
    theirs = tokens(2, 5, 6)
    a, b = colour(theirs, theirs.copy())
    np.testing.assert_array_equal(a, b)
    assert a.shape == (2, 5, 6, 3) and a.dtype == np.uint8
    assert (a.min(axis=(0, 1, 2)) == 0).all() and (a.max(axis=(0, 1, 2)) == 255).all()


def test_the_student_is_drawn_in_the_teachers_basis_and_limits_not_its_own():
    theirs = tokens(2, 8, 8)
    middle = theirs.reshape(-1, 8).mean(axis=0)
    shy = middle + 0.1 * (theirs[:, ::2, ::2] - middle)
    a, b = colour(theirs, shy)
    assert b.shape == (2, 4, 4, 3)
    # A tenth of the spread stays a tenth, around the same centre; a basis or limits of its own
    # would spread it over all 256 levels.
    assert a.std() > 4 * b.std()
    flat = colour(theirs, np.broadcast_to(middle, theirs.shape))[1]
    assert np.ptp(flat, axis=(0, 1, 2)).max() <= 1


def test_what_a_student_says_outside_the_teachers_directions_is_not_drawn():
    theirs = tokens(2, 8, 8)
    centred = theirs.reshape(-1, 8) - theirs.reshape(-1, 8).mean(axis=0)
    outside = np.linalg.svd(centred)[2][5]  # the teacher does not vary here
    loud = (
        theirs.reshape(-1, 8).mean(axis=0)
        + 50 * np.random.default_rng(1).normal(size=(2, 8, 8, 1)) * outside
    )
    assert np.ptp(colour(theirs, loud)[1], axis=(0, 1, 2)).max() <= 1


def test_red_follows_the_strongest_direction():
    theirs = tokens(1, 16, 16)
    centred = theirs.reshape(-1, 8) - theirs.reshape(-1, 8).mean(axis=0)
    first = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    red = colour(theirs, theirs)[0][..., 0].reshape(-1).astype(float)
    assert abs(np.corrcoef(red, first)[0, 1]) > 0.97


def test_few_channels_few_tokens_and_plain_maps_are_drawn_too():
    rng = np.random.default_rng(0)
    for shape in ((1, 4, 4, 1), (1, 4, 4, 2), (1, 1, 2, 8), (1, 1, 1, 8)):
        theirs = rng.normal(size=shape).astype(np.float16)
        assert colour(theirs, theirs)[1].shape == (*shape[:-1], 3)
    assert np.ptp(colour(np.ones((1, 3, 3, 8)), np.ones((1, 3, 3, 8)))[0]) == 0
    with pytest.raises(ValueError, match="8 channels and the student's have 7"):
        colour(np.ones((1, 3, 3, 8)), np.ones((1, 3, 3, 7)))


def test_many_tokens_are_fitted_on_a_share_with_nearly_the_same_colours(monkeypatch):
    theirs = tokens(4, 20, 20)
    share = colour(theirs, theirs)[0].astype(int)
    monkeypatch.setattr("zoo.eval.report.maps.TOKENS_TO_FIT", 10_000)
    assert np.abs(colour(theirs, theirs)[0] - share).mean() < 6
