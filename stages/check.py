"""All sections of params.yaml at once, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from drawplate import settings
from drawplate.core.errors import UserError
from stages import STAGES
from stages.quiet import guarded
from stages.run import Execution


def check(tree: Mapping[str, Any]) -> None:
    """Raises `UserError` for the first thing that is wrong in any section."""
    check_sections(tree)
    for name in STAGES:
        stage = getattr(import_module(f"stages.{name}"), name)
        settings.validate(stage.params, tree.get(name), name)
    settings.validate(Execution, tree.get("execution"), "execution")


def check_sections(tree: Mapping[str, Any]) -> None:
    """Raises `UserError` for the first section that nothing reads."""
    known = {*STAGES, "execution"}
    for section in tree:
        if section not in known:
            near = settings.nearest(section, known)
            raise UserError(
                f"{section!r} is no section{near}; there are: {', '.join(sorted(known))}"
            )


if __name__ == "__main__":
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "params.yaml")
    sys.exit(guarded(lambda: check(settings.read(file))))
