"""Axis: where answers end after all, once the whole group is known."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import Rollout


class Cut(Method):
    """Contract: judges each group by its own answers alone; an answer keeps a token or more."""

    @property
    def least(self) -> int:
        """Samples per prompt below which nothing is ever cut."""
        return 1

    @abstractmethod
    def keep(self, rollout: Rollout) -> Tensor:
        """First tokens that remain of each answer, integer [B], from 1 to all it has."""

    def applied(self, rollout: Rollout, score: Callable[[int, list[int]], float]) -> Rollout:
        """The record after the cut, as if the limit had been there while sampling.

        A cut answer did not finish, and counts what `score` (row, tokens left) says of the rest.
        """
        keep = self.keep(rollout)
        less = keep < rollout.length
        mask = rollout.mask & (rollout.mask.cumsum(1) <= keep[:, None])
        scores = rollout.score.clone()
        for row in less.nonzero().flatten().tolist():
            scores[row] = score(row, rollout.tokens[row, mask[row]].tolist())
        finished, reward = rollout.finished & ~less, scores.clone()
        return replace(rollout, mask=mask, score=scores, reward=reward, finished=finished)
