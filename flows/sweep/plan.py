"""Trials and what they have in common: which stages several of them compute alike."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.settings import override
from flows.workspace import git
from stages.quiet import quiet_environment


class Step(NamedTuple):
    """A stage that a sweep runs, and the keys of params.yaml that decide its result."""

    name: str
    keys: frozenset[str]
    """Those that it or a stage before it reads; "" stands for the whole file."""
    metrics: tuple[str, ...]
    """Files that it writes figures to."""
    deps: tuple[str, ...]
    """Files and folders that it reads."""
    outs: tuple[str, ...]
    """Those that it writes."""


class Turn(Frozen):
    """Stages that trials with the same `lock` compute alike, so that one does it for all."""

    stages: tuple[str, ...]
    lock: str


class Spec(Frozen):
    """All that one trial needs to know, in whatever process and on whatever machine it runs."""

    root: Path
    """The project; a machine that runs trials sees it at this path."""
    revision: str
    name: str
    changes: dict[str, str]
    params: str
    """Its params.yaml."""
    targets: tuple[str, ...]
    turns: tuple[Turn, ...]
    metrics: tuple[str, ...]
    session: str
    """Which call of the sweep this belongs to."""
    parent: str | None
    """MLflow run of the sweep; None where nothing is logged."""
    environment: dict[str, str]
    """For the stages."""

    @property
    def folder(self) -> Path:
        """Where trials of one call leave their outcomes and process ids."""
        return self.root / ".dvc" / "tmp" / "sweep" / self.session


class Outcome(Frozen):
    """What became of a trial."""

    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """File stem -> key -> value."""
    statuses: dict[str, str] = Field(default_factory=dict)
    """Stage -> ran, cached or unchanged."""
    seconds: float = 0.0
    run: str | None = None
    """Its MLflow run."""
    error: str | None = None
    """Why it failed; None where it did not."""
    earlier: bool = False
    """Whether an earlier sweep computed it."""


def steps(root: Path, targets: Sequence[str]) -> list[Step]:
    """The stages that lead to the targets (all where empty), each after what it needs.

    Raises:
        UserError: a target is no stage.
    """
    from flows.graph import nodes, refuse_unknown

    order = nodes(root)
    known = {node.name: node for node in order}
    refuse_unknown(targets, known)
    quiet_environment()
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        stages = {s.name: s for s in repo.index.stages if not s.is_data_source}
        direct = {name: frozenset(_keys(stage)) for name, stage in stages.items()}
        metrics = {
            name: tuple(out.def_path for out in stage.outs if out.metric)
            for name, stage in stages.items()
        }
        deps = {name: tuple(str(d.def_path) for d in s.deps) for name, s in stages.items()}
        outs = {name: tuple(str(o.def_path) for o in s.outs) for name, s in stages.items()}
    keys: dict[str, frozenset[str]] = {}
    behind: dict[str, set[str]] = {}
    for node in order:
        keys[node.name] = direct[node.name].union(*(keys[up] for up in node.upstream))
        behind[node.name] = {node.name}.union(*(behind[up] for up in node.upstream))
    wanted = set().union(*(behind[target] for target in targets or known))
    return [
        Step(name, keys[name], metrics[name], deps[name], outs[name])
        for name in known
        if name in wanted
    ]


def committed(root: Path, order: list[Step]) -> str:
    """The commit that trials are clones of.

    What stages write may differ from it; anything else must not, for a trial would not see it.

    Raises:
        UserError: the folder is no repository's root, has no commit, or differs from it.
    """
    try:
        top = git(root, "rev-parse", "--show-toplevel")
        revision = git(root, "rev-parse", "--verify", "HEAD")
        changed = git(root, "diff", "--name-only", "HEAD").splitlines()
        new = git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    except subprocess.CalledProcessError as error:
        raise UserError(f"{root}: {error.stderr.decode().strip().splitlines()[0]}") from None
    if Path(top) != root:
        raise UserError(f"{root} is not the root of its repository, which is {top}")

    def within(file: str, places: Iterable[str]) -> bool:
        return any(Path(file).is_relative_to(place) for place in places)

    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        for added in (out for s in repo.index.stages if s.is_data_source for out in s.outs):
            if "modified" in added.workspace_status().values():
                raise UserError(
                    f"{added} differs from what `dvc add` noted of it, which trials get: "
                    "add it again and commit that first"
                )
    read = [dep for step in order for dep in step.deps]
    made = ["dvc.lock", *(out for step in order for out in step.outs)]
    for file in [*changed, *(file for file in new if within(file, read))]:
        if not within(file, made):
            raise UserError(
                f"{file} differs from the last commit, of which trials are clones: commit it first"
            )
    return revision


def _keys(stage: Any) -> Iterable[str]:
    """Keys of params.yaml that a stage of DVC reads."""
    for dep in stage.deps:
        if Path(str(dep.def_path)).name == "params.yaml":
            yield from (getattr(dep, "params", None) or [""])


def decides(step: Step, key: str) -> bool:
    """Whether a stage's result can depend on a key: one of its keys holds it, or lies in it."""
    return any(
        not own or key == own or key.startswith(f"{own}.") or own.startswith(f"{key}.")
        for own in step.keys
    )


def turns(
    order: Sequence[Step], changes: Mapping[str, str], apart: frozenset[str], base: str
) -> tuple[Turn, ...]:
    """The stages of a trial that other trials of the sweep may compute alike, in groups.

    A stage is decided by the varied keys that it or a stage before it reads. Trials that agree on
    these agree on the stage. Keys only grow along the pipeline, so groups in order of their number
    of keys run each stage after what it needs.

    Args:
        order: stages of the sweep.
        changes: varied key -> value of this trial.
        apart: keys on which no two trials agree; what they decide is nobody else's.
        base: what all trials of the sweep, and of no other, have in common.
    """
    groups: dict[frozenset[str], list[str]] = {}
    for step in order:
        deciding = frozenset(key for key in changes if decides(step, key))
        if not deciding & apart and len(deciding) < len(changes):
            groups.setdefault(deciding, []).append(step.name)
    return tuple(
        Turn(
            stages=tuple(names),
            lock=_hash([base, names, {key: changes[key] for key in sorted(deciding)}]),
        )
        for deciding, names in sorted(groups.items(), key=lambda group: len(group[0]))
    )


def early_first(order: Sequence[Step], keys: Sequence[str]) -> list[str]:
    """Keys of early stages first.

    A grid whose first key changes fastest then begins with trials that differ as early as they
    can, which keep each other waiting least.
    """

    def first(key: str) -> int:
        reading = [i for i, step in enumerate(order) if decides(step, key)]
        return reading[0] if reading else len(order)

    return sorted(keys, key=first)


def settings_of(tree: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """params.yaml of a trial."""
    return override(tree, [f"{key}={value}" for key, value in changes.items()])


def name_of(tree: Mapping[str, Any], changes: Mapping[str, str], targets: Sequence[str]) -> str:
    """A trial's name as an experiment: what was changed, and a hash of all its settings."""
    words = "-".join(f"{_word(key)}-{text}" for key, text in changes.items())
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", words.replace(".", "_"))[:48].strip("-_")
    return f"{slug or 'trial'}-{_hash([tree, sorted(targets)])[:6]}"


def _word(key: str) -> str:
    parts = key.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
