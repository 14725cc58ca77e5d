"""Malinovskii et al. 2024, HIGGS, arXiv 2411.17525: the best tables for normal numbers."""

from math import pi

import numpy as np
import pytest
import tiny
import torch
from quantize_cases import PAIRS, mask, oracle, stats, weights
from safetensors import safe_open

from drawplate import edits
from drawplate.core import hf
from drawplate.core.artifact import publish
from drawplate.core.errors import UserError
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.core.pack import look_up, split
from drawplate.core.stats import Stats
from drawplate.edits import sparse
from drawplate.quantize.driver import Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.normal import lloyd_max, pairs
from drawplate.quantize.round import Round
from drawplate.settings import preset, validate

SINGLE, PAIR = leaves(Grid)["gaussian"](), leaves(Grid)["gaussian"](dimension=2)
NEAREST, GPTQ = leaves(Round)["nearest"](), leaves(Round)["gptq"]()
HIGGS = validate(Quantize, preset("quantize/higgs")["quantize"], "quantize")
every_pair = pytest.mark.parametrize("bits", PAIRS)
MSE = {2: 0.11748, 3: 0.034548, 4: 0.0095010, 8: 4.1185e-05}
"""Least mean square error of 4, 8, 16 levels (Paez and Glisson 1972), and of 256 by Newton."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(grid, x, bits, scale=1.0):
    """Mean square error a number of rounding x to the table, the scale given."""
    levels = grid.levels(bits).to(x)
    at = torch.full((1, 1), scale, dtype=x.dtype)
    return float(
        (grid.decode(grid.encode(x, levels, at, None), levels, at, None) - x).square().mean()
    )


def test_published_levels():
    """Max 1960, table I, for 4 and 8 levels."""
    assert lloyd_max(2)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=5e-4)
    assert lloyd_max(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=5e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_the_means_of_their_cells(bits):
    level = lloyd_max(bits)
    want = oracle(SINGLE).exact(bits)
    assert level[len(want) :].tolist() == pytest.approx(want, rel=1e-9)
    assert torch.equal(level, -level.flip(0))
    ends = torch.cat([torch.tensor([-torch.inf]), (level[1:] + level[:-1]) / 2])
    mass = torch.special.ndtr(torch.cat([ends, torch.tensor([torch.inf])])).diff()
    # E x^2 - E level^2, since every level is the mean of its cell
    assert float(1 - (mass * level.square()).sum()) == pytest.approx(MSE[bits], rel=1e-3)


def lattice(step, shift):
    """Points of the plane and their share of a normal distribution."""
    line = np.arange(-6, 6, step) + shift
    x, y = np.meshgrid(line, line)
    mass = np.exp(-(x**2 + y**2) / 2)
    kept = mass > 1e-7
    points = np.stack([x[kept], y[kept]], 1)
    return points, mass[kept] / mass[kept].sum()


@every_pair
def test_points_are_the_means_of_their_cells_and_err_less_than_single_levels(bits):
    table = pairs(bits)
    assert (table.shape, table.dtype) == ((4**bits, 2), torch.float16)
    table = table.double().numpy()
    points, mass = lattice(0.031, 0.013)
    distance = (table**2).sum(1) / 2 - points @ table.T
    cell = distance.argmin(1)
    gap = ((points - table[cell]) ** 2).sum(1)
    loss = float((gap * mass).sum() / 2)
    total = np.bincount(cell, mass, len(table))
    mean = np.stack([np.bincount(cell, mass * points[:, i], len(table)) for i in (0, 1)], 1)
    away = np.linalg.norm(mean / total[:, None] - table, axis=1)
    assert float((away**2 * total).sum() / 2) < 2e-3 * loss
    assert loss < 0.95 * MSE[bits]
    # Gersho's bound: no cells of a plane beat regular hexagons, here of the best density.
    assert loss > 0.8 * 5 / (36 * 3**0.5) * 2 * pi * 4 / 4**bits


@every_pair
def test_less_error_on_normal_numbers_than_normal_float(bits):
    x = normal(400, 64)
    best = min(error(leaves(Grid)["nf4"](), x, bits, s) for s in np.linspace(0.8, 3.5, 60).tolist())
    single, pair = error(SINGLE, x, bits), error(PAIR, x, bits)
    assert pair < single < best
    assert single == pytest.approx(MSE[bits], rel=0.05)


@every_pair
def test_a_pair_goes_to_the_nearest_of_all_points(bits):
    x = normal(5, 3, 8) * 1.3
    levels = PAIR.levels(bits).double()
    scale = normal(5, 3, 1, seed=1).abs() + 0.2
    codes = PAIR.encode(x, levels, scale, None)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    assert int(codes.max()) < 2**bits
    near = PAIR.decode(codes, levels, scale, None)
    distance = (x / scale).view(-1, 1, 2) - levels
    least = distance.square().sum(-1).amin(1)
    found = ((near - x) / scale).view(-1, 2).square().sum(1)
    assert torch.allclose(found, least, rtol=1e-9, atol=1e-15)
    assert torch.equal(PAIR.encode(near, levels, scale, None), codes)
    number = torch.arange(4**bits, dtype=torch.int32)
    assert torch.equal(look_up(levels, split(number, levels[0]).flatten()).view(-1, 2), levels[0])


@pytest.mark.parametrize("grid", [SINGLE, PAIR], ids=str)
@pytest.mark.parametrize("inputs", [8, 13])
def test_the_scale_is_the_root_of_the_mean_square(grid, inputs):
    whole = grid.model_copy(update={"search": 1})
    weight = weights(4, inputs)
    weight[0, 2:] = 0  # pruned weights say nothing about the others
    weight[1] = 0
    rounded = NEAREST.solve(weight, stats(inputs), whole, 3, 14)
    count = torch.tensor([2, 1, inputs, inputs])
    rms = (weight.square().sum(1) / count).sqrt()
    assert torch.allclose(rounded.scale.double().squeeze(1), rms, rtol=2**-7)
    assert bool((rounded.scale.double().squeeze(1) >= rms).all())
    assert bool((rounded.weight()[1] == 0).all())


@pytest.mark.parametrize("method", [NEAREST, GPTQ], ids=lambda method: method.name)
def test_a_width_that_is_odd_is_filled_up(method):
    weight, record, keep = weights(5, 13), stats(13), mask(5, 13)
    for some in (None, keep):
        rounded = method.solve(weight, record, PAIR, 3, 14, some)
        assert rounded.codes.shape == (5, 14)
        assert rounded.weight().shape == weight.shape
        rows = method.solve(weight[1:3], record, PAIR, 3, 14, None if some is None else some[1:3])
        assert torch.equal(rows.weight(), rounded.weight()[1:3])
    assert bool((rounded.weight()[~keep] == 0).all())
    assert bool((rounded.weight()[keep] != 0).all())


def blocks(weight, gram, levels, scale, damping, order):
    """Optimal brain quantization of pairs of columns in numpy, the inverse kept up to date.

    e = w_B - point, then w_F -= e (H^-1_BB)^-1 H^-1_BF for the columns still to come.
    """
    hessian = gram + damping * gram.diagonal().mean() * np.eye(len(gram))
    result = np.zeros_like(weight)
    for row in range(len(weight)):
        w, left = weight[row].copy(), list(range(len(gram)))
        for first in order:
            block = [first, first + 1]
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            at = [left.index(i) for i in block]
            points = levels * scale[row]
            result[row, block] = points[((points - w[block]) ** 2).sum(1).argmin()]
            missed = w[block] - result[row, block]
            w[left] -= missed @ np.linalg.inv(inverse[np.ix_(at, at)]) @ inverse[at]
            left = [i for i in left if i not in block]
    return result


@pytest.mark.parametrize("order", ["natural", "activation"])
@every_pair
def test_feedback_over_pairs(order, bits):
    """GPTQ on points is the block form of LDLQ."""
    gptq, losses = GPTQ.model_copy(update={"order": order}), []
    for seed in range(6):
        weight, record = weights(4, 16, seed=seed), stats(16, seed=seed)
        rounded = gptq.solve(weight, record, PAIR, bits, 16)
        energy = record.gram.diagonal().view(-1, 2).sum(1)
        places = energy.argsort(descending=True) if order == "activation" else torch.arange(8)
        want = blocks(
            weight.numpy(),
            record.gram.numpy(),
            PAIR.levels(bits)[0].double().numpy(),
            rounded.scale.double().numpy(),
            gptq.damping,
            (2 * places).tolist(),
        )
        assert np.allclose(rounded.weight().double().numpy(), want, rtol=1e-6)
        plain = NEAREST.solve(weight, record, PAIR, bits, 16).weight()
        losses.append(
            [float(output_error(x - weight, record.gram)) for x in (rounded.weight(), plain)]
        )
    assert sum(mine < other for mine, other in losses) >= 5


@pytest.mark.parametrize("rotate", ["unchanged", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama_untied", "gpt2"])
def test_pairs_are_stored_counted_and_load_again(tmp_path, kind, dtype, rotate):
    with publish(tmp_path / "wide", "model") as folder:
        hf.save(tiny.model(kind).to(dtype), folder)
    model = hf.load(tmp_path / "wide")
    params = Quantize(bits=3, group=8, vocabulary=4, grid=PAIR, rotate={"name": rotate})
    ledger = quantize(model, tiny.tokens(), params)
    with publish(tmp_path / "packed", "model") as folder:
        hf.save(model, folder)
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in saved.values()) == ledger.bytes_after
    again = hf.load(tmp_path / "packed")
    mine, yours = model.state_dict(), again.state_dict()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
    ids = tiny.tokens()
    with torch.no_grad():
        near = 0.0 if dtype is torch.float32 else 0.05
        torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=0, atol=near)
    points = {3: 64 * 2 * 2, 4: 256 * 2 * 2}
    for layer in ledger.layers:
        own = {name: t for name, t in saved.items() if name.startswith(f"{layer.path}.")}
        (codes,) = (t for name, t in own.items() if name.endswith("codes"))
        (levels,) = (t for name, t in own.items() if name.endswith("levels"))
        (scale,) = (t for name, t in own.items() if name.endswith("scale"))
        assert levels.nbytes == points[layer.bits]
        assert codes.nbytes == scale.numel() * layer.bits  # eight weights a scale
        assert layer.activation_error is None or layer.activation_error < 0.2


def low_rank(model, path, rank=5):
    """Factors of odd width."""
    from drawplate.edits.low_rank import LowRank

    U, S, V = torch.linalg.svd(edits.matrix(model.get_submodule(path)).detach(), False)
    tensors = {"first.weight": V[:rank], "second.weight": U[:, :rank] * S[:rank]}
    edits.apply(model, LowRank(module=path, rank=rank), tensors)


def test_factors_of_odd_rank_have_pairs_too(tmp_path):
    model, path = tiny.model(), "model.layers.0.mlp.up_proj"
    low_rank(model, path)
    ledger = quantize(model, tiny.tokens(), HIGGS.model_copy(update={"group": None}))
    (layer,) = (layer for layer in ledger.layers if layer.path == f"{path}.second")
    module = model.get_submodule(f"{path}.second").core
    assert module.matrix().shape == (64, 5)
    assert module.codes.numel() == 64 * 6 // 2  # six codes of four bits a row
    assert layer.weight_error < 0.1
    hf.save(model, tmp_path / "model")
    again = hf.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


@every_pair
def test_the_preset_errs_as_the_table_does_on_normal_numbers(bits):
    """t^2 of a layer is the table's error, whatever the layer's weights were: that is data-free."""
    model = tiny.model()
    with torch.no_grad():
        for module in edits.linears(model).values():
            module.weight[0, 0] *= 40  # an outlier
    ledger = quantize(model, tiny.tokens(), HIGGS.model_copy(update={"bits": bits}))
    want = error(PAIR, normal(400, 64), bits)
    errors = [layer.weight_error for layer in ledger.layers]
    assert sum(errors) / len(errors) == pytest.approx(want, rel=0.25)
    assert ledger.kept == ("lm_head", "model.embed_tokens")


def test_what_parts_a_pair_is_refused_before_any_work(tmp_path):
    model, path = tiny.model(), "model.layers.1.mlp.down_proj"
    for given, line in (
        ({"group": 5}, "quantize.group: 5 parts neighbours .* a multiple of 2"),
        ({"vocabulary": 8}, "pairs have 2, 3 or 4 bits a weight, not 8"),
        ({"bits": 8}, "pairs have 2, 3 or 4 bits a weight, not 8"),
        ({"overrides": {path: 8}}, "pairs have 2, 3 or 4 bits a weight, not 8"),
    ):
        with pytest.raises(UserError, match=line):
            quantize(
                model,
                tiny.tokens(),
                Quantize(**({"grid": PAIR, "vocabulary": 4} | given)),
                tmp_path,
            )
    keep = mask(32, 64)
    weight = edits.matrix(model.get_submodule(path)).detach()
    edits.apply(
        model, sparse.Sparse(module=path, kept=int(keep.sum())), sparse.tensors(weight, keep)
    )
    pair = Quantize(grid=PAIR, vocabulary=4)
    with pytest.raises(UserError, match=f"^{path}: its mask parts neighbours .* of the grid gauss"):
        quantize(model, tiny.tokens(), pair, tmp_path)
    assert not list(tmp_path.iterdir())
    single = quantize(model, tiny.tokens(), Quantize(grid=SINGLE, group=8))
    module = model.get_submodule(path)
    assert torch.equal(module.keep(), keep)
    assert bool((module.matrix()[~keep] == 0).all())
    assert bool((module.matrix()[keep] != 0).all())
    assert {layer.path: layer.weight_error for layer in single.layers}[path] < 0.1


def test_data_free_means_that_inputs_do_not_matter():
    weight, params = weights(6, 32), HIGGS
    for record in (stats(32), Stats(1, torch.eye(32, dtype=torch.float64))):
        found = params.round.solve(weight, record, params.grid, 4, 32)
        assert torch.equal(found.codes, NEAREST.solve(weight, stats(32), HIGGS.grid, 4, 32).codes)
