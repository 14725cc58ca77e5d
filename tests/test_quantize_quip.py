"""Chee et al. 2023, QuIP, arXiv 2307.13304: its rounding LDLQ and GPTQ give the same codes."""

import numpy as np
import pytest
from quantize_cases import BITS, fields, oracle, stats, weights

from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, fit

GRIDS = [
    leaves(Grid)["integer"](),
    leaves(Grid)["integer"](range="symmetric"),
    leaves(Grid)["nf4"](),
]


def unit_upper(hessian):
    """H = (U + 1) D (U + 1)^T, U strictly upper triangular: QuIP's section 3.1, column by column.

    Eliminated from the last row and column to the first, with no triangular solver.
    """
    rest, width = np.array(hessian, dtype=np.float64), len(hessian)
    unit, pivots = np.eye(width), np.zeros(width)
    for j in reversed(range(width)):
        pivots[j] = rest[j, j]
        unit[: j + 1, j] = rest[: j + 1, j] / pivots[j]
        rest -= pivots[j] * np.outer(unit[:, j], unit[:, j])
    return unit, pivots


def ldlq(weight, hessian, lay, grid, bits, order):
    """Column k takes Q(W_k + (W - W') U_k): eq. 2 with the U of the decomposition; codes [O][I]."""
    source, given = oracle(grid), fields(grid)
    unit, _ = unit_upper(hessian[np.ix_(order, order)])
    codes = np.zeros(weight.shape, dtype=int)
    error = np.zeros(weight.shape)
    for k, place in enumerate(order):
        wanted = weight[:, place] + error[:, order[:k]] @ unit[:k, k]
        for row, x in enumerate(wanted.tolist()):
            scale, zero = lay(row, place)
            codes[row, place] = source.encode(x, scale, zero, bits, **given)
            value = source.decode(int(codes[row, place]), scale, zero, bits, **given)
            error[row, place] = weight[row, place] - value
    return codes


def test_the_decomposition_gives_the_matrix_back():
    hessian = stats(12).gram.numpy()
    unit, pivots = unit_upper(hessian)
    assert np.allclose(unit @ np.diag(pivots) @ unit.T, hessian, rtol=1e-9)
    assert np.array_equal(np.triu(unit), unit)
    assert (np.diag(unit) == 1).all()
    assert (pivots > 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ldlq_is_gptq(grid, order, bits):
    """On scales that are fixed before, as the paper has them: in natural order one a row."""
    damping = 0.01
    gptq = leaves(Round)["gptq"](damping=damping, order=order)
    for seed in range(3):
        weight, record = weights(4, 16, seed=seed), stats(16, seed=seed)
        group = 16 if order == "natural" else 4
        rounded = gptq.solve(weight, record, grid, bits, group)
        hessian = record.gram.numpy()
        hessian = hessian + damping * hessian.diagonal().mean() * np.eye(16)
        places = np.arange(16)
        if order == "activation":
            places = np.argsort(-record.gram.diagonal().numpy(), kind="stable")
        scale, zero = fit(grid, weight, bits, group, record)

        def lay(row, place, scale=scale, zero=zero, group=group):
            at = place // group
            return float(scale[row, at]), None if zero is None else int(zero[row, at])

        codes = ldlq(weight.numpy(), hessian, lay, grid, bits, places.tolist())
        assert rounded.codes.tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_proxy_loss_is_a_sum_over_the_pivots(bits):
    """tr(E H E^T) = sum over k of D_kk |(E (U + 1))_k|^2, each term the error of one rounding."""
    gptq, record = leaves(Round)["gptq"](damping=0, order="natural"), stats(16)
    weight = weights(6, 16)
    error = (gptq.solve(weight, record, GRIDS[0], bits, 16).weight() - weight).double()
    unit, pivots = unit_upper(record.gram.numpy())
    terms = ((error.numpy() @ unit) ** 2).sum(0) * pivots
    assert float(output_error(error, record.gram)) == pytest.approx(terms.sum(), rel=1e-9)


def test_two_bits_with_feedback_err_less_than_to_nearest():
    """The proxy loss of nearly all layers is smaller."""
    wins = 0
    for seed in range(20):
        weight, record = weights(8, 32, seed=seed), stats(32, seed=seed)
        losses = [
            float(
                output_error(
                    leaves(Round)[name]().solve(weight, record, GRIDS[0], 2, 8).weight() - weight,
                    record.gram,
                )
            )
            for name in ("gptq", "nearest")
        ]
        wins += losses[0] < losses[1]
    assert wins >= 18
