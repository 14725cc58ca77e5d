"""Every compression before every other one and before every quantization, through the stages."""

import json
import struct
import subprocess
import sys
from itertools import cycle, islice, pairwise, product
from math import prod

import pytest
import torch

from drawplate import edits
from drawplate.compress.method import Compression
from drawplate.compress.pattern import Pattern
from drawplate.core import hf
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.quantize.grid import Grid
from drawplate.quantize.rotate import Rotate
from drawplate.settings import preset, validate
from stages import compress, finetune, pretrain, quantize
from tests.test_chain import LOADS, QUIET, foreign
from tests.test_chain import corpus as corpus

KINDS = ["llama", "qwen2"]
CALIBRATION = {"rows": 8, "length": 16}
COMPRESS = {name: {"name": name} for name in leaves(Compression) if name != "sparse"} | {
    f"sparse-{pattern}": {"name": "sparse", "pattern": {"name": pattern}, "rounds": 1}
    for pattern in leaves(Pattern)
}
QUANTIZE = {
    f"{grid}-{rotate}": {"grid": {"name": grid}, "rotate": {"name": rotate}}
    for grid in leaves(Grid)
    for rotate in leaves(Rotate)
}
HIGGS = {"higgs": preset("quantize/higgs")["quantize"]}
SST = {
    "parametrisation": {"name": "sst", "rank": 4, "interval": 2, "energy": 0.5},
    "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 64}
    | {"context": 256, "init_std": 0.2},
    "batch": 4,
    "length": 128,
    "training": {"steps": 4},
}
MASKED = {"sparse": "", "low_rank_sparse": ".outliers"}
"""Edit -> where in its stand-in the mask is."""
TRAINING = {"steps": 1, "prompts": 2, "samples": 2, "length": {"name": "constant", "tokens": 4}}
IDS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))


USUAL = set(islice(zip(cycle(COMPRESS), cycle(QUANTIZE)), max(len(COMPRESS), len(QUANTIZE))))
"""Pairs of the default run, in which each is met at least once."""
OTHER = min(USUAL)
"""The pair that the default run also meets on the second kind."""
CATALOGUE = {
    ("llama", "slice", "low_rank", "integer-unchanged"): {"narrow", "turned", "low_rank"},
    ("sst", "higgs"): {"low_rank"},
    ("sst", "low_rank", "integer-unchanged"): {"low_rank"},
}
"""Chains of more or other stages than a pair -> edits that are there before the quantization."""


def cases(first, second):
    """All pairs on all kinds; not slow are usual ones of the first kind, and one of the second."""
    quick = {(KINDS[0], *pair) for pair in USUAL} | {(KINDS[1], *OTHER)}
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow])
        for case in product(KINDS, first, second)
    ]


class House:
    """Compressed models, each made once, of somebody's model or of a kind of our own: "sst"."""

    def __init__(self, corpus, home):
        self.corpus, self.home, self.made = corpus, home, {}

    def compressed(self, kind, *methods):
        """The folder of a model compressed by `methods` in turn."""
        if (kind, *methods) not in self.made:
            out = self.home / "-".join((kind, *methods))
            if methods:
                parent = self.compressed(kind, *methods[:-1])
                settings = {
                    "ratio": 0.1,
                    "method": COMPRESS[methods[-1]],
                    "calibration": CALIBRATION,
                    "recover": None,
                }
                self.stage(compress, "compress", settings, out, model=parent)
            elif kind == "sst":
                self.stage(pretrain, "pretrain", SST, out)
            else:
                foreign(kind, self.corpus, out)
            self.made[kind, *methods] = out
        return self.made[kind, *methods]

    def chain(self, kind, *steps):
        """Folders of a model that was compressed in turn, then quantized, then trained."""
        *methods, codes = steps
        folders = [self.compressed(kind, *methods[:n]) for n in range(len(methods) + 1)]
        place = "-".join((kind, *steps))
        if place not in self.made:
            settings = {"group": 16, "calibration": CALIBRATION} | (QUANTIZE | HIGGS)[codes]
            out = self.home / f"{place}.quantized"
            packed = self.stage(quantize, "quantize", settings, out, model=folders[-1])
            out = self.home / f"{place}.tuned"
            tuned = self.stage(finetune, "finetune", TRAINING, out, model=packed)
            self.made[place] = packed, tuned
        return [*folders, *self.made[place]]

    def stage(self, module, name, settings, out, **inputs):
        """One stage; its checkpoint is `out`."""
        stage = getattr(module, name)
        given = module.Inputs(corpus=self.corpus, **inputs)
        stage(validate(stage.params, settings, name), given, out, execution=QUIET)
        return out


@pytest.fixture(scope="module")
def house(corpus, tmp_path_factory):
    return House(corpus, tmp_path_factory.mktemp("house"))


def held(folder):
    """Bytes of the tensors in a folder's weights file, read off its header alone."""
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    return sum(prod(t["shape"]) * widths.get(t["dtype"], 1) for t in header.values())


def handed_over(parent, child):
    """What a stage got is still there, and what it says of its size is what lies on the disk."""
    before, after = hf.load(parent), hf.load(child)
    assert edits.of(after)[: len(edits.of(before))] == edits.of(before)
    for edit in edits.of(before):
        if edit.name in MASKED:
            path = f"{edit.module}{MASKED[edit.name]}"
            was, now = (edits.located(model, path) for model in (before, after))
            assert torch.equal(was.keep(), now.keep()), path
    assert hf.stored_bytes(after) == held(child)


@pytest.mark.parametrize(("kind", "method", "codes"), cases(COMPRESS, QUANTIZE))
def test_compressed_then_quantized_then_trained(house, kind, method, codes):
    if refills(house.compressed(kind, method), codes):
        with pytest.raises(UserError, match="refill the zeros of its mask") as error:
            house.chain(kind, method, codes)
        assert "\n" not in str(error.value)
        assert not list(house.home.glob(f"{kind}-{method}-{codes}.*"))
        return
    _, parent, packed, tuned = house.chain(kind, method, codes)
    handed_over(parent, packed)
    handed_over(packed, tuned)
    assert hf.load(tuned)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("chain", CATALOGUE, ids="-".join)
def test_chains_of_the_catalogue(house, chain):
    folders = house.chain(*chain)
    for parent, child in pairwise(folders):
        handed_over(parent, child)
    parent, packed, tuned = (hf.load(folder) for folder in folders[-3:])
    names = [{edit.name for edit in edits.of(model)} for model in (parent, packed, tuned)]
    assert names[0] == CATALOGUE[chain]
    assert names[1] >= CATALOGUE[chain] | {"quantized"}
    assert names[2] == names[1] | {"adapter"}
    assert tuned(IDS).logits.isfinite().all()


def refills(folder, codes):
    """Whether weights would be rotated that a mask keeps at zero."""
    masked = MASKED.keys() & {edit.name for edit in edits.of(hf.load(folder))}
    rotate = (QUANTIZE | HIGGS)[codes]["rotate"]["name"]
    return bool(masked) and leaves(Rotate)[rotate]().refills


@pytest.mark.parametrize(
    "chains",
    [
        pytest.param([*CATALOGUE, (KINDS[1], *OTHER)], id="few"),
        pytest.param(
            [(kind, *pair) for kind in KINDS for pair in sorted(USUAL)],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_chains_load_in_a_fresh_process_with_equal_logits(house, tmp_path, chains):
    chains = [c for c in chains if not refills(house.compressed(*c[:-1]), c[-1])]
    folders = [str(house.chain(*chain)[-1]) for chain in chains]
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", LOADS, str(tmp_path / "ids"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    torch.set_num_threads(1)  # sums over more threads round otherwise
    for folder in folders:
        loaded = torch.load(f"{folder}.logits", weights_only=True)
        assert torch.equal(loaded, hf.load(folder)(IDS).logits), folder


@pytest.mark.parametrize(("kind", "first", "second"), cases(COMPRESS, COMPRESS))
def test_compressed_twice_or_refused_before_any_work(
    house, kind, first, second, tmp_path, monkeypatch
):
    parent = house.compressed(kind, first)
    settings = {
        "ratio": 0.05,
        "method": COMPRESS[second],
        "calibration": CALIBRATION,
        "recover": None,
    }
    out = tmp_path / "twice"
    model = hf.load(parent)
    if {e.name for e in edits.of(model)} & leaves(Compression)[COMPRESS[second]["name"]].refuses:
        reason = "is already"
        monkeypatch.setattr(compress.Calibration, "tokens", None)  # no row is read before that
    elif second == "sparse-n_m" and any(
        edits.features(layer)[1] % 4 for layer in edits.linears(model).values()
    ):
        reason = "do not fall into groups of 4"
    else:
        handed_over(parent, house.stage(compress, "compress", settings, out, model=parent))
        return
    with pytest.raises(UserError, match=reason) as error:
        house.stage(compress, "compress", settings, out, model=parent)
    assert "\n" not in str(error.value)
    assert not out.exists()
