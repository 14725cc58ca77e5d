"""Laws of every factor, and each against its oracle."""

import itertools

import pytest
import torch

from drawplate.compress.factor import Factor
from drawplate.core.errors import NotFinite
from drawplate.core.linalg import cholesky, output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from tests.compress_layers import LAYERS, fields, layer, oracle, others
from tests.laws import law

each_layer = pytest.mark.parametrize(("weight", "stats"), LAYERS, ids=lambda x: "")


def product(method, weight, stats, rank):
    second, first = method.split(weight, stats, rank)
    return second @ first


@law(Factor)
@each_layer
def test_oracle(method, weight, stats):
    for rank in range(1, min(weight.shape) + 1):
        wanted, energy = oracle(f"compress/factor/{method.name}")(
            weight.numpy(), stats.gram.numpy(), stats.absmean.numpy(), rank
        )
        found = product(method, weight, stats, rank)
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-10, atol=1e-11)
        spectrum = method.spectrum(weight, stats)
        torch.testing.assert_close(spectrum, torch.from_numpy(energy), rtol=1e-10, atol=1e-11)


@law(Factor)
@each_layer
def test_exact_at_full_rank(method, weight, stats):
    found = product(method, weight, stats, min(weight.shape))
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-11)


@law(Factor)
@pytest.mark.parametrize("tokens", [1, 3])
def test_exact_at_full_rank_with_fewer_tokens_than_inputs(method, tokens):
    weight, stats = layer(9, 6, tokens)
    torch.testing.assert_close(product(method, weight, stats, 6), weight, rtol=1e-7, atol=1e-8)


@law(Factor)
@each_layer
def test_shapes_and_orthonormal_second(method, weight, stats):
    second, first = method.split(weight, stats, 2)
    assert second.shape == (weight.shape[0], 2)
    assert first.shape == (2, weight.shape[1])
    torch.testing.assert_close(second.T @ second, torch.eye(2, dtype=torch.float64))


@law(Factor)
@each_layer
def test_error_is_what_the_spectrum_says(method, weight, stats):
    spectrum = method.spectrum(weight, stats)
    assert (spectrum.diff() <= 0).all()
    for rank in range(1, min(weight.shape) + 1):
        left = method.scaled(weight - product(method, weight, stats, rank), stats)
        torch.testing.assert_close(
            left.square().sum(), spectrum[rank:].sum(), rtol=1e-9, atol=1e-10
        )


@law(Factor)
@each_layer
def test_error_never_rises_with_rank(method, weight, stats):
    errors = [
        float(output_error(weight - product(method, weight, stats, r), stats.gram))
        for r in range(1, min(weight.shape) + 1)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))


@law(Factor)
@each_layer
def test_never_below_the_whitened_bound(method, weight, stats):
    lower, _ = cholesky(stats.gram)
    tail = torch.linalg.svdvals(weight @ lower).square().flip(0).cumsum(0).flip(0)
    for rank in range(1, min(weight.shape)):
        error = float(output_error(weight - product(method, weight, stats, rank), stats.gram))
        assert error >= float(tail[rank]) * (1 - 1e-9)


@each_layer
def test_whitened_attains_the_bound_and_beats_every_leaf(weight, stats):
    whitened = leaves(Factor)["whitened"](damping=0)
    lower, _ = cholesky(stats.gram)
    tail = torch.linalg.svdvals(weight @ lower).square().flip(0).cumsum(0).flip(0)
    for rank in range(1, min(weight.shape)):
        best = float(output_error(weight - product(whitened, weight, stats, rank), stats.gram))
        assert best == pytest.approx(float(tail[rank]), rel=1e-9)
        for leaf in leaves(Factor).values():
            other = output_error(weight - product(leaf(), weight, stats, rank), stats.gram)
            assert best <= float(other) * (1 + 1e-9)


@each_layer
def test_svd_is_nearest_in_weights(weight, stats):
    svd = leaves(Factor)["svd"]()
    for rank in range(1, min(weight.shape)):
        best = (weight - product(svd, weight, stats, rank)).square().sum()
        for leaf in leaves(Factor).values():
            other = (weight - product(leaf(), weight, stats, rank)).square().sum()
            assert best <= other * (1 + 1e-9)


@law(Factor)
def test_a_matrix_of_low_rank_is_found_exactly(method):
    weight, stats = layer(8, 6)
    planted = weight[:, :2] @ weight[:2, :6]
    torch.testing.assert_close(product(method, planted, stats, 2), planted, rtol=1e-7, atol=1e-8)


@law(Factor)
def test_rows_may_be_permuted_and_scaled(method):
    weight, stats = layer()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = product(method, weight, stats, 3)
    torch.testing.assert_close(product(method, weight[order], stats, 3), whole[order])
    torch.testing.assert_close(product(method, 3 * weight, stats, 3), 3 * whole)


@law(Factor)
def test_scale_of_the_inputs_does_not_matter(method):
    weight, stats = layer()
    louder = Stats(count=stats.count, gram=25 * stats.gram, absmean=5 * stats.absmean)
    torch.testing.assert_close(
        product(method, weight, louder, 3), product(method, weight, stats, 3), rtol=1e-9, atol=1e-9
    )


@law(Factor)
def test_every_field_matters(method):
    weight, stats = layer()
    now = method.split(weight, stats, 2)[1]
    for field in fields(method):
        assert any(
            not torch.equal(other.split(weight, stats, 2)[1], now)
            for other in others(method, field)
        ), field


@law(Factor)
def test_reads_only_what_it_needs(method):
    weight, stats = layer()
    less = Stats(count=stats.count, **{part: getattr(stats, part) for part in method.needs})
    assert torch.equal(product(method, weight, less, 2), product(method, weight, stats, 2))


@law(Factor)
def test_pure(method):
    weight, stats = layer()
    before = weight.clone(), stats.gram.clone(), stats.absmean.clone()
    first = method.split(weight, stats, 3)
    again = method.split(weight, stats, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip((weight, stats.gram, stats.absmean), before, strict=True)
    )
    assert type(method).model_validate(method.model_dump()) == method


@law(Factor)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_float64_inside(method, dtype):
    weight, stats = layer()
    low = weight.to(dtype)
    short = Stats(count=40, gram=stats.gram.float(), absmean=stats.absmean.float())
    assert method.scaled(low, short).dtype == torch.float64
    second, first = method.split(low, stats, 3)
    assert second.dtype == first.dtype == dtype
    exact = product(method, low.double(), stats, 3)
    bound = 4 * torch.finfo(dtype).eps * float(weight.abs().max())
    assert (second.double() @ first.double() - exact).abs().max() < bound


@law(Factor)
def test_dead_inputs_are_no_trouble(method):
    weight, stats = layer()
    alive = torch.ones(8, dtype=torch.float64)
    alive[2] = 0
    dead = Stats(count=40, gram=stats.gram * alive * alive[:, None], absmean=stats.absmean * alive)
    assert product(method, weight, dead, 3).isfinite().all()
    silent = Stats(count=40, gram=0 * stats.gram, absmean=0 * stats.absmean)
    torch.testing.assert_close(
        product(method, weight, silent, 3), product(leaves(Factor)["svd"](), weight, silent, 3)
    )


def test_where_no_input_was_ever_seen_asvd_weighs_all_alike():
    weight, _ = layer(8, 6)
    silent = Stats(count=10, absmean=torch.zeros(6))
    assert torch.equal(leaves(Factor)["asvd"]().scaled(weight, silent), weight)


@law(Factor)
def test_not_finite_is_refused(method):
    weight, stats = layer()
    weight[0, 0] = torch.nan
    with pytest.raises(NotFinite):
        method.split(weight, stats, 2)
    with pytest.raises(NotFinite):
        method.spectrum(weight, stats)
