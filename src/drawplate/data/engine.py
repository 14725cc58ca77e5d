"""What carries out the parts in which sources are read; none has a say in the bytes.

Not an axis: an engine is how a preparation runs, not what it makes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

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
    """Several processes on this machine, by datatrove's LocalPipelineExecutor."""

    name: Literal["local"] = "local"
    workers: PositiveInt = 2
    """Processes at a time."""

    def run(self, work: Work, parts: int, folder: Path) -> None:
        """Calls `work` for each part, in any order; logs go to `folder`.

        Raises:
            UserError: datatrove is not installed.
        """
        with needs(self.name, "datatrove", "data"):
            from datatrove.executor.local import LocalPipelineExecutor
        quiet()
        LocalPipelineExecutor(
            [partial(_step, work)],
            tasks=parts,
            workers=self.workers,
            logging_dir=str(folder),
            skip_completed=False,
        ).run()


class Ray(Frozen):
    """Processes on a Ray cluster, by datatrove's RayPipelineExecutor.

    The cluster is the one that Ray finds, by `RAY_ADDRESS` or on this machine; where there is none,
    it begins one here. Its nodes have drawplate and see the same folders.
    """

    name: Literal["ray"] = "ray"
    workers: PositiveInt = 2
    """Processes at a time."""
    memory: PositiveFloat = 2
    """GiB that are reserved for each."""

    def run(self, work: Work, parts: int, folder: Path) -> None:
        """Calls `work` for each part, in any order; logs go to `folder`.

        Raises:
            UserError: Ray is not installed, or a part failed.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with needs(self.name, "ray and datatrove", "ray"):
            import ray
            from datatrove.executor.ray import RayPipelineExecutor
        quiet()
        with elsewhere(work, parts, folder) as steps:
            ray.init(log_to_driver=False)
            try:
                RayPipelineExecutor(
                    steps,
                    tasks=parts,
                    workers=self.workers,
                    mem_per_cpu_gb=self.memory,
                    logging_dir=str(folder),
                ).run()
            finally:
                ray.shutdown()


class Slurm(Frozen):
    """An array of Slurm jobs, by datatrove's SlurmPipelineExecutor; waits until it has ended.

    Nodes have drawplate in the same place and see the same folders.
    """

    name: Literal["slurm"] = "slurm"
    partition: str = Field(min_length=1)
    """Where the jobs run."""
    time: str = "24:00:00"
    """Most time of a part, as sbatch takes it."""
    workers: PositiveInt = 2
    """Jobs at a time."""
    memory: PositiveInt = 2
    """GiB of each."""

    def run(self, work: Work, parts: int, folder: Path) -> None:
        """Calls `work` for each part, in any order; logs go to `folder`.

        Raises:
            UserError: there is no sbatch, datatrove is not installed, or a part failed.
        """
        with needs(self.name, "datatrove", "data"):
            from datatrove.executor.slurm import SlurmPipelineExecutor
        if shutil.which("sbatch") is None:
            raise UserError("execution.engine slurm needs sbatch; call it where jobs are submitted")
        quiet()
        # Paths of the environment that submits, for the jobs' own `launch_pickled_pipeline`.
        paths = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        name = f"drawplate-{os.getpid()}"
        with elsewhere(work, parts, folder) as steps:
            try:
                SlurmPipelineExecutor(
                    steps,
                    tasks=parts,
                    workers=self.workers,
                    time=self.time,
                    partition=self.partition,
                    mem_per_cpu_gb=self.memory,
                    qos="",
                    job_name=name,
                    env_command=paths,
                    sbatch_args={"wait": ""},
                    requeue=False,
                    logging_dir=str(folder),
                ).run()
            except subprocess.CalledProcessError:
                pass  # a part failed, or sbatch said why there are none: the notes tell
            except BaseException:
                subprocess.run(["scancel", "--name", name], check=False)
                raise


Engine: TypeAlias = Annotated[Here | Local | Ray | Slurm, Field(discriminator="name")]


@contextmanager
def needs(engine: str, what: str, extra: str) -> Iterator[None]:
    """Says what to install where an import inside fails."""
    try:
        yield
    except ImportError:
        raise UserError(
            f"execution.engine {engine} needs {what}: pip install 'drawplate[{extra}]'"
        ) from None


def quiet() -> None:
    """Has datatrove print nothing; what it says is in its folder too."""
    from loguru import logger

    logger.remove()


@contextmanager
def elsewhere(work: Work, parts: int, folder: Path) -> Iterator[list[Any]]:
    """The steps of a pipeline whose processes can raise nothing here; afterwards, what they said.

    Raises:
        UserError: a part failed, or never began.
    """
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in range(parts):
        _note(folder, part).write_text(f"part {part} was not begun; look below {folder}")
    yield [partial(_noted, work, folder, Path.cwd())]
    failed = sorted(folder.glob("*.failed"))
    if failed:
        raise UserError(failed[0].read_text(encoding="utf-8"))


def _note(folder: Path, part: int) -> Path:
    return folder / f"{part:06}.failed"


def _noted(work: Work, folder: Path, home: Path, _: Any, rank: int = 0, world_size: int = 1) -> Any:
    """`_step` in the folder of who asked, with a note until its part is done."""
    os.chdir(home)
    note = _note(folder, rank)
    note.write_text(f"part {rank} ended without a word; look below {folder}")
    try:
        work(rank)
    except Exception as error:
        note.write_text(str(error) or type(error).__name__, encoding="utf-8")
        raise
    note.unlink()
    return iter(())


def _step(work: Work, _: Any, rank: int = 0, world_size: int = 1) -> Any:
    """A step of a pipeline that takes no documents and gives none."""
    work(rank)
    return iter(())
