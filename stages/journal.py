"""What a stage tells MLflow: written to disk first, sent by a process of its own.

A journal is a folder. `log.jsonl` is only ever appended to: a line opens the run, one holds the
points of a step, one closes the run. `files/` holds what the run shows. The sender,
`python -m stages.tracking FOLDER`, notes in `sent` how many bytes of the log the store has, and in
`run` the run's id. The stage itself never waits for MLflow and never imports it; what could not be
sent when the stage ends stays on disk, for the next attempt or for `drain`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from drawplate.core.errors import naming
from drawplate.core.method import Frozen
from stages.tracking import FILES, LOG, PROBLEM, RUN, UNSENT, rows

_PATIENCE = {"FINISHED": 8.0, "FAILED": 5.0, "KILLED": 3.0}
"""How an attempt ended -> seconds that its sender goes on trying when the store is away."""
_CLOSE = 1 << 16
"""Bytes kept free for the line that closes a journal, so that a full disk does not prevent it."""


class Facts(Frozen):
    """What a stage's run says about itself from the start."""

    stage: str
    params: dict[str, Any]
    inputs: dict[str, str]
    """Role -> content hash."""
    output: str
    """Path of the folder that is being made, as the user wrote it."""
    tags: dict[str, str]
    execution: str
    """Id of the pipeline execution that this stage belongs to."""


class Tracker:
    """Writes the journal of one stage run and starts its sender.

    A run that was cut short goes on in its journal: steps that are in it are not written again.
    """

    def __init__(self, facts: Facts, work: Path):
        self.facts = facts
        self.folder = work / "journal"
        self.run_id: str | None = None
        self.problem: str | None = None
        """Why not everything was sent, in one line."""
        self._known: dict[str, int] = {}
        self._log: IO[str]
        self._room = self.folder / "room"
        self._sender: subprocess.Popen[bytes]

    def start(self) -> None:
        """Opens the run in the journal, and starts the sender, which is handed the lock held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with naming(self._room):
            self._room.write_bytes(bytes(_CLOSE))
        log = self.folder / LOG
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sender of an earlier attempt may still be at work
            name = self._read_on(log) if log.exists() else secrets.token_hex(8)
            self._log = log.open("a", encoding="utf-8")
            self._write({"open": self.facts.model_dump(), "name": name})
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "stages.tracking", str(self.folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=(self.folder / "sender.log").open("wb"),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[lock.fileno()],
            )

    def point(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the figures of one step."""
        new = {k: float(v) for k, v in metrics.items() if step > self._known.get(k, -1)}
        if new:
            self._write({"points": new, "step": step})

    def keep(self, artifacts: Iterable[Path]) -> None:
        """Copies the files that the run shows."""
        files = self.folder / FILES
        files.mkdir(exist_ok=True)
        for path in artifacts:
            with naming(files / path.name):
                shutil.copyfile(path, files / path.name)

    def finish(
        self,
        status: str,
        *,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Closes the run and waits until it is sent, or until trying longer would be a nuisance.

        `status` is MLflow's word. What could not be sent is kept: beside the work folder where the
        stage is done, in it where the stage will go on.
        """
        self._room.unlink(missing_ok=True)
        outcome = {"status": status, "metrics": dict(metrics), "tags": dict(tags)}
        self._write({"close": outcome})
        os.fsync(self._log.fileno())
        self._log.close()
        patience = _PATIENCE[status]
        try:
            self._sender.communicate(str(patience).encode(), 10 * patience)  # a call may be slow
        except subprocess.TimeoutExpired:
            self._sender.kill()
        code = self._sender.wait()
        run = self.folder / RUN
        self.run_id = run.read_text() if run.exists() else None
        if code:
            told = self.folder / PROBLEM
            self.problem = told.read_text() if told.exists() else f"its sender ended with {code}"
            if status == "FINISHED":
                kept = (
                    self.folder.parents[1] / UNSENT / f"{self.facts.stage}-{secrets.token_hex(8)}"
                )
                kept.parent.mkdir(parents=True, exist_ok=True)
                self.folder.replace(kept)

    def _read_on(self, log: Path) -> str:
        """The run's name in a journal that goes on; half a line at its end is cut off."""
        name, end = "", 0
        for row, behind in rows(log, 0):
            end = behind
            name = row.get("name", name)
            for key in row.get("points", ()):
                self._known[key] = max(row["step"], self._known.get(key, -1))
        os.truncate(log, end)
        return name or secrets.token_hex(8)

    def _write(self, row: Mapping[str, Any]) -> None:
        with naming(self.folder / LOG):
            self._log.write(json.dumps({**row, "time": time.time_ns() // 1_000_000}) + "\n")
            self._log.flush()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values -> dotted keys; lists are kept whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        found |= flat(value, f"{where}.") if isinstance(value, Mapping) else {where: value}
    return found
