"""The pipeline as Prefect flows: on this machine in place, or on workers from any revision.

DVC decides what must run; Prefect decides when and where. `python -m flows.pipeline` needs no
server: Prefect starts one for the time of the run. The flow `pipeline` is for deployments: it gives
each stage to the work pool that dvc.yaml's `meta.pool` names, as a run of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.quiet import guarded, interruptible, quiet_environment

quiet_environment()
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

from prefect import flow, get_run_logger, runtime, task  # noqa: E402
from prefect.artifacts import (  # noqa: E402
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

from drawplate.core.errors import UserError  # noqa: E402
from drawplate.settings import read  # noqa: E402
from flows.ahead import NAME as PREFLIGHT  # noqa: E402
from flows.ahead import first, forecast_of  # noqa: E402
from flows.dispatch import STARTS, Dispatch  # noqa: E402
from flows.graph import (  # noqa: E402
    Node,
    Status,
    end_followed,
    new_execution,
    nodes,
    refuse_unknown,
    repro,
)
from flows.handover import begin, entries, tip  # noqa: E402
from flows.request import Request  # noqa: E402
from flows.slots import forget  # noqa: E402
from flows.stage import StageFailed, with_worker  # noqa: E402
from flows.workspace import Workspace, source, workspace  # noqa: E402


class StageResult(BaseModel):
    """What became of a stage."""

    model_config = ConfigDict(frozen=True)
    name: str
    status: Status
    outputs: dict[str, str]
    """Path -> DVC's md5."""


class Local(BaseModel):
    """Which stage to bring up to date in place, and for which execution."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    root: Path
    execution: str


def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """A lock held by another run passes; a stage that fails by itself fails again."""
    try:
        state.result()
    except StageFailed as error:
        return error.busy
    except Exception:
        return False
    return False


@task(
    retries=3,
    retry_delay_seconds=10,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    task_run_name="{request.name}",
)
def run_stage(request: Local) -> StageResult:
    """Brings exactly one stage up to date through DVC."""
    from flows.sync import lock

    logger = get_run_logger()
    done = repro(
        request.root,
        [request.name],
        single=True,
        environment={"DRAWPLATE_EXECUTION": request.execution},
        line=logger.info,
    )
    if done.code != 0:
        raise StageFailed(request.name, done.tail)
    status = done.statuses.get(request.name, "unchanged")
    return _result(request.name, status, lock(request.root))


def _result(name: str, status: Status, stages: Mapping[str, Any]) -> StageResult:
    outs = stages.get(name, {}).get("outs", [])
    return StageResult(name=name, status=status, outputs={out["path"]: out["md5"] for out in outs})


@flow(name="in-place", flow_run_name="pipeline")
def in_place(root: Path | None = None, targets: list[str] | None = None) -> list[StageResult]:
    """Brings the stages of `root`'s dvc.yaml up to date there, each as a task of its own.

    Args:
        root: folder of dvc.yaml; the current one where it is null.
        targets: stages to stop at, with everything before them; all where it is null.

    Raises:
        UserError: something in params.yaml is wrong, of whatever stage; nothing has run then.
    """
    from flows.sync import sync
    from stages.check import check

    root = (root or Path.cwd()).resolve()
    check(read(root / "params.yaml"))
    order = wanted(nodes(root), targets)
    execution = new_execution()
    futures: dict[str, Any] = {}
    try:
        for node in order:
            futures[node.name] = run_stage.submit(  # type: ignore[call-overload]
                Local(name=node.name, root=root, execution=execution),
                wait_for=[futures[name] for name in node.upstream],
            )
        for future in futures.values():
            future.wait()
    except BaseException:  # an interruption, of which the threads of the tasks hear nothing
        while not all(future.wrapped_future.done() for future in futures.values()):
            end_followed()
            time.sleep(0.1)
        raise
    results: list[StageResult] = [future.result() for future in futures.values()]
    sync(root, execution, {result.name: result.status for result in results})
    return results


@flow(name="pipeline")
def pipeline(request: Request = Request()) -> list[StageResult]:
    """Brings a revision up to date on the workers, as a DVC experiment of the source repository.

    Each stage is a flow run of its own in the pool that it needs. What was computed before, by
    whomever, is not computed again. `dvc exp apply NAME` and `dvc pull STAGES` bring the results.

    Args:
        request: revision, targets, and changes of params.yaml.
    """
    logger = get_run_logger()
    run = str(runtime.flow_run.id)
    if runtime.flow_run.run_count > STARTS:
        raise RuntimeError(f"lost {STARTS} times; see the logs of its workers, then run it again")
    name = request.name or f"run-{run[:8]}"
    with (
        with_worker(),
        workspace(source(), request.revision) as place,
        get_client(sync_client=True) as client,
    ):
        forget(client)
        _change(place, request)
        order = wanted(nodes(place.root), request.targets or None)
        ref = begin(place, name)
        logger.info("experiment %s of %s", name, place.source)
        ahead = first(order) if request.preflight else order
        dispatch = Dispatch(client, run, ref, ahead, logger.info)
        try:
            runs = dispatch.finish()
        except BaseException:
            state = client.read_flow_run(runtime.flow_run.id).state
            if state is not None and state.is_cancelling():
                dispatch.cancel()
            raise
        place.git("checkout", "--quiet", "--force", "--detach", str(tip(place, ref)))
        stages = entries(place)
        results = [
            _result(node.name, runs[node.name].state.message, stages)  # type: ignore[union-attr, arg-type]
            for node in order
        ]
        _show(place, name, results, {node.name: runs[node.name].work_pool_name for node in order})
        if request.preflight:
            _compare(place, forecast_of(client, runs[PREFLIGHT]), results)
    return results


def _compare(
    place: Workspace, needs: Mapping[str, Mapping[str, Any]], results: list[StageResult]
) -> None:
    """Shows the forecast beside what the stages that were computed took."""
    from flows.preflight import compared, save

    save(place.root, read(place.root / "params.yaml"), needs)
    table = compared(place.root, [result.name for result in results if result.status == "ran"])
    if table is not None:
        get_run_logger().info("the forecast, and what it took:\n%s", table)
        create_markdown_artifact(f"```\n{table}\n```", key="forecast-and-actual")


def _change(place: Workspace, request: Request) -> None:
    """Lays the request over the clone's params.yaml, by the rules of the clone's own revision."""
    if not request.overrides and not request.presets:
        return
    script = "import sys, json; from pathlib import Path; from flows.local import change_params\n"
    script += "from stages.quiet import guarded\n"
    script += "a = json.loads(sys.argv[1])\n"
    script += "sys.exit(guarded(lambda: change_params(Path('params.yaml'), *a)))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([request.overrides, request.presets])],
        cwd=place.root,
        env={**os.environ, **place.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(last.removeprefix("drawplate: "))


def _show(
    place: Workspace, name: str, results: list[StageResult], pools: Mapping[str, str | None]
) -> None:
    """Tells MLflow, and leaves what a reader of the flow run wants to see."""
    from flows.local import figures_text
    from flows.sync import records, sync
    from stages.tracking import client, experiment, uri

    place.bring([path for result in results for path in result.outputs if _is_record(path)])
    # Of the outputs themselves, which may be large, what MLflow is told of.
    outputs = {stage: record["output"] for stage, record in records(place.root).items()}
    small = [f"{outputs[name]}/report.json" for name in ("evaluate",) if name in outputs]
    place.bring([*(f"{output}/lineage.json" for output in outputs.values()), *small])
    statuses = {result.name: result.status for result in results}
    parent = sync(place.root, name, statuses)
    made = records(place.root)
    fetch = f"`dvc exp apply {name}`, then `dvc pull {' '.join(statuses)}`"
    create_table_artifact(
        [
            {
                "stage": result.name,
                "status": result.status,
                "pool": pools[result.name],
                "seconds": made.get(result.name, {}).get("seconds"),
                "MLflow run": made.get(result.name, {}).get("mlflow_run"),
            }
            for result in results
        ],
        key="stages",
        description=f"DVC experiment `{name}`: {fetch}",
    )
    figures = figures_text(place.root)
    if figures:
        create_markdown_artifact(f"```\n{figures}\n```", key="summary")
    if uri().startswith("http") and parent is not None:
        where = f"{uri().rstrip('/')}/#/experiments/{experiment(client())}/runs"
        create_link_artifact(f"{where}/{parent}", link_text="MLflow run", key="mlflow")
        report = made.get("evaluate", {}).get("mlflow_run")
        if report:
            link = f"{where}/{report}/artifacts/index.html"
            create_link_artifact(link, link_text="report", key="report")


def _is_record(path: str) -> bool:
    """Whether an output is what a stage notes of itself, `lineage/<stage>.json`."""
    return Path(path).parts[:1] == ("lineage",)


def wanted(order: list[Node], targets: list[str] | None) -> list[Node]:
    """The targets and all that they need, in order.

    Raises:
        UserError: a target is no stage.
    """
    by_name = {node.name: node for node in order}
    refuse_unknown(targets or (), by_name)
    needed: set[str] = set()
    pending = list(targets or by_name)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += by_name[name].upstream
    return [node for node in order if node.name in needed]


def main() -> None:
    """Brings the stages up to date in the current folder: `make flow`."""
    interruptible()
    # The server that Prefect starts inherits what is blocked: a terminal's SIGINT, which goes to it
    # too, then leaves it there to be told that the run is over.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    get_client(sync_client=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for result in in_place(targets=sys.argv[1:] or None):
        print(f"{result.name:10} {result.status}")


if __name__ == "__main__":
    sys.exit(guarded(main))
