"""One stage as a Prefect flow run on a worker: in a workspace of its own, through DVC.

Where the same stage with the same inputs is asked for twice at once, one run computes and the other
waits and takes the result; where a worker has a GPU, one stage at a time uses it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from stages.quiet import quiet_environment

quiet_environment()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.artifacts import create_progress_artifact, update_progress_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Completed  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field  # noqa: E402

from drawplate.core.errors import DrawplateError, Exhausted  # noqa: E402
from flows.graph import (  # noqa: E402
    Inputs,
    Repro,
    Status,
    busy,
    inputs,
    patient_repro,
    reason,
    stopped,
)
from flows.handover import REF, entries, hand_on  # noqa: E402
from flows.slots import INPUTS, device, slot  # noqa: E402
from flows.workspace import Workspace, source, workspace  # noqa: E402


class StageRequest(BaseModel):
    """Which stage to bring up to date, and in which experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    ref: str = Field(pattern=REF)
    """The experiment's git ref: where the stage begins, and where it hands its results on."""


class StageFailed(DrawplateError):
    """`dvc repro` failed; `busy` where only another run was in the way."""

    def __init__(self, name: str, tail: str):
        super().__init__(f"stage {name}: {reason(tail).removeprefix('drawplate: ')}")
        if ended := stopped(tail):
            self.code = Exhausted.code if ended.signal else ended.code
        self.busy = busy(tail)


@flow(name="stage", flow_run_name="{request.stage}")
def stage(request: StageRequest) -> State[Any]:
    """Brings exactly one stage of an experiment up to date; the state's message says how.

    Args:
        request: which stage, and in which experiment.
    """
    logger = get_run_logger()
    with with_worker(), workspace(source(), request.ref) as place:
        read = inputs(place.root, request.stage)
        with slot(f"{INPUTS}{read.key}", logger.info), on_device(place, logger.info):
            status = bring_up_to_date(place, request, read, _progress(request.stage, logger.info))
        hand_on(place, request.ref, request.stage, entries(place)[request.stage])
    return Completed(message=status)


def bring_up_to_date(
    place: Workspace, request: StageRequest, read: Inputs, line: Callable[[str], None]
) -> Status:
    """Computes the stage unless what dvc.lock names is there; returns how that went.

    Afterwards the stage's outputs are where other machines find them.
    """
    unsent, lost = place.lacking(request.stage)
    place.bring(read.added)
    if lost:
        line(f"{', '.join(lost)}: in no cache and no remote; {request.stage} makes it again")
    if lost or not (read.settled and place.remote):
        place.bring(read.made)
    done = _repro(place, request, ["--allow-missing"] if not lost else [], line)
    status = done.statuses.get(request.stage, "unchanged")
    if place.remote and (unsent or status != "unchanged"):
        place.push(request.stage, entries(place)[request.stage])
    return status


def _repro(
    place: Workspace, request: StageRequest, options: Sequence[str], line: Callable[[str], None]
) -> Repro:
    """`dvc repro` of the stage, waiting where a run that lost its lease still holds the files."""
    options = [*options, *(["--pull"] if place.remote else [])]
    experiment = request.ref.rsplit("/", 1)[1]
    done = patient_repro(
        place.root,
        [request.stage],
        single=True,
        options=options,
        environment={**place.environment(), "DRAWPLATE_EXECUTION": experiment},
        line=line,
    )
    if done.code != 0:
        raise StageFailed(request.stage, done.tail)
    return done


@contextmanager
def on_device(place: Workspace, say: Callable[[str], None]) -> Iterator[None]:
    """Holds this worker's GPU, if it has one, and has the stages of the clone use it."""
    gpu, where = os.environ.get("DRAWPLATE_GPU"), os.environ.get("DRAWPLATE_DEVICE")
    with ExitStack() as slots:
        if gpu:
            slots.enter_context(device(gpu, say))
        if where:
            _set_device(place, where)
        yield


def _set_device(place: Workspace, where: str) -> None:
    """Writes `execution.device`, which is part of no stage's identity, into the clone."""
    from ruamel.yaml import YAML

    yaml, file = YAML(), place.root / "params.yaml"
    tree = yaml.load(file.read_text(encoding="utf-8"))
    tree.setdefault("execution", {})["device"] = where
    with file.open("w", encoding="utf-8") as out:
        yaml.dump(tree, out)


_STEP = re.compile(r"^\[[a-z]+\] (?P<part>.+?) (?P<step>\d+)/(?P<total>\d+)(?:\s|$)")


def _progress(name: str, log: Callable[[str], None]) -> Callable[[str], None]:
    """Logs a stage's lines, and keeps a progress artifact of those that count steps."""
    known: dict[str, Any] = {}

    def line(text: str) -> None:
        log(text)
        found = _STEP.match(text)
        if not found or int(found["total"]) == 0:
            return
        part = found["part"]
        share = min(100.0, 100 * int(found["step"]) / int(found["total"]))
        if part not in known:
            key = re.sub(r"[^a-z0-9]+", "-", f"{name} {part}".lower()).strip("-")
            known[part] = create_progress_artifact(share, key=key, description=text)
        else:
            update_progress_artifact(known[part], progress=share, description=text)

    return line


@contextmanager
def with_worker() -> Iterator[None]:
    """Linux tells this process when its worker is killed: the stage then saves and ends.

    Nobody reads then what this process prints, for which Prefect's console would end it before it
    has told the server that it crashed; so it prints nowhere.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    try:
        yield
    except BaseException:
        if os.getppid() != parent:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
        raise
