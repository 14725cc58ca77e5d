"""Random: directions drawn evenly from all rotations, whatever the stream carries.

A matrix of independent normal numbers is Q R with R's diagonal positive; Q is Haar-distributed.

Paper: Mezzadri 2006, How to Generate Random Matrices from the Classical Compact Groups,
arXiv:math-ph/0609050, section 5 (doi:10.48550/arXiv.math-ph/0609050).
Deviation: none; the baseline of a rotation that knows nothing.
Cost: one QR decomposition of size D.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.basis import Basis
from drawplate.core.seeds import generator


class Random(Basis):
    """Q of a random normal matrix."""

    name: Literal["random"] = "random"
    paper: ClassVar[str] = "10.48550/arXiv.math-ph/0609050"

    seed: int = Field(0, ge=0)
    """Of the rotations, each place having one of its own."""

    def directions(self, gram: Tensor, place: int) -> Tensor:
        """[D, D] -> [D, D]."""
        draw = generator(self.seed, "basis", place)
        normal = torch.randn(gram.shape, generator=draw, dtype=gram.dtype)
        frame, upper = torch.linalg.qr(normal)
        turned: Tensor = frame * upper.diagonal().sign()
        return turned.to(gram.device)
