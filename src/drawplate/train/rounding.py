"""Any floating-point format with up to 8 exponent and 23 mantissa bits, exact to the bit.

A number x of magnitude 2^e <= |x| < 2^(e+1) lies between multiples of its quantum,
    quantum = 2^(max(e, e_min) - M),   e_min = 2 - 2^(E-1),
and becomes one of its two neighbours; below 2^e_min the quantum stays, which gives the subnormals.
Double precision holds every quotient by a quantum exactly, so nothing is rounded twice.

Paper: Lee et al. 2024, To FP8 and Back Again, arXiv:2405.18710, simulates fewer bits by masking
those of bfloat16: `rounding: truncate` cuts the mantissa as a mask does, `overflow: saturate` clips
what the exponent cannot hold.
Deviation: numbers below the narrowed range keep the subnormals that such a format would have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen


class Format(Frozen):
    """One sign bit, `exponent` bits with the usual bias 2^(E-1) - 1, `mantissa` bits.

    bfloat16 is 8 and 7, float16 is 5 and 10, float8_e5m2 is 5 and 2, float8_e4m3fn is 4 and 3 with
    `finite: true`.
    """

    exponent: int = Field(8, ge=2, le=8)
    """Exponent bits E: how far the numbers reach."""
    mantissa: int = Field(7, ge=0, le=23)
    """Mantissa bits M after the leading one: how dense they are."""
    rounding: Literal["nearest", "truncate"] = "nearest"
    """To the nearest number, ties to even; or towards zero, as masking bits does."""
    overflow: Literal["infinite", "saturate"] = "infinite"
    """Whether what lies above the largest number becomes infinite, or that number."""
    finite: bool = False
    """Whether the top exponent holds numbers too, all but one that is NaN, and nothing is infinite;
    what overflows is then NaN instead."""

    @model_validator(mode="after")
    def _holds_numbers(self) -> "Format":
        if self.finite and self.mantissa == 0:
            raise ValueError("finite: true needs a mantissa bit, or the top exponent is NaN alone")
        if self.finite and self.exponent == 8:
            raise ValueError("finite: true with 8 exponent bits reaches beyond float32; take 7")
        return self

    @property
    def largest(self) -> float:
        """The largest finite number."""
        top = 2 ** (self.exponent - 1)
        if self.finite:
            return float((2 - 2 * 0.5**self.mantissa) * 2.0**top)
        return float((2 - 0.5**self.mantissa) * 2.0 ** (top - 1))

    @torch.no_grad()
    def round(self, x: Tensor) -> Tensor:
        """[...] -> [...] in the dtype of x: every entry as this format would hold it.

        Zero keeps its sign and NaN stays NaN. Exact where the dtype of x holds the format, as
        float32 and float64 do.
        """
        wide = x.double()
        lowest = 2 - 2 ** (self.exponent - 1)
        power = wide.frexp().exponent.sub_(1).clamp_(min=lowest).sub_(self.mantissa)
        count = torch.ldexp(wide, -power)
        whole = count.trunc() if self.rounding == "truncate" else count.round()
        near = torch.ldexp(whole, power)
        beyond = near.abs() > self.largest
        if self.overflow == "saturate":
            bound = self.largest
        else:
            bound = torch.nan if self.finite else torch.inf
        held = torch.where(beyond, torch.copysign(torch.full_like(near, bound), wide), near)
        return torch.where(wide.isinf() & ~beyond, wide, held).to(x.dtype)


class Simulate(Format):
    """Products of linear layers computed from numbers of this format; sums and weights stay wide.

    Both passes are simulated: y = round(x) round(W)^T, and its gradients from round(dy), round(x)
    and round(W). The optimizer updates unrounded weights.
    """

    values: tuple[Literal["weights", "activations", "gradients"], ...] = Field(
        ("weights", "activations", "gradients"), min_length=1
    )
    """Which of the three operands are rounded."""
    head: bool = False
    """Whether the output head is simulated too."""


class _Rounded(torch.autograd.Function):
    """Rounds in the forward pass; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Format) -> Tensor:
        return form.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundedBack(torch.autograd.Function):
    """Rounds the gradient; the value passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Format) -> Tensor:
        ctx.form = form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.form.round(gradients[0]), None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, how: Simulate) -> Tensor:
    """[..., I], [O, I], [O] -> [..., O]: the linear layer under `how`."""
    if "activations" in how.values:
        x = _Rounded.apply(x, how)  # type: ignore[no-untyped-call]
    if "weights" in how.values:
        weight = _Rounded.apply(weight, how)  # type: ignore[no-untyped-call]
    y = functional.linear(x, weight, bias)
    if "gradients" in how.values:
        y = _RoundedBack.apply(y, how)  # type: ignore[no-untyped-call]
    return y


@contextmanager
def simulated(model: nn.Module, how: Simulate | None) -> Iterator[None]:
    """Inside, the linear layers of `model` compute under `how`; None leaves them alone.

    Raises:
        UserError: the model has no linear layer to simulate, or one that is not plain.
    """
    if how is None:
        yield
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and (how.head or module is not head)
    ]
    for name, module in model.named_modules():
        # Known by name, as importing transformers takes seconds.
        turned = type(module).__name__ == "Conv1D"
        other = hasattr(module, "in_features") and not isinstance(module, nn.Linear)
        bare = next(module.children(), None) is None
        if (turned or other) and bare and (how.head or module is not head):
            raise UserError(
                f"training.simulate rounds in plain linear layers only, and {name} is a "
                f"{type(module).__name__}; remove simulate"
            )
    if not layers:
        raise UserError(f"training.simulate finds no linear layer in {type(model).__name__}")
    for layer in layers:
        layer.forward = _forward(layer, how)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, how: Simulate) -> Any:
    def forward(x: Tensor) -> Tensor:
        return product(x, layer.weight, layer.bias, how)

    return forward
