from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.train.distill.hadamard import hadamard, has_hadamard
from zoo.train.distill.losses import mse
from zoo.train.distill.phi_s import (
    KINDS,
    ROTATIONS,
    SCALINGS,
    WHITENINGS,
    Moments,
    Normalizer,
    fit,
    fold_inverse,
)

PHI_S = Path(__file__).parents[2] / "golden" / "phi_s"
slow = pytest.mark.slow


def moments_of(x):
    moments = Moments(x.shape[-1], x.device)
    moments.update(x)
    return moments


def features(n, dim, seed=0, anisotropy=1.0):
    """Correlated rows with a mean, as a teacher's are."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gains = (anisotropy * draw(dim)).exp()
    return draw(n, dim) * gains @ torch.linalg.qr(draw(dim, dim))[0] + 5 * draw(dim)


@pytest.fixture(scope="session")
def stored_features(golden):
    """The feature matrix of the golden README, by width."""
    made = {}

    def make(dim):
        if dim not in made:
            draw = lambda name, shape: golden.rng_of(f"phi_s.{dim}.{name}").standard_normal(shape)  # noqa: E731
            z = draw("z", (3 * dim, dim)) * np.sqrt(4 * np.exp(-6 * np.arange(dim) / (dim - 1)))
            for name in "vw":
                axis = draw(name, dim)
                axis /= np.linalg.norm(axis)
                z -= 2 * np.outer(z @ axis, axis)
            x = torch.from_numpy(z + 0.5 * draw("mean", dim))
            made[dim] = x, moments_of(x)
        return made[dim]

    return make


# The reference


@pytest.mark.parametrize(
    "dim", [384, 768, *(pytest.param(dim, marks=slow) for dim in (1024, 1152, 1280))]
)
def test_phi_s_is_that_of_the_reference(stored_features, dim):
    x, moments = stored_features(dim)
    normalizer = fit("phi_s", moments)
    with np.load(PHI_S / f"phi_s_{dim}.npz") as file:
        stored = {key: torch.from_numpy(file[key]) for key in ("mean", "sign", "features16")}
        alpha, x_check = float(file["alpha"]), torch.from_numpy(file["x_check"])
    torch.testing.assert_close(x[:2, :4], x_check, atol=1e-12, rtol=0)
    torch.testing.assert_close(normalizer.mean, stored["mean"], atol=1e-12, rtol=0)
    h = hadamard(dim)
    u = (h.T @ normalizer.matrix).T / alpha
    torch.testing.assert_close(u.T @ u, torch.eye(dim, dtype=torch.float64), atol=1e-9, rtol=0)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    expected = stored["features16"].double()
    there = alpha * (x[:16] - normalizer.mean) @ (u * stored["sign"]) @ h.T
    torch.testing.assert_close(there, expected, atol=2e-6, rtol=1e-6)  # stored as float32
    torch.testing.assert_close(
        torch.cdist(normalizer(x[:16]), normalizer(x[:16])), alpha * torch.cdist(x[:16], x[:16])
    )
    spread = normalizer(x).var(0)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("standardize", "per_channel"),
        ("pca", "pca"),
        ("zca", "zca"),
        ("hadamard_whitening", "hadamard_whitening"),
        ("phi_s", "phi_s_canonical"),
    ],
)
def test_the_rivals_are_those_of_the_paper(stored_features, kind, name):
    x, moments = stored_features(384)
    with np.load(PHI_S / "other_384.npz") as file:
        expected = torch.from_numpy(file[name]).double()
    torch.testing.assert_close(fit(kind, moments)(x[:16]), expected, atol=1e-6, rtol=1e-6)


# What each kind promises


@pytest.mark.parametrize("dim", [48, 64, 30, 52, 77])
@pytest.mark.parametrize("kind", ["phi_s", "hadamard_whitening", "pca", "standardize"])
def test_every_channel_has_unit_variance_at_any_width(kind, dim):
    x = features(2000, dim)
    z = fit(kind, moments_of(x))(x)
    torch.testing.assert_close(z.var(0), torch.ones(dim).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(dim).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dim", [48, 77])
@pytest.mark.parametrize("kind", ["phi_s", "alpha_only"])
def test_the_isotropic_kinds_scale_all_distances_by_one_number(kind, dim):
    x = features(500, dim)
    alpha = x.var(0).mean().rsqrt()
    z = fit(kind, moments_of(x))(x)
    torch.testing.assert_close(torch.pdist(z[:50]), alpha * torch.pdist(x[:50]))
    assert z.var(0).mean().item() == pytest.approx(1, abs=1e-9)


def test_global_makes_all_entries_one_standard_population():
    x = features(500, 24)
    normalizer = fit("global", moments_of(x))
    z = normalizer(x)
    assert z.mean().item() == pytest.approx(0, abs=1e-12)
    assert z.var().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(z, (x - x.mean()) / x.std())
    assert normalizer.mean.unique().numel() == 1


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitened_features_have_the_identity_as_covariance(kind):
    x = features(2000, 48)
    covariance = torch.cov(fit(kind, moments_of(x))(x).T)
    torch.testing.assert_close(covariance, torch.eye(48).double(), atol=1e-9, rtol=0)


def test_zca_moves_features_least_so_its_matrix_is_symmetric():
    normalizer = fit("zca", moments_of(features(300, 20)))
    torch.testing.assert_close(normalizer.matrix, normalizer.matrix.T)


def test_pca_orders_its_channels_by_ascending_variance():
    x = features(300, 20)
    stretch = fit("pca", moments_of(x)).matrix.norm(dim=1)
    assert (stretch.diff() < 0).all()


def test_none_changes_nothing():
    x = features(20, 12)
    for normalizer in (fit("none", moments_of(x)), Normalizer("none", 12)):
        assert torch.equal(normalizer(x), x)
        assert torch.equal(normalizer.inverse(x), x)
        assert torch.equal(normalizer.inverse_matrix(), torch.eye(12).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 24, 31])
def test_the_inverse_is_exact_on_maps_of_any_rank(kind, dim):
    x = features(400, dim)
    normalizer = fit(kind, moments_of(x))
    grid = x.view(4, 10, 10, dim)
    z = normalizer(grid)
    assert z.shape == grid.shape
    torch.testing.assert_close(z.view(400, dim), normalizer(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(normalizer.inverse(z), grid, atol=1e-11, rtol=1e-12)
    there = z @ normalizer.inverse_matrix().T + normalizer.shift
    torch.testing.assert_close(there, grid, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kinds_that_rotate_pay_for_a_matrix_product(kind):
    x = features(100, 16)
    normalizer = fit(kind, moments_of(x))
    with FlopCounterMode(display=False) as counter:
        normalizer.inverse(normalizer(x))
    assert (kind in SCALINGS) == (counter.get_total_flops() == 0) == (normalizer.matrix is None)


def test_in_the_teachers_own_space_the_rotation_is_only_a_factor():
    x = features(1000, 48)
    normalizer = fit("phi_s", moments_of(x))
    ours, theirs = x[:100] + torch.randn(100, 48), x[:100]
    alpha_squared = 1 / x.var(0).mean()
    loss = mse(normalizer(ours), normalizer(theirs))
    torch.testing.assert_close(loss, alpha_squared * mse(ours, theirs), rtol=1e-12, atol=0)
    same = fit("alpha_only", moments_of(x))
    torch.testing.assert_close(loss, mse(same(ours), same(theirs)), rtol=1e-12, atol=0)


def test_a_refit_on_the_same_rows_in_another_order_gives_the_same_matrix():
    x = features(500, 48)
    first = fit("phi_s", moments_of(x))
    shuffled = fit("phi_s", moments_of(x[torch.randperm(500)]))
    torch.testing.assert_close(first.matrix, shuffled.matrix, atol=1e-9, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.floats(0, 4), st.integers(0, 99))
def test_phi_s_gives_unit_variance_and_inverts_for_any_spectrum(dim, anisotropy, seed):
    x = features(60, dim, seed, anisotropy)
    normalizer = fit("phi_s", moments_of(x))
    z = normalizer(x)
    torch.testing.assert_close(z.var(0), torch.ones(dim).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(normalizer.inverse(z), x, atol=1e-9 * x.abs().max().item(), rtol=0)


# Awkward features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 18])
def test_dead_channels_stay_finite_and_invertible(kind, dim):
    x = features(200, dim)
    x[:, 3] = 7.0
    x[:, 5] = x[:, 6]  # and a direction that is dead without a dead channel
    normalizer = fit(kind, moments_of(x))
    z = normalizer(x)
    assert torch.isfinite(z).all()
    assert torch.isfinite(normalizer(x + torch.randn_like(x))).all()
    torch.testing.assert_close(normalizer.inverse(z), x, atol=1e-9, rtol=0)
    theta = normalizer.inverse_matrix()
    assert torch.isfinite(theta).all()
    assert torch.linalg.matrix_rank(theta) == dim


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitening_amplifies_no_direction_beyond_the_floor(kind):
    x = features(200, 16)
    x[:, 3] = 7.0
    normalizer = fit(kind, moments_of(x))
    phi = x.var(0).mean().sqrt()
    gain = torch.linalg.matrix_norm(normalizer.matrix, 2)
    assert gain.item() == pytest.approx(1000 / phi.item(), rel=1e-6)


def test_fewer_rows_than_channels_are_enough_for_phi_s():
    x = features(10, 48)
    z = fit("phi_s", moments_of(x))(x)
    torch.testing.assert_close(z.var(0), torch.ones(48).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitening_refuses_rows_with_which_other_rows_would_get_a_huge_variance(kind, monkeypatch):
    x = features(4000, 48)
    seen, unseen = x.split([96, 3904])
    assert fit(kind, moments_of(seen))(unseen).var(0).mean() < 3
    for rows in (95, 48, 20):
        with pytest.raises(ValueError, match=rf"and {rows} rows .*at least 96 rows"):
            fit(kind, moments_of(x[:rows]))
    monkeypatch.setattr("zoo.train.distill.phi_s.ROWS_A_CHANNEL", 0)
    assert fit(kind, moments_of(x[:24]))(unseen).var(0).mean() > 1e4


def test_phi_s_of_few_rows_gives_other_rows_about_unit_variance():
    x = features(4000, 48)
    variance = fit("phi_s", moments_of(x[:24]))(x[24:]).var(0)
    assert variance.mean().item() == pytest.approx(1, abs=0.4) and variance.max() < 4


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="'phis': did you mean 'phi_s'"):
        fit("phis", moments_of(features(9, 4)))
    with pytest.raises(ValueError, match="There are none, global"):
        Normalizer("7", 4)


def test_fewer_than_two_rows_are_refused_with_the_next_step():
    for rows in (0, 1):
        with pytest.raises(ValueError, match=f"have {rows}; run the calibration"):
            fit("phi_s", moments_of(torch.randn(rows, 4)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_with_the_next_step(bad):
    x = features(9, 4)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"1 of 4 channels .*float16 overflows"):
        fit("global", moments_of(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_constant_features_are_refused(kind):
    for value in (0.0, 1.0, 0.1):  # the mean of nine 0.1 is not quite 0.1
        with pytest.raises(ValueError, match="All 9 rows are the same"):
            fit(kind, moments_of(torch.full((9, 4), value)))


def test_features_of_another_width_are_refused():
    moments = moments_of(features(9, 4))
    with pytest.raises(ValueError, match="over 4 channels and the features have 5"):
        moments.update(torch.randn(3, 5))
    normalizer = fit("alpha_only", moments)
    for call in (normalizer, normalizer.inverse):
        with pytest.raises(ValueError, match="for 4 channels and got 1"):
            call(torch.randn(3, 1))


# Statistics


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda parts: sum(parts) > 1),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_statistics_of_parts_are_those_of_the_whole(parts, dim, seed):
    x = features(sum(parts), dim, seed)
    running, merged, added = Moments(dim), Moments(dim), 0
    pivot = x[0]
    for part in x.split(parts):
        running.update(part)
        merged.merge(moments_of(part))
        added = added + moments_of(part).sums(pivot)
    expected = torch.cov(x.T).view(dim, dim)
    for moments in (running, merged, Moments.from_sums(added, pivot)):
        assert moments.n == len(x)
        torch.testing.assert_close(moments.mean, x.mean(0), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(moments.covariance(), expected, atol=1e-9, rtol=1e-9)


def test_merging_leaves_the_other_as_it_is_and_gives_back_the_first():
    first, second = moments_of(features(9, 4)), moments_of(features(5, 4, seed=1))
    mean, n = second.mean.clone(), second.n.clone()
    assert first.merge(second) is first
    assert torch.equal(second.mean, mean)
    assert torch.equal(second.n, n)


def test_a_mean_far_from_zero_costs_no_digits():
    x = features(4000, 6) * 1e-3 + 1e5
    moments = Moments(6)
    for part in x.split(333):
        moments.update(part)
    torch.testing.assert_close(moments.covariance(), torch.cov(x.T), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float64_whatever_comes_even_under_autocast(dtype):
    x = features(300, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        moments = moments_of(x.view(3, 10, 10, 6))
    torch.testing.assert_close(moments.covariance(), torch.cov(x.double().T))


def test_a_calibration_in_inference_mode_can_be_used_outside_of_it():
    with torch.inference_mode():
        x = features(50, 6)
        moments = moments_of(x)
        normalizer = fit("phi_s", moments)
    moments.update(x)
    assert moments.n == 100
    ours = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    normalizer.inverse(ours).sum().backward()
    assert ours.grad.abs().min() > 0


def test_updating_leaves_the_features_as_they_are():
    x = features(9, 4)
    before = x.clone()
    moments_of(x)
    assert torch.equal(x, before)


# Precision and storage


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_features_are_balanced_in_float32_even_under_autocast(kind):
    x = features(300, 16)
    normalizer = fit(kind, moments_of(x))
    narrow = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        z = normalizer(narrow)
        back = normalizer.inverse(z)
    assert z.dtype == back.dtype == torch.float32
    error = (z.double() - normalizer(narrow.double())).square().sum() / z.square().sum()
    assert error < 1e-11
    torch.testing.assert_close(back, narrow.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_balance_loads_into_a_fresh_one(kind, tmp_path):
    x = features(100, 12)
    normalizer = fit(kind, moments_of(x))
    torch.save(normalizer.state_dict(), tmp_path / "balance.pt")
    loaded = Normalizer(kind, 12)
    loaded.load_state_dict(torch.load(tmp_path / "balance.pt", weights_only=True))
    assert torch.equal(loaded(x), normalizer(x))
    assert torch.equal(loaded.inverse(x), normalizer.inverse(x))
    assert not list(normalizer.parameters()), "an optimizer has nothing to move"


# Folding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_head_equals_predicting_and_then_inverting(kind, blocks, bias):
    x = features(300, 12)
    normalizer = fit(kind, moments_of(x))
    linear = nn.Linear(7, blocks * 12, bias=bias, dtype=torch.float64)
    hidden = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = normalizer.inverse(linear(hidden).unflatten(-1, (blocks, 12))).flatten(-2)
    folded = fold_inverse(linear, normalizer, blocks)
    torch.testing.assert_close(folded(hidden), expected, atol=1e-10, rtol=0)


def test_folding_leaves_the_head_and_the_generator_as_they_are():
    normalizer = fit("phi_s", moments_of(features(300, 12)))
    linear = nn.Linear(7, 12).bfloat16().eval()
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    seed = torch.get_rng_state()
    folded = fold_inverse(linear, normalizer)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16
    assert not folded.training
    assert not torch.equal(folded.weight, linear.weight)


def test_a_head_of_another_width_is_not_folded():
    normalizer = fit("alpha_only", moments_of(features(30, 12)))
    with pytest.raises(ValueError, match="24 outputs, but 1 x 12"):
        fold_inverse(nn.Linear(7, 24), normalizer)


def test_the_widths_above_include_some_with_and_without_a_hadamard_matrix():
    assert [has_hadamard(dim) for dim in (48, 64, 30, 52, 77)] == [True, True, False, False, False]
    assert set(KINDS) == set(SCALINGS) | set(ROTATIONS)


# On a GPU


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_gpu_statistics_never_wait_and_agree_with_the_cpu():
    x = features(3000, 48).float()
    expected = fit("phi_s", moments_of(x))
    moments = Moments(48, "cuda")
    parts = x.cuda().split(1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in parts:
            moments.update(part)
        sums = Moments(48, "cuda").merge(moments).sums(moments.mean)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    normalizer = fit("phi_s", Moments.from_sums(sums, moments.mean))
    torch.testing.assert_close(normalizer.matrix.cpu(), expected.matrix, atol=1e-9, rtol=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = normalizer(parts[0])
        normalizer.inverse(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(z.cpu(), expected(x[:1000]), atol=1e-4, rtol=1e-4)
