"""Bits for each layer: the budget holds, and dynamic programming finds what trying all finds."""

from itertools import pairwise
from typing import Annotated

import pytest
import tiny
import torch
from laws import changed, law
from pydantic import TypeAdapter, ValidationError
from quantize_cases import fields, oracle

from drawplate import edits
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.method import OneOf, leaves
from drawplate.edits import sparse
from drawplate.quantize.allocation import Allocation, Choice
from drawplate.quantize.driver import Quantize, profile, quantize
from drawplate.quantize.sensitivity import perplexity, rise

LINEARITY = leaves(Allocation)["linearity"]()
WIDTHS = (2, 3, 4, 8)


def layers(count=5, seed=0, step=1):
    """Layers of different sizes, errors and slopes; bytes are multiples of `step`."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        size = int(torch.randint(20, 200, (1,), generator=draw)) * step
        extra = int(torch.randint(0, 30, (1,), generator=draw)) * step
        factor = float(torch.rand(1, generator=draw, dtype=torch.float64)) + 0.5
        error = tuple(factor * 4.0**-bits for bits in WIDTHS)
        slope = float(torch.randn(1, generator=draw, dtype=torch.float64).mul(2).exp())
        sizes = tuple(size * bits + extra for bits in WIDTHS)
        made.append(Choice(f"layer.{number}", sizes, error, slope))
    return made


def bounds(some):
    """Bytes of the narrowest and of the widest forms."""
    return sum(layer.bytes[0] for layer in some), sum(layer.bytes[-1] for layer in some)


def size(some, places):
    return sum(layer.bytes[place] for layer, place in zip(some, places, strict=True))


def predicted(some, places):
    return sum(layer.slope * layer.error[place] for layer, place in zip(some, places, strict=True))


def budgets(some, count=9):
    low, high = bounds(some)
    return [low + (high - low) * i // (count - 1) for i in range(count)]


@law(Allocation)
def test_bytes_never_exceed_the_budget(method):
    for seed in range(5):
        for step in (1, 8):
            some = layers(seed=seed, step=step)
            for budget in budgets(some):
                places = method.choose(some, budget)
                assert len(places) == len(some)
                assert all(0 <= place < len(method.widths) for place in places)
                assert size(some, places) <= budget


@law(Allocation)
def test_all_get_the_narrowest_or_the_widest_where_nothing_else_fits(method):
    some = layers()
    low, high = bounds(some)
    assert method.choose(some, low) == [0] * 5
    assert method.choose(some, high) == [3] * 5
    assert method.choose(some, 10 * high) == [3] * 5
    assert method.choose(some[:1], some[0].bytes[2]) == [2]
    with pytest.raises(UserError, match=f"{low - 1} bytes are 1 too few for the narrowest width"):
        method.choose(some, low - 1)


@law(Allocation)
def test_more_bytes_are_never_predicted_to_be_worse(method):
    for seed in range(5):
        some = layers(seed=seed)
        rises = [predicted(some, method.choose(some, budget)) for budget in budgets(some, 30)]
        assert all(later <= earlier for earlier, later in pairwise(rises))


@law(Allocation)
def test_deterministic_and_loads(method):
    some = layers(8)
    assert method.choose(some, budgets(some)[4]) == method.choose(some, budgets(some)[4])
    again = TypeAdapter(Annotated[Allocation, OneOf()]).validate_python(method.model_dump())
    assert again == method


@pytest.mark.parametrize("step", [1, 4])
@law(Allocation)
def test_oracle(method, step):
    """Sums are equal; among exact ties the fewest bytes are taken."""
    for seed in range(6):
        some = layers(6, seed, step)
        for budget in budgets(some):
            table = [layer.bytes for layer in some], [layer.error for layer in some]
            want = oracle(method).reference(*table, [layer.slope for layer in some], budget)
            found = method.choose(some, budget)
            assert predicted(some, found) == pytest.approx(predicted(some, want), rel=1e-12)
            assert size(some, found) == size(some, want)


def test_linearity_is_never_predicted_to_be_worse_than_one_width():
    uniform, better = leaves(Allocation)["uniform"](), 0
    for seed in range(10):
        some = layers(12, seed)
        for budget in budgets(some):
            mine, yours = (
                predicted(some, method.choose(some, budget)) for method in (LINEARITY, uniform)
            )
            assert mine <= yours * (1 + 1e-12)
            better += mine < yours
    assert better > 60


def test_coarse_units_cost_little_and_the_budget_holds():
    for units in (16, 64, 1024):
        coarse = LINEARITY.model_copy(update={"units": units})
        for seed in range(4):
            some = layers(6, seed)
            for budget in budgets(some, 20):
                places = coarse.choose(some, budget)
                assert size(some, places) <= budget
                assert predicted(some, places) >= predicted(some, LINEARITY.choose(some, budget))
        many = layers(100)
        budget = sum(layer.bytes[-1] for layer in many)
        places = coarse.choose(many, budget)
        assert size(many, places) <= budget
        assert sum(place > 0 for place in places) >= 15  # about one a unit, where units are few


def test_a_layer_that_does_not_matter_gets_the_fewest_bits():
    some = [*layers(3), Choice("nothing", (10, 15, 20, 40), (0.1, 0.02, 0.005, 1e-5), 0.0)]
    assert LINEARITY.choose(some, budgets(some)[-1])[3] == 0


def test_the_slope_is_the_mean_rise_over_the_square_of_the_noise():
    asked = []

    def rises(size, draw):
        asked.append((size, draw))
        return 0.3 * size**2 * (1 + draw)

    method = LINEARITY.model_copy(update={"noise": 0.2, "draws": 3})
    assert method.slope(rises) == pytest.approx(0.3 * 2)
    assert asked == [(0.2, 0), (0.2, 1), (0.2, 2)]
    assert method.slope(lambda size, draw: -1.0) == 0


@law(Allocation)
def test_every_field_matters(method):
    """Slopes and choices on a model's layers, in bytes that share no divisor with coarse units."""
    model, usual = tiny.model(), Quantize(bits=3, group=16)
    paths = list(edits.linears(model))[:7]
    tries = {"widths": [(2, 8), (3, 4)], "noise": [0.3], "draws": [1], "units": [16]}
    assert set(fields(method)) <= set(tries)
    for name in fields(method):
        outcomes = []
        for one in (method, *changed(method, name, tries[name])):
            params = usual.model_copy(update={"allocation": one})
            choices, room = profile(model, tiny.tokens(2, 8), params, paths)
            slopes = [choice.slope for choice in choices]
            widths = [one.widths[place] for place in one.choose(choices, room * 7 // 5)]
            outcomes.append((slopes, widths))
        assert any(outcome != outcomes[0] for outcome in outcomes), name


def test_noise_is_put_back_and_its_rise_is_the_square_of_its_size():
    model, tokens = tiny.model(), tiny.tokens()
    path = "model.layers.0.mlp.up_proj"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = perplexity(model, tokens)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double().log_softmax(-1)
    mean = -logits.gather(2, tokens[:, 1:, None]).mean()
    assert base == pytest.approx(float(mean.exp()), rel=1e-5)
    rises = [rise(model, tokens, path, size, 0, base) for size in (0.05, 0.1)]
    assert rises[1] / rises[0] == pytest.approx(4, rel=0.2)
    assert rises[0] != rise(model, tokens, path, 0.05, 1, base)
    assert rises[0] == rise(model, tokens, path, 0.05, 0, base)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match="calibration rows"):
        rise(model, tokens, path, 0.05, 0, base)
    assert torch.equal(model.get_submodule(path).weight, before[f"{path}.weight"])


def test_noise_stays_within_a_mask():
    model, path = tiny.model(), "model.layers.0.mlp.up_proj"
    weight = edits.matrix(model.get_submodule(path)).detach()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    edit = sparse.Sparse(module=path, kept=int(keep.sum()))
    edits.apply(model, edit, sparse.tensors(weight, keep))
    base = perplexity(model, tiny.tokens())
    assert rise(model, tiny.tokens(), path, 0.2, 0, base) != 0
    assert perplexity(model, tiny.tokens()) == base


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_keeps_its_byte_budget(kind):
    model, tokens = tiny.model(kind), tiny.tokens()
    usual = quantize(tiny.model(kind), tokens, Quantize(bits=3, group=16))
    table = usual.layers[0].path
    room = sum(layer.bytes_after for layer in usual.layers if layer.path != table)
    params = Quantize(bits=3, group=16, allocation={"name": "linearity"})
    ledger = quantize(model, tokens, params)
    taken = sum(layer.bytes_after for layer in ledger.layers if layer.path != table)
    assert 0.8 * room < taken <= room
    assert len({layer.bits for layer in ledger.layers if layer.path != table}) > 1
    assert all(model.get_submodule(layer.path).bits == layer.bits for layer in ledger.layers)
    smaller = quantize(
        tiny.model(kind), tokens, params.model_copy(update={"budget": room * 9 // 10})
    )
    taken = sum(layer.bytes_after for layer in smaller.layers if layer.path != table)
    assert taken <= room * 9 // 10


def test_uniform_with_a_budget_is_the_widest_width_that_fits():
    tokens = tiny.tokens()
    sizes = {}
    for bits in WIDTHS:
        ledger = quantize(tiny.model(), tokens, Quantize(bits=bits, group=16, vocabulary=None))
        sizes[bits] = sum(layer.bytes_after for layer in ledger.layers)
    for bits in WIDTHS:
        params = Quantize(bits=2, group=16, vocabulary=None, budget=sizes[bits])
        ledger = quantize(tiny.model(), tokens, params)
        assert {layer.bits for layer in ledger.layers} == {bits}
    with pytest.raises(UserError, match="1 too few"):
        quantize(tiny.model(), tokens, params.model_copy(update={"budget": sizes[2] - 1}))


def test_overridden_layers_are_left_out_of_the_budget():
    overrides = {"*.mlp.*": 8, "*.v_proj": None}
    params = Quantize(bits=3, group=16, overrides=overrides, allocation={"name": "linearity"})
    ledger = quantize(tiny.model(), tiny.tokens(), params)
    widths = {layer.path: layer.bits for layer in ledger.layers}
    assert all(bits == 8 for path, bits in widths.items() if ".mlp." in path)
    assert not any("v_proj" in path for path in widths)
    chosen = [layer for layer in ledger.layers if "self_attn" in layer.path]
    same = quantize(tiny.model(), tiny.tokens(), Quantize(bits=3, group=16, overrides=overrides))
    room = sum(layer.bytes_after for layer in same.layers if "self_attn" in layer.path)
    assert sum(layer.bytes_after for layer in chosen) <= room


def test_with_rotation_and_pairs():
    params = Quantize(
        bits=3,
        group=32,
        grid={"name": "gaussian", "dimension": 2},
        rotate={"name": "hadamard"},
        vocabulary=4,
        allocation={"name": "linearity", "widths": (2, 3, 4)},
    )
    ledger = quantize(tiny.model(), tiny.tokens(), params)
    assert {layer.bits for layer in ledger.layers} <= {2, 3, 4}
    wide = params.model_copy(update={"allocation": LINEARITY})
    with pytest.raises(UserError, match="not 8"):
        quantize(tiny.model(), tiny.tokens(), wide)


def test_widths_have_to_rise():
    for widths in ((4, 2), (2, 2), (), (5,)):
        with pytest.raises(ValidationError):
            type(LINEARITY)(widths=widths)


def test_rows_of_one_token_are_refused():
    with pytest.raises(UserError, match=r"^quantize.calibration.length: .* 2 tokens"):
        quantize(tiny.model(), tiny.tokens()[:, :1], Quantize(allocation=LINEARITY))
