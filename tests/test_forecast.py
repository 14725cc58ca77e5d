"""Formulas against models that are really built, lines against costs that are known."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawplate import settings
from drawplate.core import hf
from drawplate.core.errors import Exhausted
from drawplate.core.memory import file_memory, held_memory, peak_memory
from drawplate.core.stats import Gather
from drawplate.evaluate.cost import macs
from drawplate.evaluate.cost import stored_bytes as on_disk
from drawplate.forecast.lines import Line, extrapolate, split, through
from drawplate.forecast.machine import Limits, limits
from drawplate.forecast.shape import LLAMA_70B, Shape
from drawplate.forecast.stages import (
    COPIES,
    Actual,
    Need,
    comparison,
    duration,
    refuse,
    size,
    table,
)
from drawplate.model import ModelConfig, build
from drawplate.quantize.driver import Quantize, quantize

MODELS = [
    ModelConfig(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=48, context=32),
    ModelConfig(hidden=32, layers=3, heads=4, kv_heads=4, feed_forward=40, context=32, tie=False),
    ModelConfig(hidden=64, layers=2, heads=4, kv_heads=2, feed_forward=96, context=32),
]


@pytest.mark.parametrize("config", MODELS)
def test_parameters_bytes_and_multiply_adds_are_those_of_the_built_model(config, tmp_path):
    model = build(config, 80, 0)
    shape = Shape.of(config, 80)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.macs == macs(model)
    hf.save(model, tmp_path)
    assert 4 * shape.parameters == on_disk(tmp_path) == hf.stored_bytes(model)


@pytest.mark.parametrize("config", MODELS)
def test_training_bytes_are_those_of_weights_gradients_and_states(config):
    model = build(config, 80, 0)
    adam = torch.optim.Adam(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    adam.step()
    numbers = [*model.parameters(), *(p.grad for p in model.parameters())]
    numbers += [t for state in adam.state.values() for t in state.values() if t.ndim]
    shape = Shape.of(config, 80)
    assert shape.training(states=2) == sum(tensor.nbytes for tensor in numbers)
    # In half precision weights and gradients halve, and a float32 copy of the weights joins them.
    assert shape.training(states=2, stored=2) == shape.parameters * (2 + 2 + 4 + 8)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (2, None), (8, 32), (3, 16)])
def test_packed_bytes_are_those_of_the_quantized_model(bits, group):
    config = MODELS[2]
    model = build(config, 80, 0)
    params = {"bits": bits, "group": group, "vocabulary": None, "round": {"name": "nearest"}}
    made = settings.validate(Quantize, params, "quantize")
    ledger = quantize(model, torch.arange(40).reshape(2, 20), made)
    found = sum(layer.bytes_after for layer in ledger.layers)
    assert Shape.of(config, 80).packed(bits, group) * config.layers == found


def test_gathering_holds_what_the_formula_says():
    shape = Shape.of(MODELS[0], 80)
    held = 0
    for width in shape.inputs:
        gather = Gather(frozenset({"gram"}))
        gather.add(torch.ones(3, width))
        held += sum(value.nbytes for value in gather.sums.values())
    assert held == shape.gathering(gather.sums["gram"].element_size())


def test_llama_3_70b_has_the_parameters_that_its_makers_count():
    assert LLAMA_70B.parameters == 70_553_706_496


numbers = st.floats(0, 1e6, allow_nan=False)


@given(numbers, numbers, st.lists(st.integers(1, 100), min_size=2, max_size=5, unique=True))
def test_a_line_is_found_exactly(fixed, rate, sizes):
    line = Line(fixed, rate)
    found = through(sizes, [line.at(x) for x in sizes])
    assert found.at(1000) == pytest.approx(line.at(1000), rel=1e-6, abs=1e-3)


def test_a_single_or_falling_cost_is_a_constant():
    assert through([3], [7.0]).at(100) == 7
    assert through([1, 2], [8.0, 6.0]).at(100) == 7
    with pytest.raises(ValueError, match="as many costs as sizes"):
        through([1, 2], [1.0])
    with pytest.raises(ValueError, match="as many costs as sizes"):
        through([], [])


def test_costs_in_layers_and_steps_are_found_exactly():
    """seconds(layers, steps) = 2 + 0.5 layers + steps (0.1 + 0.3 layers), the first step slower."""
    figures = {}
    for layers, steps in ((1, 5), (2, 4)):
        each = 0.1 + 0.3 * layers
        start = 1.0 + 0.5 * layers
        marks = [start + each + 0.7 + step * each for step in range(steps)]
        found = split(2 + 0.5 * layers + 0.7 + steps * each, marks)
        figures[layers] = {"once": found.once, "each": found.each}
    full = extrapolate(figures, 80)
    assert full["each"] == pytest.approx(0.1 + 0.3 * 80)
    assert full["once"] == pytest.approx(2.7 + 0.5 * 80)


def test_repetitions_that_alternate_are_averaged_over_a_cycle():
    marks = [0.0, 1.0, 4.0, 5.0, 8.0, 9.0]  # 1 s and 3 s in turn
    found = split(20.0, marks, cycle=2)
    assert found.each == 2
    assert found.total(10) == pytest.approx(20 - 6 * 2 + 10 * 2)
    with pytest.raises(ValueError, match="no two cycles"):
        split(1.0, marks[:3], cycle=2)


GROWS = """
from drawplate.core.memory import peak_memory, held_memory
before = peak_memory()
block = bytearray(100_000_000)
del block
print(peak_memory() - before, held_memory() - before)
"""


def test_the_peak_is_kept_and_what_is_held_is_not():
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert 90e6 < grown < 120e6
    if sys.platform == "linux":
        assert held < 20e6
        assert 0 < file_memory() < held_memory() <= peak_memory()


def test_limits_are_there(tmp_path):
    found = limits(tmp_path)
    assert found.memory > 0
    assert found.disk > 0
    assert found.device is None


GB = 10**9
NEEDS = {
    "pretrain": Need(memory=8 * GB, seconds=100.0, disk=1 * GB, work=5 * GB),
    "compress": Need(memory=9 * GB, seconds=50.0, disk=1 * GB),
}


def test_what_fits_is_not_refused():
    refuse(NEEDS, Limits(memory=9 * GB, disk=(COPIES * 1 + 5) * GB))


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (Limits(8 * GB, 99 * GB), "compress needs about 9.0 GB of memory, 8.0 GB are free; lower"),
        (Limits(7 * GB, 99 * GB), "pretrain needs about 8.0 GB of memory, 7.0 GB are free; raise"),
        (Limits(9 * GB, 6 * GB), "pretrain needs about 7.0 GB of disk, earlier stages included"),
        (Limits(99 * GB, 3 * GB), "lower pretrain.training.keep"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_the_setting(free, says):
    with pytest.raises(Exhausted) as caught:
        refuse(NEEDS, free)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 4


def test_outputs_of_earlier_stages_count_on_the_disk():
    later = {**NEEDS, "pretrain": NEEDS["pretrain"].model_copy(update={"work": 0.0})}
    refuse(later, Limits(99 * GB, 2 * COPIES * GB))
    with pytest.raises(Exhausted, match=r"compress needs about 4\.0 GB of disk"):
        refuse(later, Limits(99 * GB, 2 * COPIES * GB - 1))


def test_memory_of_a_device_is_a_limit_of_its_own():
    need = {"finetune": NEEDS["pretrain"].model_copy(update={"device": 90.0 * GB})}
    refuse(need, Limits(9 * GB, 99 * GB, 90 * GB))
    with pytest.raises(Exhausted, match=r"90\.0 GB of memory of the device.*finetune\.parallel"):
        refuse(need, Limits(9 * GB, 99 * GB, 80 * GB))


def test_memory_is_that_of_all_processes_together():
    four = {**NEEDS, "pretrain": NEEDS["pretrain"].model_copy(update={"processes": 4})}
    refuse(four, Limits(32 * GB, 99 * GB))
    says = r"pretrain needs about 32\.0 GB of memory.*; lower execution\.nproc, raise pretrain"
    with pytest.raises(Exhausted, match=says):
        refuse(four, Limits(32 * GB - 1, 99 * GB))
    _, pretrain, compress, whole = (line.split() for line in table(four).splitlines())
    assert pretrain[:5] == ["pretrain", "4", "x", "8.0", "GB"]
    assert compress[:3] == ["compress", "9.0", "GB"]
    assert whole[:3] == ["all", "32.0", "GB"]
    # Records hold the memory of one process.
    assert "-20%" in comparison(four, {"pretrain": Actual(10 * GB, None, None)})


def test_tables_say_what_was_told_and_found():
    text = table(NEEDS)
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["pretrain", "compress", "all"]
    assert "device" not in text
    assert text.splitlines()[-1].split()[1:] == ["9.0", "GB", "2", "min", "2.0", "GB", "5.0", "GB"]
    device = {"pretrain": NEEDS["pretrain"].model_copy(update={"device": 3.0 * GB})}
    assert "3.0 GB" in table(device)
    found = comparison(NEEDS, {"pretrain": Actual(10 * GB, 80.0, None)}).splitlines()
    assert "+25%" in found[1]
    assert "-20%" in found[1]
    assert found[2].count(" - ") >= 2


def test_people_read_sizes_and_durations():
    assert [size(x) for x in (0, 999, 1500, 123_456, 2.5e9, 7e13)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "123 kB",
        "2.5 GB",
        "70.0 TB",
    ]
    assert [duration(x) for x in (0.25, 89, 120, 7200)] == ["0.2 s", "89.0 s", "2 min", "2.0 h"]
