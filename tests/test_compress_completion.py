"""Laws of every completion, each against its oracle, and what outliers do to factors."""

import itertools

import pytest
import torch

from drawplate import edits
from drawplate.compress.completion import Completion, zero_filled
from drawplate.compress.driver import Compress, compress
from drawplate.compress.method import Compression
from drawplate.core.errors import Damaged, NotFinite
from drawplate.core.hf import load, save, stored_bytes
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from tests import tiny
from tests.compress_layers import fields, layer, oracle, others
from tests.laws import law
from tests.test_compress_method import site

Altmin = leaves(Completion)["altmin"]
Method = leaves(Compression)["low_rank_sparse"]


def planted(rows=30, columns=24, rank=3, seen=0.8, noise=0.0, seed=0):
    """A matrix of low rank, with noise, and which entries count."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    matrix = normal(rows, rank) @ normal(rank, columns) + noise * normal(rows, columns)
    return matrix, torch.rand(rows, columns, generator=draw) < seen


CASES = [planted(noise=0.3, seed=seed, seen=seen) for seed, seen in ((0, 0.8), (1, 0.95), (2, 1.0))]


def product(method, matrix, counts, rank=3):
    second, first = method.complete(matrix, counts, rank)
    return second @ first


def masked(matrix, counts, now):
    return float((matrix - now).where(counts, 0).square().sum())


@law(Completion, inner=12)  # with as many steps as ranks, half-steps are exact
@pytest.mark.parametrize(("matrix", "counts"), CASES, ids=lambda x: "")
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_oracle(method, matrix, counts, rank):
    wanted = oracle(f"compress/completion/{method.name}")(matrix.numpy(), counts.numpy(), rank)
    found = product(method, matrix, counts, rank)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-8, atol=1e-8)


@law(Completion)
@pytest.mark.parametrize(("matrix", "counts"), CASES, ids=lambda x: "")
def test_never_worse_than_zeros_for_what_does_not_count(method, matrix, counts):
    for rank in (1, 2, 4, 24):
        second, first = zero_filled(matrix, counts, rank)
        most = masked(matrix, counts, second @ first)
        found = masked(matrix, counts, product(method, matrix, counts, rank))
        assert found <= most * (1 + 1e-9) + 1e-12


@law(Completion)
def test_what_does_not_count_has_no_influence(method):
    matrix, counts = planted(noise=0.3)
    other = matrix.where(counts, torch.nan)
    assert torch.equal(product(method, matrix, counts), product(method, other, counts))
    with pytest.raises(NotFinite, match="matrix holds NaN"):
        method.complete(other, torch.ones_like(counts), 3)


@law(Completion)
def test_shapes_and_whole_matrices(method):
    matrix, counts = planted(7, 5, noise=1.0)
    second, first = method.complete(matrix, counts, 2)
    assert second.shape == (7, 2)
    assert first.shape == (2, 5)
    everything = torch.ones_like(counts)
    torch.testing.assert_close(product(method, matrix, everything, 5), matrix)
    second, first = zero_filled(matrix, everything, 2)
    torch.testing.assert_close(product(method, matrix, everything, 2), second @ first)


@law(Completion)
def test_nothing_counts(method):
    matrix, counts = planted()
    assert not product(method, matrix, torch.zeros_like(counts)).any()


@law(Completion)
def test_scales(method):
    matrix, counts = planted(noise=0.3)
    found = product(method, matrix, counts)
    torch.testing.assert_close(product(method, -3 * matrix, counts), -3 * found)


@law(Completion)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure(method, dtype):
    matrix, counts = planted(noise=0.3)
    matrix = matrix.to(dtype)
    before = matrix.clone(), counts.clone()
    found = method.complete(matrix, counts, 3)
    assert found[0].dtype == found[1].dtype == dtype
    again = method.complete(matrix, counts, 3)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])
    assert torch.equal(matrix, before[0])
    assert torch.equal(counts, before[1])


@law(Completion)
def test_every_field_matters(method):
    matrix, counts = planted(noise=0.3)
    now = product(method, matrix, counts)
    for field in fields(method):
        changed = [product(other, matrix, counts) for other in others(method, field)]
        assert any(not torch.equal(one, now) for one in changed), field


def test_error_never_rises_from_round_to_round():
    matrix, counts = planted(noise=0.5, seen=0.6)
    for inner in (1, 2, 5):
        errors = [
            masked(matrix, counts, product(Altmin(rounds=rounds, inner=inner), matrix, counts))
            for rounds in range(12)
        ]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
        assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_finds_a_planted_matrix_from_half_of_its_entries(seed):
    matrix, counts = planted(80, 70, 3, 0.5, seed=seed)
    found = product(Altmin(rounds=60), matrix, counts)
    assert float((found - matrix).norm() / matrix.norm()) < 1e-6


def test_exact_half_steps_are_not_needed():
    """With few steps in a half-step the rounds end where those with exact ones do."""
    matrix, counts = planted(40, 30, 3, 0.7, noise=0.1)
    few = product(Altmin(rounds=200, inner=1), matrix, counts)
    exact = product(Altmin(rounds=200, inner=20), matrix, counts)
    torch.testing.assert_close(few, exact, rtol=1e-7, atol=1e-7)


# The method that sets outliers apart.


def contaminated(rows=48, columns=40, seed=0, size=30):
    """A layer of rank 4 of which some weights are far too large, its inputs uncorrelated."""
    matrix, _ = planted(rows, columns, 4, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(matrix.shape, generator=draw) < 0.01
    weight = matrix + size * wrong * torch.randn(matrix.shape, generator=draw, dtype=torch.float64)
    scale = 0.5 + torch.rand(columns, generator=draw, dtype=torch.float64)
    return weight, Stats(count=40, gram=scale.square().diag())


@torch.no_grad()
def test_outliers_do_not_bend_the_factors():
    """Which a truncated SVD at the same rank, and zeros filled in, cannot say of theirs."""
    weight, stats = contaminated()
    whole = output_error(weight, stats.gram)

    def error(**fields):
        method = Method.model_validate({"name": "low_rank_sparse", "outliers": 0.03, **fields})
        now = method.solve(site(weight, stats), 4).weights["layer"]
        return float(output_error(weight - now, stats.gram) / whole)

    rounds = {"completion": {"name": "altmin", "rounds": 60}}
    assert error(**rounds, turns=4) < 1e-12
    assert error(completion={"name": "filled"}, turns=1) > 1e-3
    plain = leaves(Compression)["low_rank"](factor={"name": "svd"})
    now = plain.solve(site(weight, stats), 4).weights["layer"]
    assert float(output_error(weight - now, stats.gram) / whole) > 1e-2


@torch.no_grad()
def test_outliers_are_exact():
    weight, stats = layer(12, 10)
    method = Method(outliers=0.1)
    solved = method.solve(site(weight, stats), 2)
    ((edit, tensors),) = solved.changes
    assert edit.kept == 12
    assert len(tensors["outliers.values"]) == 12
    close = torch.isclose(solved.weights["layer"], weight, rtol=1e-12, atol=1e-12)
    assert int(close.sum()) >= 12


@torch.no_grad()
def test_turns_choose_better_outliers():
    weight, stats = contaminated(seed=3, size=3)
    errors = []
    for turns in (1, 2, 4):
        now = Method(turns=turns, outliers=0.02).solve(site(weight, stats), 4).weights["layer"]
        errors.append(float(output_error(weight - now, stats.gram)))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_a_model_and_back_from_disk(tmp_path, kind):
    model = tiny.model(kind)
    before = stored_bytes(model)
    params = Compress.model_validate({"ratio": 0.2, "method": {"name": "low_rank_sparse"}})
    ledger = compress(model, tiny.tokens(), params, batch=4)
    assert ledger.bytes_after == stored_bytes(model) <= 0.8 * before
    names = {edit.name for edit in edits.of(model)}
    assert names == {"low_rank_sparse"}
    save(model, tmp_path / "out")
    with torch.no_grad():
        wanted = model(tiny.tokens()).logits
        assert torch.equal(load(tmp_path / "out")(tiny.tokens()).logits, wanted)
    path = edits.of(model)[0].module
    model.get_submodule(path).outliers.mask.fill_(0)
    with pytest.raises(Damaged, match=f"{path}: 0 outliers, the spec says"):
        edits.check(model)
