"""How a long computation tells where it is, without knowing who listens."""

from collections.abc import Mapping
from typing import Protocol


class Watch(Protocol):
    """Called after every step of a driver, with the figures of that step."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """`step` of `total` is done."""


def silent(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Nobody listens."""
