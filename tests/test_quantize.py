"""The quantize driver: everything is found, counted to the byte, resumable, and loads again."""

import copy
import re
from pathlib import Path

import pytest
import tiny
import torch
from pydantic import ValidationError
from quantize_cases import neighbours
from safetensors import safe_open

from drawplate import edits
from drawplate.core import hf
from drawplate.core.artifact import publish
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.edits import sparse
from drawplate.edits.low_rank import LowRank
from drawplate.edits.quantized import QuantizedLinear
from drawplate.edits.quantized_embedding import QuantizedTable, TiedHead
from drawplate.quantize import driver
from drawplate.quantize.driver import Ledger, Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round

NEAREST = Quantize(round={"name": "nearest"}, group=8)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def equal(one, other):
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[k], yours[k]) for k in mine)


def sparse_layer(model, path):
    weight = edits.matrix(model.get_submodule(path)).detach()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.view(len(weight), -1, 4)[..., [0, 2]] = True
    edit = sparse.Sparse(module=path, kept=int(keep.sum()), n=2, m=4)
    edits.apply(model, edit, sparse.tensors(weight, keep))
    return keep


def low_rank_layer(model, path, rank=5):
    weight = edits.matrix(model.get_submodule(path)).detach()
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    tensors = {"first.weight": V[:rank], "second.weight": U[:, :rank] * S[:rank]}
    edits.apply(model, LowRank(module=path, rank=rank), tensors)


@pytest.mark.parametrize("grid", list(leaves(Grid)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama_untied", "gpt2"])
def test_saved_bytes_are_the_counted_ones_and_load_again(tmp_path, kind, dtype, grid):
    model = tiny.model(kind)
    with publish(tmp_path / "wide", "model") as folder:
        hf.save(model.to(dtype), folder)
    model = hf.load(tmp_path / "wide")
    params = Quantize(bits=3, group=5, grid={"name": grid})
    ledger = quantize(model, tiny.tokens(), params)
    assert ledger.kept == (("transformer.wpe",) if kind == "gpt2" else ())
    with publish(tmp_path / "packed", "model") as folder:
        hf.save(model, folder)
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert sum(saved.values()) == ledger.bytes_after
    for layer in ledger.layers:
        own = [size for name, size in saved.items() if name.startswith(f"{layer.path}.")]
        assert sum(own) == layer.bytes_after
        assert layer.bytes_after < layer.bytes_before
    again = hf.load(tmp_path / "packed")
    assert equal(model, again)
    assert torch.equal(logits(model, tiny.tokens()), logits(again, tiny.tokens()))


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_all_architectures_are_quantized_whole_and_eight_bits_change_little(kind):
    model, tokens = tiny.model(kind), tiny.tokens()
    before, size = logits(model, tokens), hf.stored_bytes(model)
    ledger = quantize(model, tokens, Quantize(bits=8, group=16))
    assert not edits.linears(model)
    assert set(ledger.kept) <= {"transformer.wpe"}
    assert ledger.bytes_before == size
    assert ledger.bytes_after == hf.stored_bytes(model) < size
    assert ledger.ratio == 1 - ledger.bytes_after / size
    assert float((logits(model, tokens) - before).norm() / before.norm()) < 0.05
    assert all(layer.bits == 8 and layer.group == 16 for layer in ledger.layers)


@pytest.mark.parametrize("kind", tiny.OTHERS)
def test_routers_experts_and_scaled_tables_stay_and_are_told(kind):
    model, tokens = tiny.model(kind), tiny.tokens()
    before = logits(model, tokens)
    matrices = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    params = Quantize(bits=8, group=16)
    if kind == "gemma3":
        with pytest.raises(
            UserError, match=r"^model.embed_tokens: a Gemma3\w+ is no plain emb.*: null$"
        ):
            quantize(model, tokens, params)
        params = params.model_copy(update={"vocabulary": None})
    ledger = quantize(model, tokens, params)
    left = {"phimoe": ".router", "gemma3": "model.embed_tokens"}.get(kind, "none")
    assert not any(layer.path.endswith(left) for layer in ledger.layers)
    assert not edits.linears(model)
    told = {*ledger.kept, *(layer.path for layer in ledger.layers)}
    assert {name.rpartition(".")[0] for name in matrices} <= told
    assert float((logits(model, tokens) - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("kind", ["llama", "llama_untied"])
def test_vocabulary(kind):
    tied = kind == "llama"
    model = tiny.model(kind)
    ledger = quantize(model, tiny.tokens(), NEAREST.model_copy(update={"vocabulary": 4}))
    paths = [layer.path for layer in ledger.layers]
    assert ("lm_head" in paths) is not tied
    assert isinstance(model.lm_head, TiedHead if tied else QuantizedLinear)
    assert model.model.embed_tokens.bits == 4
    widths = {layer.path: layer.bits for layer in ledger.layers}
    assert widths["model.embed_tokens"] == 4
    assert tied or widths["lm_head"] == 4
    model = tiny.model(kind)
    ledger = quantize(model, tiny.tokens(), NEAREST.model_copy(update={"vocabulary": None}))
    assert "lm_head" in ledger.kept
    assert "model.embed_tokens" in ledger.kept
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_table_rows_err_by_half_a_step():
    model = tiny.model()
    table = model.model.embed_tokens.weight.detach().clone()
    params = Quantize(group=8, vocabulary=4, grid={"name": "integer", "search": 1})
    ledger = quantize(model, tiny.tokens(), params)
    new = model.model.embed_tokens
    assert isinstance(new, QuantizedTable)
    step = new.scale.detach().repeat_interleave(8, 1)
    assert bool(((new(torch.arange(96)) - table).abs() <= step / 2 * (1 + 1e-5)).all())
    share = (new(torch.arange(96)) - table).square().sum() / table.square().sum()
    assert ledger.layers[0].weight_error == pytest.approx(float(share), rel=1e-4)
    assert ledger.layers[0].activation_error is None


@pytest.mark.parametrize("name", list(leaves(Round)))
def test_ledger_tells_the_errors_on_the_inputs_that_the_quantized_model_has(name):
    model, tokens = tiny.model(), tiny.tokens()
    old = {path: edits.matrix(module).detach() for path, module in edits.linears(model).items()}
    ledger = quantize(model, tokens, Quantize(bits=2, group=8, round={"name": name}))
    inputs = {}
    for path in old:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0].reshape(-1, args[0].shape[-1])})
        )
    logits(model, tokens)
    checked = 0
    for layer in ledger.layers[1:]:
        weight, new = old[layer.path], edits.matrix(model.get_submodule(layer.path))
        share = (new - weight).square().sum() / weight.square().sum()
        assert layer.weight_error == pytest.approx(float(share), rel=1e-4)
        if layer.path.endswith(("q_proj", "k_proj", "v_proj")):  # later ones saw unquantized ones
            x = inputs[layer.path]
            gram = x.T @ x / len(x)
            share = output_error(new - weight, gram) / output_error(weight, gram)
            assert layer.activation_error == pytest.approx(float(share), rel=1e-3)
            checked += 1
    assert checked == 6


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("rotate", ["unchanged", "hadamard"])
def test_ledger_tells_the_errors_of_what_a_model_in_bfloat16_computes_with(bits, rotate):
    model = tiny.model("llama_untied").bfloat16()
    linears = edits.linears(model)
    old = {path: edits.matrix(module).detach().float() for path, module in linears.items()}
    params = Quantize(bits=bits, group=8, rotate={"name": rotate})
    for layer in quantize(model, tiny.tokens(), params).layers:
        if layer.path in old:
            weight, module = old[layer.path], model.get_submodule(layer.path)
            if rotate == "unchanged":
                new = module.matrix().detach().float()
            else:
                new = module.rotation().dense(module.core.matrix().detach().float())
            share = (new - weight).double().square().sum() / weight.double().square().sum()
            assert layer.weight_error == pytest.approx(float(share), rel=1e-5)


def test_gptq_errs_less_than_nearest():
    errors = {}
    for name in ("nearest", "gptq"):
        ledger = quantize(tiny.model(), tiny.tokens(), Quantize(bits=2, round={"name": name}))
        errors[name] = [layer.activation_error for layer in ledger.layers[1:]]
    less = [a < b for a, b in zip(errors["gptq"], errors["nearest"], strict=True)]
    assert sum(less) >= 12
    assert len(less) == 14


def test_factors_and_surviving_weights_stay_what_they_are(tmp_path):
    model, down = tiny.model(), "model.layers.0.mlp.down_proj"
    low_rank_layer(model, "model.layers.1.mlp.up_proj")
    keep = sparse_layer(model, down)
    beside = sparse_layer(
        model, "model.layers.1.self_attn.k_proj"
    )  # q and v, dense, share its input
    ledger = quantize(model, tiny.tokens(), Quantize(bits=4, group=12))
    paths = [layer.path for layer in ledger.layers]
    assert "model.layers.1.mlp.up_proj.first" in paths
    assert "model.layers.1.mlp.up_proj.second" in paths
    assert ledger.kept == ()
    for path, mask in ((down, keep), ("model.layers.1.self_attn.k_proj", beside)):
        layer = model.get_submodule(path)
        assert torch.equal(layer.keep(), mask)
        assert bool((layer.matrix()[~mask] == 0).all())
        assert layer.codes.numel() == -(-4 * int(mask.sum()) // 8)
    spec = [edit for edit in edits.of(model) if edit.module == down][-1]
    assert (spec.n, spec.m) == (2, 4)
    with publish(tmp_path / "packed", "model") as folder:
        hf.save(model, folder)
    again = hf.load(tmp_path / "packed")
    assert torch.equal(logits(again, tiny.tokens()), logits(model, tiny.tokens()))
    assert (
        sum(safe.nbytes for safe in again.state_dict().values())
        == ledger.bytes_after
        == hf.stored_bytes(again)
    )


def test_layers_that_share_an_input_are_solved_as_if_alone():
    together = tiny.model()
    quantize(together, tiny.tokens(), Quantize(bits=3, group=8))
    apart = tiny.model()
    only = {"*.layers.0.self_attn.k_proj": 3, "*": None}
    ledger = quantize(apart, tiny.tokens(), Quantize(bits=3, group=8, overrides=only))
    assert [layer.path for layer in ledger.layers] == ["model.layers.0.self_attn.k_proj"]
    # The embedding is quantized in one and not in the other: give both the same statistics.
    apart = tiny.model()
    only = {"*.layers.0.self_attn.k_proj": 3, "*embed_tokens": 8, "*": None}
    quantize(apart, tiny.tokens(), Quantize(bits=3, group=8, overrides=only))
    one, other = (m.model.layers[0].self_attn.k_proj for m in (together, apart))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def test_rows_may_be_rounded_some_at_a_time(monkeypatch):
    whole, parts = tiny.model(), tiny.model()
    sparse_layer(whole, "model.layers.0.mlp.down_proj")
    sparse_layer(parts, "model.layers.0.mlp.down_proj")
    first = quantize(whole, tiny.tokens(), Quantize(group=8))
    monkeypatch.setattr(driver, "_CHUNK", 32 * 7)
    second = quantize(parts, tiny.tokens(), Quantize(group=8))
    assert equal(whole, parts)
    assert first == second


def test_overrides():
    model = tiny.model("llama_untied")
    overrides = {"*.layers.0.mlp.*": 8, "*.mlp.*": 2, "lm_head": 4, "*.v_proj": None}
    ledger = quantize(model, tiny.tokens(), Quantize(bits=3, group=8, overrides=overrides))
    widths = {layer.path: layer.bits for layer in ledger.layers}
    assert widths["model.layers.0.mlp.up_proj"] == 8
    assert widths["model.layers.1.mlp.up_proj"] == 2
    assert widths["model.layers.1.self_attn.q_proj"] == 3
    assert widths["lm_head"] == 4
    assert widths["model.embed_tokens"] == 8
    assert ledger.kept == ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    for path, bits in widths.items():
        assert model.get_submodule(path).bits == bits


def test_layers_that_stay_are_not_calibrated():
    model = tiny.model()
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"spare: .*never used.*quantize\.overrides"):
        quantize(copy.deepcopy(model), tiny.tokens(), NEAREST)
    ledger = quantize(
        model, tiny.tokens(), NEAREST.model_copy(update={"overrides": {"*.spare": None}})
    )
    assert ledger.kept == ("model.layers.1.mlp.spare",)


def test_one_group_a_row():
    model = tiny.model()
    quantize(model, tiny.tokens(), Quantize(group=None))
    assert model.model.layers[0].mlp.down_proj.scale.shape == (32, 1)
    assert model.model.layers[0].mlp.down_proj.group == 64
    assert model.model.embed_tokens.scale.shape == (96, 1)


def test_every_field_of_params_matters():
    def outcome(**given):
        model = tiny.model()
        quantize(model, tiny.tokens(2, 8), Quantize(**given))
        return model

    usual = outcome()
    changed = [
        {"bits": 3},
        {"group": 8},
        {"vocabulary": 4},
        {"overrides": {"*.q_proj": 8}},
        *(
            {"grid": grid}
            for leaf in leaves(Grid).values()
            for grid in [leaf()]
            if leaf.model_fields["name"].default != "integer"
        ),
        *(
            {"round": other.model_dump()}
            for _, some in neighbours(leaves(Round)["gptq"]())
            for other in some[:1]
        ),
    ]
    for given in changed:
        assert not equal(usual, outcome(**given)), given


def test_deterministic():
    one, other = tiny.model(), tiny.model()
    assert quantize(one, tiny.tokens(), Quantize()) == quantize(other, tiny.tokens(), Quantize())
    assert equal(one, other)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "llama_untied"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, kind):
    params, told = Quantize(bits=3, group=8), []

    def dies(step, total, metrics):
        told.append((step, total))
        if step == 1:
            raise _Killed

    with pytest.raises(_Killed):
        quantize(tiny.model(kind), tiny.tokens(), params, tmp_path, dies)
    resumed, whole = tiny.model(kind), tiny.model(kind)
    (first,) = tmp_path.glob("*/block-0000/manifest.json")
    stamp = first.stat().st_mtime_ns
    after = quantize(resumed, tiny.tokens(), params, tmp_path)
    assert first.stat().st_mtime_ns == stamp
    assert after == quantize(whole, tiny.tokens(), params)
    assert equal(resumed, whole)
    assert told == [(1, 2 if kind == "llama" else 3)]
    other = tiny.model(kind)
    quantize(other, tiny.tokens(), Quantize(bits=2, group=8), tmp_path)  # not taken for the first
    assert other.model.layers[0].self_attn.q_proj.bits == 2


def test_ledger_is_written_and_read():
    ledger = quantize(tiny.model(), tiny.tokens(), NEAREST)
    assert Ledger.model_validate_json(ledger.model_dump_json()) == ledger


@pytest.mark.parametrize("path", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_a_weight_that_is_no_number_is_named(path):
    model = tiny.model()
    with torch.no_grad():
        model.get_submodule(path).weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=re.escape(f"{path}: its weight holds NaN or infinity")):
        quantize(model, tiny.tokens(), Quantize())


def test_what_cannot_be_is_refused_in_one_line():
    model = tiny.model()
    with pytest.raises(UserError, match=r"overrides: '\*.w_proj' matches no layer; they are named"):
        quantize(model, tiny.tokens(), Quantize(overrides={"*.w_proj": 8}))
    with pytest.raises(UserError, match="no layer is left to quantize"):
        quantize(model, tiny.tokens(), Quantize(overrides={"*": None}))
    quantize(model, tiny.tokens(), Quantize())
    with pytest.raises(UserError, match="QuantizedTable is no plain embedding table"):
        quantize(model, tiny.tokens(), Quantize())
    with pytest.raises(UserError, match="no layer is left to quantize"):
        quantize(model, tiny.tokens(), Quantize(vocabulary=None))
    for wrong in ({"bits": 5}, {"group": 0}, {"grid": {"name": "int"}}, {"width": 4}):
        with pytest.raises(ValidationError):
            Quantize.model_validate(wrong)


def test_scales_that_the_model_cannot_store_are_refused():
    model = tiny.model().half()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2.0**-18)
    with pytest.raises(UserError, match=r"q_proj: its scales, .* do not fit torch.float16"):
        quantize(model, tiny.tokens(), Quantize())


def test_the_work_folder_holds_nothing_else(tmp_path: Path):
    quantize(tiny.model(), tiny.tokens(), NEAREST, tmp_path)
    (own,) = tmp_path.iterdir()
    assert sorted(folder.name for folder in own.iterdir()) == ["block-0000", "block-0001"]
