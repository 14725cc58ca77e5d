"""Four-way clipped importance weights: stop_gradient(clip(w, 1 - down, 1 + up)) A log p.

`down` and `up` are one pair for right answers (A > 0) and another for wrong ones (A < 0).

Paper: Karaman et al. 2026, DISPO, arXiv:2602.00983: for right answers weights above one explore and
those below one distil, both good in measure; for wrong answers tight bounds make training collapse,
above one into repetition and below one into ever shorter answers.
Deviation: none in the formula; the defaults are the paper's values as later summaries give them.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, where

from drawplate.rl.surrogate import Surrogate


class Dispo(Surrogate):
    """Bounds the weight by what the answer was worth, and keeps every token's gradient."""

    name: Literal["dispo"] = "dispo"
    paper: ClassVar[str] = "2602.00983"
    right_down: float = Field(default=0.2, gt=0, le=1)
    """How far below one the weight of a right answer's token may be; 1 is no bound."""
    right_up: PositiveFloat = 10.0
    """How far above one."""
    wrong_down: float = Field(default=1.0, gt=0, le=1)
    """How far below one the weight of a wrong answer's token may be; 1 is no bound."""
    wrong_up: PositiveFloat = 100.0
    """How far above one."""

    def value(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        return self._bounded(log_ratio.exp(), advantage).detach() * advantage * logp

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 2 -> bool [B, T]."""
        weight = log_ratio.exp()
        return (self._bounded(weight, advantage) != weight) & (advantage != 0)

    def _bounded(self, weight: Tensor, advantage: Tensor) -> Tensor:
        right = weight.clamp(1 - self.right_down, 1 + self.right_up)
        wrong = weight.clamp(1 - self.wrong_down, 1 + self.wrong_up)
        return where(advantage > 0, right, wrong)
