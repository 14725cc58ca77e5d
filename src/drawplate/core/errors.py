"""Errors a user can act on: one clear line that says what, where, and what would be right."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DrawplateError(Exception):
    """Base of every error the command line prints as a single line; `code` is its exit code."""

    code = 1


class UserError(DrawplateError):
    """The caller asked for something impossible: a wrong key, a missing folder, an unfit model."""

    code = 2


class Damaged(DrawplateError):
    """An artifact is not what its manifest says: truncated, altered, incomplete."""

    code = 3


class Exhausted(DrawplateError):
    """A resource ran out (disk, memory) or another run holds it."""

    code = 4


class NotFinite(DrawplateError):
    """Training met NaN or infinity more often than its guard allows."""

    code = 5


def is_full(error: BaseException) -> bool:
    """True for a full disk, also where a writer in another language reports it as text."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return isinstance(error, Exception) and "No space left on device" in str(error)


def out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch and Python report that memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            said in text for said in ("can't allocate memory", "out of memory", "not enough memory")
        )
    )


def place_of(error: BaseException) -> str | None:
    """The file that an error of the operating system is about, where it says so."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    return str(error.filename2 or error.filename)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name `path`; those of a write would name nothing."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def told(error: Exception) -> DrawplateError | None:
    """What a user is told about an error; None where it is a fault of the program.

    Besides our own errors that is memory that ran out, a full disk, or a path that the operating
    system refuses.
    """
    if isinstance(error, DrawplateError):
        return error
    if out_of_memory(error):
        said = str(error).partition("\n")[0] or "no more can be had"
        return Exhausted(f"out of memory: {said}; free some, or choose smaller batches or models")
    place, reason = place_of(error), getattr(error, "strerror", None) or "no space left on device"
    if is_full(error):
        return Exhausted(f"{place or 'a file'}: {reason.lower()}; free some and run again")
    if place is not None:
        return UserError(f"{place}: {reason.lower()}; give a path that can be used like this")
    return None
