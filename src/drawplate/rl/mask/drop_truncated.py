"""Overlong filtering: answers that were cut at the token limit do not take part.

Those that go on in a later batch were not cut: their tokens are learned from now or never.

Paper: Yu et al. 2025, DAPO, arXiv:2503.14476, section 3.4: whether a cut answer was on its way to a
right result is unknown, so its reward is noise.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.mask import Mask
from drawplate.rl.rollout import Rollout


class DropTruncated(Mask):
    """Only answers that finished, or still can, are learned from."""

    name: Literal["drop_truncated"] = "drop_truncated"
    paper: ClassVar[str] = "2503.14476"

    def weight(self, rollout: Rollout) -> Tensor:
        """[B, T]."""
        return rollout.spread((rollout.finished | rollout.going).to(rollout.logp.dtype))
