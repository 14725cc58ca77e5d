"""Dynamic sampling: keep groups with right and wrong answers, draw more prompts for the rest.

Paper: Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 11: 0 < number of right answers < G.
Deviation: graded scores count as mixed when they differ; at most `attempts` draws, after which the
batch stays smaller.
Cost: up to `attempts` times the sampling.
"""

from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from drawplate.rl.rollout import Rollout
from drawplate.rl.select import Select, varies


class Mixed(Select):
    """Judges by the verifier's scores, before shaping."""

    name: Literal["mixed"] = "mixed"
    paper: ClassVar[str] = "2503.14476"
    attempts: PositiveInt = 10
    """Most draws for one batch."""

    def keep(self, rollout: Rollout) -> Tensor:
        """[P]."""
        return varies(rollout.grouped(rollout.score))

    def draws(self) -> int:
        """`attempts`."""
        return self.attempts
