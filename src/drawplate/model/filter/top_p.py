"""Top-p, or nucleus: the fewest likeliest tokens that together have probability p.

Paper: Holtzman, Buys, Du, Forbes, Choi 2019, The Curious Case of Neural Text Degeneration,
arXiv:1904.09751, equation 2.
Deviation: tokens as likely as the last one of the nucleus are kept as well.
Cost: O(V log V) a row, a sort.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.model.filter import TokenFilter


class TopP(TokenFilter):
    """Keep the smallest set of likeliest tokens with sum of probabilities >= p."""

    name: Literal["top_p"] = "top_p"
    paper: ClassVar[str] = "1904.09751"

    p: float = Field(0.95, gt=0, le=1)
    """Probability that the kept tokens must reach; the paper uses 0.95."""

    def keep(self, logits: Tensor) -> Tensor:
        """[B, V] -> bool [B, V]."""
        rising = logits.sort().values
        upto = rising.softmax(-1).cumsum(-1)  # probability of this token and all less likely ones
        size = (upto > 1 - self.p).sum(-1, keepdim=True).clamp(min=1)
        return logits >= rising.gather(-1, logits.shape[1] - size)
