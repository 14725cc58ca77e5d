"""Before stages run on workers: a rehearsal there, which refuses what will not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from stages.quiet import quiet_environment

quiet_environment()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.client.orchestration import SyncPrefectClient  # noqa: E402
from prefect.client.schemas.filters import (  # noqa: E402
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.states import Completed  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field  # noqa: E402

from flows.graph import Node, follow, inputs, outdated  # noqa: E402
from flows.handover import REF  # noqa: E402
from flows.preflight import FORECAST  # noqa: E402
from flows.stage import StageFailed, on_device, with_worker  # noqa: E402
from flows.workspace import source, workspace  # noqa: E402

NAME = "preflight"
KEY = "forecast"


class Rehearsal(BaseModel):
    """Which stages of which experiment to forecast."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ref: str = Field(pattern=REF)
    stages: list[str]


@flow(name=NAME, flow_run_name=NAME)
def preflight(request: Rehearsal) -> State[Any]:
    """Forecasts what will run of the stages; fails where a stage would not fit on this machine.

    Args:
        request: which stages, and of which experiment.
    """
    logger = get_run_logger()
    with with_worker(), workspace(source(), request.ref) as place, on_device(place, logger.info):
        # Without them a stage that reads them would look outdated, and could not be rehearsed.
        place.bring(sorted({path for s in request.stages for path in inputs(place.root, s).added}))
        stages = outdated(place.root, request.stages)
        if not stages:
            return Completed(message="nothing will run")
        said: list[str] = []

        def line(text: str) -> None:
            said.append(text)
            logger.info(text)

        command = [sys.executable, "-m", "flows.cli", NAME, *stages]
        if follow(command, place.root, place.environment(), line) != 0:
            raise StageFailed(NAME, "\n".join(said))
        needs = json.loads((place.root / FORECAST).read_bytes())
        rows = [{"stage": stage, **need["needs"]} for stage, need in needs.items()]
        table = "\n".join(said)
        create_table_artifact(rows, key=KEY, description=f"```\n{table}\n```")
    return Completed(message=f"forecast {', '.join(stages)}")


def first(order: Sequence[Node]) -> list[Node]:
    """The stages with a rehearsal of them all before the first."""
    pool = "gpu" if any(node.meta.get("pool") == "gpu" for node in order) else "cpu"
    meta = {"flow": NAME, "pool": pool, "request": {"stages": [node.name for node in order]}}
    later = [node._replace(upstream=(*node.upstream, NAME)) for node in order]
    return [Node(NAME, (), meta), *later]


def forecast_of(client: SyncPrefectClient, run: FlowRun) -> dict[str, dict[str, Any]]:
    """Stage -> its needs, as a run of `preflight` left them; empty where nothing had to run."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(any_=[KEY])
        )
    )
    rows = json.loads(str(found[0].data)) if found else []
    return {row.pop("stage"): row for row in rows}
