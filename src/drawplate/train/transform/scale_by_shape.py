"""Scale by shape: multiply a matrix step by sqrt(max(1, O / I)).

An orthogonal step changes the outputs of a tall matrix less than those of a wide one; this evens
it out.

Paper: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks (no arXiv id);
the spectral argument is Bernstein, Newhouse 2024, Old Optimizer, New Norm, arXiv:2409.20325.
Deviation: the factor never falls below one, as in Jordan's code.
Cost: one pass, no memory.
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.train.transform import Memory, Transform


class ScaleByShape(Transform):
    """Larger steps for matrices with more outputs than inputs."""

    name: Literal["scale_by_shape"] = "scale_by_shape"
    paper: ClassVar[str] = "2409.20325"
    needs: ClassVar[frozenset[str]] = frozenset({"matrix"})

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ..., O, I] -> [N, ..., O, I], in units of the direction."""
        outputs, inputs = direction.shape[-2:]
        return direction * max(1.0, outputs / inputs) ** 0.5, memory
