"""Training a decoder from scratch on a corpus, or adopting one that fits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate.core import hf
from drawplate.core.batches import Batch, Rows
from drawplate.core.corpus import Corpus
from drawplate.core.errors import UserError
from drawplate.core.progress import Watch, silent
from drawplate.model import build
from drawplate.pretrain import Pretrain
from drawplate.pretrain.budget import SIZES, Plan
from drawplate.train import precision
from drawplate.train.attention import attention_for
from drawplate.train.distributed import ALONE, World, whole_state
from drawplate.train.language import NextToken
from drawplate.train.loop import Outcome, train
from drawplate.train.loss import check_apart, check_head
from drawplate.train.optimizer import Chain, Optimizer


class Pretrained(NamedTuple):
    """A decoder with the tokenizer it reads, and how training went (None where it was adopted)."""

    model: PreTrainedModel
    tokenizer: Any
    outcome: Outcome | None


def pretrain(
    params: Pretrain,
    corpus: Corpus,
    work: Path,
    watch: Watch = silent,
    world: World = ALONE,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A decoder for `corpus`: trained, or adopted and checked; equal in all processes of `world`.

    Training takes place on `device`.

    Raises:
        UserError: the corpus does not fit the rows or the adopted model, or this one the training.
        NotFinite: training diverged and the guard gave up.
    """
    if params.adopt is not None and params.position is None:
        return adopt(params.adopt, corpus)
    plan = planned(params, corpus)
    if plan is not None:
        params = follow(params, plan)
    whole = [part.name for part in params.parts if not part.sharded]
    if world.sharded and whole:
        raise UserError(
            f"{', '.join(whole)} cannot be trained with weights split over processes; "
            "set execution.sharded to false"
        )
    model, tokenizer = _begun(params, corpus)
    model.to(device)  # begun elsewhere: the same bits everywhere, so that a run may change devices
    check_head(model)
    if params.adopt is not None:
        check_apart(model)
    rows = Rows(
        corpus,
        batch=params.batch,
        length=params.length,
        steps=params.training.steps,
        seed=params.seed,
        mix=params.mix,
        learn_prompts=params.learn_prompts,
    )
    without = {"training", "adopt"}
    identity = params.model_dump(mode="json", exclude=without, exclude_none=True)
    training, optimizer = params.training, Held.of(params.training.optimizer)
    if params.parts:
        training = training.model_copy(update={"optimizer": optimizer})
    task = Kept(params, model, optimizer, world, rows, {"corpus": hf_id(corpus), **identity})
    model.train()
    dtype = precision.choose(training.precision, model.device)
    with attention_for(model, params.length, dtype):
        outcome = train(model, task, training, work, watch, world)
    if world.sharded:
        split, (model, _) = model, _begun(params, corpus)
        model.load_state_dict(whole_state(split))
        precision.cast(model, dtype)
    for part in reversed(params.parts):
        part.finish(model)
    return Pretrained(model.eval(), tokenizer, outcome)


def _begun(params: Pretrain, corpus: Corpus) -> tuple[PreTrainedModel, Any]:
    """What training begins with: a fresh decoder or an adopted one, with its parts, and tokenizer.

    Raises:
        UserError: rows are longer than its context.
    """
    if params.adopt is None:
        model, tokenizer = build(params.model, corpus.vocabulary, params.seed), corpus.tokenizer
        for settings in (model.config, model.generation_config):
            settings.eos_token_id, settings.pad_token_id = corpus.end, corpus.pad
        whose = "pretrain.model.context"
    else:
        model, tokenizer, _ = adopt(params.adopt, corpus)
        whose = f"the context of {params.adopt},"
    context = model.config.max_position_embeddings
    if context < params.length:
        raise UserError(
            f"pretrain.length {params.length} is longer than {whose} {context}; "
            "raise the context or shorten the rows"
        )
    for part in params.parts:
        part.install(model, params.seed)
    return model, tokenizer


def planned(params: Pretrain, corpus: Corpus) -> Plan | None:
    """What the budget plans for this corpus; None without a budget.

    Raises:
        UserError: the budget pays for nothing, or the corpus is seen in less than a run.
    """
    if params.budget is None:
        return None
    # Rows that are there at least: text loses up to one to the shift, problems fill theirs or less.
    text = len(corpus.stream("text-train").tokens) // params.length - 1
    problems = len(corpus.stream("problems-train").tokens) // params.length
    parts = 1000
    share = sum(params.mix.share((part + 0.5) / parts) for part in range(parts)) / parts
    rows = min(
        text / (1 - share) if share < 1 else math.inf,
        problems / share if share > 0 else math.inf,
    )
    # A batch is kept back for shares that a run of few steps rounds otherwise.
    available = (math.floor(rows) - params.batch) * params.length
    per_step = params.batch * params.length
    return params.budget.plan(params.model, corpus.vocabulary, per_step, available)


def follow(params: Pretrain, plan: Plan) -> Pretrain:
    """The parameters with what was planned in its places."""
    model = params.model.model_copy(update={key: getattr(plan, key) for key in SIZES})
    training = params.training.model_copy(update={"steps": plan.steps})
    return params.model_copy(update={"model": model, "training": training})


class Held(Optimizer):
    """The settings' optimizer, which keeps hold of the chain that it builds."""

    _chain: Chain | None = PrivateAttr(None)

    @classmethod
    def of(cls, settings: Optimizer) -> Held:
        """The same settings."""
        return cls(**dict(settings))

    def build(self, model: nn.Module) -> Chain:
        """The optimizer of `model`, held."""
        self._chain = super().build(model)
        return self._chain

    @torch.no_grad()
    def renew(self, model: nn.Module, names: Collection[str]) -> None:
        """Take the parameters `names` as they stand in `model`, with memories as at the start.

        Entries in 16 bits that still are what their 32-bit copy rounds to keep that copy.
        """
        assert self._chain is not None, "the loop builds the optimizer before the first step"
        new, state = super().build(model).tensors(), self._chain.tensors()
        for name in names:
            key, parameter = f"weight/{name}", model.get_parameter(name)
            kept = state[key].to(parameter.dtype) == parameter
            new[key] = torch.where(kept, state[key], new[key])
        self._chain.load_tensors(
            {key: (new if key.split("/")[1] in names else state)[key] for key in state}
        )


class Kept(NextToken):
    """Next tokens, and parts of the model that are looked after before and after each step.

    A step that is given up never reaches `state` and so changes nothing: what is saved is always
    what finished steps left. One that the guard skips is finished: it counts, but what its passes
    left in the model is forgotten before.
    """

    def __init__(
        self,
        params: Pretrain,
        model: PreTrainedModel,
        optimizer: Held,
        world: World,
        rows: Callable[[int], Batch],
        identity: Mapping[str, Any],
    ):
        super().__init__(rows, identity, params.sharpness)
        self.parts, self.seed = params.parts, params.seed
        self.model, self.optimizer, self.world = model, optimizer, world
        self.steps, self.begun = 0, False

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of `step`."""
        for part in self.parts:
            part.before(self.model, step)
        self.begun = True
        return super().batch(step)

    def state(self) -> dict[str, Any]:
        """How many steps are finished, the one that was begun among them."""
        if not self.parts:
            return {}
        if self.begun:
            self.begun, self.steps = False, self.steps + 1
            for part in self.parts:
                written = part.after(self.model, self.steps, self.seed, self.world)
                if written:
                    self.optimizer.renew(self.model, written)
        return {"steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to a saved state, whose tensors the loop has put in place."""
        self.begun, self.steps = False, state.get("steps", 0)


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
