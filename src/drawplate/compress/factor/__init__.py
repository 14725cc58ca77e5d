"""Factor: how one matrix becomes the product of two thinner ones."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.linalg import energies, left_basis
from drawplate.core.method import Method
from drawplate.core.stats import Stats


class Factor(Method):
    """Contract: of all W' of rank r, `split` gives the one with the least |scaled(W - W')|^2.

    With U the first r left singular vectors of `scaled(W)` = W S, S invertible, that W' is U U^T W:
    outputs are projected on the r directions that carry most of what the leaf's scaling S measures.
    A leaf only says what S is. `second` = U is orthonormal, so `first` = U^T W is no larger than W.
    """

    @abstractmethod
    def scaled(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> W S [O, I], float64; its squared entries sum to the error that is minimised."""

    def split(self, weight: Tensor, stats: Stats, rank: int) -> tuple[Tensor, Tensor]:
        """[O, I] -> (second [O, r], first [r, I]) in the dtype of `weight`; W' = second @ first."""
        basis = left_basis(self.scaled(weight, stats))[0][:, :rank]
        return basis.to(weight.dtype), (basis.T @ weight.double()).to(weight.dtype)

    def spectrum(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> [min(O, I)] float64, largest first: what each further rank takes off the error.

        The error of `split` at rank r is the sum of the entries from r on.
        """
        return energies(self.scaled(weight, stats))
