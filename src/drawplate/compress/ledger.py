"""What the compress stage did, layer by layer."""

from __future__ import annotations

from pydantic import Field

from drawplate.core.method import Frozen


class Row(Frozen):
    """One layer of the ledger."""

    path: str
    block: int
    """Number of the decoder block; -1 is outside of the blocks."""
    rows: int
    columns: int
    edit: str
    """Name of the edit, "" where the layer was left as it stands."""
    units: int
    """Ranks, members of each group, or directions of the residual stream, that stay; the full rank
    of a layer that was left as it stands."""
    sparsity: float
    """Share of the layer's dense matrix that is exactly zero."""
    weight_error: float
    """|W - W'|^2 / |W|^2."""
    activation_error: float
    """E |(W - W') x|^2 / E |W x|^2 on calibration tokens, x as the compressed model has it; where
    the residual stream is cut, as the model had it before."""
    bytes_before: int
    bytes_after: int
    seconds: float = Field(0.0, exclude=True)
    """Time that solving took; never stored, 0 for blocks taken up from an earlier run."""


class Group(Frozen):
    """Layers that share a factor, and what that was allowed to cost before any recovery."""

    paths: tuple[str, ...]
    """The first one stores what is shared."""
    rank: int
    error: float
    """|W - W'| / |W| of all layers together, as stored, in the norm of the chosen factor."""
    threshold: float
    """Largest error that was allowed."""


class Ledger(Frozen):
    """What the compress stage did."""

    bytes_before: int
    """Stored bytes of the whole model."""
    bytes_after: int
    rows: tuple[Row, ...]
    groups: tuple[Group, ...] = Field((), exclude_if=lambda groups: not groups)
    """Layers that share a factor, where the family makes such groups."""

    @property
    def ratio(self) -> float:
        """Share of the stored bytes that was removed."""
        return 1 - self.bytes_after / self.bytes_before

    @property
    def activation_error(self) -> float:
        """Mean over the layers that could be changed."""
        return sum(row.activation_error for row in self.rows) / max(len(self.rows), 1)


def part(error: float, whole: float) -> float:
    """Error as a share of the whole; 0 of nothing is 0."""
    return error / whole if error else 0.0
