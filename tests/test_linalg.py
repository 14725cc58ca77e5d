"""core.linalg against numpy, at its limits, and on what cannot be answered."""

import numpy as np
import pytest
import torch

from drawplate.core.errors import NotFinite, UserError
from drawplate.core.linalg import (
    cholesky,
    damped,
    energies,
    inverse_root,
    left_basis,
    output_error,
    require_finite,
)
from tests.compress_layers import LAYERS, oracle

reference = oracle("core/linalg")
close = {"rtol": 1e-10, "atol": 1e-12}
each = pytest.mark.parametrize("case", range(len(LAYERS)))


@each
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_damped_and_cholesky(case, damping):
    gram = LAYERS[case][1].gram
    wanted = torch.from_numpy(reference("damped", gram.numpy(), damping))
    torch.testing.assert_close(damped(gram, damping), wanted, **close)
    lower, used = cholesky(gram, damping)
    assert used == damping
    torch.testing.assert_close(
        lower, torch.from_numpy(reference("cholesky", gram.numpy(), damping)), **close
    )


@each
def test_inverse_root_is_the_upper_factor_of_the_inverse(case):
    gram = LAYERS[case][1].gram
    root = inverse_root(gram, 0.01)
    torch.testing.assert_close(
        root, torch.from_numpy(reference("inverse_root", gram.numpy(), 0.01)), **close
    )
    assert torch.equal(root, root.triu())


def test_damping_grows_until_it_is_enough():
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.003], dtype=torch.float64))
    lower, used = cholesky(gram)
    assert used == pytest.approx(1e-2)  # 1e-3 of the mean 0.665667 does not lift -0.003
    torch.testing.assert_close(lower @ lower.T, damped(gram, used), **close)
    assert cholesky(gram, 0.004)[1] == pytest.approx(0.04)
    assert cholesky(gram, 0.005)[1] == 0.005


def test_damping_is_bounded():
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.003], dtype=torch.float64))
    assert cholesky(gram, limit=0.01 + 1e-15)[1] == pytest.approx(0.01)
    with pytest.raises(UserError, match=r"damping by 0\.005 of its mean diagonal"):
        cholesky(gram, limit=0.005)
    with pytest.raises(UserError, match="not positive semi-definite"):
        cholesky(-torch.eye(3))


def test_a_dead_layer_has_a_factor():
    lower, used = cholesky(torch.zeros(3, 3))
    torch.testing.assert_close(lower, torch.eye(3, dtype=torch.float64) * used**0.5)
    assert 0 < used <= 1e-11


@each
def test_basis_and_energies(case):
    weight = LAYERS[case][0]
    wanted = torch.from_numpy(reference("energies", weight.numpy()).copy())
    basis, energy = left_basis(weight)
    torch.testing.assert_close(energy, wanted, **close)
    torch.testing.assert_close(energies(weight), wanted, **close)
    assert basis.shape == (weight.shape[0], min(weight.shape))
    torch.testing.assert_close(basis.T @ basis, torch.eye(min(weight.shape), dtype=torch.float64))
    left = (basis.T @ weight).square().sum(1)  # energy along each vector: sorted and the same
    torch.testing.assert_close(left, wanted, **close)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_basis_of_a_rank_deficient_matrix_still_spans_its_columns(shape):
    matrix = torch.ones(shape, dtype=torch.float64)
    basis, energy = left_basis(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T @ matrix, matrix)
    assert energy[0] == pytest.approx(28)
    assert (energy >= 0).all()
    assert (energies(matrix) >= 0).all()
    assert energy[1:].max() < 1e-12


@each
def test_output_error_is_the_mean_squared_output(case):
    weight, stats = LAYERS[case]
    error = output_error(weight, stats.gram)
    assert error.dtype == torch.float64
    wanted = reference("output_error", weight.numpy(), stats.gram.numpy())
    np.testing.assert_allclose(float(error), wanted, rtol=1e-10)
    assert float(output_error(weight, -stats.gram)) == 0.0  # rounding never makes it negative


def test_float32_in_float64_inside():
    weight, stats = LAYERS[0]
    lower, _ = cholesky(stats.gram.float(), 1e-3)
    assert lower.dtype == torch.float64
    assert left_basis(weight.float())[0].dtype == torch.float64
    assert output_error(weight.float(), stats.gram).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ask", [cholesky, energies, left_basis, lambda g: damped(g, 0.1)])
def test_not_finite(ask, bad):
    gram = torch.eye(3)
    gram[1, 2] = bad
    with pytest.raises(NotFinite, match="holds NaN or infinity"):
        ask(gram)


def test_not_finite_names_what():
    require_finite("this", torch.ones(2), torch.zeros(1))
    with pytest.raises(NotFinite, match=r"^this holds"):
        require_finite("this", torch.ones(2), torch.tensor([torch.nan]))


def test_inputs_stay_as_they_are():
    weight, stats = LAYERS[0]
    before = weight.clone(), stats.gram.clone()
    cholesky(stats.gram, 0.1)
    inverse_root(stats.gram, 0.1)
    left_basis(weight)
    output_error(weight, stats.gram)
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.gram, before[1])
