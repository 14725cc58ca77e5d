"""Families that bring each linear layer to a level of its own, under one byte budget.

The driver walks the model twice and asks the family three things: `profiles` of each block's layers
on the untouched model, a `plan` for all of them under one byte budget, and block by block what to
change. A family that treats layers one by one gives `profile` and `solve`; one that ties several
layers of a block together (a shared basis, say) overrides `profiles` and `changes` instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from drawplate.compress.allocation import Allocation, Profile
from drawplate.compress.method import Compression, default
from drawplate.core.blocks import Site
from drawplate.core.errors import DrawplateError
from drawplate.core.method import OneOf
from drawplate.edits import Change, matrix
from drawplate.edits.low_rank import LowRankLinear


class Solved(NamedTuple):
    """What becomes of some layers of a block."""

    changes: list[Change]
    """Edits with their tensors, in the order of application."""
    weights: dict[str, Tensor]
    """Path of each layer concerned -> the dense matrix [O, I] that it now amounts to, as stored."""


class Layerwise(Compression):
    """Contract: `solve` spends exactly the bytes that the planned level of the profile promises."""

    allocation: Annotated[Allocation, OneOf()] = default(Allocation, "uniform")
    """How the byte budget is shared out among the layers."""

    @abstractmethod
    def surveys(self) -> frozenset[str]:
        """Parts of `Stats` that `profiles` reads; none means that no calibration pass is needed."""

    @abstractmethod
    def profile(self, block: int, site: Site) -> Profile:
        """The levels that one layer can be brought to."""

    @abstractmethod
    def solve(self, site: Site, units: int) -> Solved:
        """One layer at the level that keeps `units`."""

    def profiles(self, block: int, sites: Sequence[Site]) -> list[Profile]:
        """The levels of each layer of a block, or of each set of layers that share one fate."""
        found = []
        for site in sites:
            with naming(site.path):
                found.append(self.profile(block, site))
        return found

    def plan(self, profiles: Sequence[Profile], budget: int) -> dict[str, int | None]:
        """Path of each profile -> the units that stay, None where it is left as it stands.

        Raises:
            UserError: the budget is below the smallest levels together.
        """
        chosen = self.allocation.levels(profiles, budget)
        return {
            profile.path: None if level == len(profile.units) - 1 else int(profile.units[level])
            for profile, level in zip(profiles, chosen, strict=True)
        }

    def changes(self, sites: Sequence[Site], plan: Mapping[str, int | None]) -> list[Solved]:
        """What becomes of a block's layers; those that are planned to stay are left out."""
        found = []
        for site in sites:
            units = plan[site.path]
            if units is not None:
                with naming(site.path):
                    found.append(self.solve(site, units))
        return found


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Inside, the message of an error of ours begins with the layer's path."""
    try:
        yield
    except DrawplateError as error:
        raise type(error)(f"{path}: {error}") from None


def dense(site: Site) -> Tensor:
    """The layer's weight [O, I], at least float32, detached; a pair is multiplied in that."""
    module = site.module
    if isinstance(module, LowRankLinear):
        return _wide(module.second) @ _wide(module.first)
    return _wide(module)


def _wide(module: nn.Module) -> Tensor:
    weight = matrix(module).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
