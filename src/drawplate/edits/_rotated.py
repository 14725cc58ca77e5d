"""A stand-in between two rotations: y = U^T core(V (x / d)) + bias."""

import torch
from torch import Tensor

from drawplate.core.method import Frozen
from drawplate.core.pack import pack_mask, unpack_mask
from drawplate.core.rotation import Hadamard, Kronecker, Rotation, Turn, passes, shapes
from drawplate.edits import StandIn, placement


class Sides(Frozen):
    """What is turned, and how it is stored: the sizes of two factors, or none where it is signs."""

    inputs: tuple[int, ...] | None = None
    """V; null: inputs are not turned."""
    outputs: tuple[int, ...] | None = None
    """U; null: outputs are not turned."""
    stretch: bool = False
    """Whether inputs are divided by a stored d."""


class RotatedLinear(StandIn):
    """`core` [O, I] has no bias of its own; the turns are stored as signs or as float32 factors."""

    turns: Rotation | None = None
    """The stored turns unpacked, inside `materialized`."""

    def __init__(self, core: StandIn, sides: Sides):
        super().__init__()
        self.out_features, self.in_features = core.out_features, core.in_features
        self.sides = sides
        self.core = core
        self.bias, core.bias = core.bias, None
        where = {"device": placement(core)["device"]}

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.empty(*shape, dtype=dtype, **where))

        for side, width, sizes in self._sides():
            if sizes == ():
                count = (passes(width) * width + 7) // 8
                buffer(f"{side}_signs", count, dtype=torch.uint8)
            elif sizes is not None:
                for name, size in zip(("left", "right"), sizes, strict=True):
                    buffer(f"{side}_{name}", size, size)
        if sides.stretch:
            buffer("stretch", self.in_features)

    def _sides(self) -> list[tuple[str, int, tuple[int, ...] | None]]:
        return [
            ("inputs", self.in_features, self.sides.inputs),
            ("outputs", self.out_features, self.sides.outputs),
        ]

    def rotation(self) -> Rotation:
        """The stored turns."""
        found: list[Turn | None] = []
        for side, width, sizes in self._sides():
            if sizes is None:
                found.append(None)
            elif sizes == ():
                packed = self.get_buffer(f"{side}_signs")
                found.append(Hadamard(unpack_mask(packed, (passes(width), width))))
            else:
                left, right = (self.get_buffer(f"{side}_{name}") for name in ("left", "right"))
                found.append(Kronecker(left, right))
        stretch = self.get_buffer("stretch") if self.sides.stretch else None
        return Rotation(found[0], found[1], stretch)

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; turns run in float32 at least."""
        rotation = self.turns or self.rotation()
        y = rotation.leave(self.core(rotation.enter(x).to(x.dtype))).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def matrix(self) -> Tensor:
        """[O, I] in the dtype of the core's."""
        inner = self.core.matrix()
        return self.rotation().dense(inner).to(inner.dtype)

    @property
    def macs(self) -> int:
        """The core's and those of both turns."""
        rotation = self.rotation()
        turns = (rotation.inputs, rotation.outputs)
        return self.core.macs + sum(turn.macs for turn in turns if turn is not None)


def sides(rotation: Rotation) -> Sides | None:
    """What a spec says of a rotation; None where nothing is turned."""
    inputs, outputs = shapes(rotation.inputs), shapes(rotation.outputs)
    if inputs is None and outputs is None and rotation.stretch is None:
        return None
    return Sides(inputs=inputs, outputs=outputs, stretch=rotation.stretch is not None)


def tensors(rotation: Rotation, core: dict[str, Tensor]) -> dict[str, Tensor]:
    """What fills a `RotatedLinear`: the core's tensors and those of the turns."""
    filled = {f"core.{name}": tensor for name, tensor in core.items()}
    for side, turn in (("inputs", rotation.inputs), ("outputs", rotation.outputs)):
        if isinstance(turn, Hadamard):
            filled[f"{side}_signs"] = pack_mask(turn.signs)
        elif turn is not None:
            filled |= {f"{side}_left": turn.left, f"{side}_right": turn.right}
    return filled | ({} if rotation.stretch is None else {"stretch": rotation.stretch})
