"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, dict[str, object]]:
    """Processor and cores, and the versions that matter."""
    names = ("torch", "transformers", "dvc", "mlflow", "drawplate")
    versions: dict[str, object] = {name: version(name) for name in names}
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions | {"python": platform.python_version()},
    }


def processor() -> str:
    """The processor's name."""
    known = Path("/proc/cpuinfo")  # Linux has it
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
