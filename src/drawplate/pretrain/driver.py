"""Training a decoder from scratch on a corpus, or adopting one that fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from drawplate.core import hf
from drawplate.core.batches import Rows
from drawplate.core.corpus import Corpus
from drawplate.core.errors import UserError
from drawplate.core.progress import Watch, silent
from drawplate.model import build
from drawplate.pretrain import Pretrain
from drawplate.train import precision
from drawplate.train.attention import attention_for
from drawplate.train.distributed import ALONE, World, whole_state
from drawplate.train.language import NextToken
from drawplate.train.loop import Outcome, train
from drawplate.train.loss import check_head


class Pretrained(NamedTuple):
    """A decoder with the tokenizer it reads, and how training went (None where it was adopted)."""

    model: PreTrainedModel
    tokenizer: Any
    outcome: Outcome | None


def pretrain(
    params: Pretrain, corpus: Corpus, work: Path, watch: Watch = silent, world: World = ALONE
) -> Pretrained:
    """A decoder for `corpus`: trained, or adopted and checked; equal in all processes of `world`.

    Raises:
        UserError: the corpus does not fit the rows or the adopted model.
        NotFinite: training diverged and the guard gave up.
    """
    if params.adopt is not None:
        return adopt(params.adopt, corpus)
    if params.model.context < params.length:
        raise UserError(
            f"pretrain.length {params.length} is longer than pretrain.model.context "
            f"{params.model.context}; raise the context or shorten the rows"
        )
    model = _fresh(params, corpus)
    check_head(model)
    rows = Rows(
        corpus,
        batch=params.batch,
        length=params.length,
        steps=params.training.steps,
        seed=params.seed,
        mix=params.mix,
        learn_prompts=params.learn_prompts,
    )
    identity = params.model_dump(mode="json", exclude={"training", "adopt"})
    task = NextToken(rows, {"corpus": hf_id(corpus), **identity})
    model.train()
    dtype = precision.choose(params.training.precision, model.device)
    with attention_for(model, params.length, dtype):
        outcome = train(model, task, params.training, work, watch, world)
    if world.sharded:
        parts, model = model, _fresh(params, corpus)
        model.load_state_dict(whole_state(parts))
        precision.cast(model, dtype)
    return Pretrained(model.eval(), corpus.tokenizer, outcome)


def _fresh(params: Pretrain, corpus: Corpus) -> PreTrainedModel:
    model = build(params.model, corpus.vocabulary, params.seed)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = corpus.end, corpus.pad
    return model


def hf_id(corpus: Corpus) -> str:
    """What tells this corpus from others: its manifest's hash, or its facts where it has none."""
    from drawplate.lineage import content_hash

    return content_hash(corpus.folder)


def adopt(folder: Path, corpus: Corpus) -> Pretrained:
    """The decoder in `folder` with its own tokenizer, which the corpus must have been cut with.

    Raises:
        UserError: the folder holds no decoder, or the corpus was tokenized otherwise.
    """
    model = hf.load(folder)
    tokenizer = hf.load_tokenizer(folder)
    if tokenizer.get_vocab() != corpus.tokenizer.get_vocab():
        raise UserError(
            f"{folder} reads other tokens than the corpus {corpus.folder} was cut with; "
            f"set prepare.tokenizer to {folder} and run prepare again"
        )
    return Pretrained(model, tokenizer, None)
