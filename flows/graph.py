"""The pipeline as DVC sees it: its stages in order, and running one of them or all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from drawplate.core.errors import UserError
from drawplate.settings import nearest
from stages.quiet import INTERRUPTED, quiet_environment

Status = Literal["ran", "cached", "unchanged"]


class Node(NamedTuple):
    """A stage of dvc.yaml."""

    name: str
    upstream: tuple[str, ...]
    meta: dict[str, Any]


class Repro(NamedTuple):
    """What one call of `dvc repro` did."""

    statuses: dict[str, Status]
    code: int
    tail: str
    """The last lines that were printed, for an error message."""


def refuse_unknown(stages: Iterable[str], known: Collection[str]) -> None:
    """Raises `UserError` for the first of the stages that is not known."""
    for stage in stages:
        if stage not in known:
            near = nearest(stage, known)
            raise UserError(f"no stage {stage!r}{near}; there are: {', '.join(known)}")


def nodes(root: Path) -> list[Node]:
    """Stages of `root`'s dvc.yaml, each after everything it needs."""
    quiet_environment()
    import networkx
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = _stages(repo.index.graph)
        return [
            Node(
                stage.name,
                tuple(sorted(up.name for up in graph.successors(stage))),
                stage.meta or {},
            )
            for stage in networkx.dfs_postorder_nodes(graph)
        ]


def _stages(graph: Any) -> Any:
    """The part of DVC's graph that dvc.yaml describes, without the files of `dvc add`."""
    return graph.subgraph([stage for stage in graph if not stage.is_data_source])


def outdated(root: Path, names: Sequence[str]) -> list[str]:
    """Those of the stages, given in order, that `dvc repro` would run; data may be missing."""
    quiet_environment()
    from dvc.repo import Repo

    found: list[str] = []
    with Repo(str(root)) as repo, repo.lock:
        graph = _stages(repo.index.graph)
        for stage in sorted(
            (stage for stage in graph if stage.name in names), key=lambda s: names.index(s.name)
        ):
            upstream = list(graph.successors(stage))
            again = any(up.name in found for up in upstream)
            if again or stage.changed(allow_missing=True, upstream=upstream):
                found.append(stage.name)
    return found


class Inputs(NamedTuple):
    """What a stage would read."""

    key: str
    """The same for the same command, inputs and parameters, whatever machine asks."""
    made: tuple[str, ...]
    """Those that other stages make."""
    added: tuple[str, ...]
    """Those that `dvc add` put into a folder that the stage reads."""
    settled: bool
    """Whether dvc.lock knows the stage with just these inputs of other stages."""


def inputs(root: Path, name: str) -> Inputs:
    """What stage `name` of a clean clone would read, without having its data there.

    Outputs of other stages count by their hashes in dvc.lock, source files by git's.

    Raises:
        KeyError: there is no such stage.
    """
    quiet_environment()
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        stage = next((s for s in repo.index.stages if getattr(s, "name", None) == name), None)
        if stage is None:
            raise KeyError(name)
        produced = {out.fs_path: out.hash_info.value for out in repo.index.outs}
        before = {dep.fs_path: dep.hash_info.value for dep in stage.deps}
        facts: dict[str, Any] = {"cmd": stage.cmd}
        made: dict[str, str] = {}
        added: list[str] = []
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                facts[f"params {dep.def_path}"] = dep.read_params()
                continue
            path = os.path.relpath(dep.fs_path, root)
            facts[path] = produced.get(dep.fs_path) or _tree(root, path)
            if dep.fs_path in produced:
                made[path] = dep.fs_path
            inside = f"{dep.fs_path}{os.sep}"
            added += [os.path.relpath(out, root) for out in produced if out.startswith(inside)]
        settled = all(produced[path] and produced[path] == before[path] for path in made.values())
    text = json.dumps(facts, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Inputs(key, tuple(sorted(made)), tuple(sorted(added)), settled)


def _tree(root: Path, path: str) -> str:
    """Git's hash of a file or folder of the commit, empty where it has none."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"HEAD:{path}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


_RAN = re.compile(r"^Running stage '([^']+)'")
_CACHED = re.compile(r"^Stage '([^']+)' is cached - skipping run")
_UNCHANGED = re.compile(r"^Stage '([^']+)' didn't change, skipping")
_NOISE = re.compile(
    r"^(> |$|'.*\.dvc' didn't change, skipping|Updating lock file|Generating lock file"
    r"|To track the changes|\s+git add|To enable auto staging|\s+dvc config|Use `dvc push`"
    r"|Data and pipelines are up to date)"
)

STOPPED = re.compile(
    r"^ERROR: failed to reproduce '(.+?)': failed to run: .*, exited with (-?\d+)$", re.MULTILINE
)
"""What DVC says of a stage that failed: its name and its exit code."""


class Stopped(NamedTuple):
    """How a stage failed: by its own exit code, or by a signal."""

    stage: str
    code: int
    signal: int | None


def stopped(text: str) -> Stopped | None:
    """Which stage failed by what `dvc` printed, and how; None where it was none."""
    said = STOPPED.search(text)
    if said is None:
        return None
    code = int(said[2])
    # Some shells take their command's place, others outlive it and give 128 + its signal.
    number = -code if code < 0 else code - 128
    return Stopped(said[1], code, number if number > 0 and code != INTERRUPTED else None)


_ASIDE = re.compile(
    r"Having any troubles\?|Is your cache up to date\?|Learn more about|See <|<?https://"
)


def reason(text: str) -> str:
    """What went wrong, in one line, of what a failed `dvc`, or a stage below it, printed.

    A stage's own error, else DVC's first one with the paths that follow it. The last line is an
    advice as a rule, or a link.
    """
    lines = [line.strip() for line in text.splitlines() if not _ASIDE.match(line.strip())]
    lines = [line for line in lines if line]
    own = [line for line in lines if line.startswith("drawplate: ")]
    begin = next((at for at, line in enumerate(lines) if line.startswith("ERROR: ")), None)
    if own or begin is None:
        return (own or lines or ["no output"])[-1]
    more = takewhile(lambda line: not re.match("[A-Z]+: ", line), lines[begin + 1 :])
    return " ".join([lines[begin].removeprefix("ERROR: "), *more])


# Linux ends a `dvc` whose caller was killed; the stage below it asks for the same.
_DVC = """
import runpy, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.argv[0] = "dvc"
runpy.run_module("dvc", run_name="__main__", alter_sys=True)
"""


def repro(
    root: Path,
    targets: Sequence[str] = (),
    *,
    single: bool = False,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    line: Callable[[str], None] = print,
) -> Repro:
    """Runs `dvc repro`, passing its lines on as they come.

    The whole process group ends with this call, however it ends: a stage that outlived its `dvc`
    would write beside the next run.

    Args:
        root: folder of dvc.yaml.
        targets: stages; all where empty.
        single: exactly the targets, nothing upstream of them.
        options: further options of `dvc repro`.
        environment: added to that of this process.
        line: given each line that is worth showing.
    """
    command = [sys.executable, "-c", _DVC, "--wait-for-lock", "repro", *targets, *options]
    if single:
        command.append("--single-item")
    statuses: dict[str, Status] = {}
    tail: list[str] = []

    def heard(text: str) -> None:
        for pattern, status in ((_RAN, "ran"), (_CACHED, "cached"), (_UNCHANGED, "unchanged")):
            found = pattern.match(text)
            if found:
                statuses[found[1]] = status  # type: ignore[assignment]
        if not _NOISE.match(text):
            line(text)
            tail[:] = [*tail[-19:], text]

    code = follow(command, root, environment or {}, heard)
    return Repro(statuses, code, "\n".join(tail))


def busy(tail: str) -> bool:
    """Whether a `dvc repro` that ended with `tail` failed only because another one was at work."""
    return any(
        text in tail for text in ("is busy", "Unable to acquire lock", "is being made by process")
    )


def patient_repro(
    root: Path, targets: Sequence[str], *, line: Callable[[str], None], **how: Any
) -> Repro:
    """`repro`, and again while only another run is in the way."""
    while True:
        done = repro(root, targets, line=line, **how)
        if done.code == 0 or not busy(done.tail):
            return done
        line(f"{reason(done.tail)}; trying again in 10 s")
        time.sleep(10)


def follow(
    command: Sequence[str], root: Path, environment: Mapping[str, str], line: Callable[[str], None]
) -> int:
    """Runs a command in `root`, gives each line that it prints to `line`; returns its exit code.

    The whole process group ends with this call, however it ends.
    """
    quiet_environment()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # DVC calls stages by $SHELL, which for accounts of services is nologin.
    settled = {"PATH": path, "PYTHONUNBUFFERED": "1", "SHELL": "/bin/sh"}
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **settled, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _FOLLOWED.add(process)
    try:
        assert process.stdout is not None
        for text in process.stdout:
            line(text.rstrip("\n"))
        return process.wait()
    except BaseException:
        end_group(process)
        raise
    finally:
        _FOLLOWED.discard(process)


_FOLLOWED: set[subprocess.Popen[str]] = set()
"""The commands that `follow` runs now, in whatever thread."""


def end_followed() -> None:
    """Ends all that `follow` runs in other threads, which an interruption does not reach."""
    for process in list(_FOLLOWED):
        end_group(process)


def end_group(process: subprocess.Popen[str], grace: float = 10) -> None:
    """Asks a process group to end, so that stages can save, and ends it after `grace` seconds.

    SIGINT has four fifths of them, because on it a stage saves. SIGTERM is its second signal, on
    which it leaves without saving: one fifth lets go of locks. What is left then gets SIGKILL.
    """
    asked = ((signal.SIGINT, 0.8 * grace), (signal.SIGTERM, 0.2 * grace), (signal.SIGKILL, 5.0))
    for sign, patience in asked:
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            if not _group_alive(process.pid):
                return
            time.sleep(0.1)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def new_execution() -> str:
    """An id for one execution of the pipeline: when it began, and which process began it."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
