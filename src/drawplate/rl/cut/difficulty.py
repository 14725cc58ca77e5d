"""Difficulty-aware truncation: the more of a prompt's answers are right, the tighter their limit.

A group whose share of right answers has passed i of the `levels` is cut at shares[i] x limit.

Paper: Liu et al. 2025, DLER: Doing Length pEnalty Right, arXiv:2510.15110, section 3.5 (DA-DLER):
4000 tokens, or 2000 where at least half of the answers are right.
Deviation: lengths are shares of the limit, so that they follow a limit that changes. An answer
counts as right as far as its score goes, if it ended by itself.
Cost: O(B), and the verifier once more for each answer that is cut.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, bucketize, minimum, tensor

from drawplate.rl.cut import Cut
from drawplate.rl.rollout import Rollout

Share = Annotated[float, Field(gt=0, le=1)]


class Difficulty(Cut):
    """What the model can do reliably it has to do in fewer tokens."""

    name: Literal["difficulty"] = "difficulty"
    paper: ClassVar[str] = "2510.15110"
    levels: tuple[Share, ...] = (0.5,)
    """Shares of right answers, rising, at which a prompt becomes easier."""
    shares: tuple[Share, ...] = (1.0, 0.5)
    """Parts of the limit for prompts below the first level, from it on, and so forth; falling."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.shares) != len(self.levels) + 1:
            raise ValueError(f"{len(self.levels)} levels take {len(self.levels) + 1} shares")
        if sorted(set(self.levels)) != list(self.levels):
            raise ValueError(f"levels have to rise, {list(self.levels)} do not")
        if sorted(self.shares, reverse=True) != list(self.shares):
            raise ValueError(f"shares have to fall, {list(self.shares)} do not")
        return self

    def keep(self, rollout: Rollout) -> Tensor:
        """[B]."""
        right = rollout.grouped(rollout.score * rollout.finished).double().mean(1)
        tier = bucketize(right, right.new_tensor(self.levels), right=True)
        limits = [max(1, int(share * rollout.limit)) for share in self.shares]
        length = rollout.length
        own = tensor(limits, device=length.device)[tier, None].expand_as(rollout.grouped(length))
        return minimum(length, own.flatten())
