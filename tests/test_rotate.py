"""Laws of every rotation: orthogonal, undone exactly, drawn from its generators alone."""

import subprocess
import sys
from dataclasses import replace
from typing import Annotated

import pytest
import tiny
import torch
from laws import law
from pydantic import TypeAdapter
from quantize_cases import fields, neighbours, oracle, stats, weights
from safetensors import safe_open

from drawplate import edits
from drawplate.core import hf
from drawplate.core.artifact import publish
from drawplate.core.errors import UserError
from drawplate.core.linalg import output_error
from drawplate.core.method import OneOf, leaves
from drawplate.core.rotation import Hadamard, Kronecker, factors, walsh
from drawplate.core.stats import Stats
from drawplate.edits import sparse
from drawplate.edits._rotated import RotatedLinear
from drawplate.quantize.driver import Quantize, quantize
from drawplate.quantize.grid import Grid
from drawplate.quantize.rotate import Rotate
from drawplate.quantize.round import Round

SHAPES = [(1, 1), (3, 5), (8, 16), (12, 20), (7, 64), (37, 24)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
ANY = [
    variant for leaf in leaves(Rotate).values() if len(leaf.model_fields) > 1
    for _, some in neighbours(leaf()) for variant in some
]  # fmt: skip
TURNING = [*(leaf() for leaf in leaves(Rotate).values() if leaf.refills), *ANY]
turning = pytest.mark.parametrize("rotate", TURNING, ids=str)


def random(seed):
    return torch.Generator().manual_seed(seed)


def drawn(method, shape=(8, 16), seed=0):
    """A weight, its statistics and its rotation, all in float64."""
    weight, record = weights(*shape, seed=seed), stats(shape[1], seed=seed)
    return weight, record, method.rotation(weight, record, random(seed), random(seed + 1))


def tensors(turn):
    return None if turn is None else turn._asdict()


def same(one, other):
    """Whether two rotations hold the same numbers."""
    pairs = []
    for mine, yours in zip(one, other, strict=True):
        if not isinstance(mine, torch.Tensor | None):
            pairs += zip(mine, yours, strict=True) if type(mine) is type(yours) else [(mine, None)]
        else:
            pairs.append((mine, yours))
    return all(a is b is None or (b is not None and torch.equal(a, b)) for a, b in pairs)


@every_shape
@law(Rotate)
def test_turns_are_orthogonal(method, shape):
    rotation = drawn(method, shape)[2]
    for turn, width in ((rotation.inputs, shape[1]), (rotation.outputs, shape[0])):
        if turn is None:
            continue
        x = weights(5, width, seed=3)
        for way in (turn.ahead, turn.back):
            assert torch.allclose(way(x).norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
            products = way(x) @ way(x).T
            assert torch.allclose(products, x @ x.T, rtol=0, atol=1e-12)
        assert torch.allclose(turn.back(turn.ahead(x)), x, rtol=0, atol=1e-13)
        assert torch.allclose(turn.ahead(turn.back(x)), x, rtol=0, atol=1e-13)


@every_shape
@law(Rotate)
def test_undone_and_the_layer_computes_what_it_did(method, shape):
    weight, record, rotation = drawn(method, shape)
    turned = rotation.weight(weight)
    assert turned.shape == weight.shape
    assert turned.dtype == weight.dtype
    assert torch.allclose(rotation.dense(turned), weight, rtol=0, atol=1e-12)
    x = weights(2, 3, shape[1], seed=4)
    y = rotation.leave(rotation.enter(x) @ turned.T)
    assert torch.allclose(y, x @ weight.T, rtol=1e-11, atol=1e-12)
    difference = weights(*shape, seed=5)
    before = output_error(rotation.dense(difference), record.gram)
    after = output_error(difference, rotation.gram(record.gram))
    assert float(after) == pytest.approx(float(before), rel=1e-10)


@law(Rotate)
def test_single_precision_is_close(method):
    weight, _, rotation = drawn(method, (24, 40))
    exact, single = rotation.weight(weight), rotation.weight(weight.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-6)


@law(Rotate)
def test_inputs_turn_alike_whatever_the_weight(method):
    """Layers that read the same input may share one Gram matrix, unless it is rescaled."""
    record = stats(16)
    one = method.rotation(weights(8, 16), record, random(0), random(1))
    other = method.rotation(weights(3, 16, seed=1), record, random(0), random(2))
    assert same((one.inputs,), (other.inputs,))


@law(Rotate)
def test_equal_seeds_give_equal_turns_and_others_do_not(method):
    weight, record = weights(12, 20), stats(20)
    before = weight.clone(), record.gram.clone()
    one, again, other = (
        method.rotation(weight, record, random(a), random(b)) for a, b in ((0, 1), (0, 1), (2, 3))
    )
    assert same(one, again)
    assert same(one, other) is not type(method).refills
    assert torch.equal(weight, before[0])
    assert torch.equal(record.gram, before[1])


@law(Rotate)
def test_dumps_and_loads(method):
    again = TypeAdapter(Annotated[Rotate, OneOf()]).validate_python(method.model_dump())
    assert again == method


@law(Rotate)
def test_every_field_matters(method):
    for name, others in neighbours(method):
        changed = [drawn(other)[2] for other in others]
        assert not all(same(drawn(method)[2], one) for one in changed), name


@every_shape
@pytest.mark.parametrize("method", [*(leaf() for leaf in leaves(Rotate).values()), *ANY], ids=str)
def test_oracle(method, shape):
    weight, record, rotation = drawn(method, shape, seed=7)
    before, after, d, turned, gram = oracle(method).reference(
        weight.numpy(),
        record.gram.numpy(),
        inputs=tensors(rotation.inputs),
        outputs=tensors(rotation.outputs),
        **fields(method),
    )
    close = {"rtol": 1e-10, "atol": 1e-11}
    assert torch.allclose(rotation.weight(weight), torch.from_numpy(turned), **close)
    assert torch.allclose(rotation.gram(record.gram), torch.from_numpy(gram), **close)
    eye = torch.eye(shape[1], dtype=torch.float64)
    assert torch.allclose(rotation.enter(eye).T, torch.from_numpy(before / d), **close)
    eye = torch.eye(shape[0], dtype=torch.float64)
    assert torch.allclose(rotation.leave(eye), torch.from_numpy(after), **close)


def test_zero_energies_give_no_infinite_stretch():
    balanced = leaves(Rotate)["random"]()
    weight, gram = weights(4, 6), stats(6).gram.clone()
    weight[:, 1], gram[2], gram[:, 2] = 0, 0, 0
    for w, g in ((weight, gram), (torch.zeros(4, 6), gram), (weight, torch.zeros(6, 6))):
        stretch = balanced.rotation(w, Stats(1, g), random(0), random(1)).stretch
        assert bool(stretch.isfinite().all())
        assert float(stretch.log().mean()) == pytest.approx(0, abs=1e-6)


def test_the_stretch_has_the_least_bound_of_all():
    """tr(D^-1 H D^-1) |W D|^2 over other positive diagonals."""
    weight, record, rotation = drawn(leaves(Rotate)["random"](), (6, 10))

    def bound(d):
        return float((record.gram.diagonal() / d**2).sum() * (weight * d).square().sum())

    least = bound(rotation.stretch)
    draw = random(0)
    for size in (0.01, 0.3, 1.0):
        for _ in range(20):
            step = torch.randn(10, generator=draw, dtype=torch.float64) * size
            assert bound(rotation.stretch * step.exp()) >= least
    assert least < bound(torch.ones(10))


def test_factors_are_next_to_the_root():
    widths = [1, 12, 13, 64, 96]
    assert [factors(width) for width in widths] == [(1, 1), (3, 4), (1, 13), (8, 8), (8, 12)]


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_walsh_rows_are_orthogonal(width):
    matrix = walsh(width)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, width * torch.eye(width))


@pytest.mark.parametrize("width", [24, 33, 63, 64, 127])
@turning
def test_an_outlier_is_spread(rotate, width):
    """A lone entry becomes a row whose largest entry is a small share of it, wherever it stood."""
    for place in (0, 1, width // 2, width - 1):
        weight = torch.zeros(4, width, dtype=torch.float64)
        weight[1, place] = 1
        record = Stats(1, torch.eye(width, dtype=torch.float64))
        found = []
        for seed in range(5):
            rotation = rotate.rotation(weight, record, random(seed), random(seed + 1))
            turned = rotation._replace(stretch=None).weight(weight)
            found.append(float(turned.abs().max()))
        assert sum(found) / 5 < 0.75


@turning
@pytest.mark.parametrize(("name", "bits"), [("gptq", 2), ("gptq", 3), ("nearest", 3)])
def test_weights_with_outliers_err_less_when_turned(rotate, bits, name):
    """Rounding to nearest knows no correlations, so there the inputs have none."""
    method, grid = leaves(Round)[name](), leaves(Grid)["integer"]()
    wins = 0
    for seed in range(10):
        weight, record = weights(32, 64, seed=seed), stats(64, seed=seed)
        if "order" not in fields(method):
            record = Stats(1, torch.eye(64, dtype=torch.float64))
        draw = random(seed)
        spots = torch.randint(32 * 64, (24,), generator=draw)
        weight.view(-1)[spots] *= 12
        rotation = rotate.rotation(weight, record, random(seed), random(seed + 1))
        turned = Stats(record.count, rotation.gram(record.gram))
        plain = method.solve(weight, record, grid, bits, 64).weight()
        inside = method.solve(rotation.weight(weight), turned, grid, bits, 64).weight()
        losses = [
            float(output_error(found - weight, record.gram))
            for found in (plain, rotation.dense(inside.double()))
        ]
        wins += losses[1] < losses[0]
    assert wins >= 9


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


FRESH = """
import sys, torch, drawplate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model(ids).logits.detach(), folder + ".logits")
"""


def test_a_fresh_process_gives_equal_logits_and_bytes_are_counted(tmp_path):
    torch.save(tiny.tokens(), tmp_path / "ids")
    folders, expected = [], []
    for number, rotate in enumerate(TURNING):
        for kind in ("llama_untied", "gpt2")[: 1 + (number == 0)]:
            model = tiny.model(kind)
            params = Quantize(bits=3, group=16, rotate=rotate.model_dump())
            ledger = quantize(model, tiny.tokens(), params)
            folders.append(str(tmp_path / f"{kind}-{number}"))
            with publish(tmp_path / f"{kind}-{number}", "model") as folder:
                hf.save(model, folder)
            with safe_open(f"{folders[-1]}/model.safetensors", "pt") as file:
                saved = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
            assert sum(saved.values()) == ledger.bytes_after
            for layer in ledger.layers:
                own = [size for name, size in saved.items() if name.startswith(f"{layer.path}.")]
                assert sum(own) == layer.bytes_after
            expected.append(logits(model))
            again = hf.load(folders[-1])
            assert torch.equal(logits(again), expected[-1])
            assert edits.of(again) == edits.of(model)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    for folder, want in zip(folders, expected, strict=True):
        loaded = torch.load(f"{folder}.logits", weights_only=True)
        torch.testing.assert_close(loaded, want, rtol=1e-5, atol=1e-5)


@turning
def test_stored_bytes_of_a_rotation(rotate):
    model, plain = tiny.model(), tiny.model()
    with_turn = quantize(model, tiny.tokens(), Quantize(rotate=rotate.model_dump()))
    without = quantize(plain, tiny.tokens(), Quantize())
    for one, other in zip(with_turn.layers[1:], without.layers[1:], strict=True):
        module = model.get_submodule(one.path)
        rotation, extra = module.rotation(), 0
        for turn in (rotation.inputs, rotation.outputs):
            if isinstance(turn, Hadamard):
                extra += -(-turn.signs.numel() // 8)
            elif isinstance(turn, Kronecker):
                extra += 4 * (turn.left.numel() + turn.right.numel())
        extra += 0 if rotation.stretch is None else 4 * module.in_features
        assert extra > 0
        assert one.bytes_after == other.bytes_after + extra


@turning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_is_its_dense_matrix(rotate, dtype):
    model = tiny.model().to(dtype)
    before = {path: edits.matrix(m).detach().float() for path, m in edits.linears(model).items()}
    ledger = quantize(model, tiny.tokens(), Quantize(bits=8, rotate=rotate.model_dump()))
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.5}
    for layer in ledger.layers[1:]:
        module = model.get_submodule(layer.path)
        x = torch.randn(5, module.in_features, generator=random(0)).to(dtype)
        dense = torch.nn.functional.linear(x, module.matrix(), module.bias)
        assert module.matrix().dtype == module(x).dtype == dtype
        torch.testing.assert_close(module(x), dense, **near)
        error = (module.matrix().float() - before[layer.path]).norm() / before[layer.path].norm()
        assert float(error) < 0.02
    inside = logits(model)
    with edits.materialized(model):
        assert torch.equal(logits(model), inside)
    with edits.materialized(model, whole=True):
        torch.testing.assert_close(logits(model), inside, **near)


@turning
def test_materialized_keeps_the_unpacked_turns(rotate, monkeypatch):
    model = tiny.model()
    quantize(model, tiny.tokens(), Quantize(rotate=rotate.model_dump()))
    before, calls, plain = logits(model), [], RotatedLinear.rotation
    monkeypatch.setattr(RotatedLinear, "rotation", lambda m: calls.append(m) or plain(m))
    with edits.materialized(model):
        for _ in range(3):
            assert torch.equal(logits(model), before)
    assert len(calls) == len(set(calls)) > 0
    logits(model)
    assert len(calls) == 2 * len(set(calls))


@pytest.mark.parametrize("grid", list(leaves(Grid)))
@pytest.mark.parametrize("name", list(leaves(Round)))
@pytest.mark.parametrize("rotate", list(leaves(Rotate)))
def test_every_combination_runs_and_tells_its_errors(rotate, name, grid):
    model = tiny.model()
    old = {path: edits.matrix(module).detach() for path, module in edits.linears(model).items()}
    params = Quantize(
        bits=4, group=16, grid={"name": grid}, round={"name": name}, rotate={"name": rotate}
    )
    ledger = quantize(model, tiny.tokens(), params)
    for layer in ledger.layers[1:]:
        new, weight = edits.matrix(model.get_submodule(layer.path)), old[layer.path]
        share = (new - weight).square().sum() / weight.square().sum()
        assert layer.weight_error == pytest.approx(float(share), rel=1e-3)
        assert layer.activation_error < 0.1


def test_layers_that_share_an_input_are_solved_as_if_alone():
    for rotate in leaves(Rotate):
        together, apart = tiny.model(), tiny.model()
        params = Quantize(bits=3, group=8, rotate={"name": rotate})
        quantize(together, tiny.tokens(), params)
        only = {"*.layers.0.self_attn.k_proj": 3, "*embed_tokens": 8, "*": None}
        quantize(apart, tiny.tokens(), params.model_copy(update={"overrides": only}))
        one, other = (m.model.layers[0].self_attn.k_proj.state_dict() for m in (together, apart))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_matters_only_where_something_is_drawn():
    for leaf in leaves(Rotate).values():
        states = []
        for seed in (0, 1):
            model = tiny.model()
            quantize(model, tiny.tokens(2, 8), Quantize(seed=seed, rotate=leaf().model_dump()))
            states.append(model.model.layers[0].mlp.up_proj.state_dict())
        equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert equal is not leaf.refills


@turning
def test_a_mask_refuses_a_rotation_before_any_work(rotate, tmp_path):
    model, path = tiny.model(), "model.layers.1.mlp.down_proj"
    weight = edits.matrix(model.get_submodule(path)).detach()
    keep = torch.rand(weight.shape, generator=random(0)) < 0.5
    edit = sparse.Sparse(module=path, kept=int(keep.sum()))
    edits.apply(model, edit, sparse.tensors(weight, keep))
    before, params = logits(model), Quantize(rotate=rotate.model_dump())
    line = f"^{path}: rotating by {rotate.name} would refill"
    with pytest.raises(UserError, match=line) as error:
        quantize(model, tiny.tokens(), params, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), before)
    quantize(model, tiny.tokens(), params.model_copy(update={"overrides": {path: None}}))
    assert torch.equal(model.get_submodule(path).keep(), keep)


def test_nothing_is_stored_of_a_rotation_that_is_not_there(tmp_path):
    model = tiny.model()
    quantize(model, tiny.tokens(), Quantize())
    hf.save(model, tmp_path / "model")
    assert "rotated" not in (tmp_path / "model/config.json").read_text()
    assert all(not name.endswith(("signs", "left", "stretch")) for name in model.state_dict())


@turning
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(rotate, tmp_path):
    params = Quantize(bits=3, group=8, rotate=rotate.model_dump())

    def dies(step, total, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.model(), tiny.tokens(), params, tmp_path, dies)
    resumed, whole = tiny.model(), tiny.model()
    assert quantize(resumed, tiny.tokens(), params, tmp_path) == quantize(
        whole, tiny.tokens(), params
    )
    mine, yours = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[name], yours[name]) for name in yours)


def test_only_the_gram_matrix_is_turned():
    """A statistic that is not carried over would be one of other coordinates: it is not there."""
    weight, record, rotation = drawn(leaves(Rotate)["hadamard"]())
    full = replace(record, mean=record.gram[0])
    assert Stats(full.count, rotation.gram(full.gram)).mean.numel() == 0
    assert weight.shape == (8, 16)
