"""Allocation: which layer gets how many bits of the bytes that all may have together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from drawplate.core.errors import UserError
from drawplate.core.method import Method

Bits = Literal[2, 3, 4, 8]
Rise = Callable[[float, int], float]
"""(t, draw) -> how far perplexity rises when noise of t |W| is added to a layer's weight W."""


class Choice(NamedTuple):
    """What one layer could become, from its smallest form on."""

    path: str
    bytes: tuple[int, ...]
    """Stored bytes at each of the allocation's widths, ascending as they do."""
    error: tuple[float, ...]
    """t^2 = |W' - W|^2 / |W|^2 at each width."""
    slope: float
    """What the allocation's `slope` said of the layer."""


class Allocation(Method):
    """Contract: the bytes of the chosen widths never exceed the budget.

    `measures`: `slope` reads perplexities, so that it is asked for even where no budget is given.
    """

    measures: ClassVar[bool] = False

    widths: tuple[Bits, ...] = Field((2, 3, 4, 8), min_length=1)
    """Widths that a layer may get, in rising order."""

    @field_validator("widths")
    @classmethod
    def _rise(cls, widths: tuple[Bits, ...]) -> tuple[Bits, ...]:
        if sorted(set(widths)) != list(widths):
            raise ValueError(f"widths have to rise, {list(widths)} do not")
        return widths

    def slope(self, rise: Rise) -> float:
        """How perplexity rises with t^2 in a layer; 0 where `choose` does not read it."""
        return 0.0

    @abstractmethod
    def choose(self, layers: Sequence[Choice], budget: int) -> list[int]:
        """The place in `widths` for every layer; their bytes together are at most `budget`.

        Raises:
            UserError: the smallest forms together exceed the budget.
        """


def require_room(layers: Sequence[Choice], budget: int) -> None:
    """Raises `UserError` where even the smallest forms exceed the budget."""
    least = sum(layer.bytes[0] for layer in layers)
    if least > budget:
        raise UserError(
            f"quantize.budget: {budget} bytes are {least - budget} too few for the narrowest width"
        )
