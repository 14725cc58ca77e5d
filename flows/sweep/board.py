"""A sweep in MLflow: one run with table, JSON and picture, each trial's run below it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.sweep.plan import Outcome
from stages.tracking import told


class Board:
    """The sweep's run. A store that fails while trials run costs its view of them, and is named."""

    def __init__(self, sweep: str, revision: str, request: Mapping[str, Any]):
        from stages.tracking import answering, client, execution_run, experiment, uri

        self.revision = revision
        self.environment = {"MLFLOW_TRACKING_URI": uri()}
        with answering("commit execution.tracking: false"):
            self.store = client()
            self.place = experiment(self.store)
            self.run: str = execution_run(self.store, self.place, sweep)
            self.store.update_run(self.run, status="RUNNING", name="sweep")
            self.store.set_tag(self.run, "git.commit", revision)
            for key, value in request.items():
                self.store.set_tag(self.run, f"sweep.{key}", json.dumps(value)[:5000])

    def link(self, name: str, outcome: Outcome) -> None:
        """Names a trial's run, or why it has none, in a tag."""
        try:
            found = outcome.run or (self._earlier(name) if outcome.earlier else None)
            words = found or outcome.error or "not logged"
            self.store.set_tag(self.run, f"trial.{name}", words[:5000])
        except Exception as error:
            print(f"MLflow did not take the link to {name}: {told(error)}")

    def _earlier(self, name: str) -> str | None:
        wanted = f"tags.`drawplate.experiment` = '{name}' and tags.`git.commit` = '{self.revision}'"
        found = self.store.search_runs([self.place], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None

    def close(self, status: str, facts: Mapping[str, Any], folder: Path) -> None:
        """Leaves table, JSON and picture with the run."""
        try:
            for key in ("front", "trials", "failed"):
                self.store.log_metric(self.run, key, len(facts[key]))
            for name in ("sweep.json", "table.txt", "front.svg"):
                self.store.log_artifact(self.run, str(folder / name))
            self.store.set_terminated(self.run, status)
        except Exception as error:
            print(f"MLflow did not take what {folder} holds: {told(error)}")
