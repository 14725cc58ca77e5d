"""Laws of every grid: nearest levels, an exact zero, bounded errors, ranges that only help."""

from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import law
from pydantic import TypeAdapter
from quantize_cases import BITS, PAIRS, fields, neighbours, oracle, weights

from drawplate.core.method import OneOf, leaves
from drawplate.core.pack import decode
from drawplate.quantize.grid import SMALLEST, Grid, stored

every_width = pytest.mark.parametrize("bits", BITS)
ANY = [
    variant
    for leaf in leaves(Grid).values()
    for name, some in neighbours(leaf())
    for variant in some
    if name != "dimension"  # points for several weights have an oracle of their own
]


def laid(grid, weight, bits, importance=None):
    """Levels, scale and zero with a last axis to broadcast, and the decoded weights."""
    levels = grid.levels(bits).to(weight)
    scale, zero = grid.fit(weight, bits, importance)
    scale, zero = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
    codes = grid.encode(weight, levels, scale, zero)
    return levels, scale, zero, codes, grid.decode(codes, levels, scale, zero)


def taught(grid, weight, bits):
    """The table that is learned from one layer."""
    return grid.learn(weight.view(4, 2, -1), bits, weights(2, 16, seed=2).abs())


def loss(grid, weight, bits, importance):
    return ((laid(grid, weight, bits, importance)[-1] - weight).square() * importance).sum(-1)


@every_width
@law(Grid)
def test_levels_rise_and_fill_the_width(method, bits):
    levels = method.levels(bits)
    assert levels.shape == (2**bits,)
    assert levels.dtype == torch.float32
    assert bool((levels[1:] > levels[:-1]).all())


@every_width
@law(Grid)
def test_shapes_and_storage(method, bits):
    scale, zero = method.fit(weights(3, 4, 6), bits)
    assert (scale.shape, scale.dtype) == ((3, 4), torch.bfloat16)
    assert zero is None or (zero.shape, zero.dtype) == ((3, 4), torch.uint8)
    assert zero is None or int(zero.max()) < 2**bits
    codes = laid(method, weights(3, 4, 6), bits)[3]
    assert (codes.shape, codes.dtype) == ((3, 4, 6), torch.uint8)
    assert int(codes.max()) < 2**bits


@every_width
@law(Grid)
def test_zero_is_exact(method, bits):
    for seed in range(5):
        weight = weights(4, 8, seed=seed) + (seed - 2) * 0.1
        weight[:, ::3] = 0
        assert bool((laid(method, weight, bits)[-1][:, ::3] == 0).all())
    assert torch.equal(laid(method, torch.zeros(2, 3), bits)[-1], torch.zeros(2, 3))


@every_width
@law(Grid)
def test_code_is_the_nearest_of_all(method, bits):
    weight = weights(6, 40, seed=3)
    weight[:, :4] *= 3  # beyond the range of most narrower fits
    levels, scale, zero, _, near = laid(method, weight, bits)
    offset = 0 if zero is None else zero.double()
    values = (levels - offset) * scale.double()  # [6, K]
    distance = (weight.unsqueeze(-1) - values.unsqueeze(1)).abs()
    assert torch.allclose((near - weight).abs(), distance.amin(-1), rtol=1e-12, atol=1e-15)


@every_width
@law(Grid)
def test_rounding_is_idempotent_and_monotone(method, bits):
    weight = weights(3, 60, seed=4).sort(-1).values
    levels, scale, zero, codes, near = laid(method, weight, bits)
    assert torch.equal(method.encode(near, levels, scale, zero), codes)
    assert bool((codes[:, 1:].int() >= codes[:, :-1].int()).all())
    every = torch.arange(2**bits, dtype=torch.uint8).expand(3, -1)
    values = method.decode(every, levels, scale, zero)
    assert torch.equal(method.encode(values, levels, scale, zero), every)


@every_width
@law(Grid, search=1)
def test_whole_range_errs_by_half_the_widest_gap_at_most(method, bits):
    wide = weights(1, 2000, seed=9)
    for seed in range(8):
        weight = weights(5, 16, seed=seed) + (seed - 4) * 0.03 if seed else wide
        levels, scale, _, _, near = laid(method, weight, bits)
        widest = (levels[1:] - levels[:-1]).max() * scale.double()
        assert bool(((near - weight).abs() <= widest / 2 * (1 + 1e-12)).all())


@every_width
@law(Grid)
def test_trying_more_ranges_never_hurts(method, bits):
    weight, importance = weights(5, 16, seed=7), weights(1, 16, seed=8).abs()
    whole = method.model_copy(update={"search": 1})
    assert bool(
        (loss(method, weight, bits, importance) <= loss(whole, weight, bits, importance)).all()
    )
    other = weights(1, 16, seed=9).square()
    mine, yours = (method.fit(weight, bits, each)[0] for each in (importance, other))
    judged = loss(method, weight, bits, other)
    levels = method.levels(bits).to(weight)
    scale, zero = method.fit(weight, bits, importance)
    apart = None if zero is None else zero.unsqueeze(-1)
    codes = method.encode(weight, levels, scale.unsqueeze(-1), apart)
    crossed = method.decode(codes, levels, scale.unsqueeze(-1), apart)
    assert bool((judged <= ((crossed - weight).square() * other).sum(-1)).all())
    assert bits == 8 or not torch.equal(mine, yours)


@every_width
@law(Grid)
def test_the_widest_of_equal_ranges_is_taken(method, bits):
    weight = weights(5, 16, seed=12)
    whole = method.model_copy(update={"search": 1})
    indifferent = torch.zeros(16, dtype=torch.float64)
    assert torch.equal(method.fit(weight, bits, indifferent)[0], whole.fit(weight, bits)[0])


@every_width
@law(Grid)
def test_a_faster_form_agrees_with_the_definition(method, bits):
    weight = weights(6, 40, seed=13)
    weight[:, :4] *= 3
    levels, scale, zero, codes, near = laid(method, weight, bits)
    assert torch.equal(Grid.encode(method, weight, levels, scale, zero), codes)
    assert torch.equal(Grid.decode(method, codes, levels, scale, zero), near)


@every_width
@law(Grid)
def test_groups_do_not_influence_one_another(method, bits):
    weight = weights(3, 4, 6, seed=5)
    scale, zero = method.fit(weight, bits)
    for o in range(3):
        for g in range(4):
            alone, alone_zero = method.fit(weight[o, g], bits)
            assert alone == scale[o, g]
            assert (zero is None and alone_zero is None) or alone_zero == zero[o, g]


@every_width
@law(Grid)
def test_scale_follows_the_weights(method, bits):
    weight = weights(4, 12, seed=6)
    _, scale, _, codes, _ = laid(method, weight, bits)
    _, larger, _, same, _ = laid(method, weight * 64, bits)
    assert torch.equal(larger, scale * 64)
    assert torch.equal(codes, same)


@law(Grid)
def test_deterministic_and_inputs_unchanged(method):
    weight, importance = weights(4, 12), weights(12).abs()
    before = weight.clone(), importance.clone()
    first, again = laid(method, weight, 4, importance), laid(method, weight, 4, importance)
    assert torch.equal(first[-1], again[-1])
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])


@every_width
@law(Grid)
def test_decoding_is_the_stored_formula(method, bits):
    weight = weights(5, 3, 4, seed=2).float()
    levels, scale, zero, codes, near = laid(method, weight, bits)
    flat = decode(
        levels, codes.flatten(1), scale.squeeze(-1), None if zero is None else zero.squeeze(-1), 4
    )
    assert torch.equal(flat, near.flatten(1))


@law(Grid)
def test_dumps_and_loads(method):
    again = TypeAdapter(Annotated[Grid, OneOf()]).validate_python(method.model_dump())
    assert again == method


@law(Grid)
def test_every_field_matters(method):
    weight, importance = weights(8, 16), weights(8, 16, seed=1).abs()
    for name, others in neighbours(method):
        outcomes = [
            torch.equal(laid(method, weight, b, importance)[-1], laid(o, weight, b, importance)[-1])
            and torch.equal(taught(method, weight, b), taught(o, weight, b))
            for o in others
            for b in (PAIRS if name == "dimension" else BITS)
        ]
        assert not all(outcomes), f"{name} has no effect"


@every_width
@pytest.mark.parametrize("grid", [*(leaf() for leaf in leaves(Grid).values()), *ANY], ids=str)
def test_oracle(grid, bits):
    weight = torch.cat([weights(4, 9, seed=bits), torch.zeros(1, 9), weights(2, 9).abs()])
    importance = weights(9, seed=11).abs()
    source, given_fields = oracle(grid), fields(grid)
    levels, scale, zero, codes, near = laid(grid, weight, bits, importance)
    assert levels.tolist() == pytest.approx(source.levels(bits, **given_fields), rel=1e-7, abs=0)
    for o, row in enumerate(weight.tolist()):
        s, z = source.fit(row, importance.tolist(), bits, **given_fields)
        assert float(scale[o]) == s
        assert (None if zero is None else int(zero[o])) == z
        assert codes[o].tolist() == [source.encode(w, s, z, bits, **given_fields) for w in row]
        want = [source.decode(int(c), s, z, bits, **given_fields) for c in codes[o]]
        assert near[o].tolist() == pytest.approx(want, rel=1e-7, abs=0)


def test_four_bits_of_nf4_are_the_published_table():
    grid = leaves(Grid)["nf4"]()
    assert grid.levels(4).tolist() == pytest.approx(oracle(grid).PUBLISHED, abs=5e-7)


def test_a_stored_scale_may_be_the_smallest():
    exact = torch.tensor([SMALLEST, SMALLEST / 2, 0.0], dtype=torch.float64)
    assert stored(exact).tolist() == [SMALLEST, 1, 1]


@settings(deadline=None, max_examples=300)
@given(st.floats(min_value=0, max_value=1e30, allow_subnormal=False))
def test_stored_scale_is_the_next_bfloat16_not_below(value):
    up = stored(torch.tensor(value, dtype=torch.float64))
    if value < SMALLEST:
        assert float(up) == 1
        return
    assert float(up) >= value
    assert float(torch.nextafter(up, torch.zeros_like(up))) < value
