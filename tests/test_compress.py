"""The driver: bytes, ledger, hand-over, resume, and refusals, on tiny decoders."""

import copy
from math import floor

import pytest
import torch

from drawplate import edits
from drawplate.compress.driver import Compress, Ledger, compress
from drawplate.compress.layerwise import dense
from drawplate.compress.method import Compression
from drawplate.core.blocks import Site
from drawplate.core.errors import DrawplateError, NotFinite, UserError
from drawplate.core.hf import blocks, load, save, stored_bytes
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from drawplate.edits import low_rank as low_rank_edit
from drawplate.edits.quantized import QuantizedLinear
from drawplate.quantize.driver import Quantize, quantize
from tests import tiny

SPECS = {
    "low_rank": {"name": "low_rank"},
    "svd": {"name": "low_rank", "factor": {"name": "svd"}, "allocation": {"name": "uniform"}},
    "sparse": {"name": "sparse"},
    "sparsegpt": {
        "name": "sparse",
        "prune": {"name": "obs"},
        "update": {"name": "obs"},
        "allocation": {"name": "owl"},
    },
    "lamp": {
        "name": "sparse",
        "prune": {"name": "magnitude"},
        "update": {"name": "unchanged"},
        "allocation": {"name": "lamp"},
        "pattern": {"name": "unstructured", "within": "layer"},
    },
    "two_of_four": {"name": "sparse", "pattern": {"name": "n_m"}},
    "rows": {"name": "sparse", "pattern": {"name": "rows"}},
    "columns": {"name": "sparse", "pattern": {"name": "columns"}},
    "apart": {"name": "low_rank_sparse"},
    "greedy": {"name": "sparse", "update": {"name": "greedy_blocks", "steps": 4}},
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(model, spec=None, ratio=0.2, work=None, watch=None, **fields):
    params = Compress.model_validate(
        {"ratio": ratio, "method": spec or SPECS["low_rank"], **fields}
    )
    extra = {"watch": watch} if watch else {}
    return compress(model, tiny.tokens(), params, work, batch=4, **extra)


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


@each_spec
@pytest.mark.parametrize("ratio", [0.1, 0.25])
def test_bytes_are_met_from_below(spec, ratio):
    model = tiny.model()
    before = stored_bytes(model)
    ledger = run(model, spec, ratio)
    assert ledger.bytes_before == before
    assert ledger.bytes_after == stored_bytes(model)
    assert ledger.bytes_after <= floor((1 - ratio) * before)
    assert ledger.ratio == pytest.approx(1 - stored_bytes(model) / before)
    changes = sum(row.bytes_after - row.bytes_before for row in ledger.rows)
    assert changes == ledger.bytes_after - before
    largest = max(row.bytes_before - row.bytes_after for row in ledger.rows)
    factors = 4 * (64 + 32)
    step = {"low_rank": factors, "low_rank_sparse": factors, "n_m": largest}.get(
        spec.get("pattern", spec)["name"], 4 * 64
    )
    assert floor((1 - ratio) * before) - ledger.bytes_after < step


@each_spec
def test_ledger_says_what_happened(spec):
    model = tiny.model()
    original = copy.deepcopy(model)
    ledger = run(model, spec)
    assert [row.path for row in ledger.rows] == list(edits.linears(original))
    for row in ledger.rows:
        now, old = model.get_submodule(row.path), original.get_submodule(row.path)
        dense, weight = edits.matrix(now).detach().double(), old.weight.detach().double()
        assert (row.rows, row.columns) == tuple(weight.shape)
        assert row.block == int(row.path.split(".")[2])
        assert row.sparsity == pytest.approx(float((dense == 0).double().mean()))
        error = (dense - weight).square().sum() / weight.square().sum()
        assert row.weight_error == pytest.approx(float(error), rel=1e-4, abs=1e-9)
        stored = [t for name, t in now.state_dict().items() if "bias" not in name]
        assert row.bytes_after == sum(t.nbytes for t in stored)
        assert row.bytes_before == weight.numel() * 4
        assert row.seconds >= 0
        if not row.edit:
            assert row.units == min(row.rows, row.columns)
            assert row.activation_error == row.weight_error == 0
        elif row.edit == "low_rank":
            assert now.first.weight.shape[0] == row.units
    assert "seconds" not in ledger.model_dump_json()
    assert {row.edit for row in ledger.rows} <= {edit.name for edit in edits.of(model)} | {""}
    read = Ledger.model_validate_json(ledger.model_dump_json())
    assert read.model_dump() == ledger.model_dump()
    mean = sum(row.activation_error for row in ledger.rows) / len(ledger.rows)
    assert ledger.activation_error == pytest.approx(mean)


@pytest.mark.parametrize("name", ["low_rank", "sparse"])
def test_activation_error_is_measured_on_what_the_layer_really_reads(name):
    """In block 1 the inputs are those that the compressed block 0 gives."""
    model = tiny.model()
    original = copy.deepcopy(model)
    spec = {**SPECS[name], "allocation": {"name": "uniform"}}
    ledger = run(model, spec, exclude=("*.1.self_attn.[kvo]_proj", "*.1.mlp.*"))
    path = "model.layers.1.self_attn.q_proj"
    (row,) = (row for row in ledger.rows if row.path == path)
    inputs = []
    layer = model.get_submodule(path)
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(model)
    x = inputs[0].reshape(-1, 32).double()
    weight = original.get_submodule(path).weight.detach().double()
    lost = x @ (weight - edits.matrix(layer).detach().double()).T
    error = float(lost.square().sum() / (x @ weight.T).square().sum())
    assert row.activation_error == pytest.approx(error, rel=1e-3)
    assert error > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in tiny.CONFIGS for name in ("low_rank", "sparse")]
    + [(kind, name) for kind in ("llama", "gpt2") for name in ("two_of_four", "rows")],
)
def test_any_decoder_and_back_from_disk(tmp_path, name, kind):
    model = tiny.model(kind)
    ledger = run(model, SPECS[name], 0.15)
    assert 0.15 <= ledger.ratio < 0.2
    edits.check(model)
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_nothing_to_remove_changes_nothing():
    model = tiny.model()
    original = copy.deepcopy(model)
    ledger = run(model, ratio=0)
    assert same(model, original)
    assert ledger.ratio == 0
    assert edits.of(model) == ()
    assert all(row.edit == "" and row.activation_error == 0 for row in ledger.rows)


@each_spec
def test_same_inputs_same_bytes(spec):
    one, other = tiny.model(), tiny.model()
    first, second = run(one, spec), run(other, spec)
    assert same(one, other)
    assert first.model_dump() == second.model_dump()


def test_a_larger_ratio_costs_more():
    errors = [run(tiny.model(), ratio=ratio).activation_error for ratio in (0.1, 0.2, 0.4)]
    assert errors[0] < errors[1] < errors[2]


def test_whitening_loses_less_than_plain_svd():
    def error(factor):
        spec = {"name": "low_rank", "factor": {"name": factor}, "allocation": {"name": "uniform"}}
        return run(tiny.model(), spec, 0.3).activation_error

    assert error("whitened") < 0.9 * error("svd")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["low_rank", "sparsegpt"])
@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_resumes_with_the_same_bytes(tmp_path, monkeypatch, name, last):
    whole = tiny.model()
    expected = run(whole, SPECS[name], work=tmp_path / "whole")

    def stop(step, total, metrics):
        assert total == 4
        if step == last:
            raise Killed

    with pytest.raises(Killed):
        run(tiny.model(), SPECS[name], work=tmp_path / "cut", watch=stop)
    leaf = leaves(Compression)[SPECS[name]["name"]]
    solve, profile = leaf.solve, leaf.profile
    solved, profiled = [], []
    monkeypatch.setattr(leaf, "solve", lambda s, *a: (solved.append(a[0].path), solve(s, *a))[1])
    monkeypatch.setattr(
        leaf, "profile", lambda s, *a: (profiled.append(a[1].path), profile(s, *a))[1]
    )
    again = tiny.model()
    ledger = run(again, SPECS[name], work=tmp_path / "cut")
    assert same(again, whole)
    assert ledger.model_dump() == expected.model_dump()
    finished = max(0, last - 2)
    assert {int(path.split(".")[2]) for path in solved} == set(range(finished, 2))
    assert bool(profiled) == (last <= 2)


def test_cutting_factors_further_resumes_too(tmp_path):
    def stop(step, total, metrics):
        if step == 3:
            raise Killed

    whole, cut, again = (tiny.model().bfloat16() for _ in range(3))
    for model in (whole, cut, again):
        run(model, ratio=0.2)
    expected = run(whole, ratio=0.1)
    with pytest.raises(Killed):
        run(cut, ratio=0.1, work=tmp_path, watch=stop)
    assert run(again, ratio=0.1, work=tmp_path).model_dump() == expected.model_dump()
    assert same(again, whole)
    edits.check(again)


def test_work_of_other_inputs_is_not_taken_up(tmp_path):
    run(tiny.model(), ratio=0.3, work=tmp_path)
    model, fresh = tiny.model(), tiny.model()
    run(model, ratio=0.2, work=tmp_path)
    run(fresh, ratio=0.2)
    assert same(model, fresh)
    other, fresh = tiny.model(seed=1), tiny.model(seed=1)
    run(other, ratio=0.2, work=tmp_path)
    run(fresh, ratio=0.2)
    assert same(other, fresh)
    params = Compress(ratio=0.2)
    moved, fresh = tiny.model(), tiny.model()
    compress(moved, tiny.tokens(seed=1), params, tmp_path)
    compress(fresh, tiny.tokens(seed=1), params)
    assert same(moved, fresh)
    assert len(list(tmp_path.iterdir())) == 4


def test_fields_of_the_stage_do_not_spoil_the_work(tmp_path):
    class Wider(Compress):
        more: int = 0

    run(tiny.model(), work=tmp_path)
    compress(
        tiny.model(), tiny.tokens(), Wider(ratio=0.2, method=SPECS["low_rank"], more=3), tmp_path
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_plan_is_made_anew(tmp_path):
    expected = tiny.model()
    run(expected, work=tmp_path)
    (plan,) = tmp_path.glob("*/plan/plan.json")
    plan.chmod(0o644)
    plan.write_text("{}")
    for block in tmp_path.glob("*/block-0001/*"):
        block.chmod(0o644)
        block.write_bytes(b"x")
    again = tiny.model()
    run(again, work=tmp_path)
    assert same(again, expected)


def test_watch_counts_both_passes():
    seen = []
    run(tiny.model(), watch=lambda step, total, metrics: seen.append((step, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seen.clear()
    run(tiny.model(), SPECS["lamp"], watch=lambda step, total, metrics: seen.append((step, total)))
    assert seen == [(3, 4), (4, 4)]  # magnitudes need no calibration


@pytest.mark.parametrize("name", list(SPECS))
def test_an_impossible_ratio_names_the_largest_possible(name):
    with pytest.raises(UserError, match=r"ratio 0\.95 cannot be reached") as caught:
        run(tiny.model(), SPECS[name], 0.95)
    most = float(str(caught.value).split("at most ")[1].split(" ")[0])
    model = tiny.model()
    assert most <= run(model, SPECS[name], most).ratio < most + 2e-4
    with pytest.raises(UserError, match="cannot be reached"):
        run(tiny.model(), SPECS[name], most + 2e-4)


def test_exclude():
    model = tiny.model()
    original = copy.deepcopy(model)
    ledger = run(model, ratio=0.1, exclude=("*.down_proj", "model.layers.0.*"))
    assert all(row.block == 1 and "down_proj" not in row.path for row in ledger.rows)
    assert len(ledger.rows) == 6
    kept = original.model.layers[1].mlp.down_proj.weight
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, kept)
    with pytest.raises(UserError, match=r"'\*\.upproj' matches no linear layer; there are for"):
        run(tiny.model(), exclude=("*.upproj",))
    with pytest.raises(UserError, match="no linear layer is left"):
        run(tiny.model(), exclude=("*",))


@pytest.mark.parametrize("spec", ["low_rank", "sparse", "lamp", "shared"])
def test_a_layer_that_is_never_used_may_be_left_out(spec):
    model = tiny.model()
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    spec = SPECS.get(spec, {"name": spec})
    if spec != SPECS["lamp"]:  # which reads no inputs before it solves
        with pytest.raises(UserError, match=r"spare: .* leave it out by compress\.exclude"):
            run(copy.deepcopy(model), spec, 0.1)
    assert not any("spare" in row.path for row in run(model, spec, 0.1, exclude=("*.spare",)).rows)


@pytest.mark.parametrize("name", ["low_rank", "lamp", "sparsegpt"])
def test_head(tmp_path, name):
    model = tiny.model("llama_untied")
    ledger = run(model, SPECS[name], 0.3, head=True)
    assert ledger.rows[-1].path == "lm_head"
    assert ledger.rows[-1].block == -1
    assert ledger.rows[-1].edit
    assert ledger.bytes_after == stored_bytes(model)
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    plain = tiny.model("llama_untied")
    assert all(row.path != "lm_head" for row in run(plain, SPECS[name], 0.3).rows)
    with pytest.raises(UserError, match=r"compress\.head: the output head shares"):
        run(tiny.model(), head=True)


@pytest.mark.parametrize("kind", ["llama", "llama_untied"])
def test_the_head_of_a_model_whose_embedding_is_quantized(kind):
    model = tiny.model(kind)
    left = ["*_proj"] if kind == "llama" else ["*_proj", "lm_head"]
    quantize(model, tiny.tokens(), Quantize(overrides=dict.fromkeys(left)))
    if kind == "llama":
        with pytest.raises(UserError, match=r"compress\.head: the output head shares"):
            compress(model, tiny.tokens(), Compress(head=True))
    else:
        assert compress(model, tiny.tokens(), Compress(head=True)).rows[-1].path == "lm_head"


def test_hand_over():
    model = tiny.model()
    run(model, ratio=0.1)
    factors = stored_bytes(model)
    with pytest.raises(UserError, match=r"_proj is already low_rank: method shared cannot"):
        run(model, {"name": "shared"}, 0.1)
    ledger = run(model, SPECS["sparse"], 0.1)  # factors may be pruned
    assert any(row.path.endswith(".first") and row.edit == "sparse" for row in ledger.rows)
    assert ledger.bytes_before == factors
    edits.check(model)
    for name in ("sparse", "low_rank"):
        with pytest.raises(UserError, match="already"):
            run(model, SPECS[name], 0.1)
    sliced = tiny.model()
    run(sliced, SPECS["columns"], 0.1)
    assert run(sliced, SPECS["low_rank"], 0.1).ratio >= 0.1  # a smaller layer may be factored
    run(sliced, SPECS["low_rank"], 0.1)
    model = tiny.model()
    run(model, ratio=0.1)
    run(model, SPECS["columns"], 0.1)
    with pytest.raises(UserError, match=r"_proj is already two factors, and those were edited"):
        run(model, ratio=0.1)


@pytest.mark.parametrize("head", [False, True])
def test_factors_are_cut_further(tmp_path, head):
    """Both budgets are of what was stored; the second edit takes the place of the first."""
    model = tiny.model("llama_untied")
    run(model, ratio=0.2, head=head)
    factors, earlier, whole = stored_bytes(model), edits.of(model), copy.deepcopy(model)
    ranks = {edit.module: edit.rank for edit in earlier}
    ledger = run(model, ratio=0.1, head=head)
    assert ledger.bytes_before == factors
    assert ledger.bytes_after == stored_bytes(model) <= floor(0.9 * factors)
    changes = sum(row.bytes_after - row.bytes_before for row in ledger.rows)
    assert changes == ledger.bytes_after - factors
    assert floor(0.9 * factors) - ledger.bytes_after < 4 * (96 + 32)
    new = edits.of(model)[len(earlier) :]
    assert edits.of(model)[: len(earlier)] == earlier
    assert {edit.module for edit in new} & ranks.keys()
    assert all(edit.rank < ranks.get(edit.module, 32) for edit in new)
    for row in ledger.rows:
        now, old = model.get_submodule(row.path), whole.get_submodule(row.path)
        assert row.bytes_before == edits.weight_bytes(old)
        assert row.bytes_after == edits.weight_bytes(now)
        assert row.edit or row.units == ranks.get(row.path, min(row.rows, row.columns))
        assert not any(hasattr(now, name + ".first") for name in ("first", "second"))
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_factors_in_sixteen_bits_are_multiplied_in_more():
    model = tiny.model().bfloat16()
    run(model)
    path = edits.of(model)[0].module
    pair = model.get_submodule(path)
    product = pair.second.weight.double() @ pair.first.weight.double()
    found = dense(Site(path, pair, Stats(count=0))).double()
    assert (found - product).norm() < 1e-6 * product.norm()


def test_a_head_of_factors_stays_where_it_is_not_asked_for():
    model = tiny.model("llama_untied")
    run(model, ratio=0.2, head=True)
    kept = copy.deepcopy(model.lm_head)
    run(model, ratio=0.1)
    assert same(model.lm_head, kept)


@pytest.mark.parametrize("name", ["low_rank", "low_rank_sparse", "shared", "columns", "sparse"])
def test_a_compressed_head_is_never_made_dense_again(name):
    """Later stages keep its kind and add no bytes, or refuse."""
    first = tiny.model("llama_untied")
    run(first, SPECS.get(name, {"name": name}), 0.3, head=True)
    kind, size = type(first.lm_head), edits.weight_bytes(first.lm_head)
    assert issubclass(kind, edits.StandIn)

    def pack(model, **fields):
        quantize(model, tiny.tokens(), Quantize(**fields))

    model = copy.deepcopy(first)
    if name == "sparse":
        pack(model)
        assert isinstance(model.lm_head, QuantizedLinear)
        assert int(model.lm_head.keep().sum()) == first.lm_head.values.numel()
        assert edits.weight_bytes(model.lm_head) < size
    else:
        with pytest.raises(UserError, match=r"lm_head: the output head is a .*\{lm_head: null\}"):
            pack(model)
        assert same(model, first)
        pack(model, overrides={"lm_head": None})
        assert same(model.lm_head, first.lm_head)
    with pytest.raises(UserError, match=r"already(.*cannot follow|, .*compress\.head$)"):
        run(first, SPECS["sparse"], 0.1, head=True)


def test_a_broken_promise_is_refused_before_work():
    model = tiny.model()
    run(model, SPECS["two_of_four"])
    path = edits.of(model)[0].module
    model.get_submodule(path).mask.fill_(255)
    with pytest.raises(DrawplateError, match=path):
        run(model, SPECS["low_rank"], 0.1)


def test_not_finite_names_the_layer():
    model = tiny.model()
    path = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(path).weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"model\.layers\.1"):
        run(model)


def test_tokens_must_be_rows():
    with pytest.raises(UserError, match=r"calibration needs token rows \[N, T\]"):
        compress(tiny.model(), torch.ones(4, dtype=torch.long), Compress())


def test_rows_longer_than_the_model_reads_are_refused():
    for stage in (compress, quantize):
        params = Compress() if stage is compress else Quantize()
        name = rf"{stage.__name__}\.calibration\.length: rows of 65 tokens.* at most 64"
        with pytest.raises(UserError, match=name):
            stage(tiny.model("gpt2"), tiny.tokens(2, 65), params)
        stage(tiny.model("gpt2"), tiny.tokens(2, 64), params)


def test_bfloat16():
    model = tiny.model().bfloat16()
    before = stored_bytes(model)
    ledger = run(model, ratio=0.2)
    assert ledger.bytes_after == stored_bytes(model) <= 0.8 * before
    edited = model.get_submodule(edits.of(model)[0].module)
    assert isinstance(edited, low_rank_edit.LowRankLinear)
    assert edited.first.weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_params_are_checked():
    for bad in ({"ratio": 1.0}, {"ratio": -0.1}, {"rate": 0.1}, {"method": {"name": "magic"}}):
        with pytest.raises(ValueError, match="validation error"):
            Compress.model_validate(bad)
    assert Compress.model_validate_json(Compress().model_dump_json()) == Compress()
    assert len(blocks(tiny.model())[1]) == 2
