"""What carries out the parts in which sources are read; none has a say in the bytes.

Not an axis: an engine is how a preparation runs, not what it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PositiveInt

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen

Work: TypeAlias = Callable[[int], None]
"""Does one part, by number, and leaves what it found in a file; can be pickled."""


class Here(Frozen):
    """One part after the other, in this process."""

    name: Literal["here"] = "here"

    def run(self, work: Work, parts: int, folder: Path) -> None:
        """Calls `work` for each part from 0 to `parts` - 1."""
        for part in range(parts):
            work(part)


class Local(Frozen):
    """Several processes on this machine, by datatrove's LocalPipelineExecutor.

    datatrove's executors for Slurm and Ray take the same pipeline.
    """

    name: Literal["local"] = "local"
    workers: PositiveInt = 2
    """Processes at a time."""

    def run(self, work: Work, parts: int, folder: Path) -> None:
        """Calls `work` for each part, in any order; logs go to `folder`.

        Raises:
            UserError: datatrove is not installed.
        """
        try:
            from datatrove.executor.local import LocalPipelineExecutor
            from loguru import logger
        except ImportError:
            raise UserError(
                "execution.engine local needs datatrove: pip install 'drawplate[data]'"
            ) from None
        logger.remove()  # what it says is in `folder` too
        LocalPipelineExecutor(
            [partial(_step, work)],
            tasks=parts,
            workers=self.workers,
            logging_dir=str(folder),
            skip_completed=False,
        ).run()


Engine: TypeAlias = Annotated[Here | Local, Field(discriminator="name")]


def _step(work: Work, _: Any, rank: int = 0, world_size: int = 1) -> Any:
    """A step of a pipeline that takes no documents and gives none."""
    work(rank)
    return iter(())
