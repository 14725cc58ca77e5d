"""Min-p: tokens at least a given fraction as likely as the likeliest.

Paper: Nguyen, Baker, Neo, Roush, Kirsch, Shwartz-Ziv 2024, Turning Up the Heat: Min-p Sampling for
Creative and Coherent LLM Outputs, arXiv:2407.01082, section 3.1.
Deviation: none.
Cost: O(V) a row.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.model.filter import TokenFilter


class MinP(TokenFilter):
    """Keep token v when p(v) >= share * max p, that is logit(v) >= max logit + log share."""

    name: Literal["min_p"] = "min_p"
    paper: ClassVar[str] = "2407.01082"

    share: float = Field(0.1, gt=0, le=1)
    """Least probability relative to the likeliest token; the paper's base value is 0.1."""

    def keep(self, logits: Tensor) -> Tensor:
        """[B, V] -> bool [B, V]."""
        return logits >= logits.amax(-1, keepdim=True) + math.log(self.share)
