"""Completion: two thin factors from those entries of a matrix that count."""

from abc import abstractmethod

import torch
from torch import Tensor

from drawplate.core.linalg import left_basis, require_finite
from drawplate.core.method import Method


class Completion(Method):
    """Contract: on the entries that count, the product errs no more than that of `zero_filled`.

    What stands at the other entries has no influence.
    """

    @abstractmethod
    def complete(self, matrix: Tensor, counts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """[O, I], bool [O, I] -> (second [O, r], first [r, I]) in the dtype of `matrix`."""


def zero_filled(matrix: Tensor, counts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of rank r where entries that do not count are zeros, float64.

    Raises:
        NotFinite: an entry that counts is NaN or infinite.
    """
    zeroed = matrix.double().where(counts, 0)
    require_finite("matrix", zeroed)
    basis = left_basis(zeroed)[0][:, :rank]
    return basis, torch.as_tensor(basis.T @ zeroed)
