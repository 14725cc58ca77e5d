"""Whether checkout, cache and remote hold what dvc.lock says; what is damaged can be repaired.

The deployed `verify` does so for the newest commit and the experiments of the source repository.

DVC trusts a file's name, size and time: a changed object of the cache is handed out as if it were
whole, and `dvc status` says nothing. Here every byte is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from drawplate.core.errors import Damaged, UserError
from stages.quiet import quiet_environment

quiet_environment()

import click  # noqa: E402
from prefect import flow, get_run_logger  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402

from flows.handover import experiments  # noqa: E402
from flows.workspace import source, workspace  # noqa: E402

Place = Literal["checkout", "cache", "remote"]
State = Literal["whole", "damaged", "missing"]


class Finding(NamedTuple):
    """One file of one output in one place."""

    path: str
    place: Place
    state: State
    digest: str
    """DVC's hash of what should be there."""


def check(root: Path, commits: Sequence[str] | None = None) -> list[Finding]:
    """Reads every file that dvc.lock names, in the checkout, the cache and the default remote.

    What is missing in one place is no fault by itself: a checkout or cache may hold only a part.

    Args:
        root: a checkout with DVC's configuration.
        commits: of this repository, whose dvc.lock is meant in place of that of the checkout;
            cache and remote are read then, each file once.

    Raises:
        UserError: `commits` is None and there is no dvc.lock in `root`.
    """
    from dvc.repo import Repo

    root = root.resolve()
    if commits is None and not (root / "dvc.lock").exists():
        raise UserError(f"{root} has no dvc.lock: nothing was computed here yet")
    findings: list[Finding] = []
    read: set[tuple[str, str]] = set()
    stored = cache(_stored)
    with Repo(str(root)) as repo:
        stores = _stores(repo)
        for _ in repo.brancher(revs=list(commits or []), workspace=False):
            for out in repo.index.outs:
                if not out.use_cache or not out.hash_info:
                    continue
                path = Path(repo.fs.relpath(out.fs_path, repo.root_dir)).as_posix()
                if (path, out.hash_info.value) in read:
                    continue
                read.add((path, out.hash_info.value))
                for name, digest in _members(path, out.hash_info.value, stores, stored):
                    findings += [
                        Finding(name, place, stored(store, digest), digest)
                        for place, store in stores.items()
                    ]
                    if commits is None and not digest.endswith(".dir"):
                        state = _file(root / name, digest)
                        findings.append(Finding(name, "checkout", state, digest))
    return findings


def _stores(repo: Any) -> dict[Place, Any]:
    stores: dict[Place, Any] = {"cache": repo.cache.local}
    if repo.config["core"].get("remote"):
        stores["remote"] = repo.cloud.get_remote_odb()
    return stores


def _members(
    path: str, digest: str, stores: Mapping[Place, Any], stored: Callable[[Any, str], State]
) -> Iterator[tuple[str, str]]:
    """The output and, where it is a folder, its files by the first whole listing there is."""
    yield path, digest
    if not digest.endswith(".dir"):
        return
    for store in stores.values():
        if stored(store, digest) == "whole":
            with store.fs.open(store.oid_to_path(digest), "rb") as file:
                for entry in json.load(file):
                    yield f"{path}/{entry['relpath']}", entry["md5"]
            return


def _stored(store: Any, digest: str) -> State:
    place = store.oid_to_path(digest)
    if not store.fs.exists(place):
        return "missing"
    with store.fs.open(place, "rb") as file:
        return "whole" if _md5(file) == digest.removesuffix(".dir") else "damaged"


def _file(path: Path, digest: str) -> State:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return "whole" if _md5(file) == digest else "damaged"


def _md5(file: Any) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def faults(findings: list[Finding]) -> list[Finding]:
    """Damaged files, and those that are whole nowhere."""
    whole = {finding.digest for finding in findings if finding.state == "whole"}
    return [
        finding
        for finding in findings
        if finding.state == "damaged"
        or (finding.state == "missing" and finding.digest not in whole)
    ]


def repair(
    root: Path, findings: list[Finding], commits: Sequence[str] | None = None
) -> list[Finding]:
    """Replaces damaged files by whole copies from another place; returns what is still wrong.

    What is whole nowhere is taken out of cache and remote, so that the next run computes it again
    instead of trusting it; so is the listing of its folder, which to DVC means that all is there.
    """
    from dvc.repo import Repo

    root = root.resolve()
    whole = {finding.digest: finding for finding in findings if finding.state == "whole"}
    # Outputs that hold the same share one copy in a store; in the checkout each has its own.
    damaged = {
        (f.place, f.path if f.place == "checkout" else f.digest): f
        for f in findings
        if f.state == "damaged"
    }
    with Repo(str(root)) as repo:
        stores = _stores(repo)
        for finding in damaged.values():
            with ExitStack() as files:
                good = whole.get(finding.digest)
                content = files.enter_context(_open(root, stores, good)) if good else None
                if finding.place == "checkout":
                    _put(root / finding.path, content)
                    continue
                store = stores[finding.place]
                place = store.oid_to_path(finding.digest)
                if store.fs.protocol == "local":
                    _put(Path(place), content, mode=0o444 if finding.place == "cache" else 0o644)
                elif content is None:
                    store.fs.remove(place)
                else:  # an object store shows an object when it is complete
                    with store.fs.open(place, "wb") as out:
                        shutil.copyfileobj(content, out, 1 << 20)
        lost = {finding.digest for finding in faults(findings)} - set(whole)
        listings = {f.digest: f.path for f in findings if f.digest.endswith(".dir")}
        for listing, path in listings.items():
            members = _members(path, listing, stores, _stored)
            if not lost.isdisjoint(digest for _, digest in members):
                for store in stores.values():
                    if store.exists(listing):
                        store.delete(listing)
    return faults(check(root, commits))


def _open(root: Path, stores: Mapping[Place, Any], finding: Finding) -> Any:
    if finding.place == "checkout":
        return (root / finding.path).open("rb")
    store = stores[finding.place]
    return store.fs.open(store.oid_to_path(finding.digest), "rb")


def _put(path: Path, content: Any, mode: int = 0o644) -> None:
    """Replaces a file at once by `content`, or takes it away where that is None."""
    if content is None:
        path.unlink()
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
    temporary.chmod(mode)
    temporary.replace(path)


def told(finding: Finding) -> str:
    """A fault in one line."""
    return f"{finding.state:8} {finding.place:8} {finding.path}  ({finding.digest})"


@flow(name="verify")
def verify(revision: str | None = None, mend: bool = False) -> None:
    """Rehashes in cache and remote what was computed; the run fails where something is damaged.

    Args:
        revision: branch, tag, commit or experiment's ref to take dvc.lock from; the newest commit
            and all experiments of the source repository where it is null.
        mend: whether to replace what is damaged by whole copies.
    """
    logger = get_run_logger()
    findings, wrong, left = verify_source(revision, mend)
    for finding in wrong:
        logger.error(told(finding))
    create_table_artifact(
        [finding._asdict() for finding in wrong] or [{"files": len(findings), "damaged": 0}],
        key="verify",
        description=f"{len(findings)} files read, {len(wrong)} damaged, {len(left)} still are",
    )
    if left:
        raise RuntimeError(f"{len(left)} of {len(findings)} files are damaged: {told(left[0])}")


def verify_source(
    revision: str | None, mend: bool
) -> tuple[list[Finding], list[Finding], list[Finding]]:
    """What was read of the source's results, what is wrong with it, and what still is.

    Read from a workspace, so no file of a checkout is touched.
    """
    with workspace(source(), revision or "HEAD") as place:
        commits = [place.git("rev-parse", "HEAD"), *([] if revision else experiments(place))]
        findings = check(place.root, commits)
        wrong = faults(findings)
        left = repair(place.root, findings, commits) if mend and wrong else wrong
    return findings, wrong, left


def verify_project(root: Path, mend: bool) -> None:
    """What `drawplate verify` does: says what is damaged, and mends it where it is asked to.

    Raises:
        Damaged: something is damaged, or still is.
    """
    findings = check(root)
    wrong = faults(findings)
    for finding in wrong:
        click.echo(told(finding))
    left = repair(root, findings) if mend and wrong else wrong
    if left:
        advice = "run the pipeline again" if mend else "call it with --repair"
        raise Damaged(f"{len(left)} of {len(findings)} files are damaged or lost; {advice}")
    click.echo(f"{len(findings)} files are whole" + (", now" if wrong else ""))
