"""Divergence from the start: q - log q - 1 with q = p_reference / p, which estimates the KL.

Paper: Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 4; a note by Schulman has it as the
third of three estimators.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.penalty import Penalty, divergence
from drawplate.rl.rollout import Rollout


class K3(Penalty):
    """Never negative, zero where the policy still is what it was."""

    name: Literal["k3"] = "k3"
    paper: ClassVar[str] = "2402.03300"

    def value(self, rollout: Rollout) -> Tensor:
        """[B, T]."""
        return divergence(rollout.logp, rollout.reference)
