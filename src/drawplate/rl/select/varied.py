"""Dynamic sampling on rewards: keep groups whose shaped rewards differ, draw more for the rest.

Paper: Liu et al. 2025, DLER: Doing Length pEnalty Right, arXiv:2510.15110, where an answer cut at
the limit counts as wrong before groups are judged; after DAPO, arXiv:2503.14476, eq. 11.
Deviation: at most `attempts` draws, after which the batch stays smaller.
Cost: up to `attempts` times the sampling.
"""

from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from drawplate.rl.rollout import Rollout
from drawplate.rl.select import Select, varies


class Varied(Select):
    """Judges by what the advantage will see: a group of equal rewards teaches nothing."""

    name: Literal["varied"] = "varied"
    paper: ClassVar[str] = "2510.15110"
    attempts: PositiveInt = 10
    """Most draws for one batch."""

    def keep(self, rollout: Rollout) -> Tensor:
        """[P]."""
        return varies(rollout.grouped(rollout.reward))

    def draws(self) -> int:
        """`attempts`."""
        return self.attempts
