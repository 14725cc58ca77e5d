"""The stages that train follow the same series in two processes as in one."""

import json
from random import Random

import pytest
import torch

from drawplate.core import hf
from drawplate.data.prepare import Prepare
from drawplate.pretrain import Pretrain
from drawplate.rl.params import Finetune
from drawplate.train import series
from stages import compress, finetune, prepare, pretrain
from stages.run import Execution
from tests import faults

WORDS = ["sum", "array", "the", "of", "returns", "graph", "node", "value", "12", "number"]
STEPS = {"steps": 4, "precision": "float32", "save_every": 2}


def texts():
    draw = Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(8, 40))) for _ in range(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and what it was made from."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    params = Prepare.model_validate(
        {
            "sources": [{"name": "jsonl", "files": str(folder / "a.jsonl")}],
            "tasks": [{"name": "chain_sum", "min_digits": 1, "max_digits": 1}],
            "heldout_text": 0.2,
            "train_problems": 60,
            "heldout_problems": 20,
            "vocabulary": 320,
        }
    )
    quiet = Execution(tracking=False)
    prepare.prepare(params, prepare.Inputs(), folder / "corpus", execution=quiet)
    return folder


def made(stage, params, inputs, folder, name, sharded=False):
    """Paths of what one process and what two of them make, which share the weights out or not."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in faults.environment().items():
            patch.setenv(key, value)
        for nproc, split in ((1, False), (2, sharded)):
            execution = Execution(nproc=nproc, threads=1, tracking=False, sharded=split)
            stage(params, inputs, folder / f"{name}{nproc}", execution=execution)
    return folder / f"{name}1", folder / f"{name}2"


def based(folder, name, sharded=False):
    model = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "feed_forward": 64}
    params = Pretrain.model_validate(
        {"model": model | {"context": 128}, "batch": 4, "length": 96, "training": STEPS}
    )
    inputs = pretrain.Inputs(corpus=folder / "corpus")
    return made(pretrain.pretrain, params, inputs, folder, name, sharded)


@pytest.fixture(scope="module")
def bases(folder):
    return based(folder, "base")


def close(one, other, history, names, steps=4):
    rows = [series.read(path / history) for path in (one, other)]
    assert len(rows[0]) == len(rows[1]) == steps
    for a, b in zip(*rows, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), (a["step"], name)


def test_pretraining(bases):
    close(*bases, "history-pretrain.jsonl", ["loss", "grad_norm", "tokens"])


def test_pretraining_with_split_weights(folder, bases):
    _, two = based(folder, "split", sharded=True)
    close(bases[0], two, "history-pretrain.jsonl", ["loss", "grad_norm", "tokens"])
    one, other = (hf.load(path).state_dict() for path in (bases[0], two))
    for name, value in one.items():
        assert value.dtype is other[name].dtype
        torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-3)


def test_recovery(folder, bases):
    params = compress.Compress.model_validate(
        {
            "ratio": 0.2,
            "calibration": {"rows": 4, "length": 96},
            "recover": {"training": STEPS, "rows": 4, "length": 96},
        }
    )
    inputs = compress.Inputs(model=bases[0], corpus=folder / "corpus")
    one, two = made(compress.compress, params, inputs, folder, "compressed")
    close(one, two, "history-recover.jsonl", ["loss", "grad_norm", "divergence"])
    sizes = [hf.stored_bytes(hf.load(path)) for path in (one, two)]
    assert sizes[0] == sizes[1] < hf.stored_bytes(hf.load(bases[0]))
    assert (one / "ledger.json").exists()
    assert (two / "ledger.json").exists()


@pytest.mark.parametrize("updates", [1, 2])
def test_reinforcement(folder, bases, updates):
    params = Finetune.model_validate(
        STEPS
        | {
            "prompts": 4,
            "samples": 3,
            "updates": updates,
            "penalties": [{"name": "k3"}],
            "length": {"name": "constant", "tokens": 8},
            # Random answers are never right: their lengths are what differs.
            "shaping": [{"name": "overlong_ramp", "share": 1.0}],
        }
    )
    inputs = finetune.Inputs(model=bases[0], corpus=folder / "corpus")
    one, two = made(finetune.finetune, params, inputs, folder, f"tuned{updates}-")
    names = ["loss", "grad_norm", "reward", "length", "truncated", "entropy"]
    close(one, two, "history-finetune.jsonl", names)
    rewards = [row["reward"] for row in series.read(one / "history-finetune.jsonl")]
    assert len(set(rewards)) > 1
