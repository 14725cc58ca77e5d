"""The metric series of a run: one JSON line a step, cut back to the checkpoint on resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from drawplate.core.errors import Damaged

TIMING = frozenset({"seconds", "tokens_per_second", "eta"})
"""Columns that a clock wrote; all others are equal in every run of equal settings."""


class Series:
    """Append rows to `path`, after keeping its first `steps` rows."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.last: dict[str, float] = {}
        kept = 0
        path.touch()
        with path.open("rb") as file:
            for number in range(1, steps + 1):
                line = file.readline()
                try:
                    row = json.loads(line)
                    right = line.endswith(b"\n") and row["step"] == number
                except (ValueError, KeyError, TypeError):
                    right = False
                if not right:
                    raise Damaged(
                        f"{path} should hold steps 1 to {steps} but line {number} is not step "
                        f"{number}; delete the folder {path.parent} to start this run over"
                    )
                kept += len(line)
                self.last = {k: v for k, v in row.items() if v is not None}
        os.truncate(path, kept)
        self.file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, float]) -> None:
        """Write one step; a NaN or an infinity becomes null, as JSON has no such numbers."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        self.last = {k: v for k, v in finite.items() if v is not None}

    def sync(self) -> None:
        """Put what was written on the disk, before a checkpoint says that it is there."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def read(path: Path, timing: bool = False) -> list[dict[str, float | None]]:
    """The rows of a series, without what clocks wrote unless `timing`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if timing or k not in TIMING} for row in rows]
