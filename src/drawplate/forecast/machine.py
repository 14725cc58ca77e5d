"""What this process has taken so far, and what this machine has left."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

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


class Limits(NamedTuple):
    """What may be taken, in bytes."""

    memory: int
    """Main memory."""
    disk: int
    """Of the file system that results go to."""
    device: int | None = None
    """Memory of the accelerator; None where there is none."""


def limits(folder: Path, device: str = "cpu") -> Limits:
    """What is free now: main memory (of a container, its own), the disk of `folder`, the device."""
    return Limits(_free_memory(), shutil.disk_usage(folder).free, _free_device(device))


def _free_memory() -> int:
    file = Path("/proc/meminfo")
    if not file.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in file.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    control = Path("/sys/fs/cgroup")
    most, used = control / "memory.max", control / "memory.current"
    if most.exists() and used.exists() and (text := most.read_text().strip()) != "max":
        # Pages of files count as used but go when something else needs the room.
        stat = dict(line.split() for line in (control / "memory.stat").read_text().splitlines())
        free = min(free, int(text) - int(used.read_text()) + int(stat.get("inactive_file", 0)))
    return free


def _free_device(name: str) -> int | None:
    import torch

    device = torch.device(name)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
