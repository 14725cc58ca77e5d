"""Powers of integers: products stay integers, uniform at exponent 1, never worse than uniform."""

import pytest
import tiny
import torch
from quantize_cases import BITS, fields, neighbours, oracle, stats, weights

from drawplate import edits
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.quantize.driver import Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, fit, learn

NUPES = leaves(Grid)["nupes"]()
CENTRED = leaves(Grid)["integer"](range="symmetric")
every_width = pytest.mark.parametrize("bits", BITS)
every_exponent = pytest.mark.parametrize("exponent", [0.3, 0.5, 0.83, 1.0])


def laid(grid, weight, bits, levels, importance=None):
    scale, _ = grid.fit(weight, bits, importance, levels)
    levels, scale = levels.to(weight), scale.unsqueeze(-1)
    codes = grid.encode(weight, levels, scale, None)
    return codes, scale, grid.decode(codes, levels, scale, None)


@every_width
@every_exponent
def test_the_product_of_two_codes_is_the_code_of_the_product(bits, exponent):
    """Integers multiply, and one power and one factor outside make them the product of values."""
    half = 2 ** (bits - 1)
    codes = torch.arange(-half, half)
    table = NUPES.power(exponent, bits).double()
    factor = float(table[half + 1])  # the value of 1
    product = codes.unsqueeze(1) * codes  # integer arithmetic alone
    values = factor**2 * product.sign() * product.abs().double() ** (1 / exponent)
    assert product.dtype == torch.int64
    assert torch.allclose(table.unsqueeze(1) * table, values, rtol=1e-6, atol=0)


@every_width
def test_a_layer_multiplied_in_integers_is_the_decoded_one(bits):
    """Weights and inputs on grids of one exponent: y = sum over j of the decoded w_j x_j."""
    table, half = NUPES.power(0.5, bits), 2 ** (bits - 1)
    (w, w_scale, decoded_w), (x, x_scale, decoded_x) = (
        laid(NUPES, weights(5, 16, seed=seed), bits, table) for seed in (1, 2)
    )
    product = (w.int() - half) * (x.int() - half)
    factor = float(table[half + 1]) ** 2
    y = (
        (product.sign() * product.square()).sum(-1)
        * factor
        * (w_scale.double() * x_scale).squeeze(-1)
    )
    assert torch.allclose(y, (decoded_w * decoded_x).sum(-1), rtol=1e-5)


@every_width
def test_exponent_one_is_the_uniform_grid_exactly(bits):
    weight, importance = weights(6, 4, 16), weights(16, seed=1).abs()
    assert torch.equal(NUPES.power(1.0, bits), CENTRED.levels(bits))
    alone = NUPES.model_copy(update={"tries": 1})
    table = alone.learn(weight, bits, importance)
    assert torch.equal(table, CENTRED.levels(bits))
    codes, scale, near = laid(alone, weight, bits, table, importance)
    uniform = laid(CENTRED, weight, bits, table, importance)
    for mine, yours in zip((codes, scale, near), uniform, strict=True):
        assert torch.equal(mine, yours)


@every_width
@every_exponent
def test_tables_rise_over_an_exact_zero_and_err_by_half_a_gap(bits, exponent):
    table, whole = NUPES.power(exponent, bits), NUPES.model_copy(update={"search": 1})
    assert bool((table[1:] > table[:-1]).all())
    assert float(table[2 ** (bits - 1)]) == 0
    weight = weights(9, 40, seed=bits)
    codes, scale, near = laid(whole, weight, bits, table)
    values = table.double() * scale.double()
    distance = (weight.unsqueeze(-1) - values.unsqueeze(1)).abs()
    assert torch.allclose((near - weight).abs(), distance.amin(-1), rtol=1e-12, atol=1e-15)
    assert bool(((near - weight).abs() <= values.diff(dim=-1).amax(-1, keepdim=True) / 2).all())
    assert torch.equal(NUPES.encode(near, table.double(), scale, None), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", [NUPES, *(o for _, some in neighbours(NUPES) for o in some)])
def test_oracle(grid, bits):
    weight, importance = weights(3, 2, 12, seed=bits), weights(2, 12, seed=4).abs()
    found = grid.learn(weight, bits, importance)
    exponent = oracle(grid).learn(weight.tolist(), importance.tolist(), bits, **fields(grid))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(oracle(grid).table(exponent, bits), rel=1e-6)


@every_width
def test_never_worse_than_uniform_and_better_on_bell_shaped_weights(bits):
    record, better = stats(32), 0
    for seed in range(6):
        weight = weights(8, 32, seed=seed)
        losses = []
        for table in (learn(NUPES, weight, bits, 16, record), NUPES.levels(bits)):
            groups = weight.view(8, 2, 16)
            importance = record.gram.diagonal().view(2, 16)
            losses.append(float(NUPES.lay(groups, bits, importance, table)[0].sum()))
        assert losses[0] <= losses[1]
        better += losses[0] < losses[1]
    assert better >= 5 or bits == 2


def test_the_shape_of_the_weights_decides():
    draw = torch.Generator().manual_seed(0)
    even = torch.rand(64, 4, 16, generator=draw, dtype=torch.float64) * 2 - 1
    peaked = torch.randn(64, 4, 16, generator=draw, dtype=torch.float64) ** 3
    assert torch.equal(NUPES.learn(even, 4), NUPES.levels(4))
    assert float(NUPES.learn(peaked, 4)[9]) < 0.3  # the level above 0, which is 1 in a uniform grid


@pytest.mark.parametrize("name", list(leaves(Round)))
def test_roundings_take_the_learned_table(name):
    method, record = leaves(Round)[name](), stats(13)
    weight = weights(6, 13)
    table = learn(NUPES, weight, 3, 5, record)
    assert not torch.equal(table, NUPES.levels(3))
    whole = method.solve(weight, record, NUPES, 3, 5, None, table)
    assert torch.equal(whole.levels, table)
    assert torch.equal(fit(NUPES, weight, 3, 5, record, table)[0], whole.scale)
    rows = method.solve(weight, record, NUPES, 3, 5, None, table.expand(6, -1))
    assert torch.equal(rows.codes, whole.codes)
    assert torch.equal(rows.weight(), whole.weight())
    mixed = torch.stack([table, NUPES.levels(3)]).repeat(3, 1)
    alternate = method.solve(weight, record, NUPES, 3, 5, None, mixed)
    plain = method.solve(weight, record, NUPES, 3, 5)
    assert torch.equal(alternate.weight()[::2], whole.weight()[::2])
    assert torch.equal(alternate.weight()[1::2], plain.weight()[1::2])
    assert float(output_error(plain.weight() - weight, record.gram)) > 0


def test_each_layer_of_a_model_has_its_own_exponent():
    model = tiny.model()
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight.copy_(
            torch.rand(attention.q_proj.weight.shape, generator=torch.Generator().manual_seed(0))
            - 0.5
        )
        attention.k_proj.weight.pow_(3)
    quantize(model, tiny.tokens(), Quantize(bits=4, group=8, grid=NUPES))
    specs = {edit.module: edit for edit in edits.of(model)}
    assert all(spec.levels and not spec.tables for spec in specs.values())
    q, k = attention.q_proj.levels, attention.k_proj.levels
    assert q.shape == k.shape == (16,)
    assert not torch.equal(q, k)


def test_a_model_errs_less_than_on_the_uniform_grid():
    """Of both losses the search saw one, the weighted weight error of rounding to nearest."""
    errors = []
    for tries in (1, 8):
        grid = NUPES.model_copy(update={"tries": tries})
        params = Quantize(bits=3, group=16, grid=grid, round={"name": "nearest"})
        ledger = quantize(tiny.model(), tiny.tokens(), params)
        errors.append(sum(layer.weight_error for layer in ledger.layers))
    assert errors[1] < errors[0]
