"""The axis of optimizer parts: gradients in, steps out, one small formula each.

An optimizer is a chain of these (`drawplate.train.optimizer.Chain`): AdamW is `[adam]`, Muon is
`[nesterov, orthogonalize, scale_by_shape]`, LAMB is `[adam, trust_ratio]`, plain gradient descent
is the empty chain. Learning rate, weight decay, precision and the loop over parameters live in the
chain, once for all of them.
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from drawplate.core.method import Method

Memory = dict[str, Tensor]
"""What a transform remembers between steps; the first dimension of every tensor is N."""


class Transform(Method):
    """One link of a chain.

    Every tensor has a leading dimension N: independent parameters of equal shape, handled together.
    Row n of a result may depend on row n of the arguments only, so a stack equals a loop. Matrices
    are the last two dimensions, O outputs by I inputs.

    `needs` may name "whole": a parameter that is split over processes has to be gathered first; and
    "matrix": it means nothing for vectors, and has to be gathered too.
    """

    coarse: ClassVar[bool] = False
    """Whether directions may come in the parameters' own precision, 16 bits where they have 16."""

    def init(self, parameter: Tensor) -> Memory:
        """[N, ...] -> the memory before the first step."""
        return {}

    @abstractmethod
    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...], memory, [N, ...] -> [N, ...] to be subtracted times the rate, next memory."""


def spread(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ..., 1] in the dtype of `like`, to multiply something shaped like it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
