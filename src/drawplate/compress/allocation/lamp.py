"""LAMP: units are ranked by how much they are of what survives together with them.

With a layer's units ordered by energy, e_1 <= e_2 <= ..., unit u scores e_u / sum of e_v over v
>= u; all layers share one threshold. The best unit of every layer scores 1 and always stays.

Paper: Lee et al. 2021, Layer-adaptive sparsity for the Magnitude-based Pruning, arXiv:2010.07611,
equation 4.
Deviation: a unit is what the method removes at once (one rank; one weight in each row), its energy
what the chosen score or factor says of it; a step over several units has their mean score.
Cost: O(levels).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile


class Lamp(Allocation):
    """Energy gained by a step over all energy kept after it."""

    name: Literal["lamp"] = "lamp"
    paper: ClassVar[str] = "2010.07611"
    needs: ClassVar[frozenset[str]] = frozenset({"error"})

    def prices(self, layers: Sequence[Profile]) -> list[Tensor]:
        """Scores [L - 1] of each layer, in [0, 1]."""
        return [_scores(layer) for layer in layers]


def _scores(layer: Profile) -> Tensor:
    kept = layer.energy - layer.error
    gained = kept.diff() / layer.units.diff()
    return (gained / kept[1:]).where(kept[1:] > 0, 0)
