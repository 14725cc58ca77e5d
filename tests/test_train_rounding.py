"""Any number format, bit for bit; linear layers computed in it; a run that does so."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from drawplate.core.errors import UserError
from drawplate.edits.low_rank import LowRank
from drawplate.edits.sparse import Sparse
from drawplate.train.rounding import Format, Simulate, product, simulated
from tests import tiny, train_cases

BFLOAT16 = Format(exponent=8, mantissa=7)
FLOAT16 = Format(exponent=5, mantissa=10)
E5M2 = Format(exponent=5, mantissa=2)
E4M3 = Format(exponent=4, mantissa=3, finite=True)
TORCH = [
    pytest.param(BFLOAT16, torch.bfloat16, id="bfloat16"),
    pytest.param(FLOAT16, torch.float16, id="float16"),
    pytest.param(E5M2, torch.float8_e5m2, id="e5m2"),
    pytest.param(Format(mantissa=23), torch.float32, id="float32"),
]


def same(one, other):
    """Equal bits, all NaN being one."""
    bits = one.view(torch.int32) == other.view(torch.int32)
    return bool((bits | (one.isnan() & other.isnan())).all())


def many():
    """All float32 patterns whose lower half is 0, half of a step, or next to it; random others."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    near = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    draw = torch.Generator().manual_seed(0)
    near.append(torch.randint(0, 2**32, (300_000,), generator=draw))
    patterns = torch.cat(near)
    whole = torch.where(patterns >= 2**31, patterns - 2**32, patterns).int().view(torch.float32)
    normal = [torch.randn(50_000, generator=draw) * 10.0**power for power in (-40, -6, -2, 0, 2, 4)]
    return torch.cat([whole, *normal])


@pytest.mark.parametrize(("form", "dtype"), TORCH)
def test_rounds_as_torch_does(form, dtype):
    x = many()
    assert same(form.round(x), x.to(dtype).float())


def test_rounds_as_float8_e4m3fn_up_to_where_versions_of_torch_differ():
    x = many()
    x = x[(x.abs() <= 464) | x.isnan()]
    assert same(E4M3.round(x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("form", [FLOAT16, BFLOAT16, E5M2, E4M3])
def test_every_number_of_a_format_stays_itself(form):
    kinds = {5: torch.float16, 8: torch.bfloat16}
    if form.mantissa > 3:
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        held = patterns.view(kinds[form.exponent]).float()
    else:
        kind = torch.float8_e4m3fn if form.finite else torch.float8_e5m2
        held = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kind).float()
    assert same(form.round(held), held)
    assert form.largest == held[held.isfinite()].max()


def reference(x: float, form: Format) -> float:
    """Nearest number of the format by exact fractions, from its definition."""
    if math.isnan(x):
        return x
    bias = 2 ** (form.exponent - 1) - 1
    if math.isinf(x):
        kept = Fraction(10) ** 60
    else:
        size = abs(Fraction(x))
        power = 1 - bias
        while size >= Fraction(2) ** (power + 1):
            power += 1
        step = Fraction(2) ** (power - form.mantissa)
        count = size / step
        kept = (round(count) if form.rounding == "nearest" else count // 1) * step
    top = 2**form.exponent - (1 if form.finite else 2) - bias
    codes = 2**form.mantissa - (2 if form.finite else 1)
    largest = (1 + Fraction(codes, 2**form.mantissa)) * Fraction(2) ** top
    if kept > largest:
        outside = math.nan if form.finite else math.inf
        value = float(largest) if form.overflow == "saturate" else outside
    else:
        value = float(kept)
    return math.copysign(value, x)


FORMS = st.builds(
    Format,
    exponent=st.integers(2, 7),
    mantissa=st.integers(1, 23),
    rounding=st.sampled_from(["nearest", "truncate"]),
    overflow=st.sampled_from(["infinite", "saturate"]),
    finite=st.booleans(),
)


@given(FORMS, st.floats(width=32) | st.floats(-600, 600, width=32))
def test_every_format_rounds_by_its_definition(form, x):
    found = form.round(torch.tensor([x], dtype=torch.float32)).item()
    wanted = reference(x, form)
    assert (math.isnan(found) and math.isnan(wanted)) or found == wanted
    assert math.isnan(wanted) or math.copysign(1, found) == math.copysign(1, wanted)


@given(FORMS, st.floats(allow_nan=False, width=32), st.floats(allow_nan=False, width=32))
def test_rounding_twice_changes_nothing_and_keeps_order(form, x, y):
    low, high = form.round(torch.tensor(sorted([x, y]), dtype=torch.float32))
    again = form.round(torch.stack([low, high]))
    assert same(again, torch.stack([low, high]))
    assert low.isnan() or high.isnan() or low <= high


def test_the_mask_of_the_paper_is_truncation():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    masked = (x.view(torch.int32) & ~((1 << 20) - 1)).view(torch.float32)
    assert same(Format(mantissa=3, rounding="truncate").round(x), masked)


def test_formats_that_cannot_be_are_refused():
    for wrong in ({"mantissa": 0, "finite": True}, {"exponent": 8, "finite": True}):
        with pytest.raises(ValidationError):
            Format(**{"exponent": 4} | wrong)


def operands():
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(5, 7, generator=draw).requires_grad_()
    weight = torch.randn(3, 7, generator=draw).requires_grad_()
    return x, weight, torch.randn(3, generator=draw), torch.randn(5, 3, generator=draw)


@pytest.mark.parametrize(
    "values",
    [("weights",), ("activations",), ("gradients",), ("weights", "activations", "gradients")],
)
def test_both_passes_multiply_rounded_operands(values):
    how = Simulate(exponent=4, mantissa=2, values=values)
    x, weight, bias, push = operands()
    y = product(x, weight, bias, how)
    y.backward(push)

    def r(tensor, value):
        return how.round(tensor.detach()) if value in values else tensor.detach()

    rx, rw, rg = r(x, "activations"), r(weight, "weights"), r(push, "gradients")
    assert torch.equal(y, torch.nn.functional.linear(rx, rw, bias))
    torch.testing.assert_close(x.grad, rg @ rw)
    torch.testing.assert_close(weight.grad, rg.T @ rx)
    assert not torch.equal(y, torch.nn.functional.linear(x, weight, bias)) or "gradients" in values


def test_a_model_is_simulated_inside_only_and_its_head_on_request():
    model, tokens = train_cases.model(dropout=0.0), torch.arange(12).view(2, 6)
    plain = model(tokens)
    coarse = Simulate(exponent=8, mantissa=1)
    with simulated(model, coarse):
        body = model(tokens)
    with simulated(model, coarse.model_copy(update={"head": True})):
        whole = model(tokens)
    assert not torch.equal(plain, body)
    assert not torch.equal(body, whole)
    with simulated(model, Simulate(mantissa=23, head=True)):
        assert torch.equal(model(tokens), plain)
    with simulated(model, None):
        assert torch.equal(model(tokens), plain)
    assert torch.equal(model(tokens), plain)
    with pytest.raises(UserError, match="no linear layer"), simulated(model.embedding, coarse):
        pass


def test_models_whose_layers_would_be_left_out_are_refused():
    sparse, low = tiny.model(), tiny.model()
    layer = "model.layers.0.mlp.up_proj"
    Sparse(module=layer, kept=8).install(sparse)
    LowRank(module=layer, rank=2).install(low)
    with simulated(low, Simulate()):
        pass
    for model, kind in ((sparse, "SparseLinear"), (tiny.model("gpt2"), "Conv1D")):
        with pytest.raises(UserError, match=f"is a {kind}"), simulated(model, Simulate()):
            pass


def test_a_run_in_float32_bits_is_the_plain_run_and_in_few_bits_another(tmp_path):
    def weights(name, **given):
        model = train_cases.model()
        given = train_cases.settings(steps=4, save_every=2, **given)
        train_cases.train(model, train_cases.Toy(), given, tmp_path / name)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = weights("plain")
    assert torch.equal(plain, weights("wide", simulate=Simulate(mantissa=23)))
    few = weights("few", simulate=Simulate(mantissa=1))
    assert not torch.equal(plain, few)
    assert torch.equal(few, weights("few", simulate=Simulate(mantissa=1)))


def test_a_simulated_run_goes_on_after_a_kill_with_the_same_bytes(tmp_path):
    class Killed(Exception):
        pass

    def stop(step, total, metrics):
        if step == 5:
            raise Killed

    how = Simulate(mantissa=2)

    def weights(work):
        model = train_cases.model()
        train_cases.train(
            model, train_cases.Toy(), train_cases.settings(steps=8, simulate=how), work
        )
        return [p.detach().clone() for p in model.parameters()]

    with pytest.raises(Killed):
        train_cases.run(tmp_path / "cut", watch=stop, steps=8, simulate=how)
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_simulation_in_16_bits_or_compiled_is_refused():
    with pytest.raises(ValidationError, match="precision: float32"):
        train_cases.settings(precision="bf16", simulate=Simulate())
    with pytest.raises(ValidationError, match="compile: false"):
        train_cases.settings(compile=True, simulate=Simulate())
