"""What the evaluate stage is asked to do, and the record of what it found."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from drawplate.core.method import Frozen, OneOf
from drawplate.evaluate.compare import Comparison
from drawplate.evaluate.cost import Cost, Machine, Probe
from drawplate.evaluate.health import Checkup, Health
from drawplate.evaluate.interval import Chance, Interval
from drawplate.evaluate.quality import Windows
from drawplate.evaluate.study import Cell, Study
from drawplate.evaluate.tasks import TaskScores
from drawplate.model.filter import TokenFilter
from drawplate.model.runtime import Runtime
from drawplate.model.runtime.plain import Plain


class Evaluate(Frozen):
    """What the evaluate stage measures, and how closely."""

    documents: PositiveInt | None = None
    """Held-out documents that are read, spread evenly over all; null reads all."""
    windows: Windows = Windows()
    """How the documents are cut."""
    problems: PositiveInt = 200
    """Held-out problems that are asked, spread evenly over all."""
    samples: PositiveInt = 8
    """Answers drawn to each problem, besides the greedy one."""
    passes: tuple[PositiveInt, ...] = Field((1, 8), min_length=1)
    """Each k of pass@k, at most `samples`."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before an answer's tokens are drawn."""
    filters: tuple[Annotated[TokenFilter, OneOf()], ...] = ()
    """Narrow what may be drawn, one after the other."""
    max_new: PositiveInt = 256
    """Most tokens of an answer."""
    batch_size: PositiveInt = 128
    """Answers that are drawn side by side."""
    seed: int = 0
    """Of the drawing."""
    runtime: Annotated[Runtime, OneOf()] = Field(Plain(), exclude_if=lambda it: it == Plain())
    """How models compute, never what; those that it does not fit run plain."""
    chance: Chance = Chance()
    """How intervals are made."""
    health: Health = Health()
    """What answers may suffer from in a model that is fit to be shown."""
    probe: Probe | None = Probe()
    """How memory and speed are measured; null leaves them out."""
    study: Study | None = Field(None, exclude_if=lambda it: it is None)
    """Ways to draw that are compared on the last model; null: none."""

    @model_validator(mode="after")
    def _drawn(self) -> Evaluate:
        if max(self.passes) > self.samples:
            raise ValueError(f"pass@{max(self.passes)} needs more than {self.samples} samples")
        return self


class Quality(Frozen):
    """Held-out text."""

    documents: int
    tokens: int
    """Predicted ones: every token of every document, its end token included."""
    bytes: int
    bits_per_byte: Interval
    """Documents resampled."""
    nats_per_token: float
    perplexity: float
    window: int
    """Most tokens that a prediction was made from: as asked for, cut to the model's context."""


class Row(Frozen):
    """What was found about one model."""

    name: str
    parent: str | None
    hash: str | None
    """Content hash of its folder; None for a folder without a manifest."""
    quality: Quality
    divergence: float | None
    """Mean KL(parent || model) of a held-out token in nats; None without a parent."""
    tasks: TaskScores
    families: dict[str, TaskScores]
    """By kind of problem."""
    cost: Cost

    def figures(self) -> dict[str, float]:
        """Flat figures by name; those that do not exist are left out."""
        found: dict[str, float | None] = {
            **self.quality.bits_per_byte.figures("bits_per_byte"),
            "nats_per_token": self.quality.nats_per_token,
            "perplexity": self.quality.perplexity,
            "divergence": self.divergence,
            **self.tasks.figures(),
            "stored_bytes": self.cost.stored_bytes,
            "macs": self.cost.macs,
        }
        for family, scores in self.families.items():
            found |= {f"task.{family}.{key}": value for key, value in scores.figures().items()}
        return {name: float(value) for name, value in found.items() if value is not None}


class Pair(Frozen):
    """A model beside its parent."""

    parent: str
    child: str
    comparisons: tuple[Comparison, ...]


class Report(Frozen):
    """What one evaluation found. All but `machine` is the same in every run of the same inputs."""

    params: Evaluate
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    checkups: tuple[Checkup, ...]
    """Whether each model's answers are fit to be shown, in the order of `rows`."""
    baselines: dict[str, float]
    """Bits per byte of other ways to predict the same text."""
    machine: dict[str, Machine]
    """Memory and speed by model; empty where they were left out."""
    unfit: dict[str, str] = Field({}, exclude_if=lambda it: not it)
    """Models that ran plain since the runtime does not fit them, each with the reason."""
    study: tuple[Cell, ...] = Field((), exclude_if=lambda it: not it)
    """The last model by way to draw; empty where that was not asked for."""

    def metrics(self) -> dict[str, float]:
        """Flat figures `model.figure`; of a pair `child.vs_parent.metric.figure`, parent by name.

        A verdict is 1 for better, -1 for worse, 0 for within noise; `healthy` is 1 or 0.
        """
        found = {f"baseline.{name}.bits_per_byte": value for name, value in self.baselines.items()}
        for row in self.rows:
            found |= {f"{row.name}.{key}": value for key, value in row.figures().items()}
        for each in self.checkups:
            found[f"{each.name}.empty"] = each.empty
            found[f"{each.name}.looping"] = each.looping
            found[f"{each.name}.healthy"] = float(each.healthy)
        for cell in self.study:
            name = f"{self.rows[-1].name}.study"
            found |= {f"{name}.{key}": value for key, value in cell.figures().items()}
        signs = {"better": 1.0, "worse": -1.0, "within noise": 0.0}
        for pair in self.pairs:
            for one in pair.comparisons:
                name = f"{pair.child}.vs_{pair.parent}.{one.metric}"
                found[f"{name}.difference"] = one.difference.value
                found[f"{name}.p"] = one.p
                found[f"{name}.adjusted_p"] = one.adjusted
                found[f"{name}.verdict"] = signs[one.verdict]
        return found

    def headlines(self) -> dict[str, float]:
        """The figures that a table of many runs has room for.

        Of a model all but interval ends, kinds of problem and restatements of its loss; of a pair
        the differences and verdicts.
        """
        dropped = ("_low", "_high", ".p", ".adjusted_p", ".nats_per_token", ".perplexity")
        return {
            name: value
            for name, value in (self.metrics() | self.machine_metrics()).items()
            if ".task." not in name and not name.endswith((*dropped, ".problems", ".threads"))
        }

    def machine_metrics(self) -> dict[str, float]:
        """Flat figures of memory and speed, which differ from run to run."""
        return {
            f"{name}.{key}": float(value)
            for name, machine in self.machine.items()
            for key, value in machine.figures().items()
        }
