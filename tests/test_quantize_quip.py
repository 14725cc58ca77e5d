"""Chee et al. 2023, QuIP, arXiv 2307.13304: LDLQ is GPTQ, and the preset is the whole algorithm."""

import numpy as np
import pytest
import tiny
import torch
from quantize_cases import BITS, fields, oracle, stats, weights

from drawplate import edits
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Gather
from drawplate.edits.quantized_embedding import QuantizedTable
from drawplate.quantize.driver import Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.rotate import Rotate
from drawplate.quantize.round import Round, fit
from drawplate.settings import preset, validate

GRIDS = [
    leaves(Grid)["integer"](),
    leaves(Grid)["integer"](range="symmetric"),
    leaves(Grid)["nf4"](),
    leaves(Grid)["midrise"](),
]
QUIP = validate(Quantize, preset("quantize/quip")["quantize"], "quantize")


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


def kron(left, right):
    return np.kron(np.array(left, dtype=np.float64), np.array(right, dtype=np.float64))


def whole(weight, hessian, before, after, bits, damping, reach):
    """Algorithms 1, 2 and 3 for a layer; V and U are given. -> the quantized weight, [O, I]."""
    weight, hessian = np.array(weight, dtype=np.float64), np.array(hessian, dtype=np.float64)
    width = weight.shape[1]
    d = (np.diag(hessian) / np.diag(weight.T @ weight)) ** 0.25
    d /= np.exp(np.mean(np.log(d)))
    turned = after @ (weight * d) @ before.T
    energy = before @ (hessian / np.outer(d, d)) @ before.T
    energy += damping * np.mean(np.diag(energy)) * np.eye(width)
    unit, _ = unit_upper(energy)
    last = 2**bits - 1
    result = np.zeros_like(turned)
    for row in range(len(turned)):
        step = 2 * reach * np.sqrt(np.mean(turned[row] ** 2)) / last
        mantissa, exponent = np.frexp(step)
        step = np.ldexp(np.ceil(mantissa * 256), exponent - 8)  # as bfloat16 stores it, not below
        for k in range(width):
            wanted = turned[row, k] + (turned[row, :k] - result[row, :k]) @ unit[:k, k]
            code = np.clip(np.round(wanted / step + last / 2), 0, last)
            result[row, k] = (code - last / 2) * step
    return after.T @ result @ before / d


@pytest.mark.parametrize("seed", [0, 1])
def test_the_preset_is_the_papers_algorithm(seed):
    """One layer of a model, from its inputs to the dense matrix of its stand-in."""
    path = "model.layers.0.self_attn.k_proj"
    model = tiny.model(seed=seed)
    weight = edits.matrix(model.get_submodule(path)).detach().clone()
    params = QUIP.model_copy(update={"seed": seed, "overrides": {path: 2, "*": None}})
    inputs = Gather(frozenset({"gram"}))
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.add(args[0]))
    (layer,) = quantize(model, tiny.tokens(), params).layers
    module = model.get_submodule(path)
    rotation = module.rotation()
    want = whole(
        weight.numpy(),
        inputs.stats().gram.numpy(),
        kron(*rotation.inputs),
        kron(*rotation.outputs),
        QUIP.bits,
        QUIP.round.damping,
        QUIP.grid.reach,
    )
    found = module.matrix().double()
    inner = kron(*rotation.outputs) @ (want * rotation.stretch.numpy()) @ kron(*rotation.inputs).T
    # A weight that lies on the edge of two cells may fall either way in single precision.
    alike = np.isclose(module.core.matrix().numpy(), inner, rtol=1e-3, atol=1e-6).all(1)
    assert alike.mean() >= 0.9
    record = inputs.stats()
    losses = [
        float(output_error(each - weight.double(), record.gram))
        for each in (found, torch.from_numpy(want))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    share = losses[0] / float(output_error(weight.double(), record.gram))
    assert layer.activation_error == pytest.approx(share, rel=1e-3)


def test_the_preset_is_two_bits_a_weight_and_what_the_rotation_takes():
    model = tiny.model()
    ledger = quantize(model, tiny.tokens(), QUIP)
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert not isinstance(model.model.embed_tokens, QuantizedTable)
    for layer in ledger.layers:
        module = model.get_submodule(layer.path)
        out, into = module.out_features, module.in_features
        rotation = module.rotation()
        turns = sum(4 * (len(t.left) ** 2 + len(t.right) ** 2) for t in rotation[:2]) + 4 * into
        assert layer.bits == 2
        assert layer.bytes_after == out * into // 4 + 4 * out + 4 * 4 + turns


def spiky(seed):
    """A weight with a few entries that are many times as large as the rest."""
    weight, draw = weights(32, 64, seed=seed), torch.Generator().manual_seed(seed)
    weight.view(-1)[torch.randint(32 * 64, (24,), generator=draw)] *= 12
    return weight


def incoherence(weight):
    """max |W_ij| sqrt(O I) / |W|: 1 where all entries are equally large."""
    return float(weight.abs().max() * weight.numel() ** 0.5 / weight.norm())


def test_incoherence_falls_and_two_bits_with_it_err_less():
    rotate, losses = leaves(Rotate)["random"](), []
    for seed in range(10):
        weight, record = spiky(seed), stats(64, seed=seed)
        draws = (torch.Generator().manual_seed(seed + i) for i in range(2))
        rotation = rotate.rotation(weight, record, *draws)
        turned = rotation.weight(weight)
        assert incoherence(turned) < incoherence(weight) / 2
        gram = rotation.gram(record.gram)
        inside = QUIP.round.solve(turned, type(record)(1, gram), QUIP.grid, 2, 64).weight()
        found = [rotation.dense(inside.double())]
        for grid in (QUIP.grid, GRIDS[0]):
            found.append(QUIP.round.solve(weight, record, grid, 2, 64).weight())
        losses.append([float(output_error(each - weight, record.gram)) for each in found])
    assert sum(mine < min(others) for mine, *others in losses) >= 9
