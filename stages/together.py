"""Several processes that make one output, started by torchrun's agent, here or on many machines.

The stage's own process is the agent. It passes signals on, and where a process is lost it starts
all of them again, from their last checkpoint. The first process does what a lone one would do; the
others only train. Agents meet in a file beside the output, so no machine has to outlive the others.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from psutil import net_if_addrs

from drawplate.core.errors import DrawplateError, Exhausted, UserError, told
from drawplate.core.method import Frozen
from stages.quiet import INTERRUPTED
from stages.run import STATE, Execution, Given, Stage, execution_id, only_one, prepare_process

P = TypeVar("P", bound=Frozen)
I = TypeVar("I", bound=Frozen)  # noqa: E741
R = TypeVar("R", bound=Frozen)
LOST = 75
"""Exit code of a process whose peers are gone (EX_TEMPFAIL: worth another try)."""


class Order(Frozen):
    """A call of a stage, for processes that have yet to be started."""

    module: str
    stage: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    out: Path
    metrics: Path | None
    record: Path | None
    execution: Execution
    given: Given | None
    pipeline: str
    """`execution_id`, which they cannot tell: each has a process group of its own."""

    def write(self, folder: Path) -> None:
        """Leaves the order in `folder`."""
        (folder / "order.json").write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Order:
        """The order in `folder`."""
        return cls.model_validate_json((folder / "order.json").read_bytes())


class Failure(Frozen):
    """What a process that could not go on leaves behind."""

    code: int
    message: str


def launch(
    stage: Stage[P, I, R],
    params: P,
    inputs: I,
    out: Path,
    metrics: Path | None,
    record: Path | None,
    execution: Execution,
    given: Given | None = None,
) -> R:
    """Makes `out` in `execution.nproc` processes on this machine, and as many on the others.

    Raises:
        DrawplateError: what the first of the processes that failed had to say, or `address` is none
            of this machine.
        Exhausted: processes were lost more often than `execution.restarts`, or somebody makes `out`
            already.
        KeyboardInterrupt: a signal came; all processes have saved and left.
    """
    order = Order(
        module=stage.body.__module__,
        stage=stage.name,
        params=params.model_dump(mode="json"),
        inputs=inputs.model_dump(mode="json"),
        out=out,
        metrics=metrics,
        record=record,
        execution=execution,
        given=given,
        pipeline=execution_id(),
    )
    result: type[R] = get_type_hints(stage.body)["return"]
    state = out.resolve().parent / STATE
    state.mkdir(parents=True, exist_ok=True)
    report = state / f"{out.name}.report.json"
    if execution.nnodes > 1:
        _reachable(stage.name, execution.address)
    # The first process guards the output, but an agent too many would not get as far as starting
    # one: it would wait at the meeting until all is done.
    lock = state / f"{out.name}.agent.lock"
    lost = ""
    with only_one(lock, out) if execution.nnodes == 1 else nullcontext():
        for _ in range(execution.restarts + 1):
            if lost:
                print(f"[{stage.name}] {lost}; starting again", file=sys.stderr, flush=True)
            place = _place(state, out.name)
            with tempfile.TemporaryDirectory(prefix="drawplate-") as folder:
                order.write(Path(folder))
                lost = _attempt(order, Path(folder), report, place)
            if not lost:
                return result.model_validate_json(report.read_bytes())
    raise Exhausted(
        f"{out}: {lost}, after {execution.restarts} new starts; look for what ends processes, "
        "such as the memory they need, or raise execution.restarts"
    )


def _reachable(name: str, address: str | None) -> None:
    """Has the processes listen where other machines find them.

    Without a word, gloo listens at the address of the host's name, on many systems 127.0.1.1.

    Raises:
        UserError: `address` is none of this machine.
    """
    try:
        number = socket.gethostbyname(address or socket.gethostname())
    except OSError as error:
        raise UserError(f"execution.address: {address or socket.gethostname()}: {error}") from None
    if address is None:
        if ipaddress.ip_address(number).is_loopback:
            print(
                f"[{name}] this machine's name stands for {number}, where no other machine finds "
                "it; give its address in the network by execution.address",
                file=sys.stderr,
                flush=True,
            )
        return
    known = {a.address: device for device, all_ in net_if_addrs().items() for a in all_}
    if number not in known:
        numbers = [text for text in known if text.count(".") == 3]
        raise UserError(
            f"execution.address: {address} is no address of this machine, which has "
            f"{', '.join(numbers)}"
        )
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = known[number]


def _place(state: Path, name: str) -> Path:
    """The file where the agents of `name` meet, the latest one: each attempt has its own."""
    numbers = sorted(int(file.suffix[1:]) for file in state.glob(f"{escape(name)}.meeting.*"))
    for old in numbers[:-2]:  # of the one before the latest, an agent may still take leave
        (state / f"{name}.meeting.{old}").unlink(missing_ok=True)
    return state / f"{name}.meeting.{numbers[-1] if numbers else 0}"


def _next(place: Path) -> None:
    """Nobody who comes from now on goes to `place`."""
    place.with_suffix(f".{int(place.suffix[1:]) + 1}").touch()


def _attempt(order: Order, folder: Path, report: Path, place: Path) -> str:
    """Starts the processes and waits for them: empty where all is done, else what was lost."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    execution = order.execution
    config = LaunchConfig(
        min_nodes=execution.nnodes,
        max_nodes=execution.nnodes,
        nproc_per_node=execution.nproc,
        run_id=place.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(place),
        rdzv_configs={"store_type": "file"},
        max_restarts=0,
        local_addr=execution.address if execution.nnodes > 1 else "127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        signals_to_handle="SIGTERM,SIGINT",
    )
    start = elastic_launch(config, sys.executable)
    try:
        with _handlers_kept():
            start("-m", "stages.together", str(folder), str(report))
    except SignalException:
        raise KeyboardInterrupt from None
    except AttributeError as error:
        if error.name != "is_failed":
            raise
        # The launcher asks a result that is None: all places were taken until the meeting closed.
        raise Exhausted(
            f"{order.out} was being made by {execution.nnodes} machines already, as many as "
            "execution.nnodes says; if it is not there now, run again"
        ) from None
    except RendezvousClosedError:
        return "the other machines went on to another attempt"
    except RendezvousTimeoutError:
        raise Exhausted(
            f"{execution.nnodes} machines did not meet within ten minutes; start the same command "
            "on each of them, on storage that all share, or lower execution.nnodes"
        ) from None
    except ChildFailedError as error:
        _raise_what_they_said(folder)
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if INTERRUPTED in codes.values():  # here or on another machine, and all have saved
            raise KeyboardInterrupt from None
        # The agent ends the others with SIGTERM, so that says nothing about them.
        gone = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
        for rank, code in gone.items():
            return f"process {rank} was ended by {signal.Signals(-code).name}"
        if LOST in codes.values():
            return "a process on another machine was lost"
        raise
    finally:
        _next(place)
    return ""


def _raise_what_they_said(folder: Path) -> None:
    """The error of the first process that left one."""
    for file in sorted(folder.glob("failure-*.json")):
        failure = Failure.model_validate_json(file.read_bytes())
        error = DrawplateError(failure.message)
        error.code = failure.code
        raise error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The agent sets signal handlers and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _help(folder: Path, report: Path) -> int:
    """One of the processes: takes part in what the order says; returns its exit code."""
    import torch.distributed as dist

    from drawplate.train.distributed import join

    order = Order.read(folder)
    os.environ["DRAWPLATE_EXECUTION"] = order.pipeline
    stage: Stage[Any, Any, Any] = getattr(import_module(order.module), order.stage)
    params, inputs = stage.params(**order.params), stage.inputs(**order.inputs)
    try:
        with join() as world:
            made = stage.make(
                params, inputs, order.out, order.metrics, order.record, order.execution, world,
                order.given,
            )  # fmt: skip
            if made is not None:
                report.write_text(made.model_dump_json(), encoding="utf-8")
            world.any(False)  # nobody leaves before the output is there
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if known := told(error):
            failure = Failure(code=known.code, message=str(known))
            file = folder / f"failure-{os.environ['RANK']:0>6}.json"
            file.write_text(failure.model_dump_json(), encoding="utf-8")
            return known.code
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        ):
            return LOST
        raise
    return 0


if __name__ == "__main__":
    prepare_process()
    verdict = _help(Path(sys.argv[1]), Path(sys.argv[2]))
    # Where another process was lost, the agent ends this one, which by now may be on its way out.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(verdict)
