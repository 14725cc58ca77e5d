"""What every stage shares: inputs checked, one writer, progress, lineage, MLflow, a clean exit."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import click
from pydantic import Field, model_validator

import drawplate
from drawplate.core.errors import DrawplateError, Exhausted, UserError, naming
from drawplate.core.method import Frozen
from drawplate.core.progress import Watch
from drawplate.data.engine import Engine, Here
from drawplate.train.distributed import ALONE, World
from stages import STAGES
from stages.journal import Facts, Tracker, flat
from stages.quiet import begin

STATE = ".drawplate"
P = TypeVar("P", bound=Frozen)
I = TypeVar("I", bound=Frozen)  # noqa: E741
R = TypeVar("R", bound=Frozen)


class Execution(Frozen):
    """How a stage runs, not what it makes: never part of its identity."""

    threads: int | None = Field(default=None, ge=1)
    """Threads of torch in a process, on which bytes depend; null: all cores, shared out."""
    nproc: int = Field(default=1, ge=1)
    """Processes on this machine that train together in pretrain, compress and finetune."""
    nnodes: int = Field(default=1, ge=1)
    """Machines that do so; each runs the same command, on storage that all of them share."""
    address: str | None = None
    """By which the other machines reach this one; null: its host name."""
    sharded: bool = False
    """Whether pretrain splits the weights over its processes (FSDP2); else each holds them all."""
    restarts: int = Field(default=3, ge=0)
    """How often processes start again from their last checkpoint when one of them was lost."""
    engine: Engine = Here()
    """What carries out the parts in which prepare reads its sources."""
    device: str = "cpu"
    """Where tensors live: cpu, cuda, cuda:1, ..."""
    tracking: bool = True
    """Whether runs are logged to MLflow."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sharded and self.processes == 1:
            raise ValueError("sharded splits weights over processes: set nproc or nnodes above 1")
        if self.address is not None and self.nnodes == 1:
            raise ValueError("address is for the other machines: set nnodes above 1")
        return self

    @property
    def processes(self) -> int:
        """All of them, on all machines."""
        return self.nproc * self.nnodes


class Given(NamedTuple):
    """Where a command found its parameters: what `settings_for` takes besides the stage."""

    file: Path | None
    presets: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass
class Run:
    """What a stage's body is given besides its parameters and inputs."""

    folder: Path
    """Where the output is written; it becomes the output when the body returns."""
    work: Path
    """What must survive a crash; the same folder for the same parameters and inputs."""
    execution: Execution
    stage: str
    tracker: Tracker | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """Raw inputs that have no folder: name -> digest; the body fills it."""
    artifacts: list[str] = field(default_factory=list)
    """Files of the output that MLflow shows; the body fills it."""
    world: World = ALONE
    """This process among those that train together."""
    _shown: float = 0.0

    def part(self, label: str) -> Watch:
        """A watch that shows and logs the steps of one part of the stage, `label`.

        Where they do not say how long they will take, the pace since the first of them does.
        """
        first: tuple[int, float] | None = None

        def watch(step: int, total: int, metrics: Mapping[str, float]) -> None:
            nonlocal first
            if self.tracker is not None:
                self.tracker.point(
                    step, {f"{label}.{key}": value for key, value in metrics.items()}
                )
            now = time.monotonic()
            first = first or (step, now)
            if "eta" not in metrics and first[0] < step < total:
                pace = (now - first[1]) / (step - first[0])
                metrics = {**metrics, "eta": pace * (total - step)}
            self._show(label, step, total, metrics)

        return watch

    def leave_to_first(self) -> None:
        """Ends the body here in all processes but the first, which writes the output."""
        if not self.world.first:
            raise Left

    def say(self, text: str) -> None:
        """One line for the user."""
        print(f"[{self.stage}] {text}", file=sys.stderr, flush=True)

    def _show(self, label: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if step < total and now - self._shown < 5:
            return
        self._shown = now
        shown = "  ".join(_figure(key, value) for key, value in metrics.items() if key in _SHOWN)
        self.say(f"{label} {step}/{total}  {shown}".rstrip())


_SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.2f}",
    "length": "length {:.0f}",
    "truncated": "truncated {:.0%}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "eta": "{} left",
}


def _figure(key: str, value: float) -> str:
    if key == "eta":
        return _SHOWN[key].format(f"{int(value) // 60}:{int(value) % 60:02d}")
    return _SHOWN[key].format(value)


class Left(Exception):
    """Raised in a process whose part of the work is done."""


@dataclass(frozen=True)
class Stage(Generic[P, I, R]):
    """A typed function from parameters and input folders to an output folder and a report."""

    name: str
    params: type[P]
    inputs: type[I]
    """Its fields are the roles of input folders, each a `Path`."""
    body: Callable[[P, I, Run], R]
    kind: str
    """Kind of artifact that the output is: corpus, model or report."""
    example: str = ""
    """Parameters that its help shows, as a user types them."""
    together: bool = False
    """Whether it trains, in as many processes as `execution` says."""
    named: Callable[[P], Mapping[str, Path]] = lambda params: {}
    """Further input folders, those that parameters name, by the dotted key that does."""

    def __call__(
        self,
        params: P,
        inputs: I,
        out: Path,
        *,
        metrics: Path | None = None,
        record: Path | None = None,
        execution: Execution | None = None,
        given: Given | None = None,
    ) -> R:
        """Makes `out`, all of it or nothing; an interrupted call goes on when it is repeated.

        Args:
            params: typed parameters of this stage.
            inputs: folders that the stage reads.
            out: folder to make; an artifact of that name is replaced at once, at the end.
            metrics: where to write the report's figures as JSON.
            record: where to write who ran this, when, and under which ids.
            execution: how to run.
            given: what has to give the same parameters, under the same code, when all is made.

        Raises:
            UserError: the inputs cannot be read or `out` not be made, or `given` or the code
                changed in the meantime.
        """
        execution = execution or Execution()
        if self.together and execution.processes > 1:
            from stages.together import launch

            return launch(self, params, inputs, out, metrics, record, execution, given)
        report = self.make(params, inputs, out, metrics, record, execution, ALONE, given)
        assert report is not None  # only helpers of a first process have none
        return report

    def make(
        self,
        params: P,
        inputs: I,
        out: Path,
        metrics: Path | None,
        record: Path | None,
        execution: Execution,
        world: World,
        given: Given | None = None,
    ) -> R | None:
        """What a call does in one process; None from those that help the first one of `world`."""
        from drawplate import lineage
        from drawplate.core.artifact import publish, read_manifest

        imported = _imported()
        folders = _folders(inputs) | _named(self.named(params))
        _refuse_overlap(out, [metrics, record], [*folders.values(), *_paths(params)])
        threads = _threads(execution, world)
        node = lineage.Node(
            stage=self.name,
            params=params.model_dump(mode="json"),
            environment=lineage.environment(threads, world.size),
        )
        trail = lineage.trace(node, folders)
        begun = f"{trail.node.model_dump_json()}{code(ROOTS)}"
        key = hashlib.sha256(begun.encode()).hexdigest()[:16]
        beside = out.resolve().parent / STATE
        state = Path(os.environ.get("DRAWPLATE_STATE") or beside).resolve()
        work = state / f"{self.name}-{key}"
        if not world.first:
            with suppress(Left):
                self.body(params, inputs, Run(work, work, execution, self.name, world=world))
            return None
        with (
            only_one(beside / f"{out.name}.lock", out),
            only_one(work.with_suffix(".lock"), out),
            Note(metrics) as noted,
            Note(record) as recorded,
            Note(lineage.places_file(out)) as placed,
        ):
            work.mkdir(parents=True, exist_ok=True)
            tracker = _tracker(self.name, trail, out, work) if execution.tracking else None
            started = time.time()
            try:
                with publish(out, self.kind) as folder:
                    run = Run(folder, work, execution, self.name, tracker, world=world)
                    report = self.body(params, inputs, run)
                    if run.sources:
                        sourced = trail.node.model_copy(update={"sources": run.sources})
                        trail = trail.model_copy(update={"node": sourced})
                    lineage.write(trail, folder)
                    figures = {k: v for k, v in flat(report.model_dump()).items() if _is_number(v)}
                    # What a full disk can still prevent comes before the output, not after it.
                    noted.draft(figures)
                    recorded.draft({})
                    placed.draft({})
                    if tracker is not None:
                        tracker.keep(folder / name for name in [*run.artifacts, lineage.FILE])
                    if given is not None:
                        _refuse_changed(self, node.params, given, imported)
                digest = read_manifest(out).tree_hash
            except BaseException as error:
                if tracker is not None:
                    tracker.finish(
                        "KILLED" if _was_stopped(error) else "FAILED",
                        metrics={},
                        tags={"drawplate.error": str(error)[:500] or type(error).__name__},
                    )
                raise
            seconds = time.time() - started
            noted.show(figures)
            placed.show(_places(folders))
            run_id = None
            if tracker is not None:
                tracker.finish(
                    "FINISHED",
                    metrics=figures | {"seconds": seconds},
                    tags={"drawplate.output": digest, "drawplate.kind": self.kind},
                )
                run_id = tracker.run_id
                if tracker.problem is not None:
                    run.say(f"MLflow did not take everything, the rest is kept: {tracker.problem}")
            recorded.show(_record(self.name, out, digest, run_id, started, seconds))
            _clear(work)
        run.say(f"{out} is ready ({seconds:.0f} s)")
        return report


class Note:
    """A JSON file that a stage writes beside its output, where somebody asked for it.

    It takes its place on the disk before the output is there, and its name after it.
    """

    _ROOM = 1 << 14
    """Bytes for what is known only later, longer than any record of a run."""

    def __init__(self, path: Path | None):
        self.path = path
        self._hidden: Path | None = None

    def __enter__(self) -> Note:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)

    def draft(self, value: Mapping[str, Any]) -> None:
        """Writes `value`, and room for more."""
        if self.path is None:
            return
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder; name a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._hidden = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with naming(self.path), self._hidden.open("w", encoding="utf-8") as file:
            file.write(_json(value) + " " * self._ROOM)
            file.flush()
            os.fsync(file.fileno())

    def show(self, value: Mapping[str, Any]) -> None:
        """Puts `value` in the place of the draft and gives it its name."""
        if self.path is None or self._hidden is None:
            return
        with naming(self.path), self._hidden.open("r+", encoding="utf-8") as file:
            file.write(_json(value))
            file.truncate()
        self._hidden.replace(self.path)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _folders(inputs: Frozen) -> dict[str, Path]:
    """Role -> folder; where a role takes several folders, each has its own name as its role."""
    found: dict[str, Path] = {}
    for role, value in inputs:
        several = isinstance(value, tuple)
        for folder in value if several else (value,):
            name = folder.name if several else role
            if name in found:
                raise UserError(f"two inputs are called {name!r}; give folders of different names")
            found[name] = folder
    return found


def _named(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Last part of the key that names a folder -> the folder, which has to be there."""
    for key, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{key}: {folder} does not exist; name a folder")
    return {key.rsplit(".", 1)[-1]: folder for key, folder in folders.items()}


def _places(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Where inputs lie, so that `drawplate lineage` finds them."""
    from drawplate.lineage import Places

    inputs = {role: folder.resolve() for role, folder in folders.items()}
    return Places(root=Path.cwd(), inputs=inputs).model_dump(mode="json")


def _paths(params: Frozen) -> list[Path]:
    """Files and folders that parameters name."""
    return [value for value in flat(params.model_dump()).values() if isinstance(value, Path)]


def _refuse_overlap(out: Path, notes: Sequence[Path | None], inputs: Sequence[Path]) -> None:
    """What a stage reads is not what it writes, and what it writes has a place of its own."""
    made = out.resolve()
    for path in inputs:
        read = path.resolve()
        if made.is_relative_to(read) or read.is_relative_to(made):
            raise UserError(
                f"{out} would replace or change {path}, which this stage reads; "
                "name another folder to make"
            )
    for note in filter(None, notes):
        for path in (out, *inputs):
            if note.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{note} would change {path}; name a file elsewhere")


def _refuse_changed(
    stage: Stage[Any, Any, Any], params: Any, given: Given, imported: Mapping[str, str]
) -> None:
    """DVC reads parameters and code when a stage has ended, and files its output under them."""
    again = "nothing is kept; run again, or put it back and run again to go on"
    if settings_for(stage, *given)[0].model_dump(mode="json") != params:
        raise UserError(f"{stage.name} in {given.file} changed while it ran: {again}")
    now = _imported()
    for name, digest in imported.items():
        if now.get(name) != digest:
            raise UserError(f"the code of {name} changed while {stage.name} ran: {again}")


def _was_stopped(error: BaseException) -> bool:
    signals = isinstance(error, DrawplateError) and error.code > 128
    return signals or isinstance(error, KeyboardInterrupt | SystemExit)


def _record(
    stage: str, out: Path, digest: str, run_id: str | None, started: float, seconds: float
) -> dict[str, Any]:
    from drawplate.core.memory import peak_memory

    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "stage": stage,
        "output": out.as_posix(),
        "hash": digest,
        "mlflow_run": run_id,
        "prefect_run": os.environ.get("PREFECT__FLOW_RUN_ID"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
        "started": started,
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _git(*arguments: str) -> str | None:
    """What git says of the code that runs; None where there is no git, or none that answers."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


ROOTS = (Path(drawplate.__file__).parent, Path(__file__).parent)
"""Where the code of stages lies."""


def code(roots: Sequence[Path]) -> str:
    """Digest of the Python files below `roots`.

    Part of the name of a stage's work folder: what other code began is not gone on with.
    """
    found = hashlib.sha256()
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes()
            found.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _imported() -> dict[str, str]:
    """Module of `ROOTS` that this process has imported -> digest of its file."""
    files = {
        name: Path(getattr(module, "__file__", None) or "")
        for name, module in [*sys.modules.items()]
    }
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if file.is_file() and any(file.is_relative_to(root) for root in ROOTS)
    }


def _threads(execution: Execution, world: World) -> int:
    import torch

    if execution.threads is not None:
        torch.set_num_threads(execution.threads)
    elif not world.alone:
        torch.set_num_threads(max(1, torch.get_num_threads() // execution.nproc))
    return torch.get_num_threads()


def _tracker(stage: str, trail: Any, out: Path, work: Path) -> Tracker:
    facts = Facts(
        stage=stage,
        params=trail.node.params,
        inputs=trail.node.parents,
        output=out.as_posix(),
        tags={
            "mlflow.source.name": f"stages.{stage}",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": _git("rev-parse", "HEAD") or "",
            "drawplate.folder": str(out.resolve()),
            "drawplate.environment": ", ".join(
                f"{key} {value}" for key, value in trail.node.environment.items()
            ),
        },
        execution=execution_id(),
    )
    tracker = Tracker(facts, work)
    tracker.start()
    return tracker


def execution_id() -> str:
    """What stages of one pipeline execution have in common.

    `DRAWPLATE_EXECUTION` where the caller sets it, else the process group: one `dvc repro` has one.
    """
    given = os.environ.get("DRAWPLATE_EXECUTION")
    if given:
        return given
    group = os.getpgrp()
    try:
        born = Path(f"/proc/{group}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        born = "0"
    return f"group-{group}-{born}"


@contextmanager
def only_one(lock: Path, out: Path) -> Iterator[None]:
    """Holds `lock`; `Exhausted` says who holds it where somebody does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Exhausted(
                f"{out} is being made by process {_holder(lock)}; wait for it or stop it"
            ) from None
        with naming(lock):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)


def _holder(lock: Path) -> str:
    """The process that a lock names; who has only just taken it writes that a moment later."""
    for _ in range(20):
        if number := lock.read_text().strip():
            return number
        time.sleep(0.05)
    return "(unknown)"


def _clear(work: Path) -> None:
    """What a finished stage leaves in its work folder is not needed any more."""
    import shutil

    shutil.rmtree(work, ignore_errors=True)


def prepare_process() -> None:
    """What `begin` settles, and transformers as quiet as the rest."""
    begin()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def settings_for(
    stage: Stage[Any, Any, Any], file: Path | None, presets: Sequence[str], changes: Sequence[str]
) -> tuple[Any, Execution]:
    """A stage's parameters and execution settings: params.yaml, then presets, then `-S`.

    Raises:
        UserError: a section is unknown, what it holds is wrong, or a preset or change has no effect
            because it belongs to another stage; the file may hold the sections of all stages.
    """
    from drawplate import settings

    tree = settings.read(file) if file is not None else {}
    given = [(f"--preset {name}", settings.preset(name)) for name in presets]
    for _, differences in given:
        tree = settings.merge(tree, differences)
    tree = settings.override(tree, changes)
    given += [
        (f"-S {change}", {change.partition("=")[0].partition(".")[0]: 0}) for change in changes
    ]
    known = {*STAGES, "execution"}
    for section in tree:
        if section not in known:
            near = settings.nearest(section, known)
            raise UserError(
                f"{section!r} is no section{near}; there are: {', '.join(sorted(known))}"
            )
    for option, sections in given:
        for section in sections:
            if section not in (stage.name, "execution"):
                raise UserError(
                    f"{option} is for {section} and has no effect on {stage.name}; leave it out"
                )
    params = settings.validate(stage.params, tree.get(stage.name), stage.name)
    return params, settings.validate(Execution, tree.get("execution"), "execution")


def device_of(run: Run) -> Any:
    """The device that `execution.device` names; raises as `device_called`."""
    return device_called(run.execution.device)


def device_called(name: str) -> Any:
    """The device of this name.

    Raises:
        UserError: torch knows no such device, this machine lacks it, or it has no 64-bit numbers.
    """
    import torch

    if name.startswith("mps"):
        raise UserError(
            f"execution.device {name!r} has no 64-bit numbers, which sums need; use cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"execution.device {name!r}: {_first_line(error)}") from None
    return device


def write_history(run: Run, part: str, series: Path) -> None:
    """Keeps a training series, without what clocks wrote, as `history-<part>.jsonl`."""
    from drawplate.train.series import read

    name = f"history-{part}.jsonl"
    lines = [json.dumps(row, sort_keys=True) for row in read(series)]
    (run.folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    run.artifacts.append(name)


def write_ledger(run: Run, ledger: Frozen) -> None:
    """Keeps what was done to each layer as `ledger.json` in the output."""
    text = json.dumps(ledger.model_dump(mode="json"), indent=1, sort_keys=True)
    (run.folder / "ledger.json").write_text(text + "\n", encoding="utf-8")
    run.artifacts.append("ledger.json")


def command(stage: Stage[Any, Any, Any], doc: str) -> click.Command:
    """The command line of one stage: its inputs as options, `--out`, `-S`, `--preset`."""
    roles = [
        click.Option(
            [f"--{role.replace('_', '-')}"],
            required=information.is_required(),
            multiple="tuple" in str(information.annotation),
            type=click.Path(path_type=Path),
            help=information.description,
        )
        for role, information in stage.inputs.model_fields.items()
    ]
    common = [
        click.Option(
            ["--out"], required=True, type=click.Path(path_type=Path), help="Folder to make."
        ),
        click.Option(
            ["--params", "file"],
            type=click.Path(path_type=Path),
            help="File of parameters; without it every parameter has its default.",
        ),
        click.Option(
            ["--preset", "presets"], multiple=True, help="Settings of a paper, such as rl/dler."
        ),
        click.Option(
            ["-S", "changes"],
            multiple=True,
            metavar="KEY=VALUE",
            help="One parameter, by dotted key.",
        ),
        click.Option(
            ["--metrics"], type=click.Path(path_type=Path), help="Where figures go, as JSON."
        ),
        click.Option(["--record"], type=click.Path(path_type=Path), help="Where ids and times go."),
    ]

    def call(
        out: Path,
        file: Path | None,
        presets: tuple[str, ...],
        changes: tuple[str, ...],
        metrics: Path | None,
        record: Path | None,
        **roles: Any,
    ) -> None:
        params, execution = settings_for(stage, file, presets, changes)
        inputs = stage.inputs(**roles)
        prepare_process()
        # Without DVC, what ran is what the lineage says, whatever the file says now.
        given = Given(file, presets, changes) if "DVC_STAGE" in os.environ else None
        stage(params, inputs, out, metrics=metrics, record=record, execution=execution, given=given)

    needed = [option for option in (*roles, *common) if option.required]
    words = " ".join(f"{option.opts[0]} {option.opts[0].strip('-').upper()}" for option in needed)
    doc += f"\n\n\b\nExample:\n  drawplate {stage.name} {words} {stage.example}"
    return click.Command(stage.name, params=[*roles, *common], callback=call, help=doc)


def command_of(name: str) -> click.Command:
    """The command line of one of `STAGES`, whose module is imported."""
    return command(getattr(import_module(f"stages.{name}"), name), STAGES[name])
