"""Laws of every update, and each against its oracle."""

import itertools

import pytest
import torch

from drawplate.compress.pattern import Pattern
from drawplate.compress.prune import Prune
from drawplate.compress.update import Update
from drawplate.core.linalg import damped, output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from tests.compress_layers import LAYERS, fields, layer, oracle, others, stats_of
from tests.laws import law

each_layer = pytest.mark.parametrize(("weight", "stats"), LAYERS, ids=lambda x: "")


def mask(weight, stats, share=0.5, score="wanda"):
    kept = round(share * weight.shape[1])
    return leaves(Pattern)["unstructured"]().keep(leaves(Prune)[score]().score(weight, stats), kept)


def error(weight, now, stats):
    return float(output_error(weight - now, stats.gram))


@law(Update, steps=100)  # refit runs until it has arrived
@each_layer
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_oracle(method, weight, stats, share):
    keep = mask(weight, stats, share)
    wanted = oracle(f"compress/update/{method.name}")(
        weight.numpy(), keep.numpy(), stats.gram.numpy()
    )
    found = method.solve(weight, keep, stats)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-10, atol=1e-11)


@law(Update)
@each_layer
def test_zero_outside_the_mask(method, weight, stats):
    keep = mask(weight, stats)
    found = method.solve(weight, keep, stats)
    assert (found[~keep] == 0).all()
    assert (found[keep] != 0).all()


@law(Update)
@each_layer
def test_nothing_to_make_up_for(method, weight, stats):
    everything = torch.ones_like(weight, dtype=torch.bool)
    torch.testing.assert_close(method.solve(weight, everything, stats), weight, rtol=1e-12, atol=0)
    assert not method.solve(weight, ~everything, stats).any()


@law(Update)
def test_never_worse_than_no_update(method):
    """Row by row, for masks that scores chose and for masks drawn at random."""
    draw = torch.Generator().manual_seed(5)
    cases = [(w, mask(w, s, share), s) for w, s in LAYERS for share in (0.25, 0.5, 0.75)]
    for seed in range(12):
        weight, stats = layer(12, 10, 12, seed)
        cases.append((weight, torch.rand(weight.shape, generator=draw) < 0.5, stats))
    for weight, keep, stats in cases:
        found = method.solve(weight, keep, stats)
        for row, now, stay in zip(weight, found, keep, strict=True):
            plain = output_error((row - row.where(stay, 0))[None], stats.gram)
            assert output_error((row - now)[None], stats.gram) <= plain * (1 + 1e-9)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("name", ["obs", "refit"])
def test_gains_over_many_rows(name, score):
    weight, stats = layer(64, 16, 60)
    keep = mask(weight, stats, 0.5, score)
    found = leaves(Update)[name]().solve(weight, keep, stats)
    assert error(weight, found, stats) < 0.9 * error(weight, weight.where(keep, 0), stats)


@law(Update)
def test_rows_are_independent(method):
    weight, stats = layer()
    keep = mask(weight, stats)
    rows = [method.solve(w[None], k[None], stats) for w, k in zip(weight, keep, strict=True)]
    torch.testing.assert_close(method.solve(weight, keep, stats), torch.cat(rows))


@law(Update)
def test_scales_with_the_weight_and_not_with_the_inputs(method):
    weight, stats = layer()
    keep = mask(weight, stats)
    found = method.solve(weight, keep, stats)
    torch.testing.assert_close(method.solve(-2 * weight, keep, stats), -2 * found)
    louder = Stats(count=stats.count, gram=9 * stats.gram)
    torch.testing.assert_close(method.solve(weight, keep, louder), found)


@law(Update)
def test_uncorrelated_inputs_need_no_update(method):
    weight, stats = layer()
    diagonal = Stats(count=stats.count, gram=stats.gram.diagonal().diag())
    keep = mask(weight, stats)
    torch.testing.assert_close(
        method.solve(weight, keep, diagonal), weight.where(keep, 0), rtol=1e-12, atol=1e-12
    )


@law(Update)
def test_dead_inputs_are_no_trouble(method):
    weight, stats = layer()
    alive = torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64)
    dead = Stats(count=40, gram=stats.gram * alive * alive[:, None])
    found = method.solve(weight, mask(weight, dead), dead)
    assert found.isfinite().all()
    silent = Stats(count=40, gram=0 * stats.gram)
    keep = mask(weight, stats)
    torch.testing.assert_close(method.solve(weight, keep, silent), weight.where(keep, 0))


@law(Update)
def test_every_field_matters(method):
    weight, stats = layer(6, 60, 80)
    keep = mask(weight, stats)
    now = method.solve(weight, keep, stats)
    for field in fields(method):
        changed = [other.solve(weight, keep, stats) for other in others(method, field)]
        assert any(not torch.equal(one, now) for one in changed), field


@law(Update)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure(method, dtype):
    weight, stats = layer()
    weight = weight.to(dtype)
    keep = mask(weight, stats)
    before = weight.clone(), keep.clone(), stats.gram.clone()
    found = method.solve(weight, keep, stats)
    assert found.dtype == dtype
    assert torch.equal(method.solve(weight, keep, stats), found)
    assert torch.equal(weight, before[0])
    assert torch.equal(keep, before[1])
    assert torch.equal(stats.gram, before[2])
    assert type(method).model_validate(method.model_dump()) == method


@law(Update)
def test_float32_is_close_to_float64(method):
    weight, stats = layer()
    keep = mask(weight, stats)
    low = method.solve(weight.float(), keep, Stats(count=40, gram=stats.gram.float()))
    exact = method.solve(weight.float().double(), keep, stats)
    torch.testing.assert_close(low.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 12, 13, 1000])
def test_obs_does_not_depend_on_its_block(block):
    weight, stats = layer(5, 12)
    keep = mask(weight, stats)
    obs = leaves(Update)["obs"]
    other = type("Obs", (obs,), {"block": block, "__annotations__": {}, "__module__": __name__})
    torch.testing.assert_close(
        other().solve(weight, keep, stats), obs().solve(weight, keep, stats), rtol=1e-12, atol=1e-13
    )


@each_layer
def test_refit_is_never_beaten_and_ends_at_the_least_squares_solution(weight, stats):
    refit = leaves(Update)["refit"](steps=100, damping=0)
    keep = mask(weight, stats)
    found = refit.solve(weight, keep, stats)
    slope = (found - weight) @ stats.gram
    assert slope[keep].abs().max() < 1e-8 * float(stats.gram.diagonal().max())
    for leaf in leaves(Update).values():
        other = error(weight, leaf().solve(weight, keep, stats), stats)
        assert error(weight, found, stats) <= other * (1 + 1e-9)


@each_layer
def test_refit_gains_with_every_step(weight, stats):
    keep = mask(weight, stats)
    penalty = leaves(Update)["refit"]().damping
    whole = Stats(count=stats.count, gram=damped(stats.gram, penalty))
    errors = [
        error(weight, leaves(Update)["refit"](steps=steps).solve(weight, keep, stats), whole)
        for steps in range(10)
    ]
    assert errors[0] == pytest.approx(error(weight, weight.where(keep, 0), whole))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_refit_does_not_see_the_scale_of_single_inputs(steps):
    """Preconditioned by the diagonal, every step is the same in whatever units inputs come."""
    weight, stats = layer(6, 12)
    keep = mask(weight, stats)
    refit = leaves(Update)["refit"](steps=steps, damping=0)
    unit = torch.logspace(-2, 2, 12, dtype=torch.float64)
    scaled = Stats(count=40, gram=stats.gram * unit * unit[:, None])
    found = refit.solve(weight / unit, keep, scaled) * unit
    torch.testing.assert_close(found, refit.solve(weight, keep, stats), rtol=1e-9, atol=1e-9)


def test_refit_of_dead_inputs_without_damping():
    weight, stats = layer()
    alive = torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64)
    dead = Stats(count=40, gram=stats.gram * alive * alive[:, None])
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, ::3] = False
    found = leaves(Update)["refit"](damping=0).solve(weight, keep, dead)
    assert found.isfinite().all()
    assert torch.equal(found[:, 7], weight[:, 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refit_without_any_input_or_damping_changes_nothing(dtype):
    weight = layer()[0].to(dtype)
    keep = mask(*layer())
    dead = Stats(count=40, gram=torch.zeros(8, 8, dtype=dtype))
    found = leaves(Update)["refit"](damping=0).solve(weight, keep, dead)
    assert torch.equal(found, weight.where(keep, 0))


def test_refit_with_fewer_tokens_than_inputs():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, stats = layer()[0], stats_of(x)
    keep = mask(weight, stats)
    found = leaves(Update)["refit"]().solve(weight, keep, stats)
    assert found.isfinite().all()
    assert error(weight, found, stats) < 0.05 * error(weight, weight.where(keep, 0), stats)


GreedyBlocks = leaves(Update)["greedy_blocks"]


def objective(method, weight, now, keep, stats):
    """Row by row: what greedy blocks minimise, [O]."""
    gram = damped(stats.gram, method.damping)
    toll = method.penalty * (weight @ gram).where(keep, 0).abs().amax(1)
    off = now - weight
    return ((off @ gram) * off).sum(1) / 2 + toll * now.abs().sum(1)


@each_layer
@pytest.mark.parametrize("block", [1, 3, 40])
def test_greedy_blocks_end_at_the_masked_least_squares_solution(weight, stats, block):
    keep = mask(weight, stats)
    wanted = oracle("compress/update/refit")(weight.numpy(), keep.numpy(), stats.gram.numpy())
    found = GreedyBlocks(block=block, steps=1500).solve(weight, keep, stats)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-9, atol=1e-10)


@each_layer
@pytest.mark.parametrize("penalty", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("block", [1, 3, 40])
def test_greedy_blocks_end_at_the_lasso_solution(weight, stats, penalty, block):
    keep = mask(weight, stats, 0.8)
    wanted = oracle("compress/update/greedy_blocks")(
        weight.numpy(), keep.numpy(), stats.gram.numpy(), damping=0.3, penalty=penalty
    )
    method = GreedyBlocks(block=block, steps=500, penalty=penalty, damping=0.3)
    found = method.solve(weight, keep, stats)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-8, atol=1e-9)
    assert torch.equal(found != 0, torch.from_numpy(wanted != 0))
    # Optimal if and only if the slope is -t sign(w') where w' lives, and within [-t, t] elsewhere.
    gram = damped(stats.gram, method.damping)
    slope = ((found - weight) @ gram).where(keep, 0)
    toll = penalty * (weight @ gram).where(keep, 0).abs().amax(1, keepdim=True)
    scale = float(toll.max())
    assert (slope + toll * found.sign())[found != 0].abs().max() < 1e-9 * scale
    assert (slope.abs() <= toll + 1e-9 * scale).all()
    alive = [
        (GreedyBlocks(penalty=p, steps=400).solve(weight, keep, stats) != 0).sum()
        for p in (0.0, penalty)
    ]
    assert alive[1] < alive[0] or penalty < 0.1


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_greedy_blocks_never_rise(penalty, block):
    weight, stats = layer(12, 24, 30, seed=3)
    keep = mask(weight, stats, 0.6)
    values = []
    for steps in range(12):
        method = GreedyBlocks(steps=steps, block=block, penalty=penalty)
        values.append(objective(method, weight, method.solve(weight, keep, stats), keep, stats))
    for before, after in itertools.pairwise(values):
        assert (after <= before * (1 + 1e-12)).all()
    assert (values[-1] < values[0]).all()


def test_a_block_that_holds_the_support_solves_it_in_one_step():
    weight, stats = layer(6, 12)
    keep = mask(weight, stats)
    once = GreedyBlocks(steps=1, block=6).solve(weight, keep, stats)
    wanted = oracle("compress/update/refit")(weight.numpy(), keep.numpy(), stats.gram.numpy())
    torch.testing.assert_close(once, torch.from_numpy(wanted), rtol=1e-9, atol=1e-10)


def test_zeros_are_found_after_finitely_many_steps():
    weight, stats = layer(10, 24, 60, seed=5)
    keep = torch.ones_like(weight, dtype=torch.bool)
    end = GreedyBlocks(steps=500, block=8, penalty=0.3).solve(weight, keep, stats)
    supports = [
        GreedyBlocks(steps=steps, block=8, penalty=0.3).solve(weight, keep, stats) != 0
        for steps in (40, 50, 60)
    ]
    assert all(torch.equal(support, end != 0) for support in supports)
    assert 0 < int((end != 0).sum()) < weight.numel() // 2


def test_a_newton_block_gains_more_than_its_coordinates_one_by_one():
    """At equally many moved weights; a block knows how its members depend on one another."""
    weight, stats = layer(16, 32, 60, seed=2)
    keep = mask(weight, stats, 0.5)
    method = GreedyBlocks(steps=2, block=8)
    single = GreedyBlocks(steps=16, block=1)
    together = objective(method, weight, method.solve(weight, keep, stats), keep, stats).sum()
    alone = objective(single, weight, single.solve(weight, keep, stats), keep, stats).sum()
    assert together < alone * 1.2
