"""One width for all layers, the widest that fits.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, and most others: one width a model.
Cost: O(layers widths).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from drawplate.quantize.allocation import Allocation, Choice, require_room


class Uniform(Allocation):
    """The last of the widths at which all layers together stay within the budget."""

    name: Literal["uniform"] = "uniform"
    paper: ClassVar[str] = "2210.17323"

    def choose(self, layers: Sequence[Choice], budget: int) -> list[int]:
        """The same place for every layer."""
        require_room(layers, budget)
        fits = [
            place
            for place in range(len(self.widths))
            if sum(layer.bytes[place] for layer in layers) <= budget
        ]
        return [fits[-1]] * len(layers)
