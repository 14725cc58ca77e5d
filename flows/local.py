"""`drawplate run` and `make run`: the pipeline on this machine, and what came of it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drawplate import settings
from drawplate.core.errors import Damaged, Exhausted, UserError
from flows.graph import STOPPED, new_execution, refuse_unknown, repro, stopped
from stages.quiet import guarded, interruptible

_COLUMNS = (
    ("pass@1", "pass_at_1", "{:.1%}"),
    ("greedy", "greedy", "{:.1%}"),
    ("bits/byte", "bits_per_byte", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("truncated", "truncated", "{:.1%}"),
    ("bytes", "stored_bytes", "{:,.0f}"),
    ("MACs/token", "macs", "{:,.0f}"),
    ("tokens/s", "decode_tokens_per_second", "{:,.0f}"),
    ("healthy", "healthy", "{:.0f}"),
)


def run_pipeline(
    root: Path, stages: Sequence[str] = (), changes: Sequence[str] = (), presets: Sequence[str] = ()
) -> int:
    """Brings the stages up to date, tells MLflow, prints the summary; returns the exit code.

    Raises:
        UserError: there is no such stage, or something in params.yaml is wrong, of whatever stage;
            nothing has run then.
        Exhausted: another run is at work here, or a stage was killed.
    """
    interruptible()
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root} holds no pipeline (no dvc.yaml); go to a clone of drawplate")
    refuse_unknown(stages, settings.read(root / "dvc.yaml").get("stages", {}))
    with _alone(root):
        if changes or presets:
            change_params(root / "params.yaml", changes, presets)
            _checked(root).write_text(_seen(root))
        else:
            _check_once(root)
        execution = new_execution()
        started = time.monotonic()
        done = repro(root, stages, environment={"DRAWPLATE_EXECUTION": execution}, line=_line)
    if done.code != 0:
        return _failed(root, done.tail)
    if all(status == "unchanged" for status in done.statuses.values()):
        from flows.sync import ship

        print("Nothing to do: every stage is up to date.")
        ship(root)
    else:
        from flows.sync import sync

        sync(root, execution, done.statuses)
        print(f"Done in {time.monotonic() - started:.0f} s.")
    if not stages or "evaluate" in stages:
        print(summary(root))
    from flows.preflight import compared

    ran = [stage for stage, status in done.statuses.items() if status == "ran"]
    forecast = compared(root, ran)
    if forecast is not None:
        print(f"\nThe forecast, and what it took:\n{forecast}")
    return 0


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """No other run changes params.yaml before this one has ended.

    Raises:
        Exhausted: there is another run.
    """
    place = root / ".drawplate" / "run.lock"
    place.parent.mkdir(exist_ok=True)
    with place.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(root, place.read_text()) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _busy(root: Path, holders: str) -> Exhausted:
    return Exhausted(f"{root} is busy: process {holders} runs its stages; wait for it or stop it")


def _check_once(root: Path) -> None:
    """Checks params.yaml, unless it was right before under the same code.

    That imports all stages, which takes seconds; a run with nothing to do takes less than one.
    """
    checked, seen = _checked(root), _seen(root)
    if checked.exists() and checked.read_text() == seen:
        return
    from stages.check import check

    check(settings.read(root / "params.yaml"))
    checked.write_text(seen)


def _checked(root: Path) -> Path:
    """Holds what `_seen` gave when params.yaml was last found right."""
    file = root / ".drawplate" / "checked"
    file.parent.mkdir(exist_ok=True)
    return file


def _seen(root: Path) -> str:
    """Hash of params.yaml and of the code that judges it."""
    import drawplate

    code = [Path(drawplate.__file__).parent, Path(__file__).parents[1] / "stages"]
    files = [root / "params.yaml", *(file for folder in code for file in folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


_BUSY = re.compile(r"^ERROR: .* is busy, it is being (blocked|used) by:$")
_HOLDER = re.compile(r"^  \(PID (\d+)\): ")
_ADVICE = re.compile(r"^If there are no processes with such PIDs, you can manually remove ")


def _line(text: str) -> None:
    """Prints a line of `dvc repro`, but not how it words what `_failed` says."""
    if not any(pattern.match(text) for pattern in (STOPPED, _BUSY, _HOLDER, _ADVICE)):
        print(text, flush=True)


def _failed(root: Path, tail: str) -> int:
    """The exit code of a run that failed: that of the stage, if one did.

    Raises:
        Exhausted: another run is at work, or the stage was killed.
    """
    lines = tail.splitlines()
    if any(map(_BUSY.match, lines)):
        holders = ", ".join(dict.fromkeys(hit[1] for hit in map(_HOLDER.match, lines) if hit))
        raise _busy(root, holders)
    ended = stopped(tail)
    if ended is None:
        return 1  # DVC itself has said why
    if ended.signal:
        why = "; most likely for its memory" if ended.signal == signal.SIGKILL else ""
        raise Exhausted(f"stage {ended.stage} was ended by signal {ended.signal}{why}")
    if not any(line.startswith("drawplate: ") for line in lines):
        print(f"drawplate: stage {ended.stage} failed; what it said stands above", file=sys.stderr)
    return ended.code


def change_params(file: Path, changes: Sequence[str], presets: Sequence[str]) -> None:
    """Writes presets and assignments into params.yaml, where DVC looks; other lines stay.

    Nothing is written unless the result is valid.
    """
    from stages.check import check

    before = settings.read(file)
    tree = before
    for name in presets:
        tree = settings.merge(tree, settings.preset(name))
    tree = settings.override(tree, changes)
    check(tree)
    from ruamel.yaml import YAML

    yaml = YAML()
    # As params.yaml is written, so that no line changes for its looks.
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.representer.add_representer(
        type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    document = yaml.load(file.read_text(encoding="utf-8"))
    _lay(document, tree)
    place = file.resolve()  # a link stays one
    temporary = place.with_suffix(".yaml.new")
    with temporary.open("w", encoding="utf-8") as out:
        yaml.dump(document, out)
    temporary.replace(place)


def _lay(document: Any, tree: Any) -> None:
    """Makes the commented `document` equal to `tree`, touching only what differs."""
    for key in [key for key in document if key not in tree]:
        del document[key]
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _lay(document[key], value)
        elif key not in document or document[key] != value:
            document[key] = value


def summary(root: Path) -> str:
    """The table of all models, and where everything is.

    Raises:
        UserError: nothing was evaluated yet.
    """
    table = figures_text(root)
    if not table:
        file = root / "metrics" / "evaluate.json"
        raise UserError(f"{file} does not exist yet: run the pipeline first")
    return "\n".join(
        [
            "",
            table,
            "",
            f"report    {root / 'reports' / 'index.html'}",
            f"model     {root / 'models' / 'tuned'}   (drawplate chat)",
            "runs      make ui, then http://127.0.0.1:5000",
        ]
    )


def figures_text(root: Path) -> str:
    """The table of all models; empty before there was an evaluation."""
    rows = figures_table(root)
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def figures_table(root: Path) -> list[list[str]]:
    """Titles, then a row a model; nothing before there was an evaluation.

    Raises:
        Damaged: the file of its figures was cut or altered.
    """
    file = root / "metrics" / "evaluate.json"
    if not file.exists():
        return []
    try:
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"{file} holds no figures: {error}; run the pipeline again") from None
    size = ".stored_bytes"
    models = [key.removesuffix(size) for key in figures if key.endswith(size)]
    rows = [["", *(title for title, _, _ in _COLUMNS)]]
    for model in models:
        cells = ((form, figures.get(f"{model}.{key}")) for _, key, form in _COLUMNS)
        rows.append(
            [model, *("-" if value is None else form.format(value) for form, value in cells)]
        )
    return rows


if __name__ == "__main__":
    sys.exit(guarded(lambda: sys.exit(run_pipeline(Path.cwd(), sys.argv[1:]))))
