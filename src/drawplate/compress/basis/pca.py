"""Principal components: the k directions that carry most of the stream's energy, for every k.

C = mean of x x^T = Q diag(e) Q^T with e descending; the first k columns of Q lose the sum of the
other e, and no k orthonormal directions lose less.

Paper: Ashkboos et al. 2024, SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
arXiv:2401.15024, section 3.3.
Deviation: none.
Cost: one eigendecomposition of size D.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.compress.basis import Basis


class Pca(Basis):
    """Eigenvectors, largest eigenvalue first."""

    name: Literal["pca"] = "pca"
    paper: ClassVar[str] = "2401.15024"

    def directions(self, gram: Tensor, place: int) -> Tensor:
        """[D, D] -> [D, D]."""
        vectors: Tensor = torch.linalg.eigh(gram)[1]
        return vectors.flip(1)
