"""Rollouts in, gradients out: reinforcement learning as a task of the training loop.

Once per batch of rollouts, in this order: limit, prompts, answers, score, cuts, shaping, selection
(and again for what was not kept), log-probabilities under the policy that sampled and the one that
training started from, advantage. Then `updates` optimizer steps, each on its own part of the batch,
whose tokens are weighed within that part. With `window`, answers grow by a piece and go on in the
next batch; with `critic`, it is asked before the advantage and learns after it. With `self_play`,
it makes statements and proofs instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate.core.errors import UserError
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import generator, seed_of
from drawplate.edits import features, materialized
from drawplate.edits.clex import reaching
from drawplate.model.sample import check_context, sample
from drawplate.rl import moving
from drawplate.rl.critic import Head
from drawplate.rl.drawing import Drawing
from drawplate.rl.judge import Step, Verify
from drawplate.rl.params import Finetune
from drawplate.rl.play import Play, tensors_of
from drawplate.rl.policy import judge, look, spread
from drawplate.rl.rollout import Rollout, join
from drawplate.rl.sampling import Start
from drawplate.rl.window import Answer, Window, remembered
from drawplate.train import precision
from drawplate.train.distributed import ALONE, World
from drawplate.train.loop import Outcome, train
from drawplate.train.loss import check_apart, check_head

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
        step: Verify | None = None,
    ):
        self.world = world
        self.model, self.how, self.score, self.decode, self.end = model, how, score, decode, end
        self.prompts = [list(prompt) for prompt in prompts]
        if not self.prompts or not all(self.prompts):
            raise UserError("finetuning needs at least one prompt, and no empty ones")
        most = max(how.length.limit(step, how.steps) for step in range(how.steps))
        check_context(model, self.prompts, [most] * len(self.prompts))  # before the first steps
        self.horizon = max(map(len, self.prompts)) + most
        self.about = about
        self.loss_of = how.loss
        self.moving = how.adapt.install(model, how.seed)
        self.start = moving.copied(self.moving)
        self.drawing = Drawing(
            model, how, self.prompts, self._scored, step or _unverified, decode, end, world
        )
        self.critic = None
        if how.critic is not None:
            width = features(cast("nn.Module", model.get_output_embeddings()))[1]
            self.critic = Head(how.critic, width, model.device)
        self.going: list[Answer] = []
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
        by_row = {
            **mine.tensors(),
            "share": self.loss_of.weight(mine),
            "held": self.loss_of.held(mine),
        }
        # Selection may leave fewer answers than processes: the others get rows without tokens.
        count = max(len(mine.group), self.world.size)
        return {
            **{name: _filled(value, count) for name, value in by_row.items()},
            "limit": torch.tensor(mine.limit),
            "rows": torch.tensor(count),
            "count": mine.mask.sum().cpu(),
            **tensors_of(self.figures),
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
        share = len(rollout.group) / part["rows"].double()
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
            "going": [dict(vars(answer)) for answer in self.going],
            "critic": self.critic.state() if self.critic else None,
            "generated": self.drawing.generated,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to `state`."""
        self.cursor, self.round = state["cursor"], state["round"]
        self.shares = list(state["shares"])
        self.figures, self.packed = dict(state["figures"]), state["rollout"]
        self.going = [Answer(**_tuples(answer)) for answer in state["going"]]
        self.drawing.generated = state["generated"]
        if self.critic is not None:
            self.critic.restore(state["critic"])
        self.rollout = None
        if self.packed is not None:
            tensors = load(base64.b64decode(self.packed))
            self.rollout = _unpack(tensors, state["limit"]).to(self.model.device)

    def merge(self) -> None:
        """Puts together what training started from and what it found."""
        moving.merge(self.moving, self.start, self.how.merge)

    @torch.no_grad()
    def _collect(self, number: int) -> None:
        """The next batch of rollouts."""
        how = self.how
        self.model.eval()
        limit = how.length.limit(min(number * how.updates, how.steps - 1), how.steps)
        if how.window is None:
            rollout, figures = self._whole(number, limit)
        else:
            rollout, figures = self._grown(how.window, limit)
        figures["generated"] = float(self.drawing.generated)
        self.round, self.rollout, self.figures = number, rollout, figures
        if how.updates > 1:
            held = {name: tensor.contiguous() for name, tensor in rollout.tensors().items()}
            self.packed = base64.b64encode(save(held)).decode()

    def _whole(self, number: int, limit: int) -> tuple[Rollout, dict[str, float]]:
        """Answers prompts until the batch is full or selection gives up."""
        how = self.how
        drawn: list[Rollout] = []
        kept: list[Rollout] = []
        missing, useful = how.prompts, 0
        while missing and len(drawn) < how.select.draws():
            count = how.sampling.prompts(how.select.ask(missing, self.shares))
            answers = self._drawn(count, limit, seed_of(how.seed, "sample", number, len(drawn)))
            keep = how.select.keep(answers)
            useful += int(keep.sum())
            keep = keep & (keep.cumsum(0) <= missing)
            drawn.append(answers)
            if keep.any():
                kept.append(answers.take(keep.repeat_interleave(how.samples)))
            missing -= int(keep.sum())
        every = join(drawn)
        self.shares.append(useful * how.samples / len(every.group))
        some = torch.arange(len(drawn[-1].group)) < how.prompts * how.samples
        rollout, figures = self._weighed(join(kept) if kept else drawn[-1].take(some))
        if not kept:
            # The last draw stands in, whose rewards may differ in ways that selection leaves out.
            rollout = replace(rollout, advantage=torch.zeros_like(rollout.advantage))
        dropped = 1 - sum(len(part.group) for part in kept) / len(every.group)
        return rollout, figures | _figures(every) | {"dropped": dropped, "draws": float(len(drawn))}

    def _grown(self, window: Window, limit: int) -> tuple[Rollout, dict[str, float]]:
        """Takes unfinished answers on and begins as many new ones as there is room for."""
        how = self.how
        room = how.prompts * how.samples - len(self.going)
        begun = [*self.going, *self._begin(room // how.samples, limit)]
        answers, every = self._answer(begun, window)
        rollout, figures = self._weighed(every, begun)
        self.going = window.kept(answers, rollout.old, every.mask)
        ended = every.take(~every.going)
        # Where no answer was completed, what was last said of those that were stands.
        figures |= _figures(ended) if len(ended.group) else _UNKNOWN | self.figures
        figures |= {"limit": float(every.limit), "ended": float(len(ended.group))}
        lengths = ((len(a.tokens), len(b.tokens)) for a, b in zip(answers, begun, strict=True))
        self.drawing.generated += sum(after - before for after, before in lengths)
        return replace(rollout, mask=window.due(answers, every.mask)), figures

    def _drawn(self, count: int, limit: int, seed: int) -> Rollout:
        """Groups of answers to the next `count` prompts, scored and shaped."""
        places = range(self.cursor, self.cursor + count)
        self.cursor += count
        starts = [Start(place, self._prompt(place)) for place in places]
        groups = self.drawing.groups(starts, limit, seed)
        rows = [(group.start, answer) for group in groups for answer in group.answers]
        most = self.how.sampling.most(limit)
        answers = [
            Answer(at.number, 0, most, tuple(a.tokens), tuple(a.behaviour), finished=a.finished)
            for at, a in rows
        ]
        heads = [[*self.prompts[at.prompt], *at.before] for at, _ in rows]
        chosen = [at.prompt for at, _ in rows]
        return self._shaped(heads, answers, [answer.score for _, answer in rows], chosen)

    def _begin(self, count: int, limit: int) -> list[Answer]:
        """`samples` answers to each of the next `count` prompts, still empty."""
        places = range(self.cursor, self.cursor + count)
        self.cursor += count
        many = self.how.samples
        return [Answer(p, p * many + i, limit) for p in places for i in range(many)]

    def _answer(self, begun: Sequence[Answer], window: Window) -> tuple[list[Answer], Rollout]:
        """Takes answers on by a window; complete ones are scored and shaped."""
        how = self.how
        prompt = {place: self._prompt(place) for place in {answer.place for answer in begun}}
        chosen = [prompt[answer.place] for answer in begun]
        mine = self.world.share(len(begun))
        with materialized(self.model, whole=True):
            drawn = sample(
                self.model,
                [[*self.prompts[chosen[row]], *begun[row].tokens] for row in mine],
                max_new=[window.most(begun[row]) for row in mine],
                end=self.end,
                temperature=how.temperature,
                # Of the whole run, so that chance goes on where an answer stopped.
                seed=seed_of(how.seed, "sample"),
                first=[begun[row].number for row in mine],
                begun=[len(begun[row].tokens) for row in mine],
                batch_size=how.parallel,
                precision=self.model.dtype,
            )
        found = zip(drawn.tokens, drawn.behaviour, drawn.finished, strict=True)
        grown = [begun[row].grown(*more) for row, more in zip(mine, found, strict=True)]
        scores = [
            0.0 if answer.going else self._scored(chosen[row], list(answer.tokens))
            for row, answer in zip(mine, grown, strict=True)
        ]
        answers, score = self.world.gather(grown), self.world.gather(scores)
        heads = [self.prompts[index] for index in chosen]
        return answers, self._shaped(heads, answers, score, chosen)

    def _shaped(
        self,
        heads: Sequence[list[int]],
        answers: Sequence[Answer],
        score: Sequence[float],
        chosen: Sequence[int],
    ) -> Rollout:
        """The record of answers behind `heads`, cut and with their rewards."""
        how = self.how
        tokens, mask, sampled = _rows(heads, answers)
        nothing = torch.zeros_like(sampled)
        rollout = Rollout(
            tokens=tokens,
            mask=mask,
            group=torch.tensor([answer.place for answer in answers]),
            finished=torch.tensor([answer.finished for answer in answers]),
            going=torch.tensor([how.window is not None and answer.going for answer in answers]),
            limit=max(answer.limit for answer in answers),
            score=torch.tensor(score),
            reward=torch.tensor(score),
            sampled=sampled,
            after=torch.zeros(len(score)),
            **dict.fromkeys(("old", "reference", "logp", "value", "advantage"), nothing),
        ).to(self.model.device)
        for cut in how.cuts:
            rollout = cut.applied(rollout, lambda row, answer: self._scored(chosen[row], answer))
        for shaping in how.shaping:
            rollout = replace(rollout, reward=shaping.reward(rollout))
        return rollout

    def _weighed(
        self, rollout: Rollout, begun: Sequence[Answer] = ()
    ) -> tuple[Rollout, dict[str, float]]:
        """With advantages, of answers `begun` in earlier batches; then the critic learns."""
        how, figures = self.how, dict[str, float]()
        if not how.once:
            rollout = self._judged(rollout)
            rollout = replace(rollout, old=remembered(begun, rollout.old, rollout.mask))
        rollout = replace(rollout, advantage=how.advantage.of(rollout))
        if self.critic is not None:
            mine = torch.tensor(self.world.share(len(rollout.group)), dtype=torch.long)
            mine = mine.to(rollout.group.device)
            inside, ended = rollout.reach[mine], _wide(rollout.spread(~rollout.going))[mine]
            target = _wide(how.advantage.returns(rollout))[mine]
            error = self.critic.learn(target[inside], ended[inside], self.world)
            value = float(rollout.value.sum() / rollout.mask.sum())
            figures = {"value": value, "value_error": error}
        return rollout, figures

    def _scored(self, index: int, answer: list[int]) -> float:
        """The verifier's word on an answer without its end token."""
        text = self.decode(answer[:-1] if answer[-1] == self.end else answer)
        score = float(self.score(index, text))
        if not 0 <= score <= 1:
            raise UserError(f"the score of an answer to prompt {index} is {score}, not in [0, 1]")
        return score

    def _judged(self, rollout: Rollout) -> Rollout:
        """Log-probabilities now, at the start of training for penalties, a critic's values."""
        how = self.how
        figures: dict[str, list[Tensor]] = {"old": [], "reference": [], "value": []}
        mine = torch.tensor(self.world.share(len(rollout.group)))
        pieces = mine.tensor_split(how.updates * how.accumulate)
        text, inside = rollout.tokens, rollout.mask
        if self.critic is not None:
            text, inside = _wide(text), rollout.reach
        forward = [(text[rows], inside[rows]) for rows in pieces if len(rows)]
        for tokens, mask in forward:
            logp, hidden = look(self.model, tokens, mask, how.temperature)
            figures["old"].append(logp.cpu())
            if self.critic is not None:
                figures["value"].append(spread(self.critic.values(hidden), mask).cpu())
        if how.penalties:
            with self._started(), materialized(self.model, whole=True):
                for tokens, mask in forward:
                    logp, _ = look(self.model, tokens, mask, how.temperature)
                    figures["reference"].append(logp.cpu())
        whole = {name: self.world.gather(parts) for name, parts in figures.items()}
        wide = {name: torch.cat(parts).to(text.device) for name, parts in whole.items() if parts}
        known: dict[str, Any] = {n: v[:, : rollout.mask.shape[1]] for n, v in wide.items()}
        if "value" in wide:
            known["after"] = wide["value"].masked_fill(_wide(rollout.mask), 0.0).sum(1)
        return replace(rollout, **known).to(self.model.device)

    def _prompt(self, place: int) -> int:
        """Which prompt stands at `place` of an endless series of shuffles."""
        epoch, offset = divmod(place, len(self.prompts))
        return _shuffle(len(self.prompts), self.how.seed, epoch)[offset]

    @contextmanager
    def _started(self) -> Iterator[None]:
        """Inside, the model is what it was when training began."""
        now = moving.copied(self.moving)
        try:
            moving.put(self.moving, self.start)
            yield
        finally:
            moving.put(self.moving, now)


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
    step: Verify | None = None,
    encode: Callable[[str], list[int]] | None = None,
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
        step: Says how right one step of an answer is, for sampling by steps with judge verifier.
        encode: Text to token ids, for self-play.

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
    check_head(model)
    check_apart(model)
    task: Reinforce | Play
    if how.self_play is None:
        task = Reinforce(model, how, prompts, score, decode, end, about, world, step)
    elif encode is None:
        raise UserError("self-play writes texts of its own: finetune has to be given encode")
    else:
        task = Play(model, how, how.self_play, encode, decode, end, world)
    # Frequencies that follow the length are the same where answers are drawn and learned from.
    with reaching(model, task.horizon):
        outcome = train(model, task, how, work, watch, world)
    task.merge()
    how.adapt.finish(model)
    precision.cast(model, stored)
    if isinstance(task, Play):
        # The last round came before the last steps, merging and rounding.
        last = {**outcome.last, "solved_heldout": task.solved(how.steps)}
        outcome = replace(outcome, last=last)
    return outcome


@lru_cache(maxsize=4)  # answers that go on may be of earlier epochs
def _shuffle(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the prompts in an epoch."""
    return torch.randperm(count, generator=generator(seed, "prompts", epoch)).tolist()


def _unverified(step: Step) -> float:
    raise UserError(
        "judge verifier has nothing that verifies steps: give finetune `step`, or choose another "
        "judge"
    )


def _rows(prompts: Sequence[list[int]], answers: Sequence[Answer]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and answers side by side, padded on the right -> tokens, mask, log-probabilities."""
    width = max(len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    sampled = torch.zeros(len(prompts), width)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, last = len(prompt), len(prompt) + len(answer.tokens)
        tokens[i, :last] = torch.tensor([*prompt, *answer.tokens])
        mask[i, first:last] = True
        sampled[i, first + answer.learned : last] = torch.tensor(answer.sampled)
    return tokens, mask, sampled


def _unpack(tensors: Mapping[str, Tensor], limit: int) -> Rollout:
    names = {field.name for field in fields(Rollout)} - {"limit"}
    known: dict[str, Any] = {name: tensors[name] for name in names}
    return Rollout(limit=limit, **known)


def _wide(figure: Tensor) -> Tensor:
    """[B, T] -> [B, T + 1], with room for what is behind the longest answer."""
    return torch.nn.functional.pad(figure, (0, 1))


def _filled(figure: Tensor, count: int) -> Tensor:
    """[B, ...] -> [count, ...], with rows of zeros at the end."""
    more = count - len(figure)
    return torch.cat([figure, figure.new_zeros(more, *figure.shape[1:])]) if more else figure


def _tuples(answer: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in answer.items()}


_UNKNOWN = dict.fromkeys(("score", "reward", "length", "truncated"), 0.0)


def _figures(every: Rollout) -> dict[str, float]:
    """Metrics of all answers that were drawn."""
    return {
        "score": float(every.score.mean()),
        "reward": float(every.reward.mean()),
        "length": float(every.length.double().mean()),
        "truncated": float((~every.finished).double().mean()),
        "limit": float(every.limit),
    }
