"""What a comparison found: figures over seeds with their intervals, as table, JSON and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from flows.sweep import show
from flows.sweep.goals import goal
from flows.sweep.plan import Outcome

Figures = Mapping[str, float]
CONFIDENCE = 0.95
SHOWN = ("pass_at_1", "greedy", "bits_per_byte", "length", "stored_bytes", "macs", "seconds")
"""Columns of a table, after what the comparison is about; those that not all have are left out."""
GOALS = {
    "pretrain": ("bits_per_byte:min", "seconds:min"),
    "compress": ("bits_per_byte:min", "stored_bytes:min"),
    "quantize": ("bits_per_byte:min", "stored_bytes:min"),
    "finetune": ("pass_at_1:max", "length:min"),
    "finetune.self_play": ("finetune.solved_heldout:max", "finetune.generated:min"),
    "evaluate": ("pass_at_1:max", "length:min"),
    "evaluate.runtime": ("peak_bytes:min", "prefill_tokens_per_second:max"),
}
"""Stage or key -> what the frontier is drawn of; the first is what contenders are compared in."""


class Mean(NamedTuple):
    """A mean over seeds and half the width of its confidence interval."""

    mean: float
    half: float
    """Of Student's t with n - 1 degrees of freedom; NaN for a single seed."""

    def __str__(self) -> str:
        plus = "" if math.isnan(self.half) else f" ± {show.figure(self.half)}"
        return show.figure(self.mean) + plus


def mean(values: Sequence[float]) -> Mean:
    """The mean with the half width t(n - 1) s / sqrt(n) of its interval."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return Mean(fmean(values), math.nan)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Mean(fmean(values), quantile * stdev(values) / math.sqrt(n))


def gain(values: Sequence[float], reference: Sequence[float]) -> Mean:
    """The mean difference from `reference`, seed by seed."""
    return mean([a - b for a, b in zip(values, reference, strict=True)])


def goals(key: str) -> tuple[str, ...]:
    """What the methods of a key are compared in; as a rule that is what their stage is for."""
    return GOALS.get(key) or GOALS[key.partition(".")[0]]


def shown(key: str) -> tuple[str, ...]:
    """The columns of a table."""
    return tuple(dict.fromkeys((*(goal(text).key for text in goals(key)), *SHOWN)))


def verdict(key: str, difference: Mean) -> str:
    """`better`, `worse` or `within noise`; nothing where one seed says nothing."""
    if math.isnan(difference.half):
        return ""
    if abs(difference.mean) <= difference.half:
        return "within noise"
    good = difference.mean > 0 if goals(key)[0].endswith(":max") else difference.mean < 0
    return "better" if good else "worse"


def table(
    key: str, names: Sequence[str], seeds: Mapping[int, Mapping[str, Figures]],
    refused: Mapping[str, str],
) -> str:  # fmt: skip
    """Markdown: a row a contender, the model that they start from last; `*` is on the frontier."""
    alive = [name for name in names if name not in refused]
    runs = {name: [run[name] for run in seeds.values()] for name in seeds[0]}
    main = goal(goals(key)[0]).key
    columns = [
        column
        for column in shown(key)
        if all(column in run for name in alive for run in runs[name])
    ]
    front = {v.row.name for v in show.judge(_rows(alive, seeds), _goals(key), ()) if v.best}
    title = ["", "contender", *columns, f"{main} against {alive[0]}", ""]
    lines = [title, ["---"] * len(title)]
    for name in [*alive, *runs.keys() - set(alive)]:
        figures = [
            str(mean([run[column] for run in runs[name]])) if column in runs[name][0] else ""
            for column in columns
        ]
        last = ["", ""]
        if name != alive[0] and main in runs[name][0]:
            against = gain([run[main] for run in runs[name]], [run[main] for run in runs[alive[0]]])
            last = [str(against), verdict(key, against)]
        lines.append(["*" if name in front else "", name, *figures, *last])
    for name, why in refused.items():
        lines.append(["!", name, why, *[""] * (len(title) - 3)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(
    key: str, names: Sequence[str], seeds: Mapping[int, Mapping[str, Figures]], file: Path
) -> None:
    """The contenders' means in the plane of the goals, as SVG."""
    show.plot(_rows(names, seeds), _goals(key), (), file)


def means(
    names: Sequence[str], seeds: Mapping[int, Mapping[str, Figures]]
) -> dict[str, dict[str, float]]:
    """Contender -> figure -> mean over seeds."""
    return {
        name: {
            key: fmean([run[name][key] for run in seeds.values()]) for key in _shared(name, seeds)
        }
        for name in names
    }


def _shared(name: str, seeds: Mapping[int, Mapping[str, Figures]]) -> list[str]:
    first, *rest = [run[name] for run in seeds.values()]
    return [key for key in first if all(key in other for other in rest)]


def _goals(key: str) -> list[Any]:
    return [goal(text) for text in goals(key)]


def _rows(names: Sequence[str], seeds: Mapping[int, Mapping[str, Figures]]) -> list[show.Row]:
    found = means(names, seeds)
    return [show.Row(name, {}, Outcome(metrics={"bench": found[name]})) for name in names]
