"""A token embedding, and the output head tied to it, stored as packed codes."""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged, UserError
from drawplate.core.pack import decode, empty_table, unpack
from drawplate.edits import Edit, Packed, StandIn, placement, replace


class QuantizedTable(nn.Module):
    """Rows of `codes` [V, H bits / 8] are unpacked for the tokens asked for; scale [V, groups]."""

    codes: Tensor
    zero: Tensor | None
    levels: Tensor | None

    def __init__(self, old: nn.Module, edit: "QuantizedEmbedding"):
        super().__init__()
        if type(old) is not nn.Embedding:  # others scale or shift what they look up
            raise UserError(f"{edit.module}: {type(old).__name__} is no plain embedding table")
        self.num_embeddings, self.embedding_dim = old.weight.shape
        self.padding_idx = old.padding_idx
        if self.embedding_dim % 8:
            raise UserError(f"{edit.module}: width {self.embedding_dim} is not a multiple of 8")
        self.bits, self.group = edit.bits, edit.group
        where = placement(old)
        groups = -(-self.embedding_dim // self.group)
        small: dict[str, Any] = {"dtype": torch.uint8, "device": where["device"]}
        self.register_buffer(
            "codes", torch.empty(self.num_embeddings, self.embedding_dim * self.bits // 8, **small)
        )
        self.scale = nn.Parameter(
            torch.empty(self.num_embeddings, groups, **where), requires_grad=False
        )
        zero = torch.empty(self.num_embeddings, groups, **small) if edit.zero else None
        self.register_buffer("zero", zero)
        tables = self.num_embeddings if edit.tables else None
        levels = empty_table(self.bits, tables, edit.points, where["device"])
        self.register_buffer("levels", levels if edit.levels else None)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Index [N], or all -> vectors [N, H]."""
        packed = self.codes[index]
        codes = unpack(packed.flatten(), self.bits, len(packed) * self.embedding_dim)
        zero = None if self.zero is None else self.zero[index]
        codes = codes.view(len(packed), self.embedding_dim)
        levels = self.levels
        if levels is not None and levels.ndim == 2:
            levels = levels[index]
        dense = decode(levels, codes, self.scale[index], zero, self.group)
        return dense.to(self.scale.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        return self.rows(ids.flatten()).view(*ids.shape, self.embedding_dim)


class TiedHead(Packed):
    """An output head that reads an embedding's table and stores nothing but a bias."""

    def __init__(self, table: QuantizedTable, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = table.num_embeddings, table.embedding_dim
        self.table = (table,)  # in a tuple, so that the state dict holds the table once
        self.bias = bias

    @property
    def borrowed(self) -> tuple[nn.Module, ...]:
        """The table."""
        return self.table

    def matrix(self) -> Tensor:
        """[V, H]."""
        return self.table[0].rows(slice(None))

    @property
    def macs(self) -> int:
        """V H."""
        return self.out_features * self.in_features


class QuantizedEmbedding(Edit):
    """The embedding table in packed codes; a tied head reads the same codes."""

    name: Literal["quantized_embedding"] = "quantized_embedding"
    bits: int = Field(ge=1, le=8)
    """Width of a code."""
    group: PositiveInt
    """Consecutive dimensions of a token's vector that share a scale."""
    zero: bool
    """Whether each group stores an integer zero point."""
    levels: bool
    """Whether a table of 2**bits levels is stored."""
    tables: bool = False
    """Whether each token has such a table of its own, in float16."""
    points: PositiveInt | None = None
    """As in `Quantized`."""
    head: str | None = None
    """Path of the output head that was tied to this table."""

    def build(self, old: nn.Module) -> nn.Module:
        """An empty table."""
        return QuantizedTable(old, self)

    def install(self, model: nn.Module) -> nn.Module:
        """The empty table, and a head that reads it."""
        table = super().install(model)
        assert isinstance(table, QuantizedTable)
        if self.head is not None:
            old = model.get_submodule(self.head)
            bias = getattr(old, "bias", None)
            replace(model, self.head, TiedHead(table, bias))
            untie(model)
        return table

    def check(self, module: nn.Module) -> None:
        """Scales are finite."""
        if not isinstance(module, QuantizedTable):
            raise Damaged(
                f"{self.module}: expected a quantized table, found a {type(module).__name__}"
            )
        if not module.scale.isfinite().all():
            raise Damaged(f"{self.module}: a quantization scale is not finite")


def untie(model: Any) -> None:
    """Tells transformers that no two parameters are tied any more: the head has none of its own."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def is_tied(model: Any) -> bool:
    """Whether the output head shares the embedding's storage."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, StandIn):
        return isinstance(head, TiedHead)
    return head is not None and head.weight is getattr(table, "weight", None)
