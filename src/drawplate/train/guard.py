"""Keep bad numbers out of the weights: skip a step, then go back, then stop.

A step is bad if its loss or gradient norm is NaN or infinite, or if one of them lies more than
`spike` standard deviations above the mean of the last `window` finite ones (the rule of OLMo-core's
skip-step optimizer). Going back and leaving out the data in between is the practice of PaLM
(Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). Spikes alone never stop a run: once going
back did not help, they are taken for a new level.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from drawplate.core.method import Frozen

Verdict = Literal["good", "spike", "not finite"]


class History(BaseModel):
    """What the guard remembers; part of every checkpoint. Finite values only."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    losses: list[float] = []
    """Losses of the last steps."""
    norms: list[float] = []
    """Gradient norms of the last steps, before clipping."""
    streak: int = 0
    """Bad steps in a row."""
    skipped: int = 0
    """Steps of this run that left the weights alone."""
    rollbacks: int = 0
    """Returns to a checkpoint since training last got past the trouble."""
    trouble: int = 0
    """The step at which training last went back."""


class Guard(Frozen):
    """When to skip a step and when to go back."""

    patience: int = Field(3, ge=1)
    """Bad steps in a row before training goes back to the last checkpoint."""
    rollbacks: int = Field(2, ge=0)
    """Returns to the same trouble before training stops."""
    spike: float = Field(6.0, ge=0)
    """Standard deviations above the mean at which a finite value is bad; 0 turns this off."""
    window: int = Field(128, ge=2)
    """Steps whose values count; the rule starts when half of them are known."""

    def judge(self, history: History, loss: float, norm: float) -> Verdict:
        """Look at one step and remember it, spikes included, so that levels may change."""
        verdict: Verdict = "good"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            verdict = "not finite"
        else:
            helpless = history.rollbacks >= self.rollbacks and history.streak + 1 >= self.patience
            outlier = self._outlier(history.losses, loss) or self._outlier(history.norms, norm)
            if outlier and not helpless:
                verdict = "spike"
            for seen, value in ((history.losses, loss), (history.norms, norm)):
                seen.append(value)
                del seen[: -self.window]
        history.streak = 0 if verdict == "good" else history.streak + 1
        history.skipped += verdict != "good"
        return verdict

    def _outlier(self, seen: list[float], value: float) -> bool:
        if not self.spike or 2 * len(seen) < self.window:
            return False
        mean = math.fsum(seen) / len(seen)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in seen) / len(seen))
        return deviation > 0 and value > mean + self.spike * deviation
