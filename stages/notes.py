"""What MLflow shows a person at the top of a run's page: where it stands, and ways to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def link(text: str, where: str, run: str, page: str = "") -> str:
    """A run's page, or one of its tabs, as Markdown."""
    return f"[{text}](#/experiments/{where}/runs/{run}{page})"


def stage_note(store: Any, where: str, run: str) -> str:
    """The description of a stage's run: its execution, what it read, what it made."""
    tags = store.get_run(run).data.tags
    lines = [f"Stage of {link('this execution', where, tags['mlflow.parentRunId'])}."]
    producer = tags.get("drawplate.cached_from")
    if producer:
        by = link(f"the run that computed it, {producer[:8]}", where, producer)
        lines = [f"**Not computed again**: the result is that of {by}.", *lines]
    parents = [
        link(key.removeprefix("drawplate.parent."), where, value)
        for key, value in sorted(tags.items())
        if key.startswith("drawplate.parent.")
    ]
    if parents:
        lines.append(f"Read what these runs made: {', '.join(parents)}.")
    if "drawplate.model_id" in tags:
        model = f"[logged model](#/experiments/{where}/models/{tags['drawplate.model_id']})"
        lines.append(f"Made a {model}; what its evaluation found stands there too.")
    if tags.get("drawplate.kind") == "report":
        report = link("the report", where, producer or run, "/artifacts/index.html")
        lines.append(f"Wrote {report}.")
    if "drawplate.champion" in tags:
        lines.append(f"Champion: {tags['drawplate.champion']}")
    if "drawplate.error" in tags:
        lines.append(f"Ended with: {tags['drawplate.error']}")
    return "\n\n".join(lines)


def execution_note(
    where: str, stages: Mapping[str, tuple[str, str]], table: list[list[str]]
) -> str:
    """The description of an execution's run.

    Args:
        where: id of the experiment.
        stages: stage -> (what became of it, id of the run that computed it).
        table: rows of cells, the first one titles; the models and their figures.
    """
    lines = ["| stage | | computed by |", "|---|---|---|"]
    lines += [
        f"| {stage} | {status} | {link(run[:8], where, run) if run else 'no run of this store'} |"
        for stage, (status, run) in stages.items()
    ]
    if len(table) > 1:
        titles, *rest = table
        lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rest]
    return "\n".join(lines)
