"""Rotations: the coordinates in which a layer's weights are laid on the grid.

A layer y = W x is also y = U^T W' V (x / d) with W' = U (W d) V^T, U and V orthogonal and d
positive. Codes are made of W', whose entries are more alike than those of W: an outlier is spread
over a row and a column, and a grid has to reach less far.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from drawplate.core.method import Method
from drawplate.core.rotation import Rotation
from drawplate.core.stats import Stats


class Rotate(Method):
    """Contract: U and V are orthogonal; V depends on its generator and on I alone.

    Layers that share an input therefore share V. `refills`: zeros of W do not stay zeros in W', so
    that layers with a mask cannot be rotated.
    """

    refills: ClassVar[bool] = True

    @abstractmethod
    def rotation(
        self, weight: Tensor, stats: Stats, inputs: torch.Generator, outputs: torch.Generator
    ) -> Rotation:
        """Weight [O, I] and its input's statistics -> U, V and d.

        V is drawn from `inputs`, U from `outputs`.
        """
