"""Layers that share a factor: guarantee, bytes, folder, and every stage after it."""

import copy
import json
import subprocess
import sys
from math import floor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drawplate import edits
from drawplate.compress import joint
from drawplate.compress.driver import Compress, compress
from drawplate.compress.factor import Factor
from drawplate.compress.grouping import Grouping
from drawplate.compress.grouping.exact import Exact
from drawplate.compress.method.shared import Shared
from drawplate.compress.recover import chosen, recover
from drawplate.core.blocks import Site
from drawplate.core.errors import Damaged, UserError
from drawplate.core.hf import load, save, stored_bytes
from drawplate.core.method import leaves
from drawplate.edits.shared import Shared as Edit
from drawplate.edits.shared import SharedLinear
from drawplate.evaluate.cost import macs
from drawplate.evaluate.cost import stored_bytes as bytes_of_folder
from drawplate.quantize.driver import Quantize, quantize
from drawplate.rl.adapt.full import Full
from drawplate.rl.adapt.lora import Lora
from tests import test_compress_recover as recovery
from tests import tiny
from tests.compress_layers import layer, oracle

RESIDUAL = ("o_proj", "down_proj", "q_proj")
corpus = recovery.corpus
WEIGHTS = {"name": "svd"}
WHITENED = {"factor": {"name": "whitened"}}


def planted(kind="llama", rank=6, noise=0.01, seed=0):
    """A decoder whose layers with 32 outputs all write into one space of `rank` directions."""
    model = tiny.model(kind, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    basis = torch.linalg.qr(torch.randn(32, rank, generator=draw))[0]
    with torch.no_grad():
        for module in edits.linears(model).values():
            weight = edits.matrix(module)
            if len(weight) == 32:
                inside = basis @ torch.randn(rank, weight.shape[1], generator=draw) / 4
                weight.copy_(inside + noise * torch.randn(weight.shape, generator=draw))
    return model


def run(model, ratio=0.3, error=0.4, work=None, watch=None, exclude=(), **parts):
    method = {"name": "shared", "grouping": {"name": "incremental", "error": error}}
    method |= {"factor": WEIGHTS, **parts}
    params = Compress.model_validate({"ratio": ratio, "method": method, "exclude": exclude})
    extra = {"watch": watch} if watch else {}
    return compress(model, tiny.tokens(), params, work, batch=4, **extra)


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens(2, 9)).logits


def groups(ledger):
    return [group for group in ledger.groups if len(group.paths) > 1]


@pytest.mark.parametrize("grouping", leaves(Grouping))
def test_planted_layers_share_and_the_promise_holds(grouping):
    model = planted()
    original = copy.deepcopy(model)
    ledger = run(model, grouping={"name": grouping, "error": 0.4})
    (group,) = groups(ledger)
    assert {path.split(".")[-1] for path in group.paths} == set(RESIDUAL)
    assert len(group.paths) == 6
    for each in ledger.groups:
        lost = whole = 0.0
        for path in each.paths:
            old = edits.matrix(original.get_submodule(path)).detach().double()
            now = edits.matrix(model.get_submodule(path)).detach().double()
            lost, whole = lost + float((old - now).square().sum()), whole + float((old**2).sum())
        assert each.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
        assert each.error <= each.threshold == 0.4
        for path in each.paths:
            assert model.get_submodule(path).first.weight.shape[0] == each.rank


def test_the_group_s_error_is_in_units_of_the_output():
    """With whitening the promise is about E |(W - W') x|^2 on the model as it came."""
    model = planted()
    inputs, handles = {}, []
    for path, module in edits.linears(model).items():
        hook = lambda _, args, path=path: inputs.__setitem__(path, args[0])  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tiny.tokens())
    for handle in handles:
        handle.remove()
    original = copy.deepcopy(model)
    ledger = run(model, **WHITENED)
    assert groups(ledger)
    for each in ledger.groups:
        lost = whole = 0.0
        for path in each.paths:
            x = inputs[path].flatten(0, 1).double()
            old = edits.matrix(original.get_submodule(path)).detach().double()
            gap = old - edits.matrix(model.get_submodule(path)).detach().double()
            lost += float((x @ gap.T).square().sum())
            whole += float((x @ old.T).square().sum())
        assert each.error == pytest.approx((lost / whole) ** 0.5, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_met_from_below_and_counted_once(tmp_path, dtype):
    for ratio in (0.2, 0.3):
        model = planted().to(dtype)
        before = stored_bytes(model)
        ledger = run(model, ratio)
        assert ledger.bytes_before == before
        assert ledger.bytes_after == stored_bytes(model) <= floor((1 - ratio) * before)
        assert groups(ledger)
        changes = sum(row.bytes_after - row.bytes_before for row in ledger.rows)
        assert changes == ledger.bytes_after - before
        save(model, tmp_path / f"{ratio}")
        assert bytes_of_folder(tmp_path / f"{ratio}") == ledger.bytes_after
        names = load_file(tmp_path / f"{ratio}" / "model.safetensors")
        for group in ledger.groups:
            owners = [path for path in group.paths if f"{path}.second.weight" in names]
            assert owners == [group.paths[0]]


def test_fewer_bytes_than_layers_on_their_own_at_equal_error():
    """On planted weights, both as small as they get within 2 % error of the weights."""
    model = planted(noise=0.0)
    sites = [
        joint.Member(0, Site(path, module, None))
        for path, module in edits.linears(model).items()
        if edits.features(module)[0] == 32
    ]
    method = Shared.model_validate(
        {"name": "shared", "grouping": {"name": "exact", "error": 0.02}, "factor": WEIGHTS}
    )
    (pool,) = joint.pools(method, sites, 12_000)
    alone = [joint.pools(method, [one], 12_000)[0] for one in sites]
    assert int(pool.profile.units[0]) == 6
    assert all(int(one.profile.units[0]) == 6 for one in alone)
    together = int(pool.profile.bytes[0])
    apart = sum(int(one.profile.bytes[0]) for one in alone)
    assert together == 4 * 6 * (32 + 256)
    assert apart - together == 4 * 6 * 32 * 5
    best = run(planted(noise=0.0))
    alone = compress(
        planted(noise=0.0),
        tiny.tokens(),
        Compress.model_validate({"ratio": 0.3, "method": {"name": "low_rank", "factor": WEIGHTS}}),
    )
    assert sum(row.weight_error for row in best.rows) < sum(r.weight_error for r in alone.rows)


@pytest.mark.parametrize("grouping", leaves(Grouping))
def test_spaces_are_told_apart_even_by_a_loose_threshold(grouping):
    """Two planted spaces and layers that have none; at first all of them are one group."""
    draw = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(2, 32, 4, generator=draw))[0]
    members = []
    for number in range(9):
        weight = torch.randn(32, 32, generator=draw)
        if number < 6:
            weight = bases[number % 2] @ torch.randn(4, 32, generator=draw) + 1e-3 * weight
        module = torch.nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            module.weight.copy_(weight)
        members.append(joint.Member(0, Site(str(number), module, None)))
    method = Shared.model_validate(
        {"name": "shared", "grouping": {"name": grouping, "error": 1.0}, "factor": WEIGHTS}
    )
    found = joint.pools(method, members, 20_000)
    several = [{s.path for s in pool.sites} for pool in found if len(pool.sites) > 1]
    planted_ones = [{"0", "2", "4"}, {"1", "3", "5"}]
    assert several
    assert all(group in planted_ones for group in several)
    if grouping != "bound":  # which sees little of what noise hides
        assert several == planted_ones
    assert sum(len(pool.sites) for pool in found) == 9


def test_what_does_not_share_a_space_stays_alone():
    ledger = run(tiny.model(), 0.2, 0.6, **WHITENED)
    assert ledger.groups
    assert all(len(group.paths) == 1 for group in ledger.groups)
    assert all(group.error <= 0.6 for group in ledger.groups)


@pytest.mark.parametrize("factor", ["svd", "whitened"])
def test_oracle(factor):
    weights, stats = zip(*(layer(6, width, seed=width) for width in (8, 5, 9)), strict=True)
    made = []
    for number, weight in enumerate(weights):
        module = torch.nn.Linear(weight.shape[1], 6, dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(weight)
        made.append(joint.Member(number, Site(f"l{number}", module, stats[number])))
    method = Shared.model_validate(
        {
            "name": "shared",
            "factor": {"name": factor},
            "grouping": {"name": "exact", "error": 1.0},
            "allocation": {"name": "lamp"},
        }
    )
    grams = [np.eye(len(each.gram)) for each in stats]
    if factor == "whitened":
        grams = [each.gram.numpy() for each in stats]
    pool = joint._pool(method, made, [joint._scaled(method, one.site) for one in made])
    rank = int(pool.profile.units[-2])
    now, error = oracle("compress/method/shared")(
        [w.numpy() for w in weights], grams, rank, 1e-6 if factor == "whitened" else 0.0
    )
    shares = joint.Shares(method, [pool], int(pool.profile.bytes[-2]))
    assert shares.plan == dict.fromkeys(("l0", "l1", "l2"), rank)
    for number, wanted in enumerate(now):
        found = shares.solved[f"l{number}"].weights[f"l{number}"]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-10)
    assert shares.groups[0].error == pytest.approx(error, rel=1e-9)
    assert float(pool.profile.error[-2]) == pytest.approx(error**2 * pool.energy, rel=1e-9)


def test_every_field_matters():
    found = {
        "default": run(planted()),
        "factor": run(planted(), **WHITENED),
        "allocation": run(planted(), allocation={"name": "uniform"}),
        "grouping": run(planted(), error=0.9),
    }
    found = {name: ledger.model_dump_json() for name, ledger in found.items()}
    assert len(set(found.values())) == len(found)
    assert set(Shared.model_fields) == {"name", "grouping", "allocation", "factor"}
    assert len(leaves(Factor)) == 3


def test_the_threshold_or_the_ratio_gives_way_in_words():
    for make in (tiny.model, planted):
        with pytest.raises(UserError, match=r"grouping\.error above 0\.3 allows more") as caught:
            run(make(), 0.6, 0.3)
        most = float(str(caught.value).split("at most ")[1].split(" ")[0])
        assert most <= run(make(), most, 0.3).ratio < most + 2e-3
        with pytest.raises(UserError, match="cannot be reached"):
            run(make(), most + 2e-4, 0.3)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "phi"])
def test_any_decoder_and_back_from_disk(tmp_path, kind):
    model = planted(kind)
    ledger = run(model)
    assert groups(ledger)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    save(again, tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


FRESH = """
import sys, torch, drawplate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2], weights_only=True)
torch.save(model(ids).logits.detach(), sys.argv[3])
"""


def test_a_fresh_process_loads_the_folder_quantized_and_adapted_too(tmp_path):
    model = planted("qwen2")
    assert groups(run(model))
    half = stored_bytes(model)
    quantized = quantize(model, tiny.tokens(), Quantize(group=8), batch=4)
    assert quantized.bytes_after == stored_bytes(model) < half
    assert any(row.path.endswith(".second") for row in quantized.layers)
    Lora(rank=2).install(model, 0)
    save(model, tmp_path / "model")
    ids = tiny.tokens(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", FRESH]
    command += [str(tmp_path / name) for name in ("model", "ids.pt", "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.set_num_threads(1)  # sums over more threads round otherwise
    assert torch.equal(found, logits(model))


def test_an_edit_of_the_lender_s_factor_is_one_for_all():
    model = planted()
    (group,) = groups(run(model))
    lender, borrower = (model.get_submodule(group.paths[i]) for i in (0, -1))
    with torch.no_grad():
        lender.second.weight.zero_()
    assert not edits.matrix(borrower).any()
    twin = copy.deepcopy(model)
    other = twin.get_submodule(group.paths[-1])
    assert other.left is twin.get_submodule(group.paths[0]).second
    assert other.left is not lender.second


def test_gradients_of_all_who_share_add_up():
    model = planted()
    (group,) = groups(run(model))
    model.requires_grad_(False)
    factor = model.get_submodule(group.paths[0]).second.weight.requires_grad_(True)
    model(tiny.tokens(2, 8)).logits.square().mean().backward()
    step, found = 1e-2 * factor.grad / factor.grad.norm(), []
    with torch.no_grad():
        for sign in (1, -2):
            factor.add_(sign * step)
            found.append(float(model(tiny.tokens(2, 8)).logits.double().square().mean()))
    assert found[0] - found[1] == pytest.approx(2e-2 * float(factor.grad.norm()), rel=2e-2)
    borrower = model.get_submodule(group.paths[-1])
    assert edits.trained(borrower)  # so that no dense copy of it is made while training
    with edits.materialized(model, whole=True):
        assert borrower.dense is None
    with torch.no_grad(), edits.materialized(model, whole=True):
        assert borrower.dense is not None


def test_training_sees_the_factor_once():
    model = planted()
    (group,) = groups(run(model))
    names = [name for name, _ in model.named_parameters() if name.endswith("second.weight")]
    assert f"{group.paths[0]}.second.weight" in names
    assert not any(f"{path}.second.weight" in names for path in group.paths[1:])
    assert set(names) <= chosen(model, "changed")
    assert set(names) <= set(Full().install(model, 0))


def test_recovery_trains_the_factor_for_all(corpus, tmp_path):
    model = planted()
    parent = copy.deepcopy(model)
    (group,) = groups(run(model))
    size, lender = stored_bytes(model), model.get_submodule(group.paths[0])
    before = lender.second.weight.detach().clone()
    outcome = recover(model, parent, corpus, recovery.settings(8), tmp_path / "work")
    first = json.loads(outcome.metrics.read_text().splitlines()[0])
    assert outcome.last["loss"] < first["loss"]
    assert not torch.equal(lender.second.weight, before)
    assert stored_bytes(model) == size
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_head(tmp_path):
    model = tiny.model("llama_untied")
    method = {"name": "shared", "grouping": {"name": "exact", "error": 0.9}}
    params = Compress.model_validate({"ratio": 0.4, "method": method, "head": True})
    ledger = compress(model, tiny.tokens(), params, batch=4)
    assert ledger.rows[-1].path == "lm_head"
    assert ledger.rows[-1].edit == "shared"
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_layer_without_a_possible_partner_is_not_sketched(monkeypatch):
    """An output head has as many rows as the vocabulary: W W^T of it may not fit."""
    sketched, sketch = [], Exact.sketch

    def watched(self, matrix, rank):
        sketched.append(len(matrix))
        return sketch(self, matrix, rank)

    monkeypatch.setattr(Exact, "sketch", watched)
    method = {"name": "shared", "grouping": {"name": "exact", "error": 0.9}}
    params = Compress.model_validate({"ratio": 0.4, "method": method, "head": True})
    model = tiny.model("llama_untied")
    compress(model, tiny.tokens(), params, batch=4)
    assert sketched
    assert model.config.vocab_size not in sketched


def test_macs_are_those_of_two_factors_each():
    model = planted()
    before = macs(model)
    ledger = run(model)
    saved = sum(
        row.rows * row.columns - row.units * (row.rows + row.columns)
        for row in ledger.rows
        if row.edit
    )
    assert before - macs(model) == saved


def test_ledger_rows_and_groups_agree():
    model = planted()
    ledger = run(model)
    inside = {path: group.rank for group in ledger.groups for path in group.paths}
    for row in ledger.rows:
        assert (row.path in inside) == (row.edit == "shared")
        assert row.units == inside.get(row.path, min(row.rows, row.columns))
        now = model.get_submodule(row.path)
        stored = [t for name, t in now.state_dict().items() if "bias" not in name]
        assert row.bytes_after == sum(t.nbytes for t in stored)
    dumped = json.loads(ledger.model_dump_json())
    assert dumped["groups"][0]["threshold"] == 0.4


def test_no_ratio_and_left_out_layers():
    model = planted()
    before = copy.deepcopy(model).state_dict()
    ledger = run(model, 0)
    assert ledger.groups == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ledger = run(planted(), 0.1, exclude=("*.down_proj",))
    assert not any(path.endswith("down_proj") for g in ledger.groups for path in g.paths)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("last", [1, 3])
def test_same_inputs_same_bytes_and_resumes(tmp_path, last):
    whole = planted()
    expected = run(whole, work=tmp_path / "whole", **WHITENED)

    def stop(step, total, metrics):
        assert total == 4
        if step == last:
            raise Killed

    with pytest.raises(Killed):
        run(planted(), work=tmp_path / "cut", watch=stop, **WHITENED)
    again = planted()
    ledger = run(again, work=tmp_path / "cut", **WHITENED)
    assert ledger.model_dump() == expected.model_dump()
    one, other = again.state_dict(), whole.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["shared", "low_rank", "low_rank_sparse", "slice"])
def test_who_cannot_follow_says_so(name):
    model = planted()
    run(model)
    with pytest.raises(UserError, match=f"is already shared: method {name} cannot follow"):
        compress(
            model,
            tiny.tokens(),
            Compress.model_validate({"ratio": 0.1, "method": {"name": name}}),
        )


def test_factors_may_be_pruned():
    model = planted()
    (group,) = groups(run(model))
    how = Compress.model_validate({"ratio": 0.15, "method": {"name": "sparse"}})
    ledger = compress(model, tiny.tokens(), how, batch=4)
    assert any(row.path == f"{group.paths[0]}.second" and row.edit for row in ledger.rows)
    assert logits(model).isfinite().all()


def test_specs_that_do_not_fit_are_refused(tmp_path):
    model = planted()
    (group,) = groups(run(model))
    first, second = group.paths[:2]
    path = "model.layers.0.self_attn.k_proj"
    with pytest.raises(Damaged, match="stores no factor that it could lend"):
        Edit(module=path, rank=3, lender=second).install(model)
    spec = next(edit for edit in edits.of(model) if edit.module == second)
    for broken in (spec.model_copy(update={"lender": None}), spec.model_copy(update={"rank": 99})):
        with pytest.raises(Damaged, match=second):
            broken.check(model.get_submodule(second))
    with pytest.raises(Damaged, match="expected own factors"):
        Edit(module=path, rank=3).check(model.get_submodule(path))
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["edits"][0]["lender"] = "model.norm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Damaged, match="stores no factor"):
        load(tmp_path)
    assert isinstance(model.get_submodule(first), SharedLinear)
