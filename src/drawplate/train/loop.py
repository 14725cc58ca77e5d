"""The training loop: batch, gradients, guard, step, row, checkpoint; then again.

A step is a function of the settings, the seed, the step's number and the state in the checkpoint. A
run that is killed and started again therefore ends with the same bytes as one that was not.
"""

import fcntl
import gc
import hashlib
import json
import math
import os
import random
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from drawplate.core.errors import (
    Damaged,
    DrawplateError,
    Exhausted,
    NotFinite,
    UserError,
    out_of_memory,
)
from drawplate.core.method import Frozen, OneOf
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import seed_of
from drawplate.train import checkpoint
from drawplate.train.direction import Direction
from drawplate.train.distributed import ALONE, World
from drawplate.train.guard import Guard, History, Verdict
from drawplate.train.optimizer import Optimizer
from drawplate.train.precision import Precision, cast, choose, compiled
from drawplate.train.rounding import Simulate, simulated
from drawplate.train.rowwise import gram
from drawplate.train.schedule import Schedule
from drawplate.train.series import Series

Batch = Mapping[str, Tensor]
"""Named tensors; those with dimensions share their first one, the rows. Scalars go to all parts."""

EXECUTION = {"accumulate", "compile", "save_every", "keep"}
"""Settings that decide how a run is carried out, not what it is to compute.

They may show in the result: sums are taken in another order, and after bad numbers training goes
back to a checkpoint, of which `save_every` says where they are.
"""


class Task(Protocol):
    """What is trained for: where rows come from and what their loss is."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain JSON values that tell this task from others: data hashes, its own settings."""

    def batch(self, step: int) -> Batch:
        """The rows of data index `step`, from 0 to the run's steps - 1.

        A function of it, of the seed and of `state` only. A run that left out data because of bad
        numbers takes what it lacks in the end from the beginning.
        """

    def loss(self, model: nn.Module, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What some rows of a batch add to its loss and to its metrics.

        Parts add up: the sum over any cut of a batch into rows is the batch's loss. A metric named
        `tokens` gives the speed its unit.
        """

    def state(self) -> dict[str, Any]:
        """A fresh copy of what `batch` has learned along the way, as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` gave."""


class Training(Frozen):
    """Settings of the loop."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps of the run."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a process computes its rows of a batch, one after the other."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient of all weights; longer ones are shortened to it."""
    precision: Precision = "auto"
    """Numbers of the forward and backward pass; optimizer states are always 32 bits."""
    simulate: Simulate | None = None
    """Another number format for the products of linear layers, simulated in float32."""
    compile: bool = False
    """Compile the loss with torch.compile: faster after a minute of compilation."""
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay on the disk."""
    seed: int = Field(0, ge=0)
    """Of dropout and everything else that a model draws."""
    schedule: Annotated[Schedule, OneOf()] = Field({"name": "wsd"}, validate_default=True)
    """The learning rate over the run."""
    direction: Annotated[Direction, OneOf()] = Field({"name": "gradient"}, validate_default=True)
    """How the gradients of a batch's rows become the one that the optimizer is given."""
    optimizer: Optimizer = Optimizer()
    """What turns gradients into steps."""
    guard: Guard = Guard()
    """What happens when numbers go bad."""

    @model_validator(mode="after")
    def _wide(self) -> "Training":
        if self.simulate is not None and self.precision != "float32":
            raise ValueError(
                f"simulate is computed in 32 bits: set precision: float32, not {self.precision}"
            )
        if self.simulate is not None and self.compile:
            raise ValueError("simulate replaces what compile would fuse: set compile: false")
        return self


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves, besides the trained model."""

    steps: int
    """Steps of the run."""
    skipped: int
    """Those that the guard kept from the weights."""
    folder: Path
    """Where checkpoints and `metrics.jsonl` are."""
    last: Mapping[str, float]
    """The last row of metrics."""

    @property
    def metrics(self) -> Path:
        """The series, one JSON line a step."""
        return self.folder / "metrics.jsonl"


class Stopped(DrawplateError):
    """A signal ended the run after its state was saved; the same call goes on from there."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step}, saved in {folder}; run again to go on"
        )
        self.code = 128 + number


def train(
    model: nn.Module,
    task: Task,
    settings: Training,
    work: Path,
    watch: Watch = silent,
    world: World = ALONE,
) -> Outcome:
    """Train `model` in place; continue where an earlier call with equal arguments got to.

    `model` has to be the untrained one in every call. Checkpoints and metrics go to a folder in
    `work` named after everything that decides the result, so other settings never meet them.

    Raises:
        Stopped: SIGTERM, SIGINT or KeyboardInterrupt; the state is saved.
        NotFinite: loss or gradients stay NaN or infinite though training went back and on.
        Exhausted: out of memory with one row at a time, disk full, or another run has the folder.
        Damaged: the metric series does not fit the checkpoint.
        UserError: settings, task and model do not fit together.
    """
    run = _Run(model, task, settings, work, watch, world)
    with run.locked(), simulated(model, settings.simulate), _Signals() as signals:
        try:
            return run.go(signals)
        finally:
            run.close()


class _Signals:
    """The first SIGINT or SIGTERM asks the run to save and leave, the second ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self.open = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, number
        if again:
            raise SystemExit(128 + number)
        if self.open:
            raise KeyboardInterrupt

    @contextmanager
    def interruptible(self, now: bool) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, as nothing is lost by leaving half-way."""
        self.open = now
        if now and self.number:
            raise KeyboardInterrupt
        try:
            yield
        finally:
            self.open = False


class _Run:
    """One run: what changes from step to step, and how."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Training,
        work: Path,
        watch: Watch,
        world: World,
    ) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.watch, self.world = watch, world
        self.by_rows = "gram" in settings.direction.needs
        if self.by_rows and (settings.compile or not world.alone):
            what = "compile: true" if settings.compile else "several processes"
            raise UserError(
                f"training.direction {settings.direction.name} takes all rows one by one in one "
                f"process and does not work with {what}"
            )
        self.device = next(model.parameters()).device
        dtype = choose(settings.precision, self.device)
        self.identity = {
            "settings": settings.model_dump(mode="json", exclude=EXECUTION | {"precision"}),
            "precision": str(dtype),
            "task": dict(task.identity),
            "model": fingerprint(model),
        }
        text = json.dumps(self.identity, sort_keys=True, allow_nan=False)
        if len(set(world.gather([text]))) > 1:
            raise UserError("the processes of this run do not start from the same model and data")
        self.folder = work / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.machine = {
            "accumulate": settings.accumulate,
            "compile": settings.compile,
            "device": self.device.type,
            "processes": f"{world.size} {world.mode}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        self.objective: nn.Module = _Objective(model, task)
        cast(model, torch.float32 if world.sharded else dtype)
        if world.sharded:
            world.split(self.objective, self.device, dtype)
        if settings.compile:
            if world.sharded:
                raise UserError("compile: true does not work with weights split over processes")
            self.objective = compiled(self.objective, self.device)
        self.chain = settings.optimizer.build(model)
        self.parameters = [p for group in self.chain.param_groups for p in group["params"]]
        self.buffers = _persistent(model)
        self.step = self.jump = 0
        self.saved = -1
        self.parts = settings.accumulate
        self.history = History()
        self.task_state = task.state()
        self.seconds: deque[float] = deque(maxlen=50)
        self.series: Series | None = None
        self.last: Mapping[str, float] = {}

    def close(self) -> None:
        """Let go of the metrics file."""
        if self.series is not None:
            self.series.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's folder, so that no second run writes into it."""
        if not self.world.first:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Exhausted(f"another run is training in {self.folder}; wait or stop it") from None
        try:
            yield
        finally:
            os.close(lock)

    def go(self, signals: _Signals) -> Outcome:
        """All steps that are left."""
        if not self._load():
            self._cut_back()
            self._save()
        total = self.settings.steps
        try:
            while self.step < total:
                self._one(signals)
                due = self.step % self.settings.save_every == 0 or self.step == total
                if due and self.saved != self.step:
                    self._save()
                self._obey(signals)
        except KeyboardInterrupt:
            signals.number = signals.number or signal.SIGINT
            if not self.world.alone:
                raise
            self._obey(signals)
        return Outcome(self.step, self.history.skipped, self.folder, self.last)

    def _obey(self, signals: _Signals) -> None:
        """Save and leave, if one of the processes was told to."""
        number = int(max(self.world.sum([signals.number])))
        if number:
            if self.saved != self.step:
                self._save()
            raise Stopped(signals.number or signal.SIGTERM, self.step, self.folder)

    def _one(self, signals: _Signals) -> None:
        """One step: up to the optimizer it can be abandoned, from there on it is finished."""
        start = time.perf_counter()
        total = self.settings.steps
        index = (self.step + self.jump) % total
        with signals.interruptible(self.world.alone):
            self._reseed(index, "batch")
            with _memory(f"while making the batch of step {self.step + 1}"):
                batch = _to(self.task.batch(index), self.device)
            metrics = self._gradients(batch, index)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.world.norm(gradients)
        loss = metrics.pop("loss")
        verdict = self.settings.guard.judge(self.history, loss, norm)
        if verdict != "good" and self.history.streak >= self.settings.guard.patience:
            self._go_back(index, verdict, loss, norm)
            return
        factor = self.settings.schedule.factor(self.step, total)
        self.chain.set_factor(factor)
        if verdict == "good":
            if norm > self.settings.clip:
                torch._foreach_mul_(gradients, self.settings.clip / norm)
            self.chain.step()
        else:
            self.model.train()  # modules forget what they were shown
        self.chain.zero_grad(set_to_none=True)
        self.step += 1
        self.task_state = self.task.state()
        seconds = time.perf_counter() - start
        self.seconds.append(seconds)
        row = {
            "step": self.step,
            "loss": loss,
            "lr": self.chain.param_groups[0]["lr"],
            "grad_norm": norm,
            **metrics,
            "skipped": float(verdict != "good"),
            "rollbacks": float(self.history.rollbacks),
            "microbatches": float(self.parts),
            "seconds": seconds,
            "eta": sum(self.seconds) / len(self.seconds) * (total - self.step),
        }
        if "tokens" in metrics:
            row["tokens_per_second"] = metrics["tokens"] / seconds
        self.last = {name: value for name, value in row.items() if math.isfinite(value)}
        if self.series is not None:
            self.series.append(row)
            self.watch(self.step, total, self.last)

    def _gradients(self, batch: Batch, index: int) -> dict[str, float]:
        """Leave the whole batch's gradient in the weights; its loss and metrics, added up."""
        while True:
            failed = False
            try:
                found = self._try_gradients(batch, index)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.world.sharded:
                    raise Exhausted(
                        f"out of memory in step {self.step + 1}; raise `accumulate` above "
                        f"{self.parts} or use more processes"
                    ) from error
                failed = True
            if not self.world.any(failed):
                break
            self._halve(batch)
        self.world.sum_gradients(self.parameters)
        names = sorted(found)
        return dict(zip(names, self.world.sum([found[n] for n in names]), strict=True))

    def _try_gradients(self, batch: Batch, index: int) -> dict[str, float]:
        self.chain.zero_grad(set_to_none=True)
        self.model.train()
        if self.by_rows:
            return self._weigh_rows(batch, index)
        self._reseed(index, "loss")
        found: dict[str, Tensor] = {}
        for part in _cut(batch, self.parts, self.world):
            loss, metrics = self.objective(part)
            (loss * self.world.factor).backward()
            for name, value in {**metrics, "loss": loss}.items():
                found[name] = found.get(name, 0.0) + value.detach().double()
        return {name: float(value) for name, value in found.items()}

    def _weigh_rows(self, batch: Batch, index: int) -> dict[str, float]:
        """The sum of the rows' gradients with the weights that the direction gives them."""
        parts = list(_cut(batch, _rows(batch), self.world))
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}

        def part(row: int) -> tuple[Tensor, dict[str, Tensor]]:
            self._reseed(index, f"loss of row {row}")
            loss, metrics = self.objective(parts[row])
            return loss, {**metrics, "loss": loss}

        products, losses = gram(lambda row: part(row)[0], len(parts), self.parameters)
        with torch.no_grad():
            for name, buffer in before.items():
                self.buffers[name].copy_(buffer)
        self.model.train()  # modules forget what they were shown: the passes below are the step's
        if products.isfinite().all() and losses.isfinite().all():
            weights = self.settings.direction.weights(products, losses)
        else:  # the guard shall see it
            weights = torch.full_like(losses, torch.nan)
        found: dict[str, Tensor] = {}
        for row, weight in enumerate(weights):
            loss, metrics = part(row)
            (loss * weight.to(loss.dtype)).backward()
            for name, value in metrics.items():
                found[name] = found.get(name, 0.0) + value.detach().double()
        return {name: float(value) for name, value in found.items()}

    def _halve(self, batch: Batch) -> None:
        """Answer a lack of memory with parts of half the size, from this step on."""
        self.chain.zero_grad(set_to_none=True)
        rows = _rows(batch) // self.world.size
        if self.by_rows or self.parts >= rows:
            raise Exhausted(
                f"out of memory in step {self.step + 1} with one row at a time; "
                "use shorter rows, a smaller model or bf16"
            )
        self.parts = min(2 * self.parts, rows)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _go_back(self, index: int, verdict: Verdict, loss: float, norm: float) -> None:
        """Return to the last checkpoint and go on with the data after `index`."""
        self.chain.zero_grad(set_to_none=True)
        where = f"step {self.step + 1} (data index {index})"
        words = f"{where}: {verdict}, loss {loss}, gradient norm {norm}"
        rollbacks = self.history.rollbacks + 1
        if rollbacks > self.settings.guard.rollbacks:
            raise NotFinite(
                f"{words}, after {self.settings.guard.rollbacks} returns to a checkpoint; "
                "lower the learning rate or look at these rows"
            )
        trouble, parts = max(self.step + 1, self.history.trouble), self.parts
        # Not to a checkpoint that a signal left: where training goes on must not depend on signals.
        # One that was left while `save_every` was another is better than none.
        if not (self._load(self.settings.save_every) or self._load()):
            raise Damaged(f"{self.folder} has no good checkpoint left to go back to")
        self.jump = (index + 1 - self.step) % self.settings.steps
        self.history.rollbacks, self.history.trouble = rollbacks, trouble
        self.history.streak, self.parts = 0, parts
        self._save()
        warnings.warn(
            f"{words}; going back to step {self.step} and leaving out the data up to here",
            stacklevel=2,
        )

    def _reseed(self, index: int, purpose: str) -> None:
        seed = seed_of(self.settings.seed, purpose, index, self.world.rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _load(self, every: int = 1) -> bool:
        """Take the state of the newest good checkpoint at a multiple of `every`, if any."""
        found = checkpoint.latest(self.folder, every) if self.world.first else None
        # One more than the step, so that zero means none and a sum carries it to every process.
        after = int(self.world.sum([found.step + 1 if found else 0])[0])
        if not after:
            return False
        self._restore(checkpoint.place(self.folder, after - 1))
        self._cut_back()
        return True

    def _cut_back(self) -> None:
        """Forget what was written about later steps."""
        if self.world.first:
            self.close()
            checkpoint.forget_after(self.folder, self.saved)
            self.series = Series(self.folder / "metrics.jsonl", self.step)
            self.last = self.series.last

    def _restore(self, path: Path) -> None:
        tensors, record = checkpoint.load(path)
        self.chain.load_tensors(_below(tensors, "optimizer/"))
        with torch.no_grad():
            for name, value in _below(tensors, "buffer/").items():
                self.buffers[name].copy_(value)
        self.step = self.saved = record["step"]
        self.jump, self.parts = record["jump"], max(record["parts"], self.settings.accumulate)
        self.history = History.model_validate(record["history"])
        self.task_state = record["task"]
        self.task.restore(record["task"])
        if record["machine"] != self.machine:
            changed = [k for k, v in self.machine.items() if record["machine"].get(k) != v]
            warnings.warn(
                f"{path} was made with another {', '.join(changed)}: the run goes on equivalently, "
                "not bit by bit",
                stacklevel=2,
            )

    def _save(self) -> None:
        """Publish the state after `step` steps; all processes of a sharded run take part."""
        if self.step > self.history.trouble and self.step % self.settings.save_every == 0:
            self.history.rollbacks = 0
        tensors = {f"buffer/{k}": v for k, v in self.buffers.items()}
        for key, value in self.chain.each():
            if self.world.first:
                tensors[f"optimizer/{key}"] = value.detach().cpu()
        record = {
            "step": self.step,
            "jump": self.jump,
            "parts": self.parts,
            "history": self.history.model_dump(),
            "task": self.task_state,
            "machine": self.machine,
            "identity": self.identity,
        }
        if self.series is not None:
            self.series.sync()
            keep, every = self.settings.keep, self.settings.save_every
            checkpoint.save(self.folder, self.step, tensors, record, keep, every)
        self.world.any(False)  # nobody goes on before the checkpoint is there
        self.saved = self.step


class _Objective(nn.Module):
    """The task's loss as a module, which sharding and compilation can take hold of."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(self.model, part)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **_persistent(model)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _memory(where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise Exhausted(f"out of memory {where}; make the batch smaller") from error
        raise


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _rows(batch: Batch) -> int:
    counts = {name: len(tensor) for name, tensor in batch.items() if tensor.ndim}
    if len(set(counts.values())) != 1:
        raise UserError(f"the tensors of a batch need equal numbers of rows, found {counts}")
    return next(iter(counts.values()))


def _cut(batch: Batch, parts: int, world: World) -> Iterator[Batch]:
    """This process' rows in `parts` parts, or in as many as there are rows.

    With split weights all processes have equally many: they gather each layer for each part.
    """
    rows = _rows(batch)
    if rows < world.size:
        raise UserError(f"a batch of {rows} rows cannot be shared by {world.size} processes")
    mine = torch.tensor(world.share(rows))
    most = rows // world.size if world.sharded else len(mine)
    for piece in mine.tensor_split(min(parts, most)):
        first, last = int(piece[0]), int(piece[-1]) + 1
        yield {name: t[first:last] if t.ndim else t for name, t in batch.items()}
