"""The axis of learning rate schedules: how far into the run -> which share of the peak rate."""

from abc import abstractmethod

from pydantic import Field

from drawplate.core.method import Method


class Schedule(Method):
    """A linear warm-up, then the leaf's shape over what is left of the run."""

    warmup: float = Field(0.02, ge=0, le=1)
    """Share of all steps in which the rate climbs from zero to its peak."""

    @abstractmethod
    def shape(self, done: float) -> float:
        """Share of the steps after the warm-up that is done, in [0, 1) -> share of the peak."""

    def factor(self, step: int, total: int) -> float:
        """Share of the peak rate at `step` = 0 ... total - 1; never zero at the first step."""
        climb = round(self.warmup * total)
        if step < climb:
            return (step + 1) / climb
        return self.shape((step - climb) / max(total - climb, 1))
