"""Laws of every family of compression, and each against its oracle."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from drawplate import edits
from drawplate.compress.allocation import Allocation
from drawplate.compress.completion import Completion
from drawplate.compress.factor import Factor
from drawplate.compress.layerwise import Layerwise, Solved
from drawplate.compress.method import Compression
from drawplate.compress.pattern import Pattern
from drawplate.compress.prune import Prune
from drawplate.compress.update import Update
from drawplate.core import stats as statistics
from drawplate.core.blocks import Site
from drawplate.core.errors import NotFinite
from drawplate.core.linalg import inverse_root, output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from drawplate.edits.low_rank import LowRank as Edit
from tests.compress_layers import LAYERS, layer, oracle, others

AXES = {
    "factor": Factor,
    "completion": Completion,
    "prune": Prune,
    "pattern": Pattern,
    "update": Update,
    "allocation": Allocation,
}

layerwise = pytest.mark.parametrize(
    "method",
    [
        pytest.param(leaf(), id=name)
        for name, leaf in leaves(Compression).items()
        if issubclass(leaf, Layerwise)
    ],
)


def site(weight, stats, bias=True):
    """A linear layer of that weight, in a model of its own."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return Site("layer", module, stats)


def make(name, **fields):
    return leaves(Compression)[name].model_validate({"name": name, **fields})


def variants(method):
    """The method with each leaf of each of its axes in turn."""
    yield method
    for axis, base in AXES.items():
        if axis in type(method).model_fields:
            for name in leaves(base):
                yield make(method.name, **{axis: {"name": name}})


def become(place, solved):
    """The stand-in that the changes make of the layer."""
    model = nn.Module()
    model.layer = place.module
    for edit, tensors in solved.changes:
        new = edit.install(model)
        new.load_state_dict(tensors, strict=False)
        if new.bias is not None:
            new.bias.copy_(place.module.bias)
        edit.check(new)
    return model.layer


@layerwise
@pytest.mark.parametrize(("weight", "stats"), LAYERS, ids=lambda x: "")
def test_oracle(method, weight, stats):
    lamp = make(method.name, allocation={"name": "lamp"})
    place = site(weight, stats)
    levels, energy = oracle(f"compress/method/{method.name}")(weight.numpy(), stats.gram.numpy(), 8)
    profile = lamp.profile(3, place)
    assert (profile.path, profile.block, profile.shape) == ("layer", 3, tuple(weight.shape))
    assert profile.units.tolist() == [level[0] for level in levels]
    assert profile.bytes.tolist() == [level[1] for level in levels]
    wanted = torch.tensor([level[2] for level in levels], dtype=torch.float64)
    torch.testing.assert_close(profile.error, wanted, rtol=1e-9, atol=1e-10)
    assert profile.energy == pytest.approx(energy, rel=1e-9)


@layerwise
def test_profiles_are_well_formed(method):
    for variant in variants(method):
        for weight, stats in (layer(8, 12), layer(12, 8), layer(4, 4), layer(1, 8), layer(8, 4)):
            profile = variant.profile(0, site(weight, stats))
            assert (profile.units.diff() > 0).all()
            assert (profile.bytes.diff() > 0).all()
            assert int(profile.bytes[-1]) == weight.numel() * 8
            assert profile.units.dtype == profile.bytes.dtype == torch.int64
            if "error" in variant.allocation.needs:
                assert len(profile.error) == len(profile.bytes)
                assert (profile.error.diff() <= 1e-12).all()
                assert float(profile.error[-1]) == 0
                assert profile.energy >= float(profile.error[0])
            else:
                assert len(profile.error) == 0
                assert profile.energy == 0


@layerwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_spends_what_the_profile_promises_and_is_what_it_says(method, dtype):
    weight, stats = layer(8, 12)
    for variant in variants(method):
        place = site(weight.to(dtype), stats)
        profile = variant.profile(0, place)
        smaller = len(profile.units) - 1
        for level in sorted({0, smaller // 2, smaller - 1}):
            solved = variant.solve(place, int(profile.units[level]))
            stored = [t for _, tensors in solved.changes for t in tensors.values()]
            assert sum(t.nbytes for t in stored) == int(profile.bytes[level])
            new = become(place, solved)
            now = solved.weights["layer"]
            assert now.dtype == torch.float32
            assert all(t.dtype in (dtype, torch.uint8) for t in stored)
            bound = 4 * torch.finfo(dtype).eps * float(weight.abs().max())
            assert (edits.matrix(new).float() - now).abs().max() <= bound
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
            wanted = nn.functional.linear(x.float(), now, place.module.bias.float())
            assert (new(x).float() - wanted).abs().max() <= 40 * bound


@layerwise
@torch.no_grad()
def test_more_bytes_never_hurt(method):
    """On the error that the parts minimise, with parts whose masks and spaces are nested."""
    weight, stats = layer(8, 12)
    exact = {
        "sparse": {"update": {"name": "refit", "steps": 200, "damping": 0}},
        "low_rank": {"factor": {"name": "whitened", "damping": 0}},
        "low_rank_sparse": {"completion": {"name": "altmin", "rounds": 60}, "turns": 1},
    }
    best = make(method.name, **exact[method.name])
    if "completion" in exact[method.name]:  # which knows how large inputs are, but no more
        stats = Stats(count=40, gram=stats.gram.diagonal().diag())
    place = site(weight, stats)
    errors = [
        float(output_error(weight - best.solve(place, units).weights["layer"], stats.gram))
        for units in best.profile(0, place).units[:-1].tolist()
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


@layerwise
def test_reads_only_what_it_says(method):
    weight, stats = layer(8, 12)
    for variant in variants(method):
        assert variant.surveys() | variant.reads() <= {"gram", "mean", "absmean", "peak"}
        seen = {part: getattr(stats, part) for part in variant.surveys()}
        profile = variant.profile(0, site(weight, Stats(count=40, **seen)))
        whole = variant.profile(0, site(weight, stats))
        assert profile.bytes.tolist() == whole.bytes.tolist()
        assert torch.equal(profile.error, whole.error)
        assert profile.figure == whole.figure
        seen = {part: getattr(stats, part) for part in variant.reads()}
        less = variant.solve(site(weight, Stats(count=40, **seen)), 2)
        assert torch.equal(
            less.weights["layer"], variant.solve(site(weight, stats), 2).weights["layer"]
        )


@layerwise
def test_every_field_matters(method):
    weight, stats = layer(16, 24)
    place = site(weight, stats)
    sites = [
        site(*layer(16 + 8 * (i % 3), 24, seed=i))._replace(path=f"layer{i}") for i in range(5)
    ]
    for i, each in enumerate(sites):
        each.module.weight.data *= 3.0 ** (i % 4)
        each.module.weight.data[:i] *= 10

    def outcome(variant):
        profiles = [p for i, each in enumerate(sites) for p in variant.profiles(i, [each])]
        plan = variant.plan(profiles, sum(int(p.bytes[-1]) for p in profiles) * 7 // 10)
        solved = variant.solve(place, 2)
        return plan, solved.weights["layer"]

    for axis, base in AXES.items():
        if axis not in type(method).model_fields:
            continue
        found = [
            outcome(make(method.name, **{"rounds": 1, axis: {"name": name}}))
            if "rounds" in type(method).model_fields
            else outcome(make(method.name, **{axis: {"name": name}}))
            for name in leaves(base)
        ]
        for i, one in enumerate(found):
            for other in found[:i]:
                assert one[0] != other[0] or not torch.equal(one[1], other[1]), axis
    if "rounds" in type(method).model_fields:
        now = outcome(method)[1]
        assert any(not torch.equal(outcome(o)[1], now) for o in others(method, "rounds"))


@layerwise
def test_plan_and_changes(method):
    sites = [site(*layer(16, 24, seed=seed))._replace(path=f"layer{seed}") for seed in range(3)]
    profiles = method.profiles(0, sites)
    assert [profile.path for profile in profiles] == ["layer0", "layer1", "layer2"]
    dense = sum(int(profile.bytes[-1]) for profile in profiles)
    plan = method.plan(profiles, dense * 6 // 10)
    chosen = method.allocation.levels(profiles, dense * 6 // 10)
    for profile, level in zip(profiles, chosen, strict=True):
        last = level == len(profile.units) - 1
        assert plan[profile.path] == (None if last else int(profile.units[level]))
    assert method.plan(profiles, dense) == dict.fromkeys(plan)
    plan["layer1"] = None
    solved = method.changes(sites, plan)
    assert [list(each.weights) for each in solved] == [["layer0"], ["layer2"]]
    assert [edit.module for each in solved for edit, _ in each.changes] == ["layer0", "layer2"]


@layerwise
def test_pure(method):
    weight, stats = layer(8, 12)
    place = site(weight, stats)
    before = place.module.weight.detach().clone(), stats.gram.clone()
    first, again = method.solve(place, 3), method.solve(place, 3)
    assert torch.equal(first.weights["layer"], again.weights["layer"])
    assert torch.equal(place.module.weight, before[0])
    assert torch.equal(stats.gram, before[1])
    assert not first.weights["layer"].requires_grad
    assert type(method).model_validate_json(method.model_dump_json()) == method


@layerwise
def test_errors_name_the_layer(method):
    weight, stats = layer(8, 12)
    gram = stats.gram.clone()
    gram[0, 0] = torch.nan
    bad = Stats(count=40, gram=gram, absmean=stats.absmean)
    parts = {"allocation": {"name": "spectral"}}
    if method.name == "sparse":
        parts["prune"] = {"name": "obs"}
    strict = make(method.name, **parts)
    with pytest.raises(NotFinite, match=r"^layer: Gram matrix holds NaN"):
        strict.profiles(0, [site(weight, bad)])
    with pytest.raises(NotFinite, match=r"^layer: Gram matrix holds NaN"):
        strict.changes([site(weight, bad)], {"layer": 2})


@torch.no_grad()
def test_low_rank_error_is_the_profile_s():
    weight, stats = layer(8, 12)
    low_rank = make("low_rank", factor={"name": "whitened", "damping": 0})
    profile = low_rank.profile(0, site(weight, stats))
    for units, promised in zip(profile.units[:-1].tolist(), profile.error, strict=False):
        now = low_rank.solve(site(weight, stats), units).weights["layer"]
        assert float(output_error(weight - now, stats.gram)) == pytest.approx(float(promised))


@torch.no_grad()
@pytest.mark.parametrize("factor", list(leaves(Factor)))
def test_factors_are_cut_as_well_as_their_product(factor):
    """Same singular values as the dense product, and no rank-r matrix has a smaller error."""
    _, stats = layer(8, 12)
    second, first = layer(8, 5)[0], layer(5, 12, seed=1)[0]
    exact = {"damping": 0} if factor == "whitened" else {}
    low_rank = make("low_rank", factor={"name": factor} | exact)
    product, cut = site(second @ first, stats), site(second @ first, stats)
    cut.module.bias.copy_(product.module.bias)
    edit = Edit(module="layer", rank=5)
    solved = Solved([(edit, {"first.weight": first, "second.weight": second})], {})
    cut = cut._replace(module=become(cut, solved))
    dense, thin = low_rank.profile(0, product), low_rank.profile(0, cut)
    assert thin.units.tolist() == [1, 2, 3, 4, 5]
    assert thin.bytes.tolist() == [rank * (8 + 12) * 8 for rank in thin.units.tolist()]
    assert thin.energy == pytest.approx(dense.energy, rel=1e-10)
    wanted = dense.error[: len(thin.error) - 1]  # the dense one has fewer ranks that save bytes
    torch.testing.assert_close(thin.error[: len(wanted)], wanted, rtol=1e-9, atol=1e-10)
    assert thin.error[-1] == 0
    lower = np.linalg.cholesky(stats.gram.numpy())
    spectrum = np.linalg.svd((second @ first).numpy() @ lower, compute_uv=False) ** 2
    for units in (1, 2, 3, 4):
        made = low_rank.solve(cut, units)
        assert sum(t.nbytes for _, ts in made.changes for t in ts.values()) == units * 160
        now = made.weights["layer"]
        torch.testing.assert_close(now, low_rank.solve(product, units).weights["layer"])
        error = float(output_error(second @ first - now, stats.gram))
        assert error >= sum(spectrum[units:]) * (1 - 1e-9)
        assert error == pytest.approx(sum(spectrum[units:]), rel=1e-9) or factor != "whitened"
        again = become(cut, made)
        assert torch.equal(again.bias, product.module.bias)
        assert type(again.first) is type(again.second) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("pattern", list(leaves(Pattern)))
def test_sparse_error_is_the_profile_s_for_uncorrelated_inputs(pattern):
    weight, stats = layer(8, 12)
    stats = Stats(count=40, gram=stats.gram.diagonal().diag())
    sparse = make("sparse", pattern={"name": pattern}, allocation={"name": "lamp"})
    profile = sparse.profile(0, site(weight, stats))
    for units, promised in zip(profile.units[:-1].tolist(), profile.error, strict=False):
        now = sparse.solve(site(weight, stats), units).weights["layer"]
        assert float(output_error(weight - now, stats.gram)) == pytest.approx(float(promised))


@torch.no_grad()
def test_rounds_find_better_masks():
    weight, stats = layer(64, 48, 400)
    errors = []
    for rounds in (1, 2, 8):
        now = make("sparse", rounds=rounds).solve(site(weight, stats), 20).weights["layer"]
        assert ((now != 0).sum(1) == 20).all()
        errors.append(float(output_error(weight - now, stats.gram)))
    assert errors[0] > 1.02 * errors[1] > 1.02 * errors[2]


SPARSEGPT = {"prune": {"name": "obs"}, "update": {"name": "obs"}, "rounds": 1}


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 8, 10, 24, 100])
def test_a_sweep_in_blocks_is_sparsegpt(block):
    weight, stats = layer(6, 24, 100)
    place = site(weight, stats)
    now = make("sparse", **SPARSEGPT, block=block).solve(place, 9).weights["layer"]
    swept = oracle("compress/method/sparse", "swept")
    wanted = swept(weight.numpy(), 9, stats.gram.numpy(), block, 0.01)
    assert ((now != 0).sum(1) == 9).all()
    np.testing.assert_allclose(now.numpy(), wanted, rtol=1e-6, atol=1e-9)
    one = make("sparse", **SPARSEGPT).solve(place, 9).weights["layer"]
    assert torch.equal(one, now) == (block >= 24)


@torch.no_grad()
def test_masks_chosen_on_the_way_are_better():
    for seed in range(4):
        weight, stats = layer(64, 96, 400, seed=seed)

        def error(block, place=site(weight, stats)):
            solved = make("sparse", **SPARSEGPT, block=block).solve(place, 40)
            dense = place.module.weight
            return float(output_error(dense - solved.weights["layer"], place.stats.gram))

        assert error(32) < 0.95 * error(None)


@torch.no_grad()
def test_layers_that_share_an_input_share_its_inverse(monkeypatch):
    made = []
    monkeypatch.setattr(statistics, "inverse_root", lambda *a: made.append(a) or inverse_root(*a))
    method = make("sparse", **SPARSEGPT | {"rounds": 3})
    (one, stats), (other, _) = layer(), layer(seed=1)
    method.solve(site(one, stats), 5)
    found = method.solve(site(other, stats), 5).weights["layer"]
    assert len(made) == 1
    assert torch.equal(found, method.solve(site(other, replace(stats)), 5).weights["layer"])
    assert len(made) == 2


@torch.no_grad()
def test_a_sweep_keeps_n_of_every_m():
    weight, stats = layer(8, 24)
    sparse = make("sparse", **SPARSEGPT, block=8, pattern={"name": "n_m", "n": 2, "m": 4})
    keep = sparse.solve(site(weight, stats), 2).weights["layer"] != 0
    assert (keep.reshape(8, 6, 4).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds": 2}, "set rounds to 1"),
        ({"pattern": {"name": "rows"}}, "pattern rows spans all columns"),
        ({"pattern": {"name": "n_m", "n": 2, "m": 3}}, "multiple of the pattern's m"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        make("sparse", **{"rounds": 1, "block": 8} | wrong)


def test_too_small_to_shrink_stays_dense():
    weight, stats = layer(2, 2)
    profile = make("low_rank").profile(0, site(weight, stats))
    assert profile.units.tolist() == [2]
    assert profile.bytes.tolist() == [32]
    assert make("low_rank").plan([profile], 32) == {"layer": None}
