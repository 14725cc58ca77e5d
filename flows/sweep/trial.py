"""One trial, in a process of its own: a workspace, changed settings, `dvc repro`, an experiment.

`python -m flows.sweep.trial SPEC` writes `<name>.json` beside the spec when it ends. SIGINT or
SIGTERM end the stage that runs, with its whole process group, and remove the workspace.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.graph import patient_repro, reason
from flows.handover import AUTHOR, ref_of
from flows.sweep.plan import Outcome, Spec
from flows.workspace import Workspace, git, workspace
from stages.journal import flat
from stages.quiet import interruptible, quiet_environment
from stages.tracking import told

DONE = "drawplate sweep:"
"""How the message of a finished trial's commit begins."""


class Failed(Exception):
    """A stage of this trial failed, here or in another trial that has it in common."""


def run(spec: Spec) -> Outcome:
    """Computes a trial and records it as an experiment of the project."""
    started = time.monotonic()
    execution = execution_of(spec.revision, spec.name)
    statuses: dict[str, str] = {}

    def stages(names: Sequence[str]) -> None:
        how = {"DRAWPLATE_EXECUTION": execution}
        done = patient_repro(place.root, names, environment=how, line=say)
        statuses.update({k: v for k, v in done.statuses.items() if k not in statuses})
        if done.code != 0:
            raise Failed(reason(done.tail).removeprefix("drawplate: "))

    def say(text: str) -> None:
        print(f"[{spec.name}] {text}", flush=True)

    with workspace(str(spec.root), spec.revision) as place:
        place.dvc("checkout", "--allow-missing")  # what dvc.lock and `dvc add` name
        os.environ.update(place.environment())  # also where `sync` finds what was not sent
        (place.root / "params.yaml").write_text(spec.params, encoding="utf-8")
        try:
            for turn in spec.turns:
                with only_one(spec, turn.lock) as mine:
                    if mine:
                        stages(turn.stages)
            stages(spec.targets)
        except Failed as error:
            return Outcome(statuses=statuses, seconds=time.monotonic() - started, error=str(error))
        metrics = measured(place.root, spec.metrics)
        record(place, spec)
        outcome = Outcome(metrics=metrics, statuses=statuses, seconds=time.monotonic() - started)
        if spec.parent is None:
            return outcome
        try:
            return outcome.model_copy(update={"run": log(place.root, spec, execution, outcome)})
        except Exception as error:  # the trial is recorded; MLflow only lacks its view of it
            say(f"MLflow did not take this trial: {told(error)}")
            return outcome


def execution_of(revision: str, name: str) -> str:
    """What the MLflow runs of a trial are found by."""
    return f"{revision[:8]}-{name}"


@contextmanager
def only_one(spec: Spec, lock: str) -> Iterator[bool]:
    """Holds a lock of this project; gives whether what is done under it is still to be done.

    Raises:
        Failed: another trial of this call failed under this lock.
    """
    place = spec.root / ".dvc" / "tmp" / "sweep" / f"{lock}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        note = json.loads(file.read() or "{}")
        done = note.get("session") == spec.session
        if done and note["error"] is not None:
            raise Failed(f"as in {note['trial']}: {note['error']}")

        def leave(error: str | None) -> None:
            note = {"session": spec.session, "trial": spec.name, "error": error}
            file.truncate(0)
            file.write(json.dumps(note))

        try:
            yield not done
        except Failed as failure:
            leave(str(failure))
            raise
        leave(None)


def measured(
    folder: Path, files: Sequence[str], revision: str | None = None
) -> dict[str, dict[str, float]]:
    """File stem -> key -> number, of metrics files in a workspace or in a commit of it."""
    found: dict[str, dict[str, float]] = {}
    for name in files:
        if revision is None:
            text = (folder / name).read_text(encoding="utf-8")
        else:
            text = git(folder, "show", f"{revision}:{name}")
        figures = flat(json.loads(text))
        found[Path(name).stem] = {
            key: float(value)
            for key, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    return found


def record(place: Workspace, spec: Spec) -> None:
    """Saves the workspace as an experiment and hands it to the project, data staying in cache."""
    named = ["-n", spec.name, "-m", f"{DONE} {spec.name}"]
    kept = [part for name in spec.metrics for part in ("-I", name)]
    saved = ("exp", "save", "--force", *named, *kept, *spec.targets)
    place.dvc(*saved, environment=AUTHOR)
    ref = ref_of(spec.revision, spec.name)
    place.git("push", "--quiet", "--no-verify", "--force", "origin", f"{ref}:{ref}")


def log(folder: Path, spec: Spec, execution: str, outcome: Outcome) -> str:
    """Brings the trial's MLflow run up to date and returns its id."""
    from flows.sync import sync

    sync(folder, execution, outcome.statuses)
    return tie(spec, execution, outcome)


def tie(spec: Spec, execution: str, outcome: Outcome) -> str:
    """Puts the MLflow run of an execution below the sweep's, as the run of this trial."""
    from mlflow.entities import Metric

    from stages.tracking import client, execution_run, experiment, legal, log_metrics, log_params

    store = client()
    run = execution_run(store, experiment(store), execution)
    store.update_run(run, name=spec.name)
    now = time.time_ns() // 1_000_000
    figures = flat(outcome.metrics).items()
    log_metrics(store, run, [Metric(legal(key), value, now, 0) for key, value in figures])
    changes = {legal(key): value for key, value in spec.changes.items()}
    known = store.get_run(run).data.params  # what `sync` put there, written its own way
    log_params(store, run, {k: v for k, v in changes.items() if k not in known})
    for key, value in (
        ("mlflow.parentRunId", str(spec.parent)),
        ("drawplate.experiment", spec.name),
        ("git.commit", spec.revision),
    ):
        store.set_tag(run, key, value)
    store.set_terminated(run, "FINISHED")
    return run


def recorded(root: Path, revision: str) -> dict[str, str]:
    """Finished trials among the project's experiments on a commit: name -> their own commit."""
    place = ref_of(revision, "")
    form = "--format=%(objectname) %(refname) %(contents:subject)"
    rows = (line.split(" ", 2) for line in git(root, "for-each-ref", form, place).splitlines())
    return {
        ref.removeprefix(place): commit for commit, ref, words in rows if words.startswith(DONE)
    }


def main(file: Path) -> None:
    """Runs the trial of a spec file and leaves its outcome beside it."""
    quiet_environment()
    interruptible()
    _end_with_parent()
    spec = Spec.model_validate_json(file.read_bytes())
    os.environ.update(spec.environment)
    try:
        outcome = run(spec)
    except Exception as error:
        outcome = Outcome(error=told(error))
    write(file.with_suffix(".json"), outcome)


def write(file: Path, outcome: Outcome) -> None:
    """Leaves an outcome, all of it or nothing."""
    temporary = file.with_suffix(".new")
    temporary.write_text(outcome.model_dump_json(), encoding="utf-8")
    temporary.replace(file)


def _end_with_parent() -> None:
    """A trial whose engine is gone ends like an interrupted one."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
