"""A model of 0.05 M weights with dropout, a task for it, and runs of both."""

import hashlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.core.method import leaves
from drawplate.core.seeds import generator
from drawplate.train import checkpoint, series
from drawplate.train.guard import Guard
from drawplate.train.loop import Batch, Outcome, Training, train
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.schedule import Schedule
from drawplate.train.transform import Transform

VOCABULARY = 64


class Layer(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Decoder(nn.Module):
    """Embedding, residual blocks, head; every token sees the mean of those before it."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen += len(tokens)
        x = self.embedding(tokens)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x.dtype)[:, None]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(width: int = 48, depth: int = 3, dropout: float = 0.1) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(width, depth)
    for layer in made.layers:
        layer.dropout.p = dropout
    return made


class Toy:
    """Count upwards from a random token; `batch` keeps a running state, as RL does."""

    def __init__(self, rows: int = 6, length: int = 12, trouble: Mapping[int, str] | None = None):
        self.rows, self.length, self.trouble = rows, length, dict(trouble or {})
        self.drawn = 0
        self.calls: list[int] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"rows": self.rows, "length": self.length}

    def batch(self, step: int) -> Batch:
        self.calls.append(step)
        draw = generator("toy", step, self.drawn % 7)
        self.drawn += 1
        start = torch.randint(0, VOCABULARY, (self.rows, 1), generator=draw)
        rows = (start + torch.arange(self.length + 1)) % VOCABULARY
        rows[:, 1::5] = torch.randint(0, VOCABULARY, rows[:, 1::5].shape, generator=draw)
        factor = {"nan loss": torch.nan, "inf loss": torch.inf, "spike": 1e4}
        trouble = self.trouble.get(step, "")
        return {
            "rows": rows,
            "count": torch.tensor(float(self.rows * self.length)),
            "factor": torch.tensor(factor.get(trouble, 1.0)),
            "poison": torch.tensor({"nan gradient": torch.nan}.get(trouble, 0.0)),
        }

    def loss(self, model: nn.Module, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, targets = part["rows"][:, :-1], part["rows"][:, 1:]
        logits = model(tokens).float()
        losses = nn.functional.cross_entropy(logits.mT, targets, reduction="sum")
        loss = losses * part["factor"] / part["count"]
        poison = part["poison"]
        if poison.isnan():
            next(iter(model.parameters())).register_hook(_Once(poison))
        return loss, {"tokens": torch.tensor(float(tokens.numel()))}

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]


class _Once:
    """A gradient hook that acts on one backward pass."""

    def __init__(self, poison: Tensor) -> None:
        self.poison: Tensor | None = poison

    def __call__(self, gradient: Tensor) -> Tensor | None:
        poison, self.poison = self.poison, None
        if poison is None:
            return None
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = poison
        return spoilt


class Hungry(Toy):
    """Runs out of memory with more than `most` rows in a part."""

    def __init__(self, most: int, error: BaseException) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.seen: list[Tensor] = []

    def loss(self, model: nn.Module, part: Any) -> Any:
        loss, metrics = super().loss(model, part)
        if len(part["rows"]) > self.most:
            loss.register_hook(self._fail)
        self.seen.append(part["rows"])
        return loss, metrics

    def _fail(self, gradient: Tensor) -> None:
        raise self.error


def leaf(axis: type, name: str, **fields: Any) -> Any:
    return leaves(axis)[name](**fields)


def settings(**given: Any) -> Training:
    muon = tuple(leaf(Transform, n) for n in ("nesterov", "orthogonalize", "match_rms"))
    known: dict[str, Any] = {
        "steps": 24,
        "save_every": 4,
        "precision": "float32",
        "schedule": leaf(Schedule, "cosine", warmup=0.2),
        "optimizer": Optimizer(
            matrices=Group(rate=0.01, decay=0.1, transforms=muon),
            rest=Group(rate=0.01, transforms=(leaf(Transform, "adam"),)),
        ),
        "guard": Guard(patience=3, rollbacks=2, window=8),
    }
    return Training(**known | given)


def run(work: str | Path, task: Toy | None = None, watch: Any = None, **given: Any) -> Outcome:
    """Train the toy in `work`, or go on with it."""
    torch.set_num_threads(1)
    more = {} if watch is None else {"watch": watch}
    return train(model(), task or Toy(), settings(**given), Path(work), **more)


def warm() -> None:
    """Everything that happens once in a process."""
    with tempfile.TemporaryDirectory() as work:
        run(work, steps=2, save_every=1)
        run(work, steps=2, save_every=1)


def warm_naive() -> None:
    """The same for the control."""
    with tempfile.TemporaryDirectory() as work:
        naive_run(work, steps=2)
        naive_run(work, steps=3)


def long_run(work: str) -> None:
    """What is killed again and again."""
    run(work, steps=60, save_every=3)


def readable(work: str) -> bool:
    """Whether there is a good checkpoint, once there is one at all."""
    folders = (
        [path for path in Path(work).iterdir() if path.is_dir()] if Path(work).exists() else []
    )
    for folder in folders:
        # A first checkpoint that was never finished is absent, not unreadable.
        if not checkpoint.generations(folder):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                checkpoint.latest(folder)
        except (Damaged, UserWarning):
            return False
    return True


def digest(outcome: Outcome) -> tuple[str, str]:
    """sha256 of the last checkpoint's bytes and of the metric series without clocks."""
    path = checkpoint.place(outcome.folder, outcome.steps)
    state = b"".join(p.read_bytes() for p in sorted(path.iterdir()))
    rows = repr(series.read(outcome.metrics)).encode()
    return hashlib.sha256(state).hexdigest(), hashlib.sha256(rows).hexdigest()


def naive_run(work: str, steps: int = 60) -> None:
    """The control: the same steps, saved the usual way into one file in place."""
    torch.set_num_threads(1)
    file = Path(work) / "state.pt"
    net, task = model(width=192), Toy()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    start = 0
    if file.exists():
        state = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        torch.manual_seed(step)
        loss, _ = task.loss(net, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, file)


def naive_readable(work: str) -> bool:
    """Whether the control's file can be loaded, once it is there."""
    file = Path(work) / "state.pt"
    if not file.exists():
        return True
    try:
        torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    except Exception:
        return False
    return True


def one_save(work: str) -> None:
    """The second checkpoint of a folder, after which the first is deleted."""
    checkpoint.save(Path(work), 2, {"w": torch.full((64,), 2.0)}, {"step": 2}, keep=1)


def first_save(work: str) -> None:
    """A folder with one checkpoint."""
    folder = Path(work)
    for generation in checkpoint.generations(folder):
        if generation.step != 1:
            shutil.rmtree(generation.path)
    checkpoint.save(folder, 1, {"w": torch.full((64,), 1.0)}, {"step": 1}, keep=1)


def found(work: str, failed: bool) -> str:
    """Which checkpoint a reader takes, and whether its tensors and its record agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generation = checkpoint.latest(Path(work))
    if generation is None:
        return "nothing"
    tensors, record = checkpoint.load(generation.path)
    whole = torch.equal(tensors["w"], torch.full((64,), float(record["step"])))
    return f"{generation.step if whole else 'mixed'}, {'failed' if failed else 'done'}"
