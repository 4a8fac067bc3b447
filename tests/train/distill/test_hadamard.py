import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.distill.hadamard import hadamard, has_hadamard, orthogonal

PHI_S = Path(__file__).parents[2] / "golden" / "phi_s"
TEACHER_WIDTHS = [
    *(192, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792),
    *(2048, 2560, 3072, 4096),
]


def sign_matrix(dim):
    return hadamard(dim).sign().to(torch.int8).numpy()


@pytest.mark.parametrize("dim", [384, 768, 1024, 1152, 1280])
def test_the_signs_are_those_of_the_published_normalisers(dim):
    with np.load(PHI_S / f"phi_s_{dim}.npz") as stored:
        signs = sign_matrix(dim)
        np.testing.assert_array_equal(signs[:4], stored["hadamard_first_rows"])
        assert hashlib.sha256(signs.tobytes()).hexdigest() == str(stored["hadamard_sha256"])


@pytest.mark.parametrize("dim", [*TEACHER_WIDTHS, 588, 1176, 2304, 3584])
def test_every_teacher_width_has_an_exact_matrix(dim):
    assert has_hadamard(dim)
    matrix = hadamard(dim)
    assert matrix.dtype == torch.float64
    smallest, largest = matrix.abs().aminmax()
    assert smallest.item() == largest.item() == pytest.approx(dim**-0.5, rel=1e-15)
    # ±1 sums are exact in float32; twelve rows against all others keep 4096 quick
    signs = matrix.sign().float()
    rows = torch.linspace(0, dim - 1, 12).long()
    assert torch.equal(signs[rows] @ signs.T, dim * torch.eye(dim)[rows])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 80).filter(has_hadamard))
def test_the_rows_are_orthonormal(dim):
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))


def test_as_many_orders_are_built_as_the_construction_reaches():
    built = [dim for dim in range(1, 4097) if has_hadamard(dim)]
    assert built[:2] == [1, 2]
    assert all(dim % 4 == 0 for dim in built[2:])
    assert len(built[2:]) == 11 + 402 + 251  # Sylvester, type I, type II
    assert not any(has_hadamard(dim) for dim in (52, 92, 100, 116, 156, 172, 184, 188, 232, 4304))


@pytest.mark.parametrize("dim", [668, 30, 0, -4])
def test_an_order_without_a_matrix_is_refused_and_the_next_one_named(dim):
    assert not has_hadamard(dim)
    following = {668: 672, 30: 32, 0: 1, -4: 1}[dim]
    with pytest.raises(ValueError, match=f"order {dim} .*next order that has one is {following}"):
        hadamard(dim)


def test_changing_a_returned_matrix_does_not_change_the_next_one():
    hadamard(12).zero_()
    assert hadamard(12).abs().min() > 0


@pytest.mark.parametrize("dim", [1, 7, 52, 100])
def test_the_fallback_is_orthogonal_and_draws_from_no_global_generator(dim):
    before = torch.get_rng_state()
    matrix = orthogonal(dim)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(matrix, orthogonal(dim))


def test_the_fallback_is_the_same_on_every_machine():
    written_down = [0.000614498684409, 0.193348594733435, -0.042785566216133, -0.617040176392628]
    first = orthogonal(7)[0, :4]
    torch.testing.assert_close(first, first.new_tensor(written_down), atol=1e-12, rtol=0)
