"""Pretraining, recovery and RL on tiny models, short and often saved, for processes that die."""

import copy
import hashlib
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from drawplate.compress.driver import Compress, compress
from drawplate.compress.recover import Recover, recover
from drawplate.core.corpus import Corpus
from drawplate.pretrain.driver import pretrain
from drawplate.rl.driver import finetune
from drawplate.train.loop import Outcome
from tests import pretrain_cases, tiny
from tests.test_rl_driver import END, PROMPTS, decode, even, settings
from tests.train_cases import digest

_HOME = tempfile.TemporaryDirectory()


@cache
def corpus() -> Corpus:
    """Made once in a process; its forks read the same one."""
    return pretrain_cases.corpus(Path(_HOME.name) / "corpus")


@cache
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A compressed model and its parent."""
    parent = tiny.model(vocabulary=corpus().vocabulary)
    model = copy.deepcopy(parent)
    compress(model, tiny.tokens(), Compress(ratio=0.3))
    return model, parent


def pretrained(work: str | Path, steps: int = 90) -> tuple[PreTrainedModel, Outcome]:
    """A fresh decoder."""
    torch.set_num_threads(1)
    params = pretrain_cases.params(steps, training={"save_every": 3})
    model, _, outcome = pretrain(params, corpus(), Path(work))
    assert outcome is not None
    return model, outcome


def recovered(work: str | Path, steps: int = 50) -> tuple[PreTrainedModel, Outcome]:
    """What compression left."""
    torch.set_num_threads(1)
    model, parent = copy.deepcopy(pair())
    training = {"steps": steps, "precision": "float32", "save_every": 3}
    params = Recover.model_validate({"rows": 4, "length": 16, "training": training})
    return model, recover(model, parent, corpus(), params, Path(work))


def reinforced(work: str | Path, steps: int = 12) -> tuple[PreTrainedModel, Outcome]:
    """Every other step learns from answers of the step before."""
    torch.set_num_threads(1)
    model, how = tiny.model(), settings(steps=steps, updates=2, save_every=1)
    given: dict[str, Any] = {"prompts": PROMPTS, "score": even, "decode": decode, "end": END}
    return model, finetune(model, how, **given, about="test", work=Path(work))


def _warm(run: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory() as work:
        run(work, steps=2)


# Everything that happens once in a process.
warm_pretrained = partial(_warm, pretrained)
warm_recovered = partial(_warm, recovered)
warm_reinforced = partial(_warm, reinforced)


def left(model: PreTrainedModel, outcome: Outcome) -> tuple[str, ...]:
    """sha256 of the model's bytes, of the last checkpoint's, and of the series without clocks."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return hashlib.sha256(save(weights)).hexdigest(), *digest(outcome)
