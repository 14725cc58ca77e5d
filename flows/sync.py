"""After a run: DVC's hashes go to MLflow, and cached stages point to the run that computed them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawplate.settings import parse


def lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    file = root / "dvc.lock"
    if not file.exists():
        return {}
    return dict((parse(file.read_text(encoding="utf-8"), "dvc.lock") or {}).get("stages", {}))


def records(root: Path) -> dict[str, dict[str, Any]]:
    """`lineage/<stage>.json` by stage: who computed what is now in the workspace.

    The files are outputs of their stages, so a stage that DVC restored from its run cache comes
    with the record of the run that computed it.
    """
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((root / "lineage").glob("*.json"))
    }


def sync(root: Path, execution: str, statuses: Mapping[str, str]) -> str | None:
    """Tags the producers' runs with DVC's hashes and the execution's run with all stages.

    Returns the id of the execution's run; calling it again changes nothing.
    """
    from stages.tracking import client, execution_run, experiment

    store = client()
    parent = execution_run(store, experiment(store), execution)
    known = records(root)
    for stage, entry in lock(root).items():
        run = known.get(stage, {}).get("mlflow_run")
        if run is None:
            continue
        for kind in ("deps", "outs"):
            for item in entry.get(kind, []):
                store.set_tag(run, f"dvc.{kind[:-1]}.{item['path']}", item.get("md5", ""))
        store.set_tag(parent, f"stage.{stage}.run_id", run)
        store.set_tag(parent, f"stage.{stage}.status", statuses.get(stage, "unchanged"))
    store.set_terminated(parent, "FINISHED")
    return parent
