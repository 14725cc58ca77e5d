"""What stages hand on between machines: a DVC experiment that grows with each stage.

The experiment is one git ref of the source repository, `refs/exps/<base>/<name>`: a commit on the
revision that was asked for, with the changed params.yaml and, as stages finish, their entries of
dvc.lock and their metrics. It is replaced atomically, so a run that is started again finds what is
done, and `dvc exp show`, `dvc exp apply` and `dvc pull STAGES` give a user everything.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawplate.core.errors import UserError
from flows.workspace import Workspace, git

AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "drawplate"), ("EMAIL", "drawplate@localhost"))
}
"""Whose commits those of a workspace are: a clone does not know the user of its source."""

REF = r"^refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/[^/]+$"
"""How the full name of an experiment's ref looks."""


def ref_of(base: str, name: str) -> str:
    """Where DVC keeps the experiment `name` on the commit `base`."""
    return f"refs/exps/{base[:2]}/{base[2:]}/{name}"


def begin(place: Workspace, name: str) -> str:
    """Makes the experiment from the workspace's params.yaml, or finds it; returns its ref.

    Raises:
        UserError: an experiment of this name has other settings; a run that starts again has the
            same.
    """
    base = place.git("rev-parse", "HEAD")
    ref = ref_of(base, name)
    params = place.root / "params.yaml"
    files = {"params.yaml": params.read_bytes()} if params.exists() else {}
    commit = _commit(place, base, base, files, name)
    known = tip(place, ref)
    if known is None:
        try:
            _replace(place, ref, None, commit)
        except subprocess.CalledProcessError:
            known = tip(place, ref)
            if known is None:
                raise
    if known is not None and _settings(place, known) != _settings(place, commit):
        raise UserError(f"{name} holds other settings on commit {base[:8]}; choose another name")
    return ref


def _settings(place: Workspace, commit: str) -> dict[str, Any]:
    """What params.yaml of a commit says, however it is written."""
    if not place.git("ls-tree", "--name-only", commit, "params.yaml"):
        return {}
    return _read(place.git("show", f"{commit}:params.yaml"))


def tip(place: Workspace, ref: str) -> str | None:
    """The commit that `ref` names in the source now, fetched; None where it does not exist."""
    found = place.git("ls-remote", "origin", ref)
    if not found:
        return None
    place.git("fetch", "--quiet", "origin", ref)
    return found.split()[0]


def experiments(place: Workspace) -> list[str]:
    """Commits of all experiments of the source now, fetched."""
    place.git("fetch", "--quiet", "--no-tags", "origin", "+refs/exps/*:refs/exps/*")
    found = place.git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    rows = [row.split(" ", 1) for row in found.splitlines()]
    return [commit for commit, ref in rows if re.match(REF, ref)]


def hand_on(place: Workspace, ref: str, stage: str, entry: Mapping[str, Any]) -> None:
    """Adds what `stage` made to the experiment: its entry of dvc.lock, and files git keeps.

    Stages that finish at the same moment each add their own; none takes another's away.
    """
    kept = [out["path"] for out in entry.get("outs", []) if _kept_by_git(place, out["path"])]
    files = {path: (place.root / path).read_bytes() for path in kept}
    for attempt in range(50):
        last = tip(place, ref)
        if last is None:
            raise RuntimeError(f"{ref} is gone from {place.source}")
        lock = _with_entry(place, last, stage, entry)
        base = place.git("rev-parse", f"{last}^")
        commit = _commit(place, base, last, {**files, "dvc.lock": lock}, ref.rsplit("/", 1)[1])
        if place.git("rev-parse", f"{commit}^{{tree}}") == place.git(
            "rev-parse", f"{last}^{{tree}}"
        ):
            return
        try:
            _replace(place, ref, last, commit)
        except subprocess.CalledProcessError:
            time.sleep(0.1 * (attempt + 1))
            continue
        return
    raise RuntimeError(f"{ref} changes faster than stage {stage} can add to it")


def retitle(root: Path, ref: str, title: str) -> None:
    """Gives the experiment's commit another message; what it holds stays."""
    known, base = git(root, "rev-parse", ref, f"{ref}^").split()
    made = git(root, "commit-tree", f"{ref}^{{tree}}", "-p", base, "-m", title, environment=AUTHOR)
    git(root, "update-ref", ref, made, known)


def _kept_by_git(place: Workspace, path: str) -> bool:
    ignored = subprocess.run(
        ["git", "check-ignore", "--quiet", path], cwd=place.root, check=False
    ).returncode
    return ignored == 1 and (place.root / path).is_file()


def entries(place: Workspace) -> dict[str, Any]:
    """The stages of the workspace's dvc.lock."""
    file = place.root / "dvc.lock"
    return _read(file.read_text(encoding="utf-8"))["stages"] if file.exists() else {}


def _read(text: str) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load(text))


def _with_entry(place: Workspace, commit: str, stage: str, entry: Mapping[str, Any]) -> bytes:
    """dvc.lock of `commit` with one entry replaced, in the order in which DVC writes keys."""
    from dvc.utils.serialize import dumps_yaml

    lock: dict[str, Any] = {"schema": "2.0", "stages": {}}
    if place.git("ls-tree", "--name-only", commit, "dvc.lock"):
        lock = _read(place.git("show", f"{commit}:dvc.lock"))
    lock.setdefault("stages", {})[stage] = entry
    text: str = dumps_yaml(lock)
    return text.encode()


def _commit(place: Workspace, parent: str, tree: str, files: Mapping[str, bytes], name: str) -> str:
    """A commit on `parent` with the tree of `tree` and `files` in it; the workspace stays as is."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": os.path.join(folder, "index")}
        place.git("read-tree", tree, environment=index)
        for path, content in files.items():
            blob = place.git("hash-object", "-w", "--stdin", given=content)
            entry = f"100644,{blob},{Path(path).as_posix()}"
            place.git("update-index", "--add", "--cacheinfo", entry, environment=index)
        made = place.git("write-tree", environment=index)
    return place.git(
        "commit-tree", made, "-p", parent, "-m", f"drawplate: {name}", environment=AUTHOR
    )


def _replace(place: Workspace, ref: str, old: str | None, new: str) -> None:
    """Sets `ref` of the source to `new` if it still is `old`."""
    lease = f"--force-with-lease={ref}:{old or ''}"
    place.git("push", "--quiet", "--no-verify", lease, "origin", f"{new}:{ref}")
