"""Laws of every allocation, and each against its oracle."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.compress.allocation import Allocation, Profile
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from tests.compress_layers import LAYERS, fields, layer, oracle, others
from tests.laws import law


def low_rank(path, block, rows, columns, seed, figure=0.0, scale=1.0):
    """The profile of a layer with a falling random spectrum, two bytes for each number."""
    draw = torch.Generator().manual_seed(seed)
    most = (rows * columns - 1) // (rows + columns)
    size = min(rows, columns)
    gain = torch.rand(size, generator=draw, dtype=torch.float64).pow(3).sort(descending=True).values
    gain = scale * gain
    units = torch.tensor([*range(1, most + 1), size])
    cost = units * (rows + columns) * 2
    cost[-1] = rows * columns * 2
    tail = gain.flip(0).cumsum(0).flip(0)
    error = torch.cat([tail[1 : most + 1], tail.new_zeros(1)])
    return Profile(
        path, block, (rows, columns), units, cost, error, float(gain.sum()), figure
    ), gain


def model(seed=0, count=5):
    shapes = [(12, 16), (16, 12), (24, 24), (8, 30), (30, 10)]
    return [
        low_rank(f"l{i}", i // 2, *shapes[i % 5], 10 * seed + i, 0.01 * ((7 * i) % 4), 3.0**i)[0]
        for i in range(count)
    ]


def plain(profile):
    return {
        "bytes": profile.bytes.tolist(),
        "error": profile.error.tolist(),
        "energy": profile.energy,
        "units": profile.units.tolist(),
        "block": profile.block,
        "shape": profile.shape,
        "figure": profile.figure,
    }


def spent(layers, levels):
    return sum(int(x.bytes[level]) for x, level in zip(layers, levels, strict=True))


def ends(layers):
    return sum(int(x.bytes[0]) for x in layers), sum(int(x.bytes[-1]) for x in layers)


def next_steps(layers, levels):
    return [
        int(x.bytes[level + 1] - x.bytes[level])
        for x, level in zip(layers, levels, strict=True)
        if level + 1 < len(x.bytes)
    ]


@law(Allocation)
def test_oracle(method):
    layers = model()
    known = [plain(x) for x in layers]
    if method.name == "uniform":
        wanted = oracle("compress/allocation/uniform", "prices")(known)
    elif method.name == "lamp":
        for record, i in zip(known, range(5), strict=True):
            shape = record["shape"]
            record["energies"] = low_rank("", 0, *shape, i, 0, 3.0**i)[1].tolist()
        wanted = oracle("compress/allocation/lamp")(known)
    else:
        wanted = oracle(f"compress/allocation/{method.name}")(known)
    for price, want in zip(method.prices(layers), wanted, strict=True):
        torch.testing.assert_close(
            price, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-13
        )


@law(Allocation)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 0.81, 0.999, 1.0])
def test_budget_is_met_from_below_and_no_further_step_fits(method, share):
    for seed in range(4):
        layers = model(seed)
        low, high = ends(layers)
        budget = int(low + share * (high - low))
        levels = method.levels(layers, budget)
        left = budget - spent(layers, levels)
        assert left >= 0
        assert all(step > left for step in next_steps(layers, levels))


@law(Allocation)
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(0, 3)), min_size=1, max_size=6
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_budget_for_any_layers(method, shapes, share, seed):
    layers = [
        low_rank(f"l{i}", block, rows, columns, seed + i, 0.1 * block)[0]
        for i, (rows, columns, block) in enumerate(shapes)
    ]
    low, high = ends(layers)
    budget = int(low + share * (high - low))
    levels = method.levels(layers, budget)
    left = budget - spent(layers, levels)
    assert left >= 0
    assert all(step > left for step in next_steps(layers, levels))
    assert levels == method.levels(layers, budget)


@law(Allocation)
def test_monotone_in_the_budget(method):
    layers = model()
    low, high = ends(layers)
    smallest = min(int(x.bytes.diff().min()) for x in layers)
    before = -1
    for budget in range(low, high + smallest, smallest):
        now = spent(layers, method.levels(layers, budget))
        assert now >= before
        before = now
    assert before == high


@law(Allocation)
def test_the_ends(method):
    layers = model()
    low, high = ends(layers)
    assert method.levels(layers, low) == [0] * 5
    assert method.levels(layers, high) == [len(x.units) - 1 for x in layers]
    assert method.levels(layers, 10 * high) == [len(x.units) - 1 for x in layers]
    with pytest.raises(UserError, match=f"{low - 1} bytes is 1 short"):
        method.levels(layers, low - 1)


@law(Allocation)
def test_layers_that_cannot_shrink(method):
    fixed = Profile(
        "small", 0, (2, 2), torch.tensor([2]), torch.tensor([8]), torch.zeros(1).double(), 1.0, 0.0
    )
    layers = [fixed, *model()]
    low, high = ends(layers)
    levels = method.levels(layers, (low + high) // 2)
    assert levels[0] == 0
    assert levels[1:] == method.levels(layers[1:], (low + high) // 2 - 8)


@law(Allocation)
def test_equal_layers_get_equal_levels(method):
    one = low_rank("x", 0, 24, 24, 3)[0]
    layers = [one._replace(path=f"x{i}", block=i) for i in range(4)]
    low, high = ends(layers)
    for share in (0.2, 0.5, 0.7):
        levels = method.levels(layers, int(low + share * (high - low)))
        assert max(levels) - min(levels) <= 1


@law(Allocation)
def test_every_field_matters(method):
    weight, stats = layer(20, 20)
    weight[0] *= 30
    layers = [x._replace(figure=x.figure + i) for i, x in enumerate(model())]
    now = method.measure(weight, stats), [p.tolist() for p in method.prices(layers)]
    for field in fields(method):
        changed = [
            (other.measure(weight, stats), [p.tolist() for p in other.prices(layers)])
            for other in others(method, field)
        ]
        assert any(one != now for one in changed), field


@law(Allocation)
def test_pure(method):
    layers = model()
    before = [tuple(t.clone() for t in (x.units, x.bytes, x.error)) for x in layers]
    first = method.levels(layers, sum(ends(layers)) // 2)
    assert method.levels(layers, sum(ends(layers)) // 2) == first
    for x, (units, cost, error) in zip(layers, before, strict=True):
        assert torch.equal(x.units, units)
        assert torch.equal(x.bytes, cost)
        assert torch.equal(x.error, error)
    assert type(method).model_validate(method.model_dump()) == method


@law(Allocation)
def test_reads_errors_only_where_it_says_so(method):
    layers = model()
    blind = [x._replace(error=torch.empty(0), energy=0.0) for x in layers]
    budget = sum(ends(layers)) // 2
    if "error" in method.needs:
        assert method.levels(layers, budget) != leaves(Allocation)["uniform"]().levels(
            layers, budget
        )
    else:
        assert method.levels(blind, budget) == method.levels(layers, budget)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_uniform_gives_equal_shares(share):
    layers = model()
    low, high = ends(layers)
    budget = int(low + share * (high - low))
    levels = leaves(Allocation)["uniform"]().levels(layers, budget)
    assert levels == oracle("compress/allocation/uniform")([plain(x) for x in layers], budget)
    shares = [float(x.shares[level]) for x, level in zip(layers, levels, strict=True)]
    step = max(float(x.shares.diff().max()) for x in layers)
    floor = max(float(x.shares[0]) for x in layers)
    spill = max(int(x.bytes.diff().max()) for x in layers) / min(int(x.bytes[-1]) for x in layers)
    assert max(shares) - min(shares) <= max(step, floor) + spill  # what no longer fits elsewhere


@pytest.mark.parametrize("relative", [0.0, 0.5, 1.0])
def test_spectral_is_optimal_up_to_one_step(relative):
    """Against every combination of levels: no better one is smaller by more than one step."""
    spectral = leaves(Allocation)["spectral"](relative=relative)
    for seed in range(6):
        layers = [low_rank(f"l{i}", 0, 7 + i, 9, 10 * seed + i, 0.0, 2.0**i)[0] for i in range(3)]
        low, high = ends(layers)

        def loss(levels, layers=layers):
            return sum(
                float(x.error[k]) / x.energy**relative for x, k in zip(layers, levels, strict=True)
            )

        choices = list(product(*[range(len(x.units)) for x in layers]))
        widest = max(int(x.bytes[-1] - x.bytes[0]) for x in layers)
        for share in (0.2, 0.45, 0.7):
            budget = int(low + share * (high - low))
            found = loss(spectral.levels(layers, budget))
            best = min(loss(c) for c in choices if spent(layers, c) <= budget)
            lower = min(
                (loss(c) for c in choices if spent(layers, c) <= budget - widest), default=1e9
            )
            assert best - 1e-12 <= found <= lower + 1e-12


def test_spectral_leaves_less_error_than_uniform():
    for seed in range(5):
        layers = model(seed)
        low, high = ends(layers)
        for share in (0.2, 0.4, 0.6, 0.8):
            losses = [
                sum(float(x.error[k]) for x, k in zip(layers, levels, strict=True))
                for levels in (
                    allocation.levels(layers, int(low + share * (high - low)))
                    for allocation in (
                        leaves(Allocation)["spectral"](relative=0),
                        leaves(Allocation)["uniform"](),
                    )
                )
            ]
            assert losses[0] < losses[1]


def test_spectral_buys_the_whole_jump_where_the_last_rank_holds_the_error():
    """A flat spectrum: factors lose half of it, so some layers are better left dense."""
    flat = torch.ones(16, dtype=torch.float64)
    units = torch.tensor([*range(1, 8), 16])
    cost = torch.tensor([*(32 * r for r in range(1, 8)), 256])
    error = torch.cat([(16.0 - units[:-1]).double(), torch.zeros(1).double()])
    one = Profile("a", 0, (16, 16), units, cost, error, float(flat.sum()), 0.0)
    layers = [one, one._replace(path="b")]
    spectral = leaves(Allocation)["spectral"]()
    assert spectral.levels(layers, 256 + 32) == [7, 0]
    assert spectral.levels(layers, 256 + 32 + 96) == [7, 3]


def test_spectral_without_energy_is_no_trouble():
    dead = low_rank("dead", 0, 12, 12, 0, 0.0, 0.0)[0]
    layers = [dead, *model()]
    levels = leaves(Allocation)["spectral"](relative=1).levels(layers, sum(ends(layers)) // 2)
    assert levels[0] == 0


def test_lamp_is_the_paper_s_score_for_single_units():
    energies = [9.0, 4.0, 4.0, 1.0, 0.5, 0.25]
    error = torch.tensor(energies, dtype=torch.float64).flip(0).cumsum(0).flip(0)[1:]
    error = torch.cat([error, torch.zeros(1).double()])
    units = torch.arange(1, 7)
    one = Profile("a", 0, (6, 6), units, 10 * units, error, sum(energies), 0.0)
    lamp = leaves(Allocation)["lamp"]()
    wanted = oracle("compress/allocation/lamp", "scores")(energies)
    assert wanted[0] == 1.0
    torch.testing.assert_close(lamp.prices([one])[0], torch.tensor(wanted[1:], dtype=torch.float64))
    scaled = one._replace(error=100 * error, energy=100 * one.energy)
    torch.testing.assert_close(lamp.prices([scaled])[0], lamp.prices([one])[0])


def test_lamp_of_a_dead_layer():
    dead = low_rank("dead", 0, 12, 12, 0, 0.0, 0.0)[0]
    assert not leaves(Allocation)["lamp"]().prices([dead])[0].any()


@pytest.mark.parametrize(("weight", "stats"), LAYERS, ids=lambda x: "")
@pytest.mark.parametrize("outlier", [1.5, 2.0])
def test_owl_counts_outliers(weight, stats, outlier):
    owl = leaves(Allocation)["owl"](outlier=outlier)
    wanted = oracle("compress/allocation/owl", "outlier_ratio")(
        weight.numpy(), stats.gram.numpy(), outlier
    )
    assert owl.measure(weight, stats) == pytest.approx(wanted, rel=1e-12)
    assert wanted > 0
    rest = Stats(count=1, gram=4 * stats.gram)
    assert owl.measure(3 * weight, rest) == pytest.approx(wanted, rel=1e-12)


def test_owl_orders_blocks_within_its_bounds():
    one = low_rank("x", 0, 60, 60, 3)[0]
    layers = [one._replace(path=f"x{i}", block=i, figure=f) for i, f in enumerate((0.1, 0.3, 0.2))]
    low, high = ends(layers)
    owl = leaves(Allocation)["owl"](spread=0.1)
    levels = owl.levels(layers, (low + high) // 2)
    shares = [float(x.shares[level]) for x, level in zip(layers, levels, strict=True)]
    assert shares[0] < shares[2] < shares[1]
    step = float(one.shares.diff().max())
    assert shares[1] - shares[0] == pytest.approx(0.2, abs=2 * step)
    assert shares[2] - shares[0] == pytest.approx(0.1, abs=2 * step)
    same = [x._replace(figure=0.2) for x in layers]
    assert owl.levels(same, (low + high) // 2) == leaves(Allocation)["uniform"]().levels(
        same, (low + high) // 2
    )
