"""A stage that trains a toy model in the processes that `execution` asks for; run, it makes one."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

import torch
from pydantic import Field

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.train.loop import Training, train
from stages.run import Execution, Run, Stage, execution_id, prepare_process, write_history
from tests.train_cases import Toy, model


class Knobs(Frozen):
    steps: int = 12
    fails: int = -1
    """The rank that finds its input wrong."""
    pause: float = 0.0
    """Seconds between steps, for tests that interfere."""


class Inputs(Frozen):
    source: Path = Field(description="Anything.")


class Report(Frozen):
    loss: float
    processes: int


def body(params: Knobs, inputs: Inputs, run: Run) -> Report:
    if run.world.rank == params.fails:
        raise UserError("this process was asked to fail")
    net = model(width=45, dropout=0.0)
    training = Training(steps=params.steps, save_every=2, precision="float32")
    shown = run.part("toy")

    class Slow(Toy):
        def batch(self, step: int) -> dict[str, torch.Tensor]:
            time.sleep(params.pause)
            return dict(super().batch(step))

    outcome = train(net, Slow(rows=8), training, run.work, shown, run.world)
    run.leave_to_first()
    torch.save(net.state_dict(), run.folder / "model.pt")
    write_history(run, "toy", outcome.metrics)
    (run.folder / "execution").write_text(execution_id())
    return Report(loss=outcome.last["loss"], processes=run.world.size)


if "RANK" in os.environ:  # the agent's signal may come when a process is already leaving
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
stage = Stage("stage", Knobs, Inputs, body, "model", together=True)


if __name__ == "__main__":
    from stages.quiet import guarded
    from tests import together_stage

    source, out, nproc, pause, nnodes, address = sys.argv[1:]
    machines = {"nnodes": int(nnodes), "address": address} if int(nnodes) > 1 else {}
    prepare_process()
    sys.exit(
        guarded(
            lambda: together_stage.stage(
                Knobs(pause=float(pause)),
                Inputs(source=Path(source)),
                Path(out),
                execution=Execution(nproc=int(nproc), tracking=False, threads=1, **machines),
            )
        )
    )
