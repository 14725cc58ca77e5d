"""`drawplate bench`: each contender from the same parent, on the same data, over several seeds."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from drawplate.core.errors import UserError
from drawplate.lineage import content_hash, environment
from drawplate.settings import Tree, override, read, validate
from flows.bench import show
from flows.bench.machine import machine
from flows.bench.plan import Plan, plan, seeded
from stages.check import check_sections
from stages.run import ROOTS, Execution, code, prepare_process

PARENTS = {"compress": "base", "quantize": "compressed", "finetune": "quantized"}
PARENT = "parent"
"""Row of the model that all contenders start from."""
FILES = ("bench.json", "table.md", "frontier.svg")


@dataclass(frozen=True)
class Ground:
    """What all contenders have in common."""

    stage: str
    model: Path | None
    """What they start from; None where nothing comes before them."""
    corpus: Path
    home: Path
    execution: Execution


def bench(
    root: Path,
    what: str,
    only: Sequence[str] = (),
    *,
    changes: Sequence[str] = (),
    file: Path | None = None,
    model: Path | None = None,
    corpus: Path | None = None,
    out: Path | None = None,
    seeds: int = 3,
    quick: bool = False,
) -> str:
    """Compare, write `FILES` into `out`, log them to MLflow, and return the table.

    What an interrupted call has finished, a seed at a time, is not computed again by the same call.

    Raises:
        UserError: nothing to compare, or a folder that is missing, or an option without effect, or
            `out` holds something else or what other code measured.
    """
    tree = read(file or root / "params.yaml")
    check_sections(tree)
    made = plan(what, only, tree, quick, changes)
    execution = validate(Execution, override(tree, changes).get("execution"), "execution")
    if made.stage == "pretrain" and model is not None:
        raise UserError(f"--model has no effect on bench {what}, which begins without one")
    model = None if made.stage == "pretrain" else model or root / "models" / _parent(made.stage)
    corpus = corpus or root / "data" / "corpus"
    for role, folder in (("model", model), ("corpus", corpus)):
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"bench {what}: {folder} does not exist; run the pipeline first, or give --{role}"
            )
    out = out or root / "bench" / what
    request: Tree = {
        "what": what,
        "seeds": 1 if quick else seeds,
        "contenders": {name: made.used(tree) for name, tree in made.contenders.items()},
        "model": content_hash(model) if model else None,
        "corpus": content_hash(corpus),
        "code": code(ROOTS),
    }
    record = _opened(out, json.loads(json.dumps(request)))
    # A process of its own sends what a stage logs: as long as a quick contender takes.
    theirs = execution.model_copy(update={"tracking": execution.tracking and not quick})
    ground = Ground(made.stage, model, corpus, out / "work", theirs)
    prepare_process()
    ours = machine()["machine"]
    with _logged(what, execution) as log:
        for seed in range(request["seeds"]):
            if str(seed) not in record["runs"]:
                figures, refused = _one_seed(ground, made, seed, record["refused"])
                record["runs"][str(seed)] = figures
                record["refused"] |= refused
                record["environment"] = environment(torch.get_num_threads())
                record["machine"] = ours
                _write(out / "bench.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
        text = _told(out, made, record)
        shutil.rmtree(ground.home, ignore_errors=True)
        log(out, made, record)
    return f"{text}\n{out}: {', '.join(FILES)}"


def _parent(stage: str) -> str:
    return PARENTS.get(stage, "tuned")


def _opened(out: Path, request: Tree) -> Tree:
    """The record of an earlier call for the same thing, or a new one."""
    file = out / "bench.json"
    if not file.exists():
        if out.exists() and any(path.name != "work" for path in out.iterdir()):
            raise UserError(f"{out} holds something else; give another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        return {"request": request, "runs": {}, "refused": {}}
    record: Tree = json.loads(file.read_bytes())
    if record["request"] | {"code": request["code"]} == request != record["request"]:
        raise UserError(
            f"{out} holds what other code measured; give another folder with --out, or remove it"
        )
    if record["request"] != request:
        raise UserError(
            f"{out} holds a comparison of other models, data or settings; give another folder "
            "with --out, or remove it"
        )
    return record


def _one_seed(
    ground: Ground, made: Plan, seed: int, refused: Mapping[str, str]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Figures of each contender, and why those that cannot take part are left out."""
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    if ground.model is not None and ground.stage != "evaluate":
        _say(f"seed {seed}: {PARENT}")
        usual = next(iter(made.contenders.values()))
        found[PARENT] = _scored(ground, PARENT, ground.model, usual, seed)
    for place, (name, tree) in enumerate(made.contenders.items(), 1):
        if name in refused:
            continue
        _say(f"seed {seed}: {ground.stage} {name} ({place}/{len(made.contenders)})")
        try:
            found[name] = _one(ground, name, seeded(ground.stage, tree, seed), seed)
        except UserError as error:
            if seed > 0:
                raise
            failed[name] = str(error)
            _say(f"{name} cannot take part: {error}")
    if len(found.keys() - {PARENT}) < 2:
        raise UserError(f"bench: nothing to compare; {'; '.join(failed.values())}")
    return found, failed


def _one(ground: Ground, name: str, tree: Tree, seed: int) -> dict[str, float]:
    """One contender: its stage, then the evaluation of what came out.

    Figures of the stage's own report are called `stage.figure`.
    """
    if ground.stage == "evaluate":
        assert ground.model is not None
        return _scored(ground, name, ground.model, tree, seed)
    folder = ground.home / f"seed-{seed}" / name
    inputs: dict[str, Any] = {"corpus": ground.corpus}
    if ground.model is not None:
        inputs["model"] = ground.model
    started = time.monotonic()
    told = _stage(ground.stage, tree, inputs, folder, ground.execution)
    figures = {f"{ground.stage}.{key}": value for key, value in told.items()}
    figures["seconds"] = time.monotonic() - started
    return figures | _scored(ground, name, folder, tree, seed)


def _scored(ground: Ground, name: str, folder: Path, tree: Tree, seed: int) -> dict[str, float]:
    """What the evaluation of the model in `folder` says of it.

    Raises:
        UserError: the runtime that is asked for does not fit the model, which ran plain.
    """
    report = ground.home / f"seed-{seed}" / f"{name}.report"
    inputs = {"model": (folder,), "corpus": ground.corpus}
    figures = _stage("evaluate", seeded("evaluate", tree, seed), inputs, report, ground.execution)
    for reason in json.loads((report / "report.json").read_bytes()).get("unfit", {}).values():
        raise UserError(reason)
    own = f"{folder.name}."
    return {key.removeprefix(own): v for key, v in figures.items() if key.startswith(own)}


def _stage(
    name: str, tree: Tree, inputs: Mapping[str, Any], out: Path, execution: Execution
) -> dict[str, float]:
    module = import_module(f"stages.{name}")
    stage = getattr(module, name)
    params = validate(stage.params, tree.get(name), name)
    report = stage(params, module.Inputs(**inputs), out, execution=execution)
    return {key: float(value) for key, value in report if isinstance(value, int | float)}


def _told(out: Path, made: Plan, record: Tree) -> str:
    seeds = {int(seed): figures for seed, figures in record["runs"].items()}
    text = show.table(made.key, list(made.contenders), seeds, record["refused"])
    _write(out / "table.md", text + "\n")
    alive = [name for name in made.contenders if name not in record["refused"]]
    show.plot(made.key, alive, seeds, out / "frontier.svg")
    return text


@contextmanager
def _logged(what: str, execution: Execution) -> Iterator[Any]:
    """One run, which gets what the comparison found; stages that are tracked log below it."""
    if not execution.tracking:
        yield lambda out, made, record: None
        return
    from stages.tracking import answering, client, execution_run, experiment, legal, told

    name = f"bench-{what}-{time.time_ns()}"
    before = os.environ.get("DRAWPLATE_EXECUTION")
    os.environ["DRAWPLATE_EXECUTION"] = name

    def log(out: Path, made: Plan, record: Tree) -> None:
        seeds = {int(seed): figures for seed, figures in record["runs"].items()}
        try:
            for contender, figures in show.means(list(seeds[0]), seeds).items():
                for key in show.shown(made.key):
                    if key in figures:
                        store.log_metric(run, legal(f"{contender}.{key}"), figures[key])
            for file in FILES:
                store.log_artifact(run, str(out / file))
            store.set_terminated(run, "FINISHED")
        except Exception as error:  # of any kind: the table is made, and the user waits for it
            _say(f"MLflow did not take what {out} holds: {told(error)}")

    try:
        with answering("give -S execution.tracking=false"):
            store = client()
            run = execution_run(store, experiment(store), name)
            store.update_run(run, status="RUNNING", name=f"bench {what}")
        try:
            yield log
        except BaseException:
            with suppress(Exception):  # the user is told why the comparison ended
                store.set_terminated(run, "FAILED")
            raise
    finally:
        if before is None:
            del os.environ["DRAWPLATE_EXECUTION"]
        else:
            os.environ["DRAWPLATE_EXECUTION"] = before


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)
