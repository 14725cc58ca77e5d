"""Trials on workers: each is a run of the deployment `pipeline/on-demand`.

Its stages go to the pools that they ask for, and what trials have in common is computed once, as
for any two pipelines. The experiment that a pipeline hands over becomes the trial's.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from drawplate.core.errors import UserError
from flows.ahead import first
from flows.dispatch import Dispatch, cancel
from flows.graph import nodes
from flows.handover import begin, ref_of, retitle
from flows.pipeline import wanted
from flows.slots import patient
from flows.stage import StageFailed
from flows.sweep import trial
from flows.sweep.plan import Outcome, Spec
from flows.workspace import git, source, workspace
from stages.tracking import told

DEPLOYMENT = "pipeline/on-demand"
LOST = 300.0
"""Seconds after which a crashed run that nobody started again counts as ended."""


class Workers:
    """Each trial is a flow run; the server that the environment names has to be there.

    Raises:
        UserError: there is no server, or nothing was deployed to it.
    """

    def __init__(self, root: Path, rehearse: bool = True):
        self.root, self.rehearse = root, rehearse
        self.runs: dict[str, UUID] = {}

    def __enter__(self) -> Self:
        self.context = get_client(sync_client=True)
        self.client = self.context.__enter__()
        try:
            self.client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise UserError(
                f"{self.client.api_url} knows no {DEPLOYMENT}: call `make deploy` first"
            ) from None
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            raise UserError(
                f"no Prefect server at {self.client.api_url} ({told(error)}); start one with "
                "`make server`"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.context.__exit__(kind, error, trace)

    def start(self, spec: Spec) -> Spec:
        """Asks for the trial's run; before the first, for a forecast."""
        if self.rehearse:
            self._rehearse(spec)
            self.rehearse = False
        spec.folder.mkdir(parents=True, exist_ok=True)
        request = {
            "revision": spec.revision,
            "targets": list(spec.targets),
            "overrides": [f"{key}={text}" for key, text in spec.changes.items()],
            "name": spec.name,
            "preflight": False,
        }
        ask = partial(
            run_deployment,
            parameters={"request": request},
            flow_run_name=spec.name,
            idempotency_key=f"{spec.session}-{spec.name}",
            timeout=0,
        )
        made = patient(ask, DEPLOYMENT)
        assert isinstance(made, FlowRun)
        self.runs[spec.name] = made.id
        return spec

    def _rehearse(self, spec: Spec) -> None:
        """Forecasts the revision as it is, on the workers.

        Raises:
            UserError: it will not fit.
        """
        with workspace(source(), spec.revision) as place:
            order = wanted(nodes(place.root), list(spec.targets) or None)
            ref = begin(place, f"preflight-{spec.session}")
            dispatch = Dispatch(self.client, spec.session, ref, first(order)[:1], print)
            try:
                dispatch.finish()
            except StageFailed as error:
                raise UserError(f"{error}; --no-preflight goes ahead without") from None
            finally:
                dispatch.cancel()
                place.git("push", "--quiet", "origin", f":{ref}")

    def ended(self, handle: Spec) -> str | None:
        """The final state of the trial's run."""
        run = patient(self.client.read_flow_run, self.runs[handle.name])
        state = run.state
        if state is None or not state.is_final():
            time.sleep(0.5)
            return None
        # An automation starts a crashed pipeline again.
        if state.is_crashed() and time.time() - state.timestamp.timestamp() < LOST:
            return None
        if state.is_completed():
            self._take(handle, run)
        words = (state.message or state.name or "").rsplit("drawplate: ", 1)
        return words[-1] if len(words) > 1 else f"its run ended as {state.name}: {state.message}"

    def _take(self, spec: Spec, run: FlowRun) -> None:
        """Makes the experiment that was handed over one of the project's, and a trial's."""
        ref = ref_of(spec.revision, spec.name)
        try:
            if Path(source()).resolve() != self.root.resolve():
                git(self.root, "fetch", "--quiet", "--no-tags", source(), f"+{ref}:{ref}")
            found = trial.measured(self.root, spec.metrics, ref)
            outcome = Outcome(metrics=found, seconds=run.total_run_time.total_seconds())
            retitle(self.root, ref, f"{trial.DONE} {spec.name}")
        except Exception as error:
            outcome = Outcome(error=told(error))
        if spec.parent is not None and outcome.error is None:
            try:
                outcome = outcome.model_copy(update={"run": trial.tie(spec, spec.name, outcome)})
            except Exception as error:  # the trial is recorded; MLflow only lacks its view of it
                print(f"MLflow did not take {spec.name}: {told(error)}")
        trial.write(spec.folder / f"{spec.name}.json", outcome)

    def stop(self, folder: Path) -> None:
        """Cancels the runs that have not ended."""
        left: list[Any] = [
            run for name, run in self.runs.items() if not (folder / f"{name}.json").exists()
        ]
        cancel(self.client, left, patience=40)
