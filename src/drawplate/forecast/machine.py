"""What this machine has left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple


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
