"""After a run: what MLflow still lacks is sent, and the execution's run shows every stage.

A stage that was not computed again gets a run of its own too, `compress (cached)`, with the figures
and parameters of the result and a link to the run that computed it.

`python -m flows.sync` does the same for the last execution of the current folder, after a plain
`dvc repro` or when MLflow was away.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawplate import settings
from stages.quiet import guarded


def lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    file = root / "dvc.lock"
    if not file.exists():
        return {}
    return dict(
        (settings.parse(file.read_text(encoding="utf-8"), "dvc.lock") or {}).get("stages", {})
    )


def records(root: Path) -> dict[str, dict[str, Any]]:
    """`lineage/<stage>.json` by stage: who computed what is now in the workspace.

    The files are outputs of their stages, so a stage that DVC restored from its run cache comes
    with the record of the run that computed it.
    """
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((root / "lineage").glob("*.json"))
    }


def ship(root: Path) -> None:
    """Sends what stages could not send, and says what is left."""
    from stages.tracking import drain

    state = os.environ.get("DRAWPLATE_STATE")
    for journal, problem in drain(root, *([Path(state)] if state else ())).items():
        print(f"MLflow did not take {journal} ({problem}); it is sent with the next run.")


def sync(root: Path, execution: str, statuses: Mapping[str, str]) -> str | None:
    """Sends what stages could not send, then brings the execution's run up to date.

    Producers' runs get DVC's hashes, stages that did not run get a run that says so, and the
    execution's run gets all parameters, the headline figures and a description with links. Calling
    it again changes nothing. Where MLflow does not take it, it says so and returns None: the next
    call tries again. None too where params.yaml says that runs are not logged.
    """
    from stages.tracking import client, told

    ship(root)
    if not (settings.read(root / "params.yaml").get("execution") or {}).get("tracking", True):
        return None
    try:
        return _bring_up_to_date(client(), root, execution, statuses)
    except Exception as error:  # of any kind; MLflow's view of a run is no reason to fail it
        print(f"MLflow did not take the rest ({told(error)}); `python -m flows.sync` tries again.")
        return None


def _bring_up_to_date(store: Any, root: Path, execution: str, statuses: Mapping[str, str]) -> str:
    from mlflow.entities import RunTag

    from stages.notes import execution_note
    from stages.tracking import (
        execution_run,
        experiment,
        legal,
        link_producers,
        log_params,
        producer_of,
        texts,
    )

    where = experiment(store)
    parent = execution_run(store, where, execution)
    known = records(root)
    shown: dict[str, tuple[str, str]] = {}
    for stage, entry in lock(root).items():
        if stage not in known:
            continue
        status = statuses.get(stage, "unchanged")
        found = producer_of(store, where, known[stage]["hash"])
        producer = found.info.run_id if found else ""
        if producer:
            made = {known[each]["output"] for each in known}
            items = [(kind, item) for kind in ("dep", "out") for item in entry.get(f"{kind}s", [])]
            tags = [(f"dvc.{kind}.{i['path']}", i["md5"]) for kind, i in items if i["path"] in made]
            store.log_batch(producer, tags=[RunTag(legal(key), md5) for key, md5 in tags])
            link_producers(store, where, producer)
        run = producer
        if status != "ran":
            run = _stand_in(store, where, parent, stage, status, known[stage], found, root)
        store.set_tag(parent, f"stage.{stage}.run_id", run)
        store.set_tag(parent, f"stage.{stage}.status", status)
        shown[stage] = (status, producer)
        node = _node(root / known[stage]["output"])
        log_params(store, parent, {f"{stage}.{k}": v for k, v in texts(node["params"]).items()})
    from flows.local import figures_table

    note = execution_note(where, shown, figures_table(root))
    store.set_tag(parent, "mlflow.note.content", note)
    if "evaluate" in shown:
        _headlines(store, parent, root, root / known["evaluate"]["output"])
    ended = store.get_run(parent).info
    if ended.status == "RUNNING" or ended.end_time is None:
        store.set_terminated(parent, "FINISHED")
    return parent


def _stand_in(
    store: Any,
    where: str,
    parent: str,
    stage: str,
    status: str,
    record: Mapping[str, Any],
    producer: Any,
    root: Path,
) -> str:
    """The run of a stage that was not computed again in this execution."""
    from mlflow.entities import LoggedModelOutput, Metric, RunTag

    from stages.notes import stage_note
    from stages.tracking import legal, log_metrics, log_params, model_of, texts

    name = f"{stage} ({status})"
    query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.run_name = '{name}'"
    found = store.search_runs([where], query, max_results=1)
    if found:
        return str(found[0].info.run_id)
    node = _node(root / record["output"])
    digest, now = record["hash"], time.time_ns() // 1_000_000
    tags = {"mlflow.parentRunId": parent, "drawplate.stage": stage, "drawplate.output": digest}
    run = str(store.create_run(where, run_name=name, tags=tags).info.run_id)
    more = {
        "drawplate.status": status,
        "drawplate.folder": str((root / record["output"]).resolve()),
    }
    if producer is not None:
        more["drawplate.cached_from"] = producer.info.run_id
        linked = ("drawplate.kind", "drawplate.model_id")
        more |= {key: value for key, value in producer.data.tags.items() if key in linked}
        more |= {k: v for k, v in producer.data.tags.items() if k.startswith("drawplate.parent.")}
    store.log_batch(run, tags=[RunTag(key, value) for key, value in more.items()])
    log_params(store, run, texts(node["params"]))
    figures = root / "metrics" / f"{stage}.json"
    if figures.exists():
        values = json.loads(figures.read_bytes())
        finals = [Metric(legal(f"final.{k}"), v, now, 0) for k, v in values.items()]
        log_metrics(store, run, finals)
    model = model_of(store, where, digest)
    if model is not None:
        store.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
    store.set_tag(run, "mlflow.note.content", stage_note(store, where, run))
    store.set_terminated(run, "FINISHED", now)
    return run


def _headlines(store: Any, parent: str, root: Path, report: Path) -> None:
    """The last model's figures on the execution's run, so that executions can be sorted by them."""
    from mlflow.entities import Metric

    from stages.champion import figures_of
    from stages.tracking import legal

    figures = json.loads((root / "metrics" / "evaluate.json").read_bytes())
    *others, name = (
        one["name"] for one in json.loads((report / "report.json").read_bytes())["checkups"]
    )
    written = (report / "report.json").stat().st_mtime_ns // 1_000_000
    last = [
        Metric(legal(f"{name}.{key}"), value, written, 0)
        for key, value in figures_of(name, others, figures).items()
    ]
    store.log_batch(parent, metrics=last)


def _node(folder: Path) -> dict[str, Any]:
    from drawplate.lineage import read

    return read(folder).node.model_dump(mode="json")


def main() -> None:
    """Brings MLflow up to date with the current folder."""
    from stages.tracking import client, experiment, uri

    root = Path.cwd()
    newest = max(records(root).values(), key=lambda record: record["started"], default=None)
    if newest is None:
        print("There is nothing to send: no stage has run in this folder.")
        return
    ship(root)
    store = client()
    found = store.search_runs(
        [experiment(store)], f"tags.`drawplate.output` = '{newest['hash']}'", max_results=1
    )
    if not found:
        print(f"{uri()} has no run of what lies in this folder; nothing was tracked, or elsewhere.")
        return
    parent = store.get_run(found[0].data.tags["mlflow.parentRunId"])
    execution = parent.data.tags["drawplate.execution"]
    statuses = {
        key.split(".")[1]: "ran"
        for key, value in parent.data.tags.items()
        if key.startswith("stage.") and key.endswith(".status") and value in ("finished", "ran")
    }
    if sync(root, execution, statuses) is not None:
        print(f"{uri()} is up to date with this folder.")


if __name__ == "__main__":
    sys.exit(guarded(main))
