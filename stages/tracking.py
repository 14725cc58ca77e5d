"""MLflow's side: what a journal says becomes one run a stage under one run an execution.

Whatever is sent may be sent again: a run is found by its journal's name, a point by its time and
step, a model by its hash. So a sender that was stopped anywhere, or got no answer, starts over at
what it last noted, and nothing is lost or doubled.

This module is also the sender's program, so it imports nothing heavy before it must.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drawplate.core.errors import UserError
from stages.quiet import quiet_environment

EXPERIMENT = "drawplate"
LOG, FILES, SENT, RUN, PROBLEM = "log.jsonl", "files", "sent", "run", "problem"
UNSENT = "unsent"
"""Folder beside the work folders that keeps journals which could not be sent."""
_BATCH = 1000  # MLflow's limit of metrics in one call
_PAUSE = 2.0


def uri() -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the current folder, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def exists() -> bool:
    """Whether the store can be asked: an SQLite file that is not there would be made by asking."""
    file = uri().removeprefix("sqlite:///")
    return file == uri() or Path(file).exists()


def client() -> Any:
    """A client of the tracking store and of its model registry; it gives up within seconds."""
    quiet_environment()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri())
    mlflow.set_registry_uri(uri())
    return mlflow.MlflowClient(tracking_uri=uri(), registry_uri=uri())


@contextmanager
def answering(otherwise: str) -> Iterator[None]:
    """Where a user waits for the store: says that it fails, and what to do without it.

    Raises:
        UserError: the store is away, or refuses.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"MLflow at {uri()} does not answer ({told(error)}); start it, or {otherwise}"
        ) from error


def experiment(store: Any) -> str:
    """Id of the project's experiment, made when it is not there."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = store.get_experiment_by_name(name)
    if found is None:
        where = None if uri().startswith("http") else (Path.cwd() / "mlartifacts").as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # which pages it has
        try:
            return str(store.create_experiment(name, artifact_location=where, tags=kind))
        except MlflowException:  # another stage made it at the same moment
            found = store.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def execution_run(store: Any, where: str, execution: str) -> str:
    """Id of the run that stands for a whole execution, made where it is not there."""
    wanted = f"tags.`drawplate.execution` = '{execution}'"

    def first() -> str | None:
        order = ["attributes.start_time", "attributes.run_id"]
        found = store.search_runs([where], wanted, order_by=order, max_results=1)
        return str(found[0].info.run_id) if found else None

    known = first()
    if known is not None:
        return known
    made = store.create_run(
        where, run_name=f"pipeline {execution}", tags={"drawplate.execution": execution}
    )
    chosen = first() or str(made.info.run_id)
    if chosen != made.info.run_id:  # another stage made one at the same moment
        store.delete_run(made.info.run_id)
    return chosen


def producer_of(store: Any, where: str, digest: str) -> Any:
    """The first run that computed an output with this content hash, or None.

    Runs that stand for a stage that was not computed again have no journal.
    """
    found = store.search_runs(
        [where],
        f"tags.`drawplate.output` = '{digest}' and tags.`drawplate.journal` LIKE '%'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None


def link_producers(store: Any, where: str, run: str) -> None:
    """Links a stage's run, both ways, with the known ones that made what it read."""
    tags = store.get_run(run).data.tags
    for key, digest in tags.items():
        role = key.removeprefix("drawplate.input.")
        producer = producer_of(store, where, digest) if role != key else None
        if producer is not None:
            store.set_tag(run, f"drawplate.parent.{role}", producer.info.run_id)
            store.set_tag(producer.info.run_id, f"drawplate.child.{tags['drawplate.stage']}", run)


def model_of(store: Any, where: str, digest: str) -> Any:
    """The logged model with this content hash, or None."""
    found = store.search_logged_models(
        [where],
        f"tags.`drawplate.hash` = '{digest}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": True}],
    )
    return next((each for each in found if str(each.status) == "READY"), None)


def log_model(
    store: Any, where: str, run: str, name: str, digest: str, params: Mapping[str, str]
) -> Any:
    """A checkpoint as a logged model: a pointer with its hash, not a copy of the weights.

    A model is what it holds: one that was made before is the same, and is linked to `run` too.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput

    made = model_of(store, where, digest)
    if made is None:
        made = mlflow.create_external_model(
            name=re.sub(r"""[./:%"']""", "-", name),  # MLflow takes none of these
            source_run_id=run,
            experiment_id=where,
            model_type="drawplate",
            params=dict(params),
            tags={"drawplate.hash": digest},
        )
    known = store.get_run(run).outputs
    if made.model_id not in {each.model_id for each in (known.model_outputs if known else ())}:
        store.log_outputs(run, [LoggedModelOutput(made.model_id, step=0)])
    store.set_tag(run, "drawplate.model_id", made.model_id)
    return made


def legal(key: str) -> str:
    """A parameter's, figure's or tag's name with what MLflow refuses in it replaced by dashes."""
    return re.sub(r"[^/\w.\- :]", "-", key)


def texts(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters -> dotted keys that MLflow takes, and short texts."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            found |= texts(value, f"{prefix}{key}.")
        else:
            found[legal(f"{prefix}{key}")] = str(value)[:5000]
    return found


def log_params(store: Any, run: str, params: Mapping[str, str]) -> None:
    """Sends parameters in the portions that MLflow takes."""
    from mlflow.entities import Param

    every = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(every), 100):
        store.log_batch(run, params=every[start : start + 100])


def log_metrics(store: Any, run: str, metrics: list[Any]) -> None:
    """Sends metrics in the portions that MLflow takes."""
    for start in range(0, len(metrics), _BATCH):
        store.log_batch(run, metrics=metrics[start : start + _BATCH])


def rows(log: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a journal behind byte `start`, each with the byte where it ends."""
    with log.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield json.loads(line), start


class Sender:
    """Brings the store up to what a journal says; the caller holds the journal."""

    def __init__(self, folder: Path):
        self.folder = folder
        sent = folder / SENT
        self._sent = int(sent.read_text()) if sent.exists() else 0
        self._facts: dict[str, Any] = {}
        self._name = ""
        self._store: Any = None
        self._where = self._parent = self._run = ""
        self.closed = False
        """Whether the last line that was sent closes the run."""
        for row, end in rows(folder / LOG, 0):
            if end > self._sent:
                break
            self._note(row)

    def send(self) -> None:
        """Sends what is new in the journal."""
        from mlflow.entities import Metric

        if self._store is None:
            store = client()
            self._where = experiment(store)
            self._store = store
            if self._facts:
                self._find()
        batch: list[Any] = []
        end = self._sent
        for row, behind in rows(self.folder / LOG, self._sent):
            points = row.get("points", {})
            if batch and (not points or len(batch) + len(points) > _BATCH):
                log_metrics(self._store, self._run, batch)
                self._sent_to(end)
                batch = []
            batch += [
                Metric(legal(key), value, row["time"], row["step"]) for key, value in points.items()
            ]
            end = behind
            self._note(row)
            if not points:
                self._open(row) if "open" in row else self._close(row)
                self._sent_to(end)
        if batch:
            log_metrics(self._store, self._run, batch)
            self._sent_to(end)

    def _note(self, row: Mapping[str, Any]) -> None:
        if "open" in row:
            self._facts, self._name = row["open"], row["name"]
        self.closed = "close" in row

    def _sent_to(self, end: int) -> None:
        self._sent = end
        _put(self.folder / SENT, str(end))

    def _find(self) -> None:
        """The runs of the journal and of its execution, where an earlier sender made them."""
        self._parent = execution_run(self._store, self._where, self._facts["execution"])
        found = self._store.search_runs(
            [self._where], f"tags.`drawplate.journal` = '{self._name}'", max_results=1
        )
        self._run = str(found[0].info.run_id) if found else ""

    def _open(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        store, facts = self._store, self._facts
        self._find()
        tags = facts["tags"] | {
            "mlflow.parentRunId": self._parent,
            "drawplate.stage": facts["stage"],
            "drawplate.journal": self._name,
            **{legal(f"drawplate.input.{k}"): digest for k, digest in facts["inputs"].items()},
        }
        if self._run:
            store.log_batch(self._run, tags=[RunTag(key, value) for key, value in tags.items()])
            store.update_run(self._run, status="RUNNING")
        else:
            made = store.create_run(
                self._where, start_time=row["time"], run_name=facts["stage"], tags=tags
            )
            self._run = str(made.info.run_id)
        log_params(store, self._run, texts(facts["params"]))
        self._inputs()
        store.set_tag(self._parent, f"stage.{facts['stage']}.run_id", self._run)
        store.set_tag(self._parent, f"stage.{facts['stage']}.status", "running")
        store.update_run(self._parent, status="RUNNING")
        _put(self.folder / RUN, self._run)

    def _inputs(self) -> None:
        """Inputs as datasets with digests, and their logged models, linked both ways."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

        store, datasets, models = self._store, [], []
        for role, digest in self._facts["inputs"].items():
            source = CodeDatasetSource({"drawplate.hash": digest})
            dataset = MetaDataset(source, name=role, digest=digest[:36])
            context = [InputTag("mlflow.data.context", role)]
            datasets.append(DatasetInput(dataset._to_mlflow_entity(), context))
            model = model_of(store, self._where, digest)
            models += [LoggedModelInput(model.model_id)] if model else []
        store.log_inputs(self._run, datasets=datasets, models=models)
        link_producers(store, self._where, self._run)

    def _close(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, RunTag

        from stages.notes import stage_note

        outcome, store, facts = row["close"], self._store, self._facts
        tags, metrics, now = outcome["tags"], outcome["metrics"], row["time"]
        model = None
        if tags.get("drawplate.kind") == "model":
            name, params = Path(facts["output"]).name, texts(facts["params"])
            digest = tags["drawplate.output"]
            model = log_model(store, self._where, self._run, name, digest, params).model_id
        finals = [
            Metric(legal(f"final.{k}"), v, now, 0, model_id=model) for k, v in metrics.items()
        ]
        log_metrics(store, self._run, finals)
        store.log_batch(self._run, tags=[RunTag(key, value) for key, value in tags.items()])
        for path in sorted((self.folder / FILES).glob("*")):
            store.log_artifact(self._run, str(path))
        if tags.get("drawplate.kind") == "report":
            from stages.champion import evaluated

            evaluated(store, self._where, self._run, facts, metrics, self.folder / FILES, now)
        status = outcome["status"]
        store.set_tag(self._run, "mlflow.note.content", stage_note(store, self._where, self._run))
        store.set_terminated(self._run, status, now)
        store.set_tag(self._parent, f"stage.{facts['stage']}.status", status.lower())
        parent = store.get_run(self._parent).info
        ended = max(now, parent.start_time, parent.end_time or 0)
        store.set_terminated(self._parent, status, ended)


def close_as_killed(folder: Path) -> None:
    """Where the stage was ended before it could close its journal: closes it."""
    *_, (last, end) = ({"close": None}, 0), *rows(folder / LOG, 0)
    if "close" not in last:
        os.truncate(folder / LOG, end)
        outcome = {"status": "KILLED", "metrics": {}, "tags": {"drawplate.error": "killed"}}
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"close": outcome, "time": last["time"]}) + "\n")


def journals(*roots: Path) -> list[Path]:
    """Journals of ended stages under projects or state folders, the oldest first."""
    found = {
        log.parent
        for root in roots
        for state in (root, root / ".drawplate", *root.glob("*/.drawplate"))
        for log in (*state.glob(f"{UNSENT}/*/{LOG}"), *state.glob(f"*/journal/{LOG}"))
    }
    return sorted(
        found, key=lambda folder: next(rows(folder / LOG, 0), ({"time": 0}, 0))[0]["time"]
    )


def drain(*roots: Path) -> dict[Path, str]:
    """Sends what earlier stages could not send; returns what is still unsent, and why.

    A journal that a stage is writing is left to its own sender.
    """
    kept: dict[Path, str] = {}
    for folder in journals(*roots):
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            close_as_killed(folder)
            try:
                Sender(folder).send()
            except Exception as error:  # of any kind: the journal is kept, and the reason told
                kept[folder] = told(error)
                continue
            if folder.parent.name == UNSENT:
                shutil.rmtree(folder)
    return kept


def told(error: BaseException) -> str:
    """An error's first line, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _put(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def main(folder: Path) -> int:
    """Sends a journal while a stage writes it; 0 when everything, its close too, has arrived.

    The stage holds the other end of standard input. It writes there how long to go on trying, and
    the end of input, which a killed stage leaves too, says that nothing more will come. The
    journal's lock was handed over held; it is free again when this process ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the stage decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    sender: Sender | None = None
    give_up: float | None = None
    while True:
        try:
            sender = sender or Sender(folder)
            sender.send()
        except Exception as error:  # the next round tries again; the last one is reported
            _put(folder / PROBLEM, told(error))
        else:
            if give_up is not None and sender.closed:
                return 0
        if give_up is None:
            if select.select([sys.stdin], [], [], _PAUSE)[0]:
                give_up = time.monotonic() + float(sys.stdin.read() or 3)
                close_as_killed(folder)
        elif time.monotonic() > give_up:
            return 75
        else:
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
