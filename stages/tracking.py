"""MLflow: one run a stage under one run an execution, fed from a thread of its own.

The stage never waits for MLflow: points go into a queue, a worker thread imports MLflow, opens the
run and sends batches. Every point also stands in the work folder's series, so a server that is away
costs nothing but its view of this run, and that is said.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawplate.core.method import Frozen
from stages.quiet import quiet_environment

EXPERIMENT = "drawplate"
_BATCH = 1000  # MLflow's limit of metrics in one call


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


def uri() -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the current folder, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def client() -> Any:
    """A client of the tracking store."""
    quiet_environment()
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri())


def experiment(store: Any) -> str:
    """Id of the project's experiment, made when it is not there."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = store.get_experiment_by_name(name)
    if found is None:
        where = None if uri().startswith("http") else (Path.cwd() / "mlartifacts").as_uri()
        try:
            return str(store.create_experiment(name, artifact_location=where))
        except MlflowException:  # another stage made it at the same moment
            found = store.get_experiment_by_name(name)
    return str(found.experiment_id)


class Tracker(threading.Thread):
    """The worker thread of one stage run."""

    def __init__(self, facts: Facts, work: Path):
        super().__init__(name="mlflow", daemon=True)
        self.facts = facts
        self.note = work / "mlflow-run"
        self.points: queue.SimpleQueue[tuple[str, float, int, int] | None] = queue.SimpleQueue()
        self.run_id: str | None = None
        self.model_id: str | None = None
        self.problem: BaseException | None = None
        self.outcome: dict[str, Any] = {}
        self.sent = 0

    def point(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the figures of one step."""
        now = time.time_ns() // 1_000_000
        for key, value in metrics.items():
            self.points.put((key, float(value), now, step))

    def finish(
        self,
        status: str,
        *,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: list[Path],
        timeout: float = 120,
    ) -> None:
        """Sends what is left, closes the run, and waits for that. `status` is MLflow's word."""
        self.outcome = {"status": status, "metrics": metrics, "tags": tags, "artifacts": artifacts}
        self.points.put(None)
        if self.is_alive():
            self.join(timeout)
            if self.is_alive():
                self.problem = TimeoutError(f"no answer within {timeout:.0f} s")

    def run(self) -> None:
        """The thread's body; a problem ends tracking, not the stage, and is kept to be reported."""
        try:
            store = client()
            self._open(store)
            while self._send(store):
                pass
            self._close(store)
        except Exception as error:
            self.problem = error

    def _open(self, store: Any) -> None:
        from mlflow.entities import Param, RunTag

        facts = self.facts
        where = experiment(store)
        parent = execution_run(store, where, facts.execution)
        earlier = self.note.read_text() if self.note.exists() else None
        if earlier:
            self.run_id = earlier
            store.update_run(earlier, status="RUNNING")
            self.known = {
                key: max(point.step for point in store.get_metric_history(earlier, key))
                for key in store.get_run(earlier).data.metrics
            }
        else:
            self.known = {}
            tags = facts.tags | {"mlflow.parentRunId": parent, "drawplate.stage": facts.stage}
            run = store.create_run(where, run_name=facts.stage, tags=tags)
            self.run_id = str(run.info.run_id)
            self.note.write_text(self.run_id)
            params = [Param(key, str(value)[:6000]) for key, value in flat(facts.params).items()]
            inputs = [RunTag(f"drawplate.input.{k}", v) for k, v in facts.inputs.items()]
            for start in range(0, len(params), 100):
                store.log_batch(self.run_id, params=params[start : start + 100])
            store.log_batch(self.run_id, tags=inputs)
            self._log_inputs(store, where)
        store.set_tag(parent, f"stage.{facts.stage}.run_id", self.run_id)
        store.set_tag(parent, f"stage.{facts.stage}.status", "running")
        self.parent = parent

    def _log_inputs(self, store: Any, where: str) -> None:
        """Inputs as datasets with digests, and the parent's logged model, linked both ways."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

        datasets, models = [], []
        for role, digest in self.facts.inputs.items():
            source = CodeDatasetSource({"drawplate.hash": digest})
            dataset = MetaDataset(source, name=role, digest=digest[:36])
            context = [InputTag("mlflow.data.context", role)]
            datasets.append(DatasetInput(dataset._to_mlflow_entity(), context))
            producer = producer_of(store, where, digest)
            if producer is not None:
                store.set_tag(self.run_id, f"drawplate.parent.{role}", producer.info.run_id)
                store.set_tag(
                    producer.info.run_id, f"drawplate.child.{self.facts.stage}", self.run_id
                )
                model = producer.data.tags.get("drawplate.model_id")
                models += [LoggedModelInput(model)] if model else []
        store.log_inputs(self.run_id, datasets=datasets, models=models)

    def _send(self, store: Any) -> bool:
        """Waits for points and sends them as one batch; False when the stage is over."""
        from mlflow.entities import Metric

        batch = [self.points.get()]
        deadline = time.monotonic() + 2
        while batch[-1] is not None and len(batch) < _BATCH:
            try:
                batch.append(self.points.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        metrics = [
            Metric(*point) for point in batch if point and point[3] > self.known.get(point[0], -1)
        ]
        if metrics:
            store.log_batch(self.run_id, metrics=metrics)
            self.sent += len(metrics)
        return batch[-1] is not None

    def _close(self, store: Any) -> None:
        from mlflow.entities import Metric, RunTag

        outcome, now = self.outcome, time.time_ns() // 1_000_000
        finals = [Metric(f"final.{k}", float(v), now, 0) for k, v in outcome["metrics"].items()]
        for start in range(0, len(finals), _BATCH):
            store.log_batch(self.run_id, metrics=finals[start : start + _BATCH])
        store.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in outcome["tags"].items()])
        for path in outcome["artifacts"]:
            store.log_artifact(self.run_id, str(path))
        if outcome["status"] == "FINISHED" and outcome["tags"].get("drawplate.kind") == "model":
            self._log_model(store, outcome)
        store.set_terminated(self.run_id, outcome["status"])
        store.set_tag(self.parent, f"stage.{self.facts.stage}.status", outcome["status"].lower())
        store.set_terminated(self.parent, outcome["status"])
        self.note.unlink(missing_ok=True)

    def _log_model(self, store: Any, outcome: Mapping[str, Any]) -> None:
        """The checkpoint as a logged model: a pointer with its hash, not a copy of the weights."""
        import mlflow
        from mlflow.entities import LoggedModelOutput

        mlflow.set_tracking_uri(uri())
        model = mlflow.create_external_model(
            name=self.facts.stage,
            source_run_id=self.run_id,
            model_type="drawplate",
            tags={"drawplate.hash": outcome["tags"]["drawplate.output"]},
        )
        self.model_id = str(model.model_id)
        store.log_outputs(self.run_id, [LoggedModelOutput(self.model_id, step=0)])
        store.set_tag(self.run_id, "drawplate.model_id", self.model_id)
        for key, value in outcome["metrics"].items():
            store.log_metric(self.run_id, f"model.{key}", float(value), model_id=self.model_id)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values -> dotted keys; lists are kept whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        found |= flat(value, f"{where}.") if isinstance(value, Mapping) else {where: value}
    return found


def execution_run(store: Any, where: str, execution: str) -> str:
    """Id of the run that stands for a whole execution, opened again or made."""
    found = store.search_runs([where], f"tags.`drawplate.execution` = '{execution}'", max_results=1)
    if found:
        run_id = str(found[0].info.run_id)
        store.update_run(run_id, status="RUNNING")
        return run_id
    tags = {"drawplate.execution": execution}
    return str(store.create_run(where, run_name="pipeline", tags=tags).info.run_id)


def producer_of(store: Any, where: str, digest: str) -> Any:
    """The first run whose output has this content hash, or None."""
    found = store.search_runs(
        [where],
        f"tags.`drawplate.output` = '{digest}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None
