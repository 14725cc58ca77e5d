"""Axis: what a model that conjectures and proves learns from what it tried."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, PositiveInt

from drawplate.core.method import Method, OneOf
from drawplate.rl.checker import Checker


class Tried(NamedTuple):
    """A conjecture and how attempts to prove it went."""

    statement: str
    share: float
    """Accepted proofs, as a share of the attempts."""
    shortest: int
    """Characters of its shortest accepted proof, 0 where there is none."""


class SelfPlay(Method):
    """Contract: what `chosen` takes was proven at least once.

    Of a round's statements (`prompts`, each tried `samples` times) some are conjectures of the
    model, the others statements that are given and not proven yet. Accepted proofs train the
    prover, chosen conjectures the conjecturer: both are the one model, told by the first word of
    its prompt. Nothing is learned from what is held out.
    """

    checker: Annotated[Checker, OneOf()] = Field({"name": "arithmetic"}, validate_default=True)
    """What decides whether a proof is one."""
    seeds: PositiveInt = 64
    """Statements that are given with a proof."""
    given: PositiveInt = 256
    """Statements that are given without one."""
    heldout: PositiveInt = 32
    """Statements whose proofs are counted in each round and in the end, and never learned from."""
    warm: PositiveInt = 50
    """First steps, on the seeds alone: they teach the two forms of text."""
    rows: PositiveInt = 32
    """Texts that an optimizer step learns from."""
    proofs: PositiveInt = 4
    """Most proofs of a statement to learn from."""

    @abstractmethod
    def conjectures(self, statements: int) -> int:
        """How many of the statements of a round are asked of the model itself."""

    @abstractmethod
    def chosen(self, tried: Sequence[Tried]) -> list[bool]:
        """Which conjectures of a round the model is to make more like."""
