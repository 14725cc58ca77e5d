"""Families whose layers share a factor, wherever in the model they stand.

Layers with equally many outputs are candidates. With S_j what the family scales the inputs of W_j
by, the matrices W_j S_j of a group lie side by side; U holds the first left singular vectors of
that, W_j becomes U (U^T W_j), and U is stored once. Groups are chosen at the mean rank that their
candidates would have alone, and stay together where that takes fewer bytes for what is missed then;
those that do not are grouped again within half the error, and so on.
Ranks below the one that meets the threshold are not for sale; the allocation shares out the others.
What is promised is checked at last on the factors as they are stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile
from drawplate.compress.grouping import ROUNDING, Grouping
from drawplate.compress.layerwise import Solved, dense, naming
from drawplate.compress.ledger import Group
from drawplate.compress.method import Compression, default
from drawplate.core.blocks import Site
from drawplate.core.errors import UserError
from drawplate.core.linalg import left_basis
from drawplate.core.method import OneOf
from drawplate.core.stats import Stats
from drawplate.edits import Change, matrix
from drawplate.edits.shared import Shared


class Joint(Compression):
    """Contract: of each group, |[.. (W_j - W_j') S_j ..]| <= error |[.. W_j S_j ..]| as stored."""

    grouping: Annotated[Grouping, OneOf()] = default(Grouping, "incremental")
    """Which layers share a factor, and the error that a group may have."""
    allocation: Annotated[Allocation, OneOf()] = default(Allocation, "spectral")
    """How ranks are shared out among the groups."""

    @abstractmethod
    def surveys(self) -> frozenset[str]:
        """Parts of `Stats` that choosing reads; none means that no calibration pass is needed."""

    @abstractmethod
    def scaled(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> W S [O, I], float64, linear in W."""


class Member(NamedTuple):
    """A layer that may join a group, as the model came."""

    block: int
    """Number of the decoder block; -1 is the output head."""
    site: Site


class Pool(NamedTuple):
    """Layers that share a factor, and the ranks at which they keep within the threshold."""

    sites: tuple[Site, ...]
    """In the order of the model; the first one stores what is shared."""
    basis: Tensor
    """[O, k], float64, orthonormal: what the shared factor is cut from."""
    energy: float
    """|[.. W_j S_j ..]|^2."""
    missed: Tensor
    """[L], float64: what each level of the profile leaves of that."""
    profile: Profile
    """Under the path of the first layer."""


class Shares:
    """What becomes of every layer, solved before the model is walked."""

    def __init__(self, method: Joint, pools: Sequence[Pool], budget: int) -> None:
        levels = method.allocation.levels([pool.profile for pool in pools], budget)
        self.plan: dict[str, int | None] = {}
        self.solved: dict[str, Solved] = {}
        groups = []
        for pool, level in zip(pools, levels, strict=True):
            stays = level == len(pool.profile.units) - 1
            rank = None if stays else int(pool.profile.units[level])
            self.plan |= {site.path: rank for site in pool.sites}
            if rank is not None:
                self.solved |= _solved(pool.sites, pool.basis, rank)
                groups.append(self._checked(method, pool, rank))
        self.groups = tuple(groups)

    def changes(self, sites: Sequence[Site], plan: Mapping[str, int | None]) -> list[Solved]:
        """What becomes of a block's layers; those that are planned to stay are left out."""
        return [self.solved[site.path] for site in sites if plan[site.path] is not None]

    def _checked(self, method: Joint, pool: Pool, rank: int) -> Group:
        error = _error(method, pool.sites, self.solved, pool.energy)
        threshold = method.grouping.error
        if error > threshold:
            raise UserError(
                f"{pool.profile.path}: rank {rank} leaves an error of {error:.4g}, above the "
                f"threshold {threshold:g}; raise compress.method.grouping.error"
            )
        paths = tuple(site.path for site in pool.sites)
        return Group(paths=paths, rank=rank, error=error, threshold=threshold)


def pools(method: Joint, members: Sequence[Member], budget: int) -> list[Pool]:
    """All layers in groups, in the order of the model, for `budget` bytes together.

    Raises:
        NotFinite: a weight or a statistic is NaN or infinite.
    """
    scaled = [_scaled(method, member.site) for member in members]
    apart = [_pool(method, [one], [each]) for one, each in zip(members, scaled, strict=True)]
    profiles = [pool.profile for pool in apart]
    enough = sum(int(profile.bytes[0]) for profile in profiles) <= budget
    levels = method.allocation.levels(profiles, budget) if enough else [0] * len(apart)
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for place, member in enumerate(members):
        weight = matrix(member.site.module)
        alike.setdefault((len(weight), weight.dtype), []).append(place)
    found: dict[int, Pool] = {}
    for places in alike.values():
        factored = [p for p in places if levels[p] < len(profiles[p].units) - 1]
        ranks = [int(profiles[p].units[levels[p]]) for p in factored]
        rank = round(sum(ranks) / len(ranks)) if ranks else 0
        # A sketch of one layer alone would be in vain, and an output head's is [V, V].
        waiting, grouping = places if rank and len(places) > 1 else [], method.grouping
        while waiting and grouping.error**2 > ROUNDING:
            rejected: list[int] = []
            for numbers in grouping.groups([scaled[p] for p in waiting], rank):
                chosen = [waiting[number] for number in numbers]
                one = _pool(method, [members[p] for p in chosen], [scaled[p] for p in chosen])
                if _saves(one, [apart[p] for p in chosen], [levels[p] for p in chosen]):
                    found[chosen[0]] = one
                elif len(chosen) > 2:
                    rejected += chosen
            waiting = sorted(rejected)
            grouping = grouping.model_copy(update={"error": grouping.error / 2})
    taken = {site.path for pool in found.values() for site in pool.sites}
    left = {p: pool for p, pool in enumerate(apart) if pool.profile.path not in taken}
    return [pool for _, pool in sorted((found | left).items())]


def _saves(together: Pool, apart: Sequence[Pool], levels: Sequence[int]) -> bool:
    """Whether a group misses as little as its members at these levels, for fewer bytes."""
    missed = sum(float(pool.missed[k]) for pool, k in zip(apart, levels, strict=True))
    spent = sum(int(pool.profile.bytes[k]) for pool, k in zip(apart, levels, strict=True))
    enough = together.missed <= missed + ROUNDING * together.energy
    return int(together.profile.bytes[int(enough.nonzero()[0])]) < spent


def _scaled(method: Joint, site: Site) -> Tensor:
    with naming(site.path):
        return method.scaled(dense(site), site.stats)


def _pool(method: Joint, members: Sequence[Member], scaled: Sequence[Tensor]) -> Pool:
    """Levels: the ranks that meet the threshold and save bytes, then the layers as they stand."""
    sites = tuple(member.site for member in members)
    shapes = [matrix(site.module).shape for site in sites]
    rows, columns = shapes[0][0], sum(shape[1] for shape in shapes)
    basis, gain = left_basis(torch.cat(list(scaled), 1))
    tail = gain.cpu().flip(0).cumsum(0).flip(0)
    most = (rows * columns - 1) // (rows + columns)
    least = next(_meeting(method, sites, basis, tail, most), most + 1)
    units = torch.tensor([*range(least, most + 1), min(rows, columns)])
    sizes = units * (rows + columns) * matrix(sites[0].module).element_size()
    sizes[-1] = sum(matrix(site.module).nbytes for site in sites)
    missed, energy = torch.cat([tail[least : most + 1], tail.new_zeros(1)]), float(tail[0])
    priced = "error" in method.allocation.needs
    curve = (missed, energy) if priced else (missed[:0], 0.0)
    figure = sum(
        method.allocation.measure(dense(site), site.stats) * shape[1] / columns
        for site, shape in zip(sites, shapes, strict=True)
    )
    path, block = sites[0].path, members[0].block
    profile = Profile(path, block, (rows, columns), units, sizes, *curve, figure)
    return Pool(sites, basis, energy, missed, profile)


def _meeting(
    method: Joint, sites: Sequence[Site], basis: Tensor, tail: Tensor, most: int
) -> Iterator[int]:
    """Ranks up to `most` that meet the threshold, by the spectrum and as they would be stored."""
    energy, threshold = float(tail[0]), method.grouping.error
    for rank in range(1, most + 1):
        fits = float(tail[rank]) <= threshold**2 * energy
        if fits and _error(method, sites, _solved(sites, basis, rank), energy) <= threshold:
            yield rank


def _solved(sites: Sequence[Site], basis: Tensor, rank: int) -> dict[str, Solved]:
    """U and U^T W_1 for the first layer, U^T W_j for the others, in the dtype that is stored."""
    found, first_path = {}, sites[0].path
    for site in sites:
        weight, stored = dense(site), matrix(site.module).dtype
        second = basis[:, :rank].to(stored)
        first = (basis[:, :rank].T @ weight.double()).to(stored)
        tensors, lender = {"first.weight": first}, None
        if site.path == first_path:
            tensors["second.weight"] = second
        else:
            lender = first_path
        change: Change = Shared(module=site.path, rank=rank, lender=lender), tensors
        now = second.to(weight.dtype) @ first.to(weight.dtype)
        found[site.path] = Solved([change], {site.path: now})
    return found


def _error(
    method: Joint, sites: Sequence[Site], solved: Mapping[str, Solved], energy: float
) -> float:
    """|[.. (W_j - W_j') S_j ..]| as a share of the root of `energy`; 0 of nothing is 0."""
    missed = 0.0
    for site in sites:
        lost = dense(site) - solved[site.path].weights[site.path]
        missed += float(method.scaled(lost, site.stats).square().sum())
    return (missed / energy) ** 0.5 if missed else 0.0
