"""Errors a user can act on: one clear line that says what, where, and what would be right."""


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
