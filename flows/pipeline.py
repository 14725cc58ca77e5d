"""The pipeline as a Prefect flow: one task a stage, in the order of dvc.yaml's graph.

DVC decides what must run; Prefect decides when and where, and retries. `python -m flows.pipeline`
needs no server: Prefect starts one for the time of the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from stages.quiet import quiet_environment

quiet_environment()
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

from flows.graph import Node, Status, new_execution, nodes, repro  # noqa: E402


class StageRequest(BaseModel):
    """Which stage to bring up to date, and for which execution."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    root: Path
    execution: str


class StageResult(BaseModel):
    """What became of a stage."""

    model_config = ConfigDict(frozen=True)
    name: str
    status: Status
    outputs: dict[str, str]
    """Path -> DVC's md5."""


class StageFailed(RuntimeError):
    """`dvc repro` failed; `busy` where only another run was in the way."""

    def __init__(self, name: str, tail: str):
        last = tail.strip().splitlines()[-1] if tail.strip() else "no output"
        super().__init__(f"stage {name}: {last}")
        self.busy = any(text in tail for text in ("is busy", "Unable to acquire lock"))


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
def run_stage(request: StageRequest) -> StageResult:
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
    outs = lock(request.root).get(request.name, {}).get("outs", [])
    return StageResult(
        name=request.name,
        status=done.statuses.get(request.name, "unchanged"),
        outputs={out["path"]: out["md5"] for out in outs},
    )


@flow(name="pipeline", flow_run_name="pipeline")
def pipeline(root: Path | None = None, targets: list[str] | None = None) -> list[StageResult]:
    """Brings the stages of `root`'s dvc.yaml up to date, each as a task of its own.

    Args:
        root: folder of dvc.yaml; the current one where it is null.
        targets: stages to stop at, with everything before them; all where it is null.
    """
    from flows.sync import sync

    root = (root or Path.cwd()).resolve()
    order = wanted(nodes(root), targets)
    execution = new_execution()
    futures: dict[str, Any] = {}
    for node in order:
        futures[node.name] = run_stage.submit(  # type: ignore[call-overload]
            StageRequest(name=node.name, root=root, execution=execution),
            wait_for=[futures[name] for name in node.upstream],
        )
    results: list[StageResult] = [future.result() for future in futures.values()]
    sync(root, execution, {result.name: result.status for result in results})
    return results


def wanted(order: list[Node], targets: list[str] | None) -> list[Node]:
    """The targets and all that they need, in order.

    Raises:
        ValueError: a target is no stage.
    """
    by_name = {node.name: node for node in order}
    unknown = sorted(set(targets or []) - set(by_name))
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}; there are: {', '.join(by_name)}")
    needed: set[str] = set()
    pending = list(targets or by_name)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += by_name[name].upstream
    return [node for node in order if node.name in needed]


if __name__ == "__main__":
    for result in pipeline(targets=sys.argv[1:] or None):
        print(f"{result.name:10} {result.status}")
