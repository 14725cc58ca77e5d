"""What this process takes of main memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Most bytes of main memory that this process has held.

    Linux starts a process with its parent's `ru_maxrss`, so its own high-water mark is read instead
    where /proc tells it.
    """
    marked = _status("VmHWM")
    if marked is not None:
        return marked
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory() -> int:
    """Bytes of main memory that this process holds now; the peak where nothing tells them."""
    held = _status("VmRSS")
    return peak_memory() if held is None else held


def file_memory() -> int:
    """Bytes of files, libraries above all, that count to the memory of this process."""
    return _status("RssFile") or 0


def _status(key: str) -> int | None:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = [line for line in lines if line.startswith(f"{key}:")]
    return int(found[0].split()[1]) * 1024 if found else None
