"""Every group is kept.

Cost: none.
"""

from typing import Literal

from torch import Tensor, ones_like

from drawplate.rl.rollout import Rollout
from drawplate.rl.select import Select


class Every(Select):
    """One draw, nothing dropped."""

    name: Literal["every"] = "every"

    def keep(self, rollout: Rollout) -> Tensor:
        """[P], all True."""
        return ones_like(rollout.grouped(rollout.group)[:, 0]).bool()
