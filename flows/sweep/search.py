"""Which trial comes next: the next point of a grid, or what Optuna suggests."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from drawplate.core.errors import UserError
from flows.sweep.goals import Bound, Goal, Metrics
from flows.sweep.space import Axis, Choices, Span, grid, points


class Search(Protocol):
    """Hands out settings, one trial after another."""

    total: int
    """How many trials there will be."""

    def ready(self, asked: int, told: int) -> bool:
        """Whether the next trial can be asked for when the first `told` are known."""
        ...

    def ask(self) -> dict[str, str]:
        """Settings of the next trial: key -> YAML."""
        ...

    def tell(self, number: int, metrics: Metrics | None) -> None:
        """What came of a trial, in the order of asking; None where it failed."""
        ...


class Grid:
    """Every combination, those that differ early in the pipeline first."""

    def __init__(self, axes: Sequence[Axis], order: Sequence[str]):
        by_key = {axis.key: points(axis) for axis in axes}
        self.left = deque(grid([(key, by_key[key]) for key in order]))
        self.keys = list(by_key)
        self.total = len(self.left)

    def ready(self, asked: int, told: int) -> bool:
        """Nothing has to be known."""
        return bool(self.left)

    def ask(self) -> dict[str, str]:
        """The next combination, keys as the user wrote them."""
        point = self.left.popleft()
        return {key: point[key] for key in self.keys}

    def tell(self, number: int, metrics: Metrics | None) -> None:
        """A grid does not learn."""


class Study:
    """Optuna's tree-structured Parzen estimator, for one goal or several, with constraints.

    Paper: Watanabe 2023, arXiv 2304.11127. What it suggests as trial k follows from seed, `jobs`
    and the results of trials 0 to k - jobs, whichever ends first: a repeated call asks the same.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        goals: Sequence[Goal],
        keep: Sequence[Bound],
        total: int,
        seed: int,
        jobs: int,
    ):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "a search needs Optuna: pip install 'drawplate[sweep]'; a grid does not"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.axes, self.goals, self.keep = axes, goals, keep
        self.total, self.jobs = total, jobs
        self.space: dict[str, Any] = {axis.key: distribution(axis) for axis in axes}
        self.study = optuna.create_study(
            directions=["minimize"] * len(goals), sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self.failed = optuna.trial.TrialState.FAIL
        self.trials: list[Any] = []
        self.known: list[Metrics | None] = []
        self.learnt = 0

    def ready(self, asked: int, told: int) -> bool:
        """Fewer than `jobs` trials are unknown."""
        return asked < self.total and asked - told < self.jobs

    def ask(self) -> dict[str, str]:
        """What Optuna suggests, knowing just the trials that `jobs` allows for."""
        while self.learnt <= len(self.trials) - self.jobs:
            self._learn(self.learnt)
            self.learnt += 1
        trial = self.study.ask(self.space)
        self.trials.append(trial)
        values: Mapping[str, Any] = trial.params
        return {
            axis.key: axis.text(values[axis.key]) if isinstance(axis, Span) else values[axis.key]
            for axis in self.axes
        }

    def tell(self, number: int, metrics: Metrics | None) -> None:
        """Keeps what came of it until the trial that may know it is asked for."""
        assert number == len(self.known)
        self.known.append(metrics)

    def _learn(self, number: int) -> None:
        trial, metrics = self.trials[number], self.known[number]
        if metrics is None:
            self.study.tell(trial, state=self.failed)
            return
        for place, bound in enumerate(self.keep):
            trial.set_constraint(str(place), bound.excess(metrics))
        self.study.tell(trial, [goal.loss(metrics) for goal in self.goals])


def distribution(axis: Axis) -> Any:
    """An axis in Optuna's words."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(axis, Choices):
        return CategoricalDistribution(axis.values)
    high = axis.high
    if axis.step is not None:
        high = axis.low + (axis.high - axis.low) // axis.step * axis.step
    if axis.whole:
        step = int(axis.step or 1)
        return IntDistribution(int(axis.low), int(high), log=axis.log, step=step)
    width = None if axis.step is None else float(axis.step)
    return FloatDistribution(float(axis.low), float(high), log=axis.log, step=width)


def apart(axes: Sequence[Axis], search: Search) -> frozenset[str]:
    """Keys of which a search takes every value once, as good as surely: ranges of fractions."""
    if isinstance(search, Grid):
        return frozenset()
    return frozenset(
        axis.key for axis in axes if isinstance(axis, Span) and not axis.whole and axis.step is None
    )
