"""Forecasts of stages: what is said, what is refused, and how it compares with what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from drawplate.core.errors import Exhausted
from drawplate.core.method import Frozen
from drawplate.forecast.machine import Limits

COPIES = 2
"""An output lies in the workspace and in DVC's cache, which copies where it cannot link."""
# What to change where a stage does not fit, by resource.
_REMEDIES = {
    "prepare": {"memory": "give fewer prepare.sources or lower prepare.train_problems"},
    "pretrain": {
        "memory": "raise pretrain.training.accumulate or make pretrain.model smaller",
        "disk": "lower pretrain.training.keep or make pretrain.model smaller",
    },
    "compress": {"memory": "lower compress.calibration.rows or compress.recover.rows"},
    "quantize": {"memory": "lower quantize.calibration.rows"},
    "finetune": {
        "memory": "lower finetune.parallel or raise finetune.accumulate",
        "disk": "lower finetune.keep",
    },
    "evaluate": {"memory": "lower evaluate.batch_size or evaluate.windows.batch_tokens"},
}
_SMALLER = "make pretrain.model smaller"


class Need(Frozen):
    """What one stage takes, in bytes and seconds."""

    memory: float
    """Most main memory that one of its processes holds."""
    seconds: float
    disk: float
    """Its output."""
    work: float = 0.0
    """Checkpoints and finished blocks while it runs; gone afterwards."""
    device: float | None = None
    """Most memory of the accelerator; None where it runs on the processor."""
    processes: int = 1
    """Processes on this machine that hold `memory` each."""

    @property
    def together(self) -> float:
        """Main memory of all processes."""
        return self.memory * self.processes


class Actual(NamedTuple):
    """What a stage took; None where that was not recorded."""

    memory: float | None
    seconds: float | None
    disk: float | None


def refuse(needs: Mapping[str, Need], limits: Limits) -> None:
    """Raises `Exhausted` for the first stage that does not fit, with the setting to change.

    On the disk all outputs lie side by side, each `COPIES` times, beside what the stage that runs
    keeps to go on from.
    """
    stored = 0.0
    for stage, need in needs.items():
        _fits(stage, "memory", need.together, limits.memory, fewer=need.processes > 1)
        if need.device is not None and limits.device is not None:
            _fits(stage, "memory", need.device, limits.device, " of the device")
        stored += COPIES * need.disk
        _fits(stage, "disk", stored + need.work, limits.disk)


def _fits(
    stage: str, resource: str, needed: float, free: int, of: str = "", fewer: bool = False
) -> None:
    if needed > free:
        remedy = _REMEDIES.get(stage, {}).get(resource, _SMALLER)
        if fewer:
            remedy = f"lower execution.nproc, {remedy}"
        what = f"{resource}{of}" if resource == "memory" else "disk, earlier stages included"
        raise Exhausted(
            f"{stage} needs about {size(needed)} of {what}, {size(free)} are free; {remedy}"
        )


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB" if count < 100 else f"{count:,.0f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def table(needs: Mapping[str, Need]) -> str:
    """What each stage takes, and all of them."""
    on_device = any(need.device is not None for need in needs.values())
    head = ["", "memory", *(["device"] if on_device else []), "time", "disk", "while it runs"]
    rows = [head]
    for stage, need in needs.items():
        device = [size(need.device) if need.device is not None else "-"] if on_device else []
        each = f"{need.processes} x " if need.processes > 1 else ""
        rows.append(
            [
                stage,
                f"{each}{size(need.memory)}",
                *device,
                duration(need.seconds),
                size(need.disk),
                size(need.work),
            ]
        )
    rows.append(
        [
            "all",
            size(max(need.together for need in needs.values())),
            *([""] if on_device else []),
            duration(sum(need.seconds for need in needs.values())),
            size(sum(need.disk for need in needs.values())),
            size(max(need.work for need in needs.values())),
        ]
    )
    return lay(rows)


def comparison(needs: Mapping[str, Need], actual: Mapping[str, Actual]) -> str:
    """Forecast, what happened, and by how much the forecast was too high or too low."""
    rows = [["", *(f"{what}{column}" for what in ("memory", "time", "disk") for column in _PAIR)]]
    for stage, need in needs.items():
        took = actual.get(stage, Actual(None, None, None))
        row = [stage]
        for told, found, form in (
            (need.memory, took.memory, size),
            (need.seconds, took.seconds, duration),
            (need.disk, took.disk, size),
        ):
            off = "-" if not found else f"{told / found - 1:+.0%}"
            row += [form(told), "-" if found is None else form(found), off]
        rows.append(row)
    return lay(rows)


_PAIR = (" told", " found", " off")


def lay(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width, the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
