"""What a sweep looks for: goals, constraints, and the trials that no other beats.

Trial a *dominates* b when it is at least as good in every goal and better in one; the front is what
no kept trial dominates (Pareto).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from drawplate.core.errors import UserError
from drawplate.settings import nearest

Metrics = Mapping[str, Mapping[str, float]]
"""File stem -> key -> value: `evaluate` -> `tuned.pass_at_1` -> 0.4."""

DEFAULT = ("evaluate:tuned.pass_at_1:max", "evaluate:tuned.stored_bytes:min")


GOAL = r"\s*(?:([^:\s]+):)?([^:\s]+):(max|min)\s*"
BOUND = r"\s*(?:([^:\s<>]+):)?([^:\s<>=]+)\s*(<=|>=)\s*(\S+)\s*"


class Goal(NamedTuple):
    """A metric that should be large or small."""

    file: str | None
    key: str
    way: Literal["max", "min"]

    def loss(self, metrics: Metrics) -> float:
        """The metric, turned so that smaller is better."""
        value = look_up(metrics, self.file, self.key)
        return -value if self.way == "max" else value


class Bound(NamedTuple):
    """A metric that must not lie beyond a limit."""

    file: str | None
    key: str
    sign: Literal["<=", ">="]
    limit: float

    def excess(self, metrics: Metrics) -> float:
        """How far beyond the limit the metric lies; 0 or less is within."""
        value = look_up(metrics, self.file, self.key)
        return value - self.limit if self.sign == "<=" else self.limit - value


def goal(text: str) -> Goal:
    """Reads `[file:]key:max` or `[file:]key:min`.

    Raises:
        UserError: the text has another form.
    """
    found = re.fullmatch(GOAL, text)
    if found is None:
        raise UserError(f"--goal {text}: expected [file:]key:max or :min, such as {DEFAULT[0]}")
    return Goal(found[1], found[2], found[3])  # type: ignore[arg-type]


def bound(text: str) -> Bound:
    """Reads `[file:]key<=number` or `[file:]key>=number`.

    Raises:
        UserError: the text has another form.
    """
    found = re.fullmatch(BOUND, text)
    try:
        limit = float(found[4]) if found else math.nan
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise UserError(
            f"--keep {text}: expected [file:]key<=number or >=, such as tuned.stored_bytes<=2e6"
        )
    return Bound(found[1], found[2], found[3], limit)  # type: ignore[arg-type]


def look_up(metrics: Metrics, file: str | None, key: str) -> float:
    """The value of a key, in one file or in whichever has it.

    Raises:
        UserError: no file has it, or several have it and none was named, or it is not finite.
    """
    if file is not None and file not in metrics:
        raise UserError(f"no metrics {file!r}{nearest(file, metrics)}; there are: {_all(metrics)}")
    files = [name for name in metrics if file in (None, name) and key in metrics[name]]
    if not files:
        known = {name for stem in metrics if file in (None, stem) for name in metrics[stem]}
        raise UserError(f"no metric {key!r}{nearest(key, known)} in {file or _all(metrics)}")
    if len(files) > 1:
        choices = ", ".join(f"{name}:{key}" for name in files)
        raise UserError(f"metric {key!r} stands in several files; name one: {choices}")
    value = float(metrics[files[0]][key])
    if not math.isfinite(value):
        raise UserError(f"metric {files[0]}:{key} is {value}")
    return value


def _all(metrics: Metrics) -> str:
    return ", ".join(sorted(metrics)) or "no file"


def front(losses: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each row is dominated by no other; smaller is better, equal rows stay together.

    Rows are visited in lexical order, in which whatever dominates a row comes before it, so that
    each is compared with the front found so far only.
    """
    best: list[int] = []
    for i in sorted(range(len(losses)), key=lambda i: tuple(losses[i])):
        if not any(dominates(losses[j], losses[i]) for j in best):
            best.append(i)
    chosen = set(best)
    return [i in chosen for i in range(len(losses))]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere larger than `b` and somewhere smaller."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
