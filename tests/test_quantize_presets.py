"""Presets of the quantize stage: real runs through the whole chain, loaded in a fresh process."""

import subprocess
import sys

import pytest
import tiny
import torch
from test_chain import LOADS, chain, corpus  # noqa: F401

from drawplate import edits
from drawplate.core import hf
from drawplate.core.errors import UserError
from drawplate.quantize.driver import Quantize, quantize
from drawplate.settings import merge, preset, presets, validate

NAMES = [name for name in presets() if name.startswith("quantize/")]
SMALL = {"calibration": {"rows": 8, "length": 16}}


def test_the_papers_are_there():
    assert NAMES == ["quantize/higgs", "quantize/quip"]
    assert all(presets()[name]["paper"] for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name):
    """From the file, through validation, to a model that still computes something finite."""
    params = validate(Quantize, preset(name)["quantize"], "quantize")
    for kind in tiny.CONFIGS:
        model, ids = tiny.model(kind), tiny.tokens()
        ledger = quantize(model, ids, params)
        assert not edits.linears(model)
        assert ledger.bytes_after == hf.stored_bytes(model)
        assert {layer.bits for layer in ledger.layers} == {params.bits}
        with torch.no_grad():
            assert bool(model(ids).logits.isfinite().all())


@pytest.mark.parametrize(
    "name", ["quantize/higgs", pytest.param("quantize/quip", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "adapt", [{"name": "lora"}, pytest.param({"name": "scales"}, marks=pytest.mark.slow)], ids=str
)
def test_factors_then_codes_then_reinforcement(name, adapt, corpus, tmp_path):  # noqa: F811
    folders = chain(
        "llama",
        corpus,
        tmp_path,
        quantize=merge(preset(name)["quantize"], SMALL),
        finetune={
            "steps": 2,
            "prompts": 2,
            "samples": 2,
            "length": {"name": "constant", "tokens": 6},
            "adapt": adapt,
        },
    )
    quantized, tuned = (hf.load(folder) for folder in folders[2:])
    specs = [edit for edit in edits.of(quantized) if edit.name == "quantized"]
    assert {edit.name for edit in edits.of(quantized)} == {"low_rank", "quantized"}
    assert all(spec.rotated is not None for spec in specs)
    assert edits.of(tuned)[: len(edits.of(quantized))] == edits.of(quantized)
    for spec in specs:
        mine, yours = (edits.located(model, spec.module) for model in (quantized, tuned))
        assert torch.equal(mine.core.codes, yours.core.codes)
        for (key, one), (_, other) in zip(mine.named_buffers(), yours.named_buffers(), strict=True):
            assert torch.equal(one, other), key
    ids = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", LOADS, str(tmp_path / "ids"), str(folders[-1])]
    subprocess.run(command, check=True, capture_output=True)
    torch.set_num_threads(1)
    loaded = torch.load(f"{folders[-1]}.logits", weights_only=True)
    assert torch.equal(loaded, tuned(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_refused_in_one_line(name, corpus, tmp_path):  # noqa: F811
    sparse = {"name": "sparse", "pattern": {"name": "n_m", "n": 2, "m": 4}}
    with pytest.raises(
        UserError, match=r"rotating by .* would refill the zeros of its mask"
    ) as error:
        chain(
            "llama",
            corpus,
            tmp_path,
            compress={"ratio": 0.1, "method": sparse, **SMALL, "recover": None},
            quantize=merge(preset(name)["quantize"], SMALL),
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "quantize").exists()
