"""Folders that are whole or absent: the one writer and the one checker of everything we store.

A folder is built under a hidden name beside its target, every file is flushed to disk, and
`manifest.json` (size and sha256 of each file) is written last; one rename then makes it visible. A
reader therefore meets the old folder, the new folder or none, never a mixture, and `verify` tells
whether the bytes are still those that were written. Nothing in a manifest depends on the clock or
on the machine: equal contents give equal manifests.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from pydantic import Field, ValidationError

from drawplate.core.errors import Damaged, Exhausted, UserError, is_full, place_of
from drawplate.core.method import Frozen

MANIFEST = "manifest.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_COLLISION = {errno.ENOTEMPTY, errno.EEXIST}


class Entry(Frozen):
    """One file of an artifact."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of the file's bytes."""
    size: int = Field(ge=0)
    """Length in bytes."""


class Manifest(Frozen):
    """What an artifact consists of."""

    schema_version: int = Field(1, ge=1, le=1)
    """Layout of this record; a reader refuses versions that it does not know."""
    kind: str
    """What the folder holds, for example "corpus", "model" or "checkpoint"."""
    files: dict[str, Entry]
    """Every file of the folder but this one, by its slash-separated path in the folder."""
    digest: str
    """Digest of the fields above, so that an edited manifest is recognised."""

    @classmethod
    def of(cls, kind: str, files: Mapping[str, Entry]) -> "Manifest":
        """The manifest of these files; their order does not matter."""
        ordered = dict(sorted(files.items()))
        bare = cls(schema_version=1, kind=kind, files=ordered, digest="")
        return bare.model_copy(update={"digest": hashlib.sha256(bare.render()).hexdigest()})

    @property
    def tree_hash(self) -> str:
        """Identity of the contents: sha256 over one line `sha256 size path` per file, by path."""
        lines = (f"{e.sha256} {e.size} {path}\n" for path, e in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def render(self) -> bytes:
        """The only accepted spelling of this manifest."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, trusted as far as its own digest goes; see `verify` for the files.

    Raises:
        Damaged: it is missing, unreadable, of an unknown version, or was edited.
    """
    _settle(folder)
    path = folder / MANIFEST
    try:
        found = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(
            f"{folder} is no finished artifact: it has no {MANIFEST}; produce the folder again"
        ) from None
    try:
        manifest = Manifest.model_validate_json(found)
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, what["loc"])) or "the file"
        raise Damaged(f"{path} is not a valid manifest: {where}: {what['msg']}") from None
    if Manifest.of(manifest.kind, manifest.files).render() != found:
        raise Damaged(f"{path} was altered after it was written; produce {folder} again")
    return manifest


def verify(folder: Path) -> Manifest:
    """Compare every byte of `folder` with its manifest and return the manifest.

    Raises:
        Damaged: naming the first file that is missing, cut, altered or does not belong there.
    """
    manifest = read_manifest(folder)
    present = {name: path for name, path in _files(folder) if name != MANIFEST}
    for name, entry in manifest.files.items():
        path = present.pop(name, None)
        if path is None:
            raise Damaged(f"{folder / name} is missing, though the manifest of {folder} lists it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is not a plain file")
        if status.st_size != entry.size:
            raise Damaged(
                f"{path} has {status.st_size} bytes where its manifest says {entry.size}; "
                f"produce {folder} again"
            )
        if _digest(path) != entry.sha256:
            raise Damaged(f"{path} was altered: its sha256 differs from the manifest of {folder}")
    if present:
        raise Damaged(f"{min(present.values())} does not belong to {folder}: no manifest lists it")
    return manifest


def tree_hash(folder: Path) -> str:
    """Content id of a published folder, read from its manifest.

    Raises:
        Damaged: the manifest is missing or was altered.
    """
    return read_manifest(folder).tree_hash


def is_ours(folder: Path) -> bool:
    """Whether the manifest of `folder`, be it damaged, is one that we wrote."""
    # Other programs write a manifest.json too; ours begins like this.
    beginning = Manifest.of("", {}).render().partition(b'""')[0]
    path = folder / MANIFEST
    return path.is_file() and path.read_bytes().startswith(beginning)


@contextmanager
def publish(folder: Path, kind: str, size: int = 0) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends well it becomes `folder` at once.

    An earlier artifact of that name is swapped out atomically and then deleted. If the block or the
    publication fails in any way, interrupts included, `folder` stays as it was and nothing is left.
    `size` is the number of bytes about to be written, where the caller knows it: a disk too small
    for it is reported before the first byte.

    Raises:
        UserError: `folder` exists and is no artifact of ours, or a written entry is no plain file.
        Exhausted: the disk is full; the message names the path and, where `size` is known, the
            bytes that are missing.
    """
    folder = Path(os.path.realpath(folder))
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise Exhausted(f"{folder} needs {size} bytes but {free} are free: {size - free} missing")
    temporary, lock = _claim(folder)
    try:
        yield temporary
        _seal(temporary, kind)
        _show(temporary, folder)
    except BaseException as error:
        place = Path(place_of(error) or folder)
        here = place.is_relative_to(temporary) or place == folder
        if not is_full(error) or not here:
            raise
        written = sum(path.stat().st_size for _, path in _files(temporary))
        free = shutil.disk_usage(folder.parent).free
        missing = f", {size - written - free} missing" if size > written + free else ""
        raise Exhausted(
            f"no space left for {folder}: {written} bytes written, {free} free{missing}; "
            "free some and run again"
        ) from error
    finally:
        # Before the swap this name holds the unfinished folder, after it the previous one.
        _remove(temporary)
        os.close(lock)


def sync(path: Path) -> None:
    """Have the operating system put a file or a folder's list of names on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below `folder` that is no folder, in a fixed order."""
    for where, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in sorted(names + links):
            path = Path(where, name)
            yield path.relative_to(folder).as_posix(), path


def _seal(temporary: Path, kind: str) -> None:
    """Put every file on the disk, then the manifest, then the lists of names."""
    files = {}
    readers = temporary.stat().st_mode & 0o666
    for name, path in _files(temporary):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is a link or a device; an artifact holds plain files only")
        if name == MANIFEST:
            raise UserError(f"{path}: this name is reserved for the list of files")
        # Some writers make files that only their owner may read; here the folder's readers may.
        path.chmod(readers)
        sync(path)
        files[name] = Entry(sha256=_digest(path), size=path.stat().st_size)
    with (temporary / MANIFEST).open("xb") as file:
        file.write(Manifest.of(kind, files).render())
        file.flush()
        os.fsync(file.fileno())
    for where, _, _ in os.walk(temporary, topdown=False, onerror=_raise):
        sync(Path(where))


def _show(temporary: Path, folder: Path) -> None:
    """Give `temporary` its final name; afterwards its own name holds what was there before."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in _COLLISION:
            raise
        if not _exchange(temporary, folder):
            _exchange_slowly(temporary, folder)
    sync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the kernel or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _exchange_slowly(temporary: Path, folder: Path) -> None:
    """Two renames; a process that dies between them leaves a state which `_settle` repairs."""
    aside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.aside"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(folder, aside)
        try:
            os.rename(temporary, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
        os.rename(aside, temporary)
    finally:
        os.close(lock)


def _claim(folder: Path) -> tuple[Path, int]:
    """A new hidden folder beside `folder`, locked for as long as this process lives."""
    while True:
        path = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A cleaner may have taken the folder for a dead process' before it was locked.
        if path.exists():
            return path, lock
        os.close(lock)


def _orphans(folder: Path, suffix: str) -> Iterator[Path]:
    """Hidden siblings whose process is gone, each locked while it is yielded.

    The kernel drops a lock with its owner: no reused process number, no container can mislead.
    """
    if not folder.parent.is_dir():
        return
    for path in sorted(folder.parent.glob(f".{escape(folder.name)}.????????.{suffix}")):
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _settle(folder: Path) -> None:
    """Undo a slow exchange whose process died half-way."""
    for aside in _orphans(folder, "aside"):
        if not folder.exists():
            os.rename(aside, folder)


def _clean(folder: Path) -> None:
    _settle(folder)
    for suffix in ("aside", "partial"):
        for path in _orphans(folder, suffix):
            _remove(path)


def kept_whole(folder: Path) -> bool:
    """Whether an earlier run left `folder` of its own work whole; a damaged one is deleted."""
    if not folder.exists():
        return False
    try:
        verify(folder)
    except Damaged as error:
        warnings.warn(f"{error}; it is made anew", stacklevel=2)
        _remove(folder)
        return False
    return True


def _remove(path: Path) -> None:
    """Delete a folder; one that is gone, or that another cleaner is deleting too, is no error."""
    while path.exists():
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue


def _refuse_foreign(folder: Path) -> None:
    """Only a folder that we wrote, or an empty one, may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the name of a folder")
    if any(folder.iterdir()) and not is_ours(folder):
        raise UserError(
            f"{folder} holds files that drawplate did not write (no {MANIFEST} of ours); "
            "name another folder or empty it"
        )
