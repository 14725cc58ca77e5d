"""Match RMS: multiply an orthogonal step by rms * sqrt(max(O, I)), to be as large as Adam's.

An O x I matrix with unit singular values has root mean square 1 / sqrt(max(O, I)); AdamW's steps
have about 0.2 to 0.4. With this factor one learning rate and one decay serve both.

Paper: Liu et al. 2025, Muon is Scalable for LLM Training, arXiv:2502.16982, sec. 2.2.
Deviation: none.
Cost: one pass, no memory.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform


class MatchRms(Transform):
    """Give every orthogonalised matrix the same root mean square."""

    name: Literal["match_rms"] = "match_rms"
    paper: ClassVar[str] = "2502.16982"
    needs: ClassVar[frozenset[str]] = frozenset({"matrix"})

    rms: float = Field(0.2, gt=0, le=10)
    """Root mean square of a full-rank orthogonal step after scaling."""

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ..., O, I] -> [N, ..., O, I], in units of the direction."""
        return direction * (self.rms * max(direction.shape[-2:]) ** 0.5), memory
