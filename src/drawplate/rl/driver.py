"""Rollouts in, gradients out: reinforcement learning as a task of the training loop.

Once per batch of rollouts, in this order: limit, prompts, answers, score, cuts, shaping, selection
(and again for what was not kept), log-probabilities under the policy that sampled and the one that
training started from, advantage. Then `updates` optimizer steps, each on its own part of the batch,
whose tokens are weighed within that part.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate.core.errors import UserError
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import generator, seed_of
from drawplate.edits import materialized
from drawplate.model.sample import sample
from drawplate.rl.params import Finetune
from drawplate.rl.policy import judge
from drawplate.rl.rollout import Rollout, join
from drawplate.train import precision
from drawplate.train.distributed import ALONE, World
from drawplate.train.loop import Outcome, train

Score = Callable[[int, str], float]
"""Number of a prompt, text of an answer -> how right it is, from 0 to 1."""


class Reinforce:
    """A `Task` of the training loop whose batches are the model's own answers."""

    def __init__(
        self,
        model: PreTrainedModel,
        how: Finetune,
        prompts: Sequence[Sequence[int]],
        score: Score,
        decode: Callable[[list[int]], str],
        end: int,
        about: str,
        world: World = ALONE,
    ):
        self.world = world
        self.model, self.how, self.score, self.decode, self.end = model, how, score, decode, end
        self.prompts = [list(prompt) for prompt in prompts]
        if not self.prompts or not all(self.prompts):
            raise UserError("finetuning needs at least one prompt, and no empty ones")
        self.about = about
        self.loss_of = how.loss
        self.moving = how.adapt.install(model, how.seed)
        self.start = {name: p.detach().clone() for name, p in self.moving.items()}
        self.cursor = 0
        self.shares: list[float] = []
        self.round = -1
        self.rollout: Rollout | None = None
        self.figures: dict[str, float] = {}
        self.packed: str | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the data and the scoring are; the settings are the loop's."""
        text = json.dumps([self.prompts, self.end])
        return {"prompts": hashlib.sha256(text.encode()).hexdigest(), "about": self.about}

    def batch(self, step: int) -> dict[str, Tensor]:
        """The part of the rollouts that optimizer step `step` learns from."""
        number, part = divmod(step, self.how.updates)
        if self.rollout is None or number != self.round:
            self._collect(number)
        rollout = cast("Rollout", self.rollout)
        rows = torch.randperm(
            len(rollout.group), generator=generator(self.how.seed, "parts", number)
        )
        # A batch that selection left with fewer answers than updates is gone through again.
        parts = rows.tensor_split(min(self.how.updates, len(rows)))
        mine = rollout.take(parts[part % len(parts)].to(rollout.group.device))
        return {
            **mine.tensors(),
            "share": self.loss_of.weight(mine),
            "held": self.loss_of.held(mine),
            "limit": torch.tensor(mine.limit),
            "rows": torch.tensor(len(mine.group)),
            "count": mine.mask.sum().cpu(),
            **{f"figure/{name}": torch.tensor(value) for name, value in self.figures.items()},
        }

    def loss(
        self, model: nn.Module, part: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What some rows add to loss and metrics."""
        model.eval()  # the policy that answered had no dropout either
        policy = cast("PreTrainedModel", model)
        rollout = _unpack(part, int(part["limit"]))
        logp, entropy = judge(policy, rollout.tokens, rollout.mask, self.how.temperature)
        old = logp.detach() if self.how.once else rollout.old
        rollout = replace(rollout, logp=logp, old=old)
        value = -(part["share"] * self.loss_of.objective(rollout, part["held"])).sum()
        tokens = part["count"]
        sums = {**self.loss_of.metrics(rollout), "entropy": entropy.sum()}
        metrics = {name: v / tokens for name, v in sums.items()}
        share = len(rollout.group) / part["rows"]
        for name in self.figures:
            metrics[name] = part[f"figure/{name}"] * share
        return value, metrics | {"tokens": rollout.mask.sum()}

    def state(self) -> dict[str, Any]:
        """Where in the prompts training is, and the rollouts where they serve several steps."""
        return {
            "cursor": self.cursor,
            "shares": list(self.shares),
            "round": self.round,
            "limit": self.rollout.limit if self.rollout else 0,
            "figures": dict(self.figures),
            "rollout": self.packed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to `state`."""
        self.cursor, self.round = state["cursor"], state["round"]
        self.shares = list(state["shares"])
        self.figures, self.packed = dict(state["figures"]), state["rollout"]
        self.rollout = None
        if self.packed is not None:
            tensors = load(base64.b64decode(self.packed))
            self.rollout = _unpack(tensors, state["limit"]).to(self.model.device)

    @torch.no_grad()
    def merge(self) -> None:
        """Puts together what training started from and what it found."""
        start, trained = (
            torch.cat([value.flatten() for value in values.values()])
            for values in (self.start, self.moving)
        )
        merged = self.how.merge.merged(start, trained)
        pieces = torch.split(merged, [value.numel() for value in self.start.values()])
        named = zip(self.start.items(), pieces, strict=True)
        self._set({name: piece.view_as(value) for (name, value), piece in named})

    @torch.no_grad()
    def _collect(self, number: int) -> None:
        """Answers prompts until the batch is full or selection gives up."""
        how = self.how
        self.model.eval()
        limit = how.length.limit(min(number * how.updates, how.steps - 1), how.steps)
        drawn: list[Rollout] = []
        kept: list[Rollout] = []
        missing, useful = how.prompts, 0
        while missing and len(drawn) < how.select.draws():
            asked = how.select.ask(missing, self.shares)
            answers = self._answer(asked, limit, seed_of(how.seed, "sample", number, len(drawn)))
            keep = how.select.keep(answers)
            useful += int(keep.sum())
            keep = keep & (keep.cumsum(0) <= missing)
            drawn.append(answers)
            if keep.any():
                kept.append(answers.take(keep.repeat_interleave(how.samples)))
            missing -= int(keep.sum())
        every = join(drawn)
        self.shares.append(useful * how.samples / len(every.group))
        # Where no group was kept the last draw stands in: equal rewards have advantage zero.
        rollout = join(kept) if kept else drawn[-1]
        if not how.once:
            rollout = self._judged(rollout)
        rollout = replace(rollout, advantage=how.advantage.of(rollout))
        dropped = 1 - sum(len(part.group) for part in kept) / len(every.group)
        self.round, self.rollout = number, rollout
        self.figures = {**_figures(every), "dropped": dropped, "draws": float(len(drawn))}
        if how.updates > 1:
            self.packed = base64.b64encode(save(rollout.tensors())).decode()

    def _answer(self, count: int, limit: int, seed: int) -> Rollout:
        """`samples` answers to each of the next `count` prompts, scored and shaped."""
        how = self.how
        places = list(range(self.cursor, self.cursor + count))
        self.cursor += count
        chosen = [index for index in map(self._prompt, places) for _ in range(how.samples)]
        asked = [self.prompts[index] for index in chosen]
        mine = self.world.share(len(asked))
        with materialized(self.model, whole=True):
            drawn = sample(
                self.model,
                [asked[row] for row in mine],
                max_new=limit,
                end=self.end,
                temperature=how.temperature,
                seed=seed,
                first=mine.start,
                batch_size=how.parallel,
            )
        scores = [self._scored(chosen[r], a) for r, a in zip(mine, drawn.tokens, strict=True)]
        found = zip(drawn.tokens, drawn.behaviour, drawn.finished, scores, strict=True)
        answers, behaviour, finished, score = zip(*self.world.gather(list(found)), strict=True)
        tokens, mask, sampled = _rows(asked, answers, behaviour)
        nothing = torch.zeros_like(sampled)
        rollout = Rollout(
            tokens=tokens,
            mask=mask,
            group=torch.tensor(places).repeat_interleave(how.samples),
            finished=torch.tensor(finished),
            limit=limit,
            score=torch.tensor(score),
            reward=torch.tensor(score),
            sampled=sampled,
            **dict.fromkeys(("old", "reference", "logp", "advantage"), nothing),
        ).to(self.model.device)
        for cut in how.cuts:
            rollout = cut.applied(rollout, lambda row, answer: self._scored(chosen[row], answer))
        for shaping in how.shaping:
            rollout = replace(rollout, reward=shaping.reward(rollout))
        return rollout

    def _scored(self, index: int, answer: list[int]) -> float:
        """The verifier's word on an answer without its end token."""
        text = self.decode(answer[:-1] if answer[-1] == self.end else answer)
        score = float(self.score(index, text))
        if not 0 <= score <= 1:
            raise UserError(f"the score of an answer to prompt {index} is {score}, not in [0, 1]")
        return score

    def _judged(self, rollout: Rollout) -> Rollout:
        """Log-probabilities now and, where a penalty asks, at the start of training."""
        how = self.how
        figures: dict[str, list[Tensor]] = {"old": [], "reference": []}
        mine = torch.tensor(self.world.share(len(rollout.group)))
        pieces = mine.tensor_split(how.updates * how.accumulate)
        forward = [(rollout.tokens[rows], rollout.mask[rows]) for rows in pieces if len(rows)]
        for tokens, mask in forward:
            figures["old"].append(judge(self.model, tokens, mask, how.temperature)[0].cpu())
        if how.penalties:
            with self._started(), materialized(self.model, whole=True):
                for tokens, mask in forward:
                    logp = judge(self.model, tokens, mask, how.temperature)[0]
                    figures["reference"].append(logp.cpu())
        whole = {name: self.world.gather(parts) for name, parts in figures.items()}
        known: dict[str, Any] = {name: torch.cat(parts) for name, parts in whole.items() if parts}
        return replace(rollout, **known).to(self.model.device)

    def _prompt(self, place: int) -> int:
        """Which prompt stands at `place` of an endless series of shuffles."""
        epoch, offset = divmod(place, len(self.prompts))
        shuffle = generator(self.how.seed, "prompts", epoch)
        return int(torch.randperm(len(self.prompts), generator=shuffle)[offset])

    @contextmanager
    def _started(self) -> Iterator[None]:
        """Inside, the model is what it was when training began."""
        now = {name: parameter.detach().clone() for name, parameter in self.moving.items()}
        try:
            self._set(self.start)
            yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.moving.items():
            parameter.copy_(values[name])


def finetune(
    model: PreTrainedModel,
    how: Finetune,
    *,
    prompts: Sequence[Sequence[int]],
    score: Score,
    decode: Callable[[list[int]], str],
    end: int,
    about: str,
    work: Path,
    watch: Watch = silent,
    world: World = ALONE,
) -> Outcome:
    """Train `model` in place on its own answers; afterwards it is stored as compactly as before.

    `model` has to be the untrained one in every call: a call with equal arguments goes on where an
    earlier one was stopped, from what it left in `work`.

    Args:
        model: A Hugging Face decoder, compressed, quantized or plain.
        how: The settings.
        prompts: Token ids of each prompt.
        score: Says how right an answer to a prompt is, given without its end token.
        decode: Token ids of an answer to its text.
        end: The token that ends an answer.
        about: What tells this scoring from others, such as the hash of the problems.
        work: Folder for checkpoints and the metric series.
        watch: Called after every step with its metrics.
        world: This process among those that train together.

    Raises:
        UserError: settings and model do not fit together, or a score is out of range.
        Stopped, NotFinite, Exhausted, Damaged: as `drawplate.train.loop.train`.
    """
    if world.sharded:
        raise UserError("finetuning needs whole weights in every process: use mode data")
    stored = model.dtype
    computed = precision.choose(how.precision, model.device)
    if torch.promote_types(stored, computed) != computed:
        raise UserError(f"precision {computed} would round the weights, stored in {stored}")
    task = Reinforce(model, how, prompts, score, decode, end, about, world)
    outcome = train(model, task, how, work, watch, world)
    task.merge()
    how.adapt.finish(model)
    precision.cast(model, stored)
    return outcome


def _rows(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], logps: Sequence[list[float]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and answers side by side, padded on the right -> tokens, mask, log-probabilities."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    sampled = torch.zeros(len(prompts), width)
    for i, (prompt, answer, logp) in enumerate(zip(prompts, answers, logps, strict=True)):
        first, last = len(prompt), len(prompt) + len(answer)
        tokens[i, :last] = torch.tensor(prompt + answer)
        mask[i, first:last] = True
        sampled[i, first:last] = torch.tensor(logp)
    return tokens, mask, sampled


def _unpack(tensors: Mapping[str, Tensor], limit: int) -> Rollout:
    names = {field.name for field in fields(Rollout)} - {"limit"}
    known: dict[str, Any] = {name: tensors[name] for name in names}
    return Rollout(limit=limit, **known)


def _figures(every: Rollout) -> dict[str, float]:
    """Metrics of all answers that were drawn."""
    return {
        "score": float(every.score.mean()),
        "reward": float(every.reward.mean()),
        "length": float(every.length.double().mean()),
        "truncated": float((~every.finished).double().mean()),
        "limit": float(every.limit),
    }
