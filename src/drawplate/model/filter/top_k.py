"""Top-k: the k likeliest tokens.

Paper: Fan, Lewis, Dauphin 2018, Hierarchical Neural Story Generation, arXiv:1805.04833,
section 5.1.
Deviation: tokens as likely as the k-th are kept as well.
Cost: O(V log k) a row.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.model.filter import TokenFilter


class TopK(TokenFilter):
    """Keep the tokens whose logit is at least the k-th largest of the row."""

    name: Literal["top_k"] = "top_k"
    paper: ClassVar[str] = "1805.04833"

    k: int = Field(10, ge=1)
    """How many tokens stay; the paper uses 10."""

    def keep(self, logits: Tensor) -> Tensor:
        """[B, V] -> bool [B, V]."""
        least = logits.topk(min(self.k, logits.shape[1])).values[:, -1:]
        return logits >= least
