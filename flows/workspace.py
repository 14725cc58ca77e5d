"""A place of its own for every scheduled run: a clone at one commit with the shared DVC cache.

A clone with borrowed objects costs a tenth of a second and has refs of its own, which parallel
`dvc` calls need; a worktree shares them. The user's checkout is read, never written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from drawplate.core.errors import UserError
from flows.graph import reason
from stages.quiet import quiet_environment

_PREFIX = "drawplate-"


class Workspace(NamedTuple):
    """A clone that one run may do with as it likes."""

    root: Path
    source: str
    """Repository that it was cloned from: where results are handed over to."""
    cache: Path
    """DVC's cache, shared by all runs of this machine."""
    remote: bool
    """Whether DVC has a remote to exchange data with other machines."""

    def git(
        self,
        *arguments: str,
        given: bytes | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What `git` prints when called here."""
        return git(self.root, *arguments, given=given, environment=environment)

    def environment(self) -> dict[str, str]:
        """For the processes of a stage: code comes from this clone, not from the installed one."""
        earlier = os.environ.get("PYTHONPATH", "")
        paths = [str(self.root), str(self.root / "src"), *filter(None, earlier.split(os.pathsep))]
        state = os.environ.get("DRAWPLATE_STATE") or str(self.cache / "work")
        return {"PYTHONPATH": os.pathsep.join(paths), "DRAWPLATE_STATE": state}

    def dvc(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Calls `dvc` here; `RuntimeError` with what it said where it fails.

        `--quiet` would have it keep most errors to itself.
        """
        quiet_environment()
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = reason(f"{done.stdout}\n{done.stderr}")
            raise RuntimeError(f"dvc {' '.join(arguments)}: {said}")

    def bring(self, paths: Sequence[str]) -> None:
        """Puts outputs that dvc.lock names here, from the cache and else from the remote."""
        if not paths:
            return
        if self.remote:
            self.dvc("pull", "--allow-missing", *paths)
        else:
            self.dvc("checkout", "--allow-missing", *paths)

    def lacking(self, stage: str) -> tuple[list[str], list[str]]:
        """Outputs of `stage`, by dvc.lock, that other machines do not find; and those lost to all.

        Others look in the remote; without one they share the cache.
        """
        from dvc.repo import Repo

        with Repo(str(self.root)) as repo:
            here = repo.cache.local
            shared = repo.cloud.get_remote_odb() if self.remote else here
            found = next(each for each in repo.index.stages if getattr(each, "name", "") == stage)
            outs = [out for out in found.outs if out.use_cache and out.hash_info]
            unsent = [out for out in outs if not _holds(shared, out.hash_info)]
            lost = [out for out in unsent if not _holds(here, out.hash_info)]
        return [out.def_path for out in unsent], [out.def_path for out in lost]

    def push(self, stage: str, entry: Mapping[str, Any]) -> None:
        """Sends what `stage` made, and its entry of the run cache, to the remote.

        `dvc push` leaves out files that git keeps, such as metrics. The run cache of another
        machine needs them too: without them it would compute the stage again.
        """
        self.dvc("push", "--run-cache", stage)
        from dvc.repo import Repo
        from dvc_data.hashfile.hash_info import HashInfo

        digests = [out["md5"] for out in entry.get("outs", []) if not out["md5"].endswith(".dir")]
        with Repo(str(self.root)) as repo:
            repo.cloud.push([HashInfo("md5", digest) for digest in digests])


def _holds(store: Any, output: Any) -> bool:
    """Whether a cache or remote has a file, or a folder with all that it lists."""
    from dvc_data.hashfile.tree import Tree

    digests = {output.value}
    if output.isdir:
        try:
            digests |= {entry.value for _, _, entry in Tree.load(store, output)}
        except FileNotFoundError:
            return False
    return set(store.list_oids_exists(digests)) == digests


def git(
    root: Path,
    *arguments: str,
    given: bytes | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What `git` prints when called in `root`; `CalledProcessError` where it fails."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        check=True,
        capture_output=True,
        input=given,
        env={**os.environ, **(environment or {})},
    )
    return done.stdout.decode().strip()


def source() -> str:
    """`DRAWPLATE_SOURCE`, a path or a URL, else the repository of the current folder.

    Raises:
        UserError: neither is there.
    """
    given = os.environ.get("DRAWPLATE_SOURCE")
    if given:
        return given
    try:
        return git(Path.cwd(), "rev-parse", "--show-toplevel")
    except subprocess.CalledProcessError:
        raise UserError(
            f"{Path.cwd()} is in no git repository; set DRAWPLATE_SOURCE to one"
        ) from None


@contextmanager
def workspace(origin: str, revision: str = "HEAD") -> Iterator[Workspace]:
    """A clone of `origin` at `revision`, removed at the end.

    Args:
        origin: path or URL of a git repository with a DVC project at its root.
        revision: branch, tag, commit or full name of a ref.

    Raises:
        UserError: there is no such repository or revision.
    """
    quiet_environment()
    parent = Path(os.environ.get("DRAWPLATE_WORKSPACES") or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    folder, held = _claim(parent)
    try:
        yield _clone(origin, revision, folder / "workspace")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held.close()


def _claim(parent: Path) -> tuple[Path, TextIO]:
    """A new folder, and its lock, which is held until it is closed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        held = (folder / "lock").open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        # Another run may have taken the folder for a killed run's before it was locked.
        if folder.exists():
            return folder, held
        held.close()


def _clone(origin: str, revision: str, root: Path) -> Workspace:
    local = Path(origin).is_dir()
    commit = _commit(Path(origin), revision, origin) if local else None
    shared = ["--shared"] if local else []
    try:
        git(
            root.parent,
            *["clone", "--quiet", "--no-tags", "--no-checkout", *shared],
            *["--", origin, str(root)],
        )
        if commit is None:
            git(root, "fetch", "--quiet", "origin", "--", revision)
            commit = _commit(root, "FETCH_HEAD", origin)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode().strip().splitlines()[-1:]
        raise UserError(f"{origin} at {revision!r}: {' '.join(last) or 'git failed'}") from None
    git(root, "checkout", "--quiet", "--detach", commit)
    return _pin(Workspace(root, origin, Path(), False), Path(origin) if local else root)


def _commit(root: Path, revision: str, origin: str) -> str:
    try:
        return git(
            root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
        )
    except subprocess.CalledProcessError:
        raise UserError(
            f"{origin} has no revision {revision!r}; give a branch, a tag or a commit"
        ) from None


def _pin(made: Workspace, configured: Path) -> Workspace:
    """Writes cache and remotes of the source into the clone's own configuration.

    A relative path means another place in a clone, and a worker's global configuration may name
    another cache than the user's.
    """
    from dvc.config import Config

    if not (configured / ".dvc").is_dir():
        raise UserError(f"{made.source} is no DVC project: it has no folder .dvc")
    config = Config(dvc_dir=str(configured / ".dvc"))
    cache = os.environ.get("DRAWPLATE_CACHE") or config["cache"].get("dir")
    if cache is None:
        if configured == made.root:
            raise UserError(
                f"{made.source} is not on this machine; set DRAWPLATE_CACHE to a folder"
            )
        cache = str(configured / ".dvc" / "cache")
    remotes: dict[str, dict[str, Any]] = {
        name: {"verify": True, **settings} for name, settings in config["remote"].items()
    }
    default = config["core"].get("remote")
    if configured == made.root:
        _refuse_relative(made)
    with Config(dvc_dir=str(made.root / ".dvc")).edit("local") as local:
        local["cache"] = {"dir": str(Path(cache).resolve())}
        local["remote"] = remotes
        if default is not None:
            local["core"] = {"remote": default}
    (made.root / ".dvc" / "config.local").chmod(0o600)
    return made._replace(cache=Path(cache).resolve(), remote=default in remotes)


def _refuse_relative(made: Workspace) -> None:
    """A remote by a relative path would lie beside the clone, and go with it."""
    from configobj import ConfigObj

    for section, settings in ConfigObj(str(made.root / ".dvc" / "config")).items():
        url = settings.get("url", "") if section.startswith(("remote ", "'remote ")) else ""
        if url and "://" not in url and not Path(url).is_absolute():
            raise UserError(
                f"{made.source}: .dvc/config gives a remote the relative path {url}, which is "
                "nowhere on this machine; give it an absolute path or a URL"
            )


def _sweep(parent: Path) -> None:
    """Removes what killed runs left: their lock is free."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with (folder / "lock").open() as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
