"""Axis: how a model makes training texts out of the ones that are there.

A document is an *instruction*, its first sentences, and a *response*, what follows them. A
Generator answers an instruction; an Extender turns a response into a longer one; a gate decides by
rules alone what is kept. Both roles are learned from what was kept, so that each round starts from
longer responses. `drawplate.data.synthesis` runs the rounds.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from drawplate.core.method import Method, OneOf
from drawplate.train.guard import Guard
from drawplate.train.loop import Training
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.precision import Precision
from drawplate.train.schedule import Schedule
from drawplate.train.schedule.constant import Constant

Reason: TypeAlias = Literal[
    "room", "cut", "ending", "characters", "duplicated", "repetitive", "lost", "short"
]
"""Why a text was refused: no room in the context, cut at the limit, no closing sign, characters
that no document has, a passage twice, the same words over and over, the response's words not there
or in another order, not longer."""

_BREAK = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[”’」』）]*\s*|\n\s*")
_SLOT = re.compile(r"(\{\w+\})")


class Ask(NamedTuple):
    """What the Extender is asked."""

    response: str
    """What it is to lengthen."""
    begun: str
    """How its answer begins; it writes the rest."""


class Synthetic(Method):
    """Contract: no randomness of its own; what `refusal` finds no reason against is kept.

    One model plays both roles, told apart by the text that asks. It is trained in full, first by
    `warm` steps on documents and on the same documents with sentences left out, then by `updates`
    steps after each round but the last; the folder it came from stays as it is.
    """

    model: Path = Path("decoders/writer")
    """Folder of the Hugging Face decoder that writes, one that no stage makes. DVC notices changes
    of what lies in `decoders/`."""
    generator: str = "Write at length.\n\n{instruction}\n\n"
    """How the Generator is asked. Special tokens in the template are taken as such; in texts they
    are plain text."""
    extender: str = "Write at length.\n\n{instruction}\n\nIn short:\n\n{response}\n\nAt length:\n\n"
    """How the Extender is asked."""
    opening: PositiveInt = 1
    """Sentences of a document that are its instruction."""
    rounds: PositiveInt = 3
    """How often texts are made, with the roles as the rounds before left them."""
    documents: PositiveInt = 256
    """Documents that a round starts from, drawn anew for each."""
    samples: PositiveInt = 2
    """Responses to each instruction."""
    passes: PositiveInt = 3
    """How often the Extender works on a response in one round, each time on the longest so far."""
    temperature: NonNegativeFloat = 1.0
    """Of sampling; 0 takes the likeliest tokens."""
    longest: PositiveInt = 1024
    """Most tokens that a role writes at a time; less where the model's context leaves less."""
    parallel: PositiveInt = 64
    """Most texts in flight while sampling: memory against speed."""
    warm: NonNegativeInt = 500
    """First steps, on documents: they teach the roles to a model that follows no instructions."""
    thinned: float = Field(0.5, gt=0, lt=1)
    """Chance of a document's sentence to be left out of what the first steps show as its short
    form."""
    updates: PositiveInt = 100
    """Optimizer steps on what was kept, after each round but the last."""
    rows: PositiveInt = 16
    """Texts that an optimizer step learns from."""
    optimizer: Optimizer = Optimizer(matrices=Group(rate=1e-4), rest=Group(rate=1e-4))
    """What turns gradients into steps."""
    schedule: Annotated[Schedule, OneOf()] = Constant(warmup=0.0)
    """The learning rate over all steps."""
    precision: Precision = "float32"
    """Numbers of the forward and backward pass."""
    accumulate: PositiveInt = 1
    """Parts in which the texts of a step are computed, one after the other."""
    save_every: PositiveInt = 100
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _slots(self) -> Self:
        for role, wanted in (("generator", ["instruction"]), ("extender", ["response"])):
            found = [part[1:-1] for part in pieces(getattr(self, role)) if _SLOT.fullmatch(part)]
            known = {"instruction"} if role == "generator" else {"instruction", "response"}
            if not set(wanted) <= set(found) <= known:
                raise ValueError(
                    f"{role} has to hold {{{wanted[0]}}} and may hold "
                    f"{', '.join(f'{{{name}}}' for name in sorted(known))}, found {found}"
                )
        return self

    @property
    def training(self) -> Training | None:
        """Settings of the loop for the steps of all rounds; None where nothing is learned."""
        steps = self.warm + (self.rounds - 1) * self.updates
        if not steps:
            return None
        return Training(
            steps=steps,
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
            accumulate=self.accumulate,
            save_every=self.save_every,
            guard=Guard(spike=0.0),  # each round brings other texts, so losses may jump
        )

    @abstractmethod
    def ask(self, response: str, said: Sequence[str]) -> Ask | None:
        """What the Extender is asked next, `said` being its answers so far; None if it is done."""

    @abstractmethod
    def join(self, said: Sequence[str]) -> str:
        """All answers of the Extender as one text, in the order of the response."""

    @abstractmethod
    def flaw(self, text: str, ended: bool, alphabet: frozenset[str]) -> Reason | None:
        """What is wrong with a text by itself; `ended` says whether its writer came to an end."""

    @abstractmethod
    def refusal(
        self, response: str, longer: str, ended: bool, alphabet: frozenset[str]
    ) -> Reason | None:
        """Why `longer` is not kept as a lengthened `response`, `flaw` included; None if it is."""

    @abstractmethod
    def shortened(self, response: str, chance: Sequence[float]) -> str:
        """What the Extender learns to start from, given a number in [0, 1) for each sentence."""

    @abstractmethod
    def learned(self, lengths: Sequence[int], chance: Sequence[float]) -> list[bool]:
        """Which texts of a round are learned from, given numbers in [0, 1)."""


def sentences(text: str) -> list[str]:
    r"""Sentences and lines with the white space behind them; joined they are the text.

    >>> sentences("One. Two (2.5)!\n\nThree")
    ['One. ', 'Two (2.5)!\n\n', 'Three']
    """
    cuts = [0, *(found.end() for found in _BREAK.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if end > start]


def without(text: str, share: float, chance: Sequence[float]) -> str:
    """The sentences whose number is not below `share`; the first one where none would be left."""
    parts = sentences(text)
    kept = [part for part, number in zip(parts, chance, strict=True) if number >= share]
    return "".join(kept or parts[:1]).strip()


def pieces(template: str) -> list[str]:
    """A template as its texts and its slots, such as `{instruction}`, in their order."""
    return [part for part in _SLOT.split(template) if part]


def filled(template: str, **texts: str) -> list[tuple[str, bool]]:
    """The same with slots filled: (piece, whether it belongs to the template)."""
    return [
        (texts[part[1:-1]], False) if _SLOT.fullmatch(part) else (part, True)
        for part in pieces(template)
    ]
