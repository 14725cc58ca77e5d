"""Laws of every rounding: rows stand alone, masks hold, and error feedback pays."""

from typing import Annotated

import pytest
import torch
from laws import law
from pydantic import TypeAdapter
from quantize_cases import BITS, fields, mask, neighbours, oracle, stats, weights

from drawplate.core.errors import NotFinite, UserError
from drawplate.core.linalg import output_error
from drawplate.core.method import OneOf, leaves
from drawplate.core.stats import Stats
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round

GRIDS = [leaf() for leaf in leaves(Grid).values()]
INTEGER = leaves(Grid)["integer"]()
NEAREST = leaves(Round)["nearest"]()
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
every_group = pytest.mark.parametrize("group", [1, 4, 5, 13, 64])
ANY = [
    variant for leaf in leaves(Round).values() for _, some in neighbours(leaf()) for variant in some
]


def error(method, weight, record, bits, group=8, grid=INTEGER):
    rounded = method.solve(weight, record, grid, bits, group)
    return float(output_error(rounded.weight() - weight, record.gram))


@every_group
@every_grid
@law(Round)
def test_shapes_and_storage(method, grid, group):
    rounded = method.solve(weights(3, 13).float(), stats(13), grid, 3, group)
    groups = -(-13 // group)
    assert (rounded.codes.shape, rounded.codes.dtype) == ((3, 13), torch.uint8)
    assert (rounded.scale.shape, rounded.scale.dtype) == ((3, groups), torch.bfloat16)
    assert rounded.zero is None or rounded.zero.shape == (3, groups)
    assert rounded.codes.is_contiguous()
    assert int(rounded.codes.max()) < 8
    assert torch.equal(rounded.levels, grid.levels(3))
    assert rounded.group == group
    assert rounded.weight().shape == (3, 13)


@every_group
@every_grid
@law(Round)
def test_rows_do_not_influence_one_another(method, grid, group):
    weight, record, keep = weights(6, 13), stats(13), mask(6, 13)
    whole = method.solve(weight, record, grid, 3, group, keep)
    for some in (slice(0, 1), slice(1, 6)):
        part = method.solve(weight[some], record, grid, 3, group, keep[some])
        assert torch.equal(part.codes, whole.codes[some])
        assert torch.equal(part.scale, whole.scale[some])
        assert part.zero is None or torch.equal(part.zero, whole.zero[some])


@every_group
@every_grid
@law(Round)
def test_what_is_not_kept_is_zero_and_does_not_matter(method, grid, group):
    weight, record, keep = weights(5, 13), stats(13), mask(5, 13)
    rounded = method.solve(weight, record, grid, 2, group, keep)
    assert bool((rounded.weight()[~keep] == 0).all())
    assert bool((rounded.weight()[keep] != 0).any())
    other = method.solve(weight + 9 * ~keep, record, grid, 2, group, keep)
    assert torch.equal(other.codes, rounded.codes)
    nothing = method.solve(weight, record, grid, 2, group, torch.zeros_like(keep))
    assert bool((nothing.weight() == 0).all())
    everything = method.solve(weight, record, grid, 2, group, torch.ones_like(keep))
    assert torch.equal(everything.codes, method.solve(weight, record, grid, 2, group).codes)


@every_group
@every_grid
@law(Round)
def test_inputs_that_do_not_correlate_are_rounded_to_nearest(method, grid, group):
    gram = torch.diag(torch.rand(13, generator=torch.Generator().manual_seed(1)).double() + 0.1)
    for record in (Stats(1, gram), Stats(1, torch.zeros(13, 13).double())):
        for keep in (None, mask(6, 13)):
            mine = method.solve(weights(6, 13), record, grid, 3, group, keep)
            plain = NEAREST.solve(weights(6, 13), record, grid, 3, group, keep)
            assert torch.equal(mine.codes, plain.codes)
            assert torch.equal(mine.scale, plain.scale)


@law(Round)
def test_deterministic_and_inputs_unchanged(method):
    weight, record, keep = weights(4, 13), stats(13), mask(4, 13)
    before = weight.clone(), record.gram.clone(), keep.clone()
    first = method.solve(weight, record, INTEGER, 3, 4, keep)
    again = method.solve(weight, record, INTEGER, 3, 4, keep)
    assert torch.equal(first.codes, again.codes)
    for tensor, copy in zip((weight, record.gram, keep), before, strict=True):
        assert torch.equal(tensor, copy)


@law(Round)
def test_single_precision_agrees_with_double(method):
    weight, record = weights(16, 24), stats(24)
    exact = error(method, weight, record, 4)
    single = error(method, weight.float(), Stats(record.count, record.gram.float()), 4)
    assert single == pytest.approx(exact, rel=0.05)


@law(Round)
def test_never_much_worse_than_nearest(method):
    """Less output error than rounding to nearest in the large majority of layers."""
    wins = 0
    for seed in range(20):
        weight, record = weights(8, 32, seed=seed), stats(32, seed=seed)
        wins += error(method, weight, record, 3) <= error(NEAREST, weight, record, 3)
    assert wins >= 18


@law(Round)
def test_dumps_and_loads(method):
    again = TypeAdapter(Annotated[Round, OneOf()]).validate_python(method.model_dump())
    assert again == method


@law(Round)
def test_every_field_matters(method):
    weight, record = weights(8, 16), stats(16)
    usual = method.solve(weight, record, INTEGER, 2, 4).codes
    for name, others in neighbours(method):
        changed = [other.solve(weight, record, INTEGER, 2, 4).codes for other in others]
        assert not all(torch.equal(usual, codes) for codes in changed), f"{name} has no effect"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [4, 5, 13, 64])
@every_grid
@pytest.mark.parametrize("method", [*(leaf() for leaf in leaves(Round).values()), *ANY], ids=str)
def test_oracle(method, grid, group, masked):
    bits = 3
    weight, record = weights(4, 13, seed=group), stats(13, seed=group)
    keep = mask(4, 13) if masked else torch.ones(4, 13, dtype=torch.bool)
    rounded = method.solve(weight, record, grid, bits, group, keep if masked else None)
    codes, scale, zero, decoded = oracle(method).reference(
        weight.tolist(),
        record.gram.tolist(),
        bits,
        group,
        keep.tolist(),
        oracle(grid),
        fields(grid),
        **fields(method),
    )
    assert rounded.codes.tolist() == codes
    assert rounded.scale.tolist() == scale
    assert (zero[0][0] is None) if rounded.zero is None else (rounded.zero.tolist() == zero)
    want = torch.tensor(decoded, dtype=torch.float64)
    assert torch.allclose(rounded.weight().double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_gptq_at_every_width_and_with_few_tokens(order, bits):
    """More inputs than tokens: the Gram matrix is singular, and damping carries it."""
    gptq = leaves(Round)["gptq"](order=order)
    weight, record = weights(8, 40), stats(40, tokens=7)
    assert error(gptq, weight, record, bits, 16) <= error(NEAREST, weight, record, bits, 16)


def test_gptq_refuses_what_is_no_gram_matrix():
    gptq = leaves(Round)["gptq"]()
    with pytest.raises(NotFinite, match="Gram matrix holds NaN"):
        gptq.solve(weights(2, 3), Stats(1, torch.full((3, 3), torch.nan)), INTEGER, 4, 3)
    with pytest.raises(UserError, match="not positive semi-definite"):
        gptq.solve(weights(2, 3), Stats(1, -5 * torch.ones(3, 3) + torch.eye(3)), INTEGER, 4, 3)
