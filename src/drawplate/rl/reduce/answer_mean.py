"""Answer mean: the mean over an answer's tokens, then over answers.

Paper: Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3.
Deviation: answers of which a mask left no token do not count.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.reduce import Reduce


class AnswerMean(Reduce):
    """Every answer weighs the same, so a token of a long one weighs less."""

    name: Literal["answer_mean"] = "answer_mean"
    paper: ClassVar[str] = "2402.03300"

    def weight(self, keep: Tensor, limit: int) -> Tensor:
        """[B, T] -> [B, T]; sums to one."""
        length = keep.sum(1, keepdim=True)
        answers = (length > 0).sum().clamp(min=1)
        return keep / length.clamp(min=1) / answers
