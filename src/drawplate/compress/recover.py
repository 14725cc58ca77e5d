"""Recovery: a short training of what compression left, on text and on the parent's predictions.

    loss = alpha T^2 KL(parent at T || model at T) + (1 - alpha) (-log p(next token))

averaged over the learned tokens, T being the temperature (Hinton et al. 2015, arXiv:1503.02531).
Training happens inside the edits: factors stay factors, and a weight that is not stored cannot come
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from drawplate import edits
from drawplate.core.batches import IGNORE, Mix, Rows, Share
from drawplate.core.calibration import TextCorpus, require_room
from drawplate.core.corpus import Corpus
from drawplate.core.method import Frozen
from drawplate.core.progress import Watch, silent
from drawplate.lineage import content_hash
from drawplate.train.attention import attention_for
from drawplate.train.distributed import ALONE, World
from drawplate.train.language import named
from drawplate.train.loop import Outcome, Training, fingerprint, train
from drawplate.train.loss import check_head, states
from drawplate.train.precision import choose


def _training() -> Training:
    group = {"rate": 1e-3}
    return Training.model_validate(
        {
            "steps": 200,
            "schedule": {"name": "cosine"},
            "optimizer": {"matrices": group, "rest": group},
        }
    )


class Recover(Frozen):
    """How a compressed model is trained back."""

    training: Training = Field(default_factory=_training)
    """Steps, rate, schedule and the other settings of the training loop."""
    rows: PositiveInt = 8
    """Rows in a batch."""
    length: int = Field(128, ge=2)
    """Tokens in a row."""
    problems: Share | None = None
    """Share of rows with worked problems; null: half where the corpus has problems."""
    learn_prompts: bool = False
    """Whether the prompts of problems are learned too."""
    trains: Literal["changed", "changed_and_vectors", "everything"] = "changed_and_vectors"
    """Factors and surviving weights; these and all norms and biases; or every stored number."""
    alpha: Share = 0.5
    """Weight of the parent's predictions; the rest goes to the text itself."""
    temperature: PositiveFloat = 1.0
    """Softens both predictions before they are compared."""
    seed: int = Field(0, ge=0)
    """Of the order of the rows."""


class Recovery:
    """The task of the training loop."""

    def __init__(
        self,
        rows: Callable[[int], Any],
        parent: nn.Module,
        params: Recover,
        identity: Mapping[str, Any],
    ) -> None:
        self.rows, self.parent, self.params = rows, parent, params
        self.identity = identity

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of `step`."""
        return named(self.rows(step))

    def loss(
        self, model: nn.Module, part: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the batch's mean loss, in nats."""
        wanted = part["targets"] != IGNORE
        tokens, positions = part["tokens"], part["positions"]
        head, above = _head(model), _head(self.parent)
        alpha, soft = self.params.alpha, self.params.temperature
        given = [states(model, tokens, positions)[wanted], part["targets"][wanted]]
        if alpha:
            with torch.no_grad():
                given.append(states(self.parent, tokens, positions)[wanted])

        def each(hidden: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
            logits = head(hidden)
            found = [cross_entropy(logits, targets)]
            if taught is not None:
                with torch.no_grad():
                    wish = above(taught)
                found.append(divergence(logits, wish, soft))
            return torch.stack(found, 1)

        sums = _by_rows(each, given).sum(0) / part["learned"].clamp(min=1)
        metrics = {"tokens": torch.tensor(tokens.numel()), "text": sums[0].detach()}
        if not alpha:
            return sums[0], metrics
        metrics["divergence"] = sums[1].detach()
        return (1 - alpha) * sums[0] + alpha * soft**2 * sums[1], metrics

    def state(self) -> dict[str, Any]:
        """Nothing: rows are a function of the step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to go back to."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target]: [N, V], [N] -> [N] in nats, at least float32."""
    return functional.cross_entropy(_wide(logits), targets, reduction="none")


def divergence(logits: Tensor, parent: Tensor, temperature: float) -> Tensor:
    """KL(softmax(parent / T) || softmax(logits / T)): [N, V] x2 -> [N] in nats."""
    here = functional.log_softmax(_wide(logits) / temperature, dim=-1)
    there = functional.log_softmax(_wide(parent) / temperature, dim=-1)
    return (there.exp() * (there - here)).sum(-1)


def recover(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    corpus: Corpus | TextCorpus,
    params: Recover,
    work: Path,
    watch: Watch = silent,
    world: World = ALONE,
) -> Outcome:
    """Trains `model` in place towards `parent`, its uncompressed self; dtypes stay as they were.

    All processes of `world` hold whole models and share out the rows.

    Raises:
        UserError: the corpus has no problems, too little text for the rows, or rows are longer than
            the model reads.
        NotFinite: training diverged and the guard gave up.
    """
    check_head(model)
    require_room(model, "compress.recover.length", params.length)
    share = params.problems
    if share is None:
        share = 0.0 if isinstance(corpus, TextCorpus) else 0.5
    rows = Rows(
        cast("Corpus", corpus),
        batch=params.rows,
        length=params.length,
        steps=params.training.steps,
        seed=params.seed,
        mix=Mix(early=share, late=share),
        learn_prompts=params.learn_prompts,
    )
    identity = {
        "corpus": content_hash(corpus.folder),
        "parent": fingerprint(parent),
        **params.model_dump(mode="json", exclude={"training"}),
    }
    parent.eval()
    with (
        _training_only(model, chosen(model, params.trains)),
        attention_for(model, params.length, choose(params.training.precision, model.device)),
        attention_for(parent, params.length),
    ):
        task = Recovery(rows, parent, params, identity)
        outcome = train(model, task, params.training, work, watch, world)
    edits.check(model)
    return outcome


def chosen(model: PreTrainedModel, trains: str) -> set[str]:
    """Names of the parameters that `Recover.trains` speaks of."""
    places = tuple(f"{edit.module}." for edit in edits.of(model))
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and (
            trains == "everything"
            or name.startswith(places)
            or (trains == "changed_and_vectors" and parameter.ndim == 1)
        )
    }


@contextmanager
def _training_only(model: PreTrainedModel, names: set[str]) -> Iterator[None]:
    """Inside, gradients reach `names` alone; afterwards modes, flags and dtypes are as before."""
    before = {
        name: (parameter.requires_grad, parameter.dtype)
        for name, parameter in model.named_parameters()
    }
    training = model.training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(before[name][0])
            parameter.data = parameter.data.to(before[name][1])


def _head(model: nn.Module) -> nn.Module:
    return cast("nn.Module", model.get_output_embeddings())  # type: ignore[operator]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


CHUNK = 512
"""Tokens whose logits are in memory at a time."""
ROUND = 64
"""Divides their number: libraries keep kernels for every number of rows they meet."""


def _by_rows(work: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
    """`work` on some rows at a time; the backward pass computes it again instead of keeping it."""
    count = len(given[0])
    more = -count % ROUND
    filled = [torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]) for tensor in given]
    pieces = zip(*(torch.split(tensor, CHUNK) for tensor in filled), strict=True)
    found = [checkpoint(work, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(found)[:count]
