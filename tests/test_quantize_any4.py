"""Learned tables: k-means never errs more, few values are exact, rows are stored and looked up."""

import pytest
import tiny
import torch
from quantize_cases import fields, mask, neighbours, oracle, stats, weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from drawplate import edits
from drawplate.core import hf
from drawplate.core.artifact import publish
from drawplate.core.method import leaves
from drawplate.core.pack import unpack
from drawplate.quantize.driver import Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, learn

ANY4 = leaves(Grid)["any4"]()
OTHERS = [leaves(Grid)["integer"](range="symmetric"), leaves(Grid)["nf4"]()]
few_bits = pytest.mark.parametrize("bits", [2, 3, 4])


def groups(rows=6, count=8, size=16, seed=0):
    weight = weights(rows, count, size, seed=seed)
    return weight, weights(count, size, seed=seed + 50).abs() + 0.01


def sorted_rows(weight, importance, bits):
    """Scaled weights of each row in rising order and what they count, as k-means gets them."""
    scale = ANY4.fit(weight, bits, importance)[0].unsqueeze(-1).double()
    value, order = (weight / scale).flatten(1).sort(1)
    return value, (importance * scale.square()).flatten(1).gather(1, order)


def row_loss(grid, weight, bits, importance, levels=None):
    return grid.lay(weight, bits, importance, levels)[0].sum(-1)


@few_bits
@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("grid", [ANY4, *(o for _, some in neighbours(ANY4) for o in some[1:2])])
def test_oracle(grid, size, bits):
    """Rows of 24 weights share a table, those of 96 have their own."""
    weight, importance = groups(rows=2, size=size, seed=bits)
    levels = grid.learn(weight, bits, importance)
    want = oracle(grid).learn(weight.tolist(), importance.tolist(), bits, **fields(grid))
    assert levels.dtype == torch.float32
    assert torch.allclose(levels, torch.tensor(want), rtol=1e-3, atol=1e-9)
    assert levels.shape == ((2, 2**bits) if size == 12 else (2**bits,))


@few_bits
def test_more_rounds_never_hurt_from_any_start(bits):
    value, mass = sorted_rows(*groups(), bits)
    own = [ANY4.levels(bits), *(other.levels(bits) for other in OTHERS[1:])]
    starts = [table.double().expand(len(value), -1) for table in own]
    for start in [*starts, ANY4.farthest(value, mass, 2**bits)]:
        last = ANY4.loss(value, mass, start)
        for rounds in (1, 2, 3, 5, 8, 20):
            moved = ANY4.model_copy(update={"rounds": rounds}).refine(value, mass, start)
            loss = ANY4.loss(value, mass, moved)
            assert bool((loss <= last * (1 + 1e-12)).all())
            assert bool((moved.diff(dim=1) >= 0).all())
            assert bool((moved == 0).any(1).all())
            last = loss
        assert bool((last < ANY4.loss(value, mass, start)).all()) or start is not starts[0]


@few_bits
@pytest.mark.parametrize("other", OTHERS, ids=lambda grid: grid.name)
def test_no_row_errs_more_than_on_a_fixed_grid(other, bits):
    for seed in range(4):
        weight, importance = groups(seed=seed)
        levels = ANY4.learn(weight, bits, importance)
        mine = row_loss(ANY4, weight, bits, importance, levels)
        assert bool((mine < row_loss(other, weight, bits, importance)).all())


@few_bits
def test_a_row_of_few_values_is_exact(bits):
    """Zero and 2^b - 1 others, which float16 holds as shares of the largest: 1."""
    draw = torch.Generator().manual_seed(bits)
    for seed in range(5):
        values = torch.randint(-1023, 1024, (4, 2**bits - 2), generator=draw) / 1024
        values = torch.cat([values, torch.ones(4, 1), torch.zeros(4, 1)], 1).double()
        codes = torch.randint(0, 2**bits, (4, 160), generator=draw)
        weight = values.gather(1, codes).view(4, 10, 16)
        weight[..., 0] = 1  # every group has the same largest value, hence the same scale
        exact = ANY4.model_copy(update={"search": 1})
        levels = exact.learn(weight, bits, weights(10, 16, seed=seed).abs() + 0.01)
        scale, _ = exact.fit(weight, bits, None, levels)
        code = exact.encode(weight, levels.double(), scale.unsqueeze(-1), None)
        assert torch.equal(exact.decode(code, levels.double(), scale.unsqueeze(-1), None), weight)


@few_bits
def test_rows_stand_alone_and_tables_fit_float16(bits):
    weight, importance = groups(size=16)
    levels = ANY4.learn(weight, bits, importance)
    assert torch.equal(levels.half().float(), levels)
    for some in (slice(0, 2), slice(2, 6)):
        assert torch.equal(ANY4.learn(weight[some], bits, importance), levels[some])
    assert torch.equal(ANY4.learn(weight * 64, bits, importance), levels)


def test_pruned_weights_stay_pruned():
    weight, record, keep = weights(5, 48), stats(48), mask(5, 48)
    levels = learn(ANY4, weight * keep, 3, 12, record)
    assert levels.shape == (5, 8)
    for leaf in leaves(Round).values():
        rounded = leaf().solve(weight, record, ANY4, 3, 12, keep, levels)
        assert bool((rounded.weight()[~keep] == 0).all())
        some = leaf().solve(weight[1:3], record, ANY4, 3, 12, keep[1:3], levels[1:3])
        assert torch.equal(some.codes, rounded.codes[1:3])
        assert torch.equal(some.weight(), rounded.weight()[1:3])


def test_inputs_that_never_fire_count_for_nothing():
    weight, importance = groups()
    weight[..., 0] = 1  # the range stays what it is
    importance[:, ::2] = 0
    importance[:, 0] = 1
    other = weight.clone()
    other[..., 2::2] /= 3
    levels = ANY4.learn(weight, 3, importance)
    assert torch.allclose(ANY4.learn(other, 3, importance), levels, rtol=1e-3)
    nothing = ANY4.learn(torch.zeros(2, 4, 16), 3, torch.zeros(4, 16))
    assert bool(nothing.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama_untied", "gpt2"])
def test_tables_of_rows_are_stored_counted_and_looked_up(tmp_path, kind, dtype):
    with publish(tmp_path / "wide", "model") as folder:
        hf.save(tiny.model(kind).to(dtype), folder)
    model = hf.load(tmp_path / "wide")
    params = Quantize(bits=2, group=8, vocabulary=2, grid=ANY4, round={"name": "nearest"})
    ledger = quantize(model, tiny.tokens(), params)
    with publish(tmp_path / "packed", "model") as folder:
        hf.save(model, folder)
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in saved.values()) == ledger.bytes_after
    again = hf.load(tmp_path / "packed")
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        ids = tiny.tokens()
        # Products in bfloat16 may differ by where in memory the same numbers lie.
        near = 0.0 if dtype is torch.float32 else 0.02
        one, other = model(input_ids=ids).logits, again(input_ids=ids).logits
        torch.testing.assert_close(one, other, rtol=0, atol=near)
    for layer in ledger.layers:
        module = model.get_submodule(layer.path)
        rows, groups_ = module.scale.shape
        spec = next(edit for edit in edits.of(model) if edit.module == layer.path)
        assert spec.tables
        assert (module.levels.shape, module.levels.dtype) == ((rows, 4), torch.float16)
        width = getattr(module, "in_features", None) or module.embedding_dim
        bias = getattr(module, "bias", None)
        assert layer.bytes_after == (
            rows * width // 4
            + rows * 4 * 2
            + rows * groups_ * dtype.itemsize
            + (0 if bias is None else bias.nbytes)
        )


def test_eight_bits_take_less_than_sixteen():
    """Tables of 256 levels for rows of 512 would take as much as their codes."""
    shape = {"hidden_size": 512, "intermediate_size": 32, "num_attention_heads": 1, "head_dim": 32}
    config = LlamaConfig(vocab_size=96, num_hidden_layers=1, **shape)
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    params = Quantize(bits=8, grid=ANY4, round={"name": "nearest"})
    ledger = quantize(model, tiny.tokens(), params)
    assert all(layer.bytes_after < layer.bytes_before for layer in ledger.layers)
    assert ledger.bytes_after < ledger.bytes_before


def test_the_product_by_lookup_is_the_product_with_the_decoded_matrix():
    """Inputs are summed by code first and multiplied by the row's table last."""
    model = tiny.model()
    quantize(model, tiny.tokens(), Quantize(bits=4, group=64, grid=ANY4))
    layer = model.model.layers[0].mlp.down_proj
    out, into = layer.out_features, layer.in_features
    assert layer.levels.shape == (out, 16)
    x = torch.randn(5, into, generator=torch.Generator().manual_seed(0))
    codes = unpack(layer.codes, 4, out * into).view(out, into).long()
    sums = torch.zeros(5, out, 16).scatter_add(
        2, codes.expand(5, -1, -1), x.unsqueeze(1).expand(-1, out, -1)
    )
    y = (sums * layer.levels.float()).sum(-1) * layer.scale.squeeze(1)
    assert torch.allclose(layer(x), y, rtol=1e-4, atol=1e-5)


def test_a_model_errs_less_than_on_fixed_grids():
    errors = {}
    for name in ("any4", "nf4", "integer"):
        params = Quantize(bits=4, group=64, grid={"name": name}, round={"name": "nearest"})
        ledger = quantize(tiny.model(), tiny.tokens(), params)
        errors[name] = sum(layer.weight_error for layer in ledger.layers)
    assert errors["any4"] < min(errors["nf4"], errors["integer"])
