"""Self-play as a task of the training loop: conjecture, prove, check, learn; then again.

Two forms of text are one model's two roles:

    conjecture 3+4*2=11        prove 5+4*2=13
    5+4*2=13                   5+8=13
                               13=13

A round asks for conjectures that go on from proven statements, tries to prove those that are new
and some of the given statements, and keeps what the checker accepts. Then `updates` optimizer steps
minimise the negative log-likelihood of texts drawn from all that is known: the seeds, accepted
proofs, chosen conjectures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate.core.seeds import generator, seed_of
from drawplate.edits import materialized
from drawplate.model.sample import check_context, sample
from drawplate.rl import moving
from drawplate.rl.params import Finetune
from drawplate.rl.policy import judge
from drawplate.rl.selfplay import SelfPlay, Tried
from drawplate.train.distributed import ALONE, World

T = TypeVar("T")
R = TypeVar("R")


class Said(NamedTuple):
    """A text that the model gave."""

    text: str
    tokens: int
    finished: bool


class Play:
    """A `Task` of the training loop whose batches are the model's own proofs and conjectures.

    Metrics of a round: `pass_rate` of all attempts (`reward` too); `fresh`, the share of what was
    conjectured that is a statement nobody made before, short enough to be answered, and `band`, the
    share of these that was chosen; `solved_heldout`, by the likeliest tokens of the model that
    plays the round; `proven`, statements with a proof besides the seeds; `generated`, tokens of all
    rounds so far. Before the first round all are zero.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        how: Finetune,
        play: SelfPlay,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        end: int,
        world: World = ALONE,
    ):
        self.model, self.how, self.play, self.world = model, how, play, world
        self.encode, self.decode, self.end = encode, decode, end
        play.checker.ready()
        self.moving = how.adapt.install(model, how.seed)
        self.start = moving.copied(self.moving)
        examples = play.checker.examples(
            play.seeds + play.given + play.heldout, generator(how.seed, "examples")
        )
        self.seeds = examples[: play.seeds]
        self.given = [statement for statement, _ in examples[play.seeds :][: play.given]]
        self.heldout = [statement for statement, _ in examples[play.seeds + play.given :]]
        self.seen = {statement: True for statement, _ in examples}
        asked = [encode(_conjecture(statement)) for statement in self.seen]
        most = max(how.length.limit(step, how.steps) for step in range(how.steps))
        check_context(model, asked, [most] * len(asked))  # before the first steps, not behind them
        self.horizon = max(map(len, asked)) + most
        context = getattr(model.config, "max_position_embeddings", None)
        self.longest = math.inf if context is None else context - most + 1
        self.proofs = {statement: [proof] for statement, proof in self.seeds}
        self.taught: list[tuple[str, str]] = []
        self.round = -1
        self.generated = 0
        self.figures = dict.fromkeys(
            ("pass_rate", "reward", "length", "truncated", "fresh", "band"), 0.0
        )
        self.figures |= {"solved_heldout": 0.0, "proven": 0.0, "generated": 0.0}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The statements; the settings are the loop's."""
        text = json.dumps([self.seeds, self.given, self.heldout, self.end])
        return {"statements": hashlib.sha256(text.encode()).hexdigest()}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Texts that optimizer step `step` learns from: of the seeds first, then of all rounds."""
        number = (step - self.play.warm) // self.how.updates
        if number >= 0 and number != self.round:
            self._play(number, step)
        texts = self.texts()
        order = torch.randperm(len(texts), generator=generator(self.how.seed, "texts", step))
        chosen = [texts[row] for row in order[: self.play.rows].tolist()]
        tokens, mask = self._rows(chosen)
        return {
            "tokens": tokens,
            "mask": mask,
            "rows": torch.tensor(len(chosen)),
            "count": mask.sum(),
            **tensors_of(self.figures),
        }

    def loss(
        self, model: nn.Module, part: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the mean log-probability of the batch's tokens, these rows' share of it."""
        model.eval()  # what is learned is the policy that is sampled from, without dropout
        logp, entropy = judge(cast("PreTrainedModel", model), part["tokens"], part["mask"], 1.0)
        share = len(part["tokens"]) / part["rows"].double()
        metrics = {name: part[f"figure/{name}"] * share for name in self.figures}
        metrics |= {"entropy": entropy.sum() / part["count"], "tokens": part["mask"].sum()}
        return -logp.sum() / part["count"], metrics

    def state(self) -> dict[str, Any]:
        """All that was found so far."""
        return {
            "round": self.round,
            "generated": self.generated,
            "seen": list(self.seen),
            "proofs": [[statement, list(proofs)] for statement, proofs in self.proofs.items()],
            "taught": [list(pair) for pair in self.taught],
            "figures": dict(self.figures),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to `state`."""
        self.round, self.generated = state["round"], state["generated"]
        self.seen = dict.fromkeys(state["seen"], True)
        self.proofs = {statement: list(proofs) for statement, proofs in state["proofs"]}
        self.taught = [(parent, conjecture) for parent, conjecture in state["taught"]]
        self.figures = dict(state["figures"])

    def merge(self) -> None:
        """Puts together what training started from and what it found."""
        moving.merge(self.moving, self.start, self.how.merge)

    def texts(self) -> list[tuple[str, str]]:
        """Every prompt with what is to be learned behind it."""
        neighbours = zip(self.seeds, self.seeds[1:], strict=False)
        pairs = [(one, other) for (one, _), (other, _) in neighbours] + self.taught
        return [
            *(
                (_prove(statement), proof)
                for statement, found in self.proofs.items()
                for proof in found
            ),
            *((_conjecture(parent), f"{statement}\n") for parent, statement in pairs),
        ]

    @torch.no_grad()
    def solved(self, step: int) -> float:
        """Share of the held-out statements that the model as it is now proves, at its likeliest."""
        self.model.eval()
        limit = self.how.length.limit(min(step, self.how.steps - 1), self.how.steps)
        right = self._proofs(self.heldout, 0.0, limit, ("heldout",))[1]
        return sum(right) / len(right)

    @torch.no_grad()
    def _play(self, number: int, step: int) -> None:
        """One round, with the model as it is now."""
        how, play = self.how, self.play
        self.model.eval()
        limit = how.length.limit(min(step, how.steps - 1), how.steps)
        asked = play.conjectures(how.prompts)
        new = self._conjectures(number, asked, limit)
        opened = [statement for statement in self.given if statement not in self.proofs]
        order = torch.randperm(len(opened), generator=generator(how.seed, "given", number))
        others = [opened[row] for row in order[: how.prompts - len(new)].tolist()]
        statements = [*(statement for _, statement in new), *others]
        tries = [statement for statement in statements for _ in range(how.samples)]
        said, right = self._proofs(tries, how.temperature, limit, ("prove", number))
        tried = []
        for row, statement in enumerate(statements):
            mine = range(row * how.samples, (row + 1) * how.samples)
            found = list(dict.fromkeys(said[i].text for i in mine if right[i]))
            share = sum(right[i] for i in mine) / how.samples
            tried.append(Tried(statement, share, min(map(len, found), default=0)))
            if found:
                kept = [*self.proofs.get(statement, []), *found]
                self.proofs[statement] = list(dict.fromkeys(kept))[: play.proofs]
        chosen = play.chosen(tried[: len(new)])
        self.taught += [pair for pair, take in zip(new, chosen, strict=True) if take]
        count = max(len(tries), 1)
        self.round = number
        self.figures = {
            "pass_rate": sum(right) / count,
            "reward": sum(right) / count,
            "length": sum(each.tokens for each in said) / count,
            "truncated": sum(not each.finished for each in said) / count,
            "fresh": len(new) / max(asked, 1),
            "band": sum(chosen) / max(len(new), 1),
            "solved_heldout": self.solved(step),
            "proven": float(len(self.proofs) - len(self.seeds)),
            "generated": float(self.generated),
        }

    def _conjectures(self, number: int, count: int, limit: int) -> list[tuple[str, str]]:
        """Statements that nobody made before, each with the proven one it goes on from."""
        if not count:
            return []
        known = list(self.proofs)
        picks = torch.randint(
            len(known), (count,), generator=generator(self.how.seed, "parents", number)
        )
        parents = [known[pick] for pick in picks.tolist()]
        said = self._say(
            [_conjecture(parent) for parent in parents],
            self.how.temperature,
            limit,
            ("conjecture", number),
        )
        self.generated += sum(each.tokens for each in said)
        read = self._shared(
            said,
            lambda each: self.play.checker.statement(each.text.strip()) if each.finished else None,
        )
        new = []
        for parent, statement in zip(parents, read, strict=True):
            if statement is None or len(self.encode(_conjecture(statement))) > self.longest:
                continue  # what leaves no room for an answer can be neither proven nor gone on from
            if statement not in self.seen:
                self.seen[statement] = True
                new.append((parent, statement))
        return new

    def _proofs(
        self, statements: Sequence[str], temperature: float, limit: int, name: tuple[int | str, ...]
    ) -> tuple[list[Said], list[bool]]:
        """An attempt at each statement, and whether the checker accepts it."""
        said = self._say([_prove(statement) for statement in statements], temperature, limit, name)
        if temperature:
            self.generated += sum(each.tokens for each in said)
        attempts = list(zip(statements, (each.text for each in said), strict=True))
        ended = [attempt for attempt, each in zip(attempts, said, strict=True) if each.finished]
        different = list(dict.fromkeys(ended))
        verdicts = self._shared(different, lambda pair: self.play.checker.accepts(*pair))
        accepted = {pair for pair, right in zip(different, verdicts, strict=True) if right}
        return said, [
            each.finished and attempt in accepted
            for attempt, each in zip(attempts, said, strict=True)
        ]

    def _say(
        self, prompts: Sequence[str], temperature: float, limit: int, name: tuple[int | str, ...]
    ) -> list[Said]:
        """What the model says to each prompt."""
        asked = [self.encode(prompt) for prompt in prompts]
        mine = self.world.share(len(asked))
        with materialized(self.model, whole=True):
            drawn = sample(
                self.model,
                [asked[row] for row in mine],
                max_new=limit,
                end=self.end,
                temperature=temperature,
                seed=seed_of(self.how.seed, *name),
                first=mine.start,
                batch_size=self.how.parallel,
                precision=self.model.dtype,
            )
        said = [
            Said(self._text(tokens), len(tokens), finished)
            for tokens, finished in zip(drawn.tokens, drawn.finished, strict=True)
        ]
        return self.world.gather(said)

    def _text(self, tokens: list[int]) -> str:
        return f"{self.decode(tokens[:-1] if tokens[-1] == self.end else tokens).strip()}\n"

    def _shared(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """`work` on all items, each done by one process."""
        return self.world.gather([work(items[row]) for row in self.world.share(len(items))])

    def _rows(self, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Prompts, answers and end tokens, padded on the right -> tokens, mask of the answers."""
        pairs = [(self.encode(prompt), [*self.encode(rest), self.end]) for prompt, rest in texts]
        width = max(len(prompt) + len(rest) for prompt, rest in pairs)
        tokens = torch.zeros(len(pairs), width, dtype=torch.long)
        mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (prompt, rest) in enumerate(pairs):
            last = len(prompt) + len(rest)
            tokens[row, :last] = torch.tensor(prompt + rest)
            mask[row, len(prompt) : last] = True
        return tokens, mask


def tensors_of(figures: Mapping[str, float]) -> dict[str, Tensor]:
    """Figures as entries of a batch, in 64 bits: 32 count tokens to 2^24 only."""
    wide = torch.float64
    return {f"figure/{name}": torch.tensor(value, dtype=wide) for name, value in figures.items()}


def _prove(statement: str) -> str:
    return f"prove {statement}\n"


def _conjecture(parent: str) -> str:
    return f"conjecture {parent}\n"
