"""A sweep from its settings to its front: which trials there are, side by side, and what came."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator

from drawplate import settings
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from flows.graph import new_execution
from flows.local import change_params
from flows.request import StageName, assignments, choices, known
from flows.sweep import engines, show, space, trial
from flows.sweep.board import Board
from flows.sweep.goals import BOUND, DEFAULT, GOAL, Bound, Goal, bound, goal
from flows.sweep.plan import (
    Outcome,
    Spec,
    committed,
    early_first,
    name_of,
    settings_of,
    steps,
    turns,
)
from flows.sweep.search import Grid, Search, Study, apart
from flows.sweep.show import Row
from stages.check import check

Assignment = Annotated[str, WithJsonSchema(assignments(several=True))]
GoalText = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{GOAL}$"})]
BoundText = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{BOUND}$"})]


class Sweep(Frozen):
    """What to vary, what to look for, and how to run it."""

    parameters: tuple[Assignment, ...] = Field(
        min_length=1,
        description="Such as `compress.ratio=0.2,0.4`, `quantize.bits=2..4` or "
        f"`finetune.optimizer.rest.rate=1e-4..1e-2:log`. {choices()}",
    )
    targets: tuple[StageName, ...] = ()
    """Stages to stop at, with all before them; the whole pipeline where empty."""
    study: int | None = Field(default=None, ge=1)
    """Number of trials of a search; null: a grid, every combination."""
    seed: int = 0
    """Of the search."""
    goals: tuple[GoalText, ...] = DEFAULT
    """`[file:]metric:max` or `:min`, the file being one of metrics/ without its ending."""
    keep: tuple[BoundText, ...] = ()
    """`[file:]metric<=number` or `>=`: what a trial on the front must satisfy."""
    jobs: int = Field(default=1, ge=1)
    """Trials side by side."""
    engine: engines.Name = "processes"
    """Local processes, Prefect's task runner for Dask, or workers that have been deployed to."""

    preflight: bool = True
    """Whether workers rehearse the parameters as committed before the first trial, and refuse the
    sweep where they will not fit; false goes ahead without."""

    @field_validator("parameters", "goals", "keep")
    @classmethod
    def _readable(cls, texts: tuple[str, ...], field: Any) -> tuple[str, ...]:
        read = {"parameters": _axis, "goals": goal, "keep": bound}[field.field_name]
        for text in texts:
            try:
                read(text)
            except UserError as error:
                raise ValueError(str(error)) from None
        return texts

    @field_validator("goals")
    @classmethod
    def _some(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return texts or DEFAULT


def _axis(text: str) -> None:
    axis = space.axis(text)
    known(axis.key, axis.values if isinstance(axis, space.Choices) else ())


@dataclass
class Result:
    """What a sweep has so far."""

    folder: Path
    """Where table, JSON and picture are written."""
    goals: list[Goal]
    keep: list[Bound]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a trial failed."""
        return any(row.outcome is not None and row.outcome.error is not None for row in self.rows)


def run(request: Sweep, root: Path) -> Result:
    """Runs a sweep on the chosen engine, from outside of any flow.

    Raises:
        UserError: a setting of any trial is wrong, or the project is not committed; nothing ran.
    """
    if request.engine == "processes":
        return drive(request, root, engines.Processes())
    if request.engine == "workers":
        from flows.services import environment

        os.environ.update(environment(root))  # before Prefect reads it
        from flows.sweep.workers import Workers

        with Workers(root, request.preflight) as workers:
            return drive(request, root, workers)
    from flows.sweep.flow import on_runner

    return on_runner(request, root)


def drive(request: Sweep, root: Path, engine: engines.Engine) -> Result:
    """Runs a sweep's trials on an engine; ends them all when it is interrupted."""
    root = root.resolve()
    with chdir(root):  # where stages.tracking looks for the store
        return _Drive(request, root, engine).run()


class _Drive:
    """One call of a sweep."""

    def __init__(self, request: Sweep, root: Path, engine: engines.Engine):
        self.request, self.root, self.engine = request, root, engine
        axes = space.axes(request.parameters)
        self.steps = steps(root, request.targets)
        self.revision = committed(root, self.steps)
        self.tree = settings.read(root / "params.yaml")
        check(self.tree)
        self.metrics = tuple(name for step in self.steps for name in step.metrics)
        goals = [goal(text) for text in request.goals]
        keep = [bound(text) for text in request.keep]
        named: list[Goal | Bound] = [*goals, *keep]
        for one in named:
            files = [Path(name).stem for name in self.metrics]
            if one.file is not None and one.file not in files:
                raise UserError(
                    f"these stages write no metrics {one.file!r}; there are: {', '.join(files)}"
                )
        order = early_first(self.steps, [axis.key for axis in axes])
        self.search: Search
        if request.study is None:
            self.search = grid = Grid(axes, order)
            everything = list(grid.left)
        else:
            total, seed, jobs = request.study, request.seed, request.jobs
            self.search = Study(axes, goals, keep, total, seed, jobs)
            everything = list(space.grid([(axis.key, space.ends(axis)) for axis in axes]))
        for changes in everything:
            self._check(changes)
        self.apart = apart(axes, self.search)
        how = {"jobs", "engine", "preflight"}  # none of these changes a result
        identity = json.dumps([self.revision, request.model_dump(exclude=how)])
        self.id = f"sweep-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self.session = new_execution()
        self.known = trial.recorded(root, self.revision)
        self.result = Result(root / ".drawplate" / "sweeps" / self.id, goals, keep)
        self.board: Board | None = None
        if (self.tree.get("execution") or {}).get("tracking", True):
            self.board = Board(self.id, self.revision, request.model_dump(mode="json"))

    def _check(self, changes: dict[str, str]) -> None:
        try:
            check(settings_of(self.tree, changes))
        except UserError as error:
            words = ", ".join(f"{key}={text}" for key, text in changes.items())
            raise UserError(f"trial {words}: {error}") from None

    def run(self) -> Result:
        """Trials until there are no more; what finished is shown however it ends."""
        running: dict[str, tuple[Spec, Any]] = {}
        told = 0
        status = "KILLED"
        try:
            while True:
                rows = self.result.rows
                while told < len(rows) and (outcome := rows[told].outcome) is not None:
                    self.search.tell(told, outcome.metrics if outcome.error is None else None)
                    told += 1
                if self.search.ready(len(rows), told) and len(running) < self.request.jobs:
                    self._next(running)
                elif running:
                    self._collect(running)
                elif told == len(rows):
                    break
            status = "FAILED" if self.result.failed else "FINISHED"
        finally:
            folder = self.root / ".dvc" / "tmp" / "sweep" / self.session
            self.engine.stop(folder)
            for name, (spec, _) in running.items():
                if engines.left(spec):
                    self._finish(name, engines.outcome(spec, ""))
            shutil.rmtree(folder, ignore_errors=True)
            self._show(status)
        return self.result

    def _next(self, running: dict[str, tuple[Spec, Any]]) -> None:
        changes = self.search.ask()
        tree = settings_of(self.tree, changes)
        name = name_of(tree, changes, self.request.targets)
        row = Row(name, changes)
        self.result.rows.append(row)
        try:
            self._check(changes)
        except UserError as error:
            self._finish(name, Outcome(error=str(error)))
            return
        twin = next((r for r in self.result.rows if r.name == name and r.outcome), None)
        if twin is not None:
            row.outcome = twin.outcome
        elif name in self.known:
            figures = trial.measured(self.root, self.metrics, self.known[name])
            self._finish(name, Outcome(metrics=figures, earlier=True))
        elif name not in running:
            spec = Spec(
                root=self.root,
                revision=self.revision,
                name=name,
                changes=changes,
                params=self._params(changes),
                targets=self.request.targets,
                turns=turns(self.steps, changes, self.apart, self.revision),
                metrics=self.metrics,
                session=self.session,
                parent=self.board.run if self.board else None,
                environment=self.board.environment if self.board else {},
            )
            running[name] = (spec, self.engine.start(spec))

    def _params(self, changes: dict[str, str]) -> str:
        """params.yaml of a trial, comments and all."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(shutil.copy(self.root / "params.yaml", folder))
            change_params(file, [f"{key}={text}" for key, text in changes.items()], ())
            return file.read_text(encoding="utf-8")

    def _collect(self, running: dict[str, tuple[Spec, Any]]) -> None:
        """Takes in the trials that have ended; waits a moment where none has."""
        ended = [(name, *pair) for name, pair in running.items()]
        for name, spec, handle in ended:
            how = self.engine.ended(handle)
            if how is not None:
                del running[name]
                self._finish(name, engines.outcome(spec, how))
        if len(running) == len(ended):
            time.sleep(0.1)

    def _finish(self, name: str, outcome: Outcome) -> None:
        if outcome.error is None:
            wrong = show.problem(outcome, self.result.goals, self.result.keep)
            outcome = outcome.model_copy(update={"error": wrong})
        for row in self.result.rows:
            if row.name == name:
                row.outcome = outcome
        if self.board is not None:
            self.board.link(name, outcome)
        done = len({row.name for row in self.result.rows if row.outcome is not None})
        said = outcome.error or ("as before" if outcome.earlier else f"{outcome.seconds:.0f} s")
        print(f"{done}/{self.search.total} {name}: {said}", flush=True)

    def _show(self, status: str) -> None:
        result = self.result
        facts = show.facts(result.rows, result.goals, result.keep)
        head = {"sweep": self.id, "revision": self.revision, **self.request.model_dump()}
        text = show.table(result.rows, result.goals, result.keep)
        result.folder.mkdir(parents=True, exist_ok=True)
        (result.folder / "sweep.json").write_text(json.dumps(head | facts, indent=1) + "\n")
        (result.folder / "table.txt").write_text(text + "\n")
        show.plot(result.rows, result.goals, result.keep, result.folder / "front.svg")
        print(f"\n{text}\n\nfiles    {result.folder}")
        print("a trial  dvc exp apply NAME")
        if self.board is not None:
            self.board.close(status, facts, result.folder)


def main(given: dict[str, Any], root: Path) -> int:
    """`drawplate sweep`: the exit code, 1 where a trial failed."""
    from stages.quiet import interruptible

    space.axes(given["parameters"])
    for text in given["goals"]:
        goal(text)
    for text in given["keep"]:
        bound(text)
    interruptible()
    return 1 if run(settings.validate(Sweep, given, "sweep"), root).failed else 0
