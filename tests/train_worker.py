"""One process of a run that torchrun started: argument 1 is a list of runs to make, in JSON."""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests import faults

if __name__ == "__main__":
    faults.light()

from drawplate.train.distributed import World, join, whole_state
from drawplate.train.guard import Guard
from drawplate.train.loop import Stopped, Training, train
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.schedule import Schedule
from drawplate.train.transform import Transform
from tests.train_cases import Hungry, Toy, leaf, model

STEPS = 6


def settings() -> Training:
    """Gathering transforms on matrices and on vectors."""
    muon = tuple(leaf(Transform, n) for n in ("nesterov", "orthogonalize", "match_rms"))
    lamb = tuple(leaf(Transform, n) for n in ("adam", "trust_ratio"))
    return Training(
        steps=STEPS,
        save_every=2,
        precision="float32",
        schedule=leaf(Schedule, "cosine", warmup=0.2),
        optimizer=Optimizer(
            matrices=Group(rate=0.02, decay=0.1, transforms=muon),
            rest=Group(rate=0.01, transforms=lamb),
        ),
        guard=Guard(window=8),
    )


def one(order: Mapping[str, Any], world: World) -> None:
    """One run, stopped after step `stop` by a signal to the last process only."""
    task: Toy = Hungry(2, MemoryError()) if order.get("hungry") else Toy(order.get("rows", 6))
    if order.get("nan"):
        task.trouble = {int(order["nan"]): "nan gradient"}

    class Signal:
        calls = 0

    def watch(step: int, total: int, metrics: Mapping[str, float]) -> None:
        Signal.calls += 1
        if step == order.get("stop"):
            os.kill(os.getpid(), signal.SIGTERM)

    net = model(width=45, dropout=0.0)
    try:
        how = settings().model_copy(update={"accumulate": order.get("accumulate", 1)})
        train(net, task, how, Path(order["work"]), watch, world)
    except Stopped as stop:
        print(f"rank {world.rank}: {stop}", file=sys.stderr)
        return
    state = whole_state(net)
    if world.rank == 0:
        torch.save(state, Path(order["work"]) / "model.pt")
    else:
        assert Signal.calls == 0, "only the first process reports"


def main(orders: str) -> None:
    """All runs of the list, in one group of processes per mode."""
    torch.set_num_threads(1)
    # Processes that wait for each other forever would say nothing.
    faulthandler.dump_traceback_later(120, exit=True)
    listed = json.loads(orders)
    with join() as world:
        for order in listed:
            one(order, World(world.rank, world.size, order["mode"]))


if __name__ == "__main__":
    main(sys.argv[1])
