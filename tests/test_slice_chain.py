"""Slicing first, then everything else, through the stages themselves."""

import subprocess
import sys

import pytest
import torch

from drawplate import edits
from drawplate.core import hf
from drawplate.settings import validate
from stages import compress
from tests.test_chain import LOADS, QUIET, chain
from tests.test_chain import corpus as corpus

KINDS = ["llama", "gpt2", "phi"]
STAGE = {
    "ratio": 0.15,
    "method": {"name": "slice"},
    "calibration": {"rows": 8, "length": 16},
    "recover": {"training": {"steps": 2}, "rows": 2, "length": 128},
}


@pytest.fixture(scope="module")
def chains(corpus, tmp_path_factory):
    homes = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: chain(kind, corpus, home, compress=STAGE) for kind, home in homes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_then_quantized_then_trained(chains, kind):
    before, sizes = (), []
    for folder in chains[kind]:
        model = hf.load(folder)
        assert edits.of(model)[: len(before)] == before
        before = edits.of(model)
        sizes.append(hf.stored_bytes(model))
    assert {"narrow", "turned", "quantized", "quantized_embedding", "adapter"} <= {
        edit.name for edit in before
    }
    base, compressed, quantized, tuned = sizes
    assert compressed <= 0.85 * base
    assert quantized < compressed / 2
    assert quantized <= tuned < compressed


@pytest.mark.slow
def test_results_load_in_a_fresh_process_with_equal_logits(chains, tmp_path):
    ids = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids")
    folders = [str(folders[-1]) for folders in chains.values()]
    command = [sys.executable, "-c", LOADS, str(tmp_path / "ids"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    torch.set_num_threads(1)
    for folder in folders:
        loaded = torch.load(f"{folder}.logits", weights_only=True)
        assert torch.equal(loaded, hf.load(folder)(ids).logits), folder


def test_sliced_then_factored(chains, corpus, tmp_path):
    params = {"ratio": 0.15, "calibration": {"rows": 8, "length": 16}, "recover": None}
    sliced = chains["llama"][1]
    inputs = compress.Inputs(model=sliced, corpus=corpus)
    made = validate(compress.compress.params, params, "compress")
    compress.compress(made, inputs, tmp_path / "out", execution=QUIET)
    model = hf.load(tmp_path / "out")
    assert edits.of(model)[: len(edits.of(hf.load(sliced)))] == edits.of(hf.load(sliced))
    assert "low_rank" in {edit.name for edit in edits.of(model)}
    assert hf.stored_bytes(model) <= 0.85 * hf.stored_bytes(hf.load(sliced))
