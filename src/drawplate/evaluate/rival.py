"""A model against one that another evaluation measured: paired, where both were asked the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from drawplate.core.errors import UserError
from drawplate.evaluate.compare import Comparison, compare_flips, compare_ratios
from drawplate.evaluate.interval import Chance

FILES = ("report.json", "problems.csv")
"""What of a report is needed."""
_ASKING = ("problems", "samples", "temperature", "filters", "max_new", "seed")


def against(new: Path, child: str, old: Path, parent: str) -> tuple[Comparison, ...]:
    """The shares of solved problems of `child` in the report `new` beside `parent`'s in `old`.

    Raises:
        UserError: the reports asked other problems, or asked them otherwise.
    """
    told, before = (json.loads((each / FILES[0]).read_bytes())["params"] for each in (new, old))
    for key in _ASKING:
        if told[key] != before[key]:
            raise UserError(
                f"evaluate.{key} is {told[key]} and was {before[key]} for {parent}: answers to "
                "other questions cannot be compared; evaluate both in one call"
            )
    mine, theirs = _read(new), _read(old)
    if [row["id"] for row in mine] != [row["id"] for row in theirs]:
        raise UserError(
            f"{child} and {parent} were asked other problems; evaluate both in one call"
        )
    chance = Chance(**told["chance"])

    def column(rows: list[dict[str, str]], name: str) -> Any:
        return np.array([float(row[name]) for row in rows])

    return (
        compare_flips(
            "greedy", column(theirs, f"{parent}.greedy"), column(mine, f"{child}.greedy"), chance
        ),
        compare_ratios(
            "pass_at_1",
            column(theirs, f"{parent}.solved") / told["samples"],
            column(mine, f"{child}.solved") / told["samples"],
            np.ones(len(mine)),
            chance,
            *(parent, child, "pass", 1),
            higher=True,
        ),
    )


def _read(report: Path) -> list[dict[str, str]]:
    with (report / FILES[1]).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
