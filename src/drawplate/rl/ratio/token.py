"""Token ratio: log w_t = log p(token t) - log p_old(token t).

Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347, section 3.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.ratio import Ratio


class Token(Ratio):
    """One weight a token."""

    name: Literal["token"] = "token"
    paper: ClassVar[str] = "1707.06347"

    def log(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        return (logp - old) * mask
