"""The products of a model's plain linear layers, by the fastest equal or in a lower precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drawplate.edits import StandIn, trained

_FEW = 8
"""Rows below which the plain matrix-vector product is the faster one."""


def _product(*given: Any) -> Tensor:
    """OneDNN's linear layer, an operator of torch that no function of torch calls by itself."""
    return torch.ops.mkldnn._linear_pointwise(*given)  # type: ignore[no-any-return]


def gram(rows: Tensor) -> Tensor:
    """Sum of x x^T over the rows x of [N, I] -> [I, I]."""
    if not _onednn(rows):
        return rows.T @ rows
    return _product(rows.T, rows.T, None, "none", [], "")


def _onednn(values: Tensor) -> bool:
    """Whether oneDNN multiplies these: MKL takes twice as long on processors not made by Intel."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and values.dtype is torch.float32 and values.device.type == "cpu"


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by such a weight, and has a layout of its own for it."""
    if weight.dtype is torch.float32:
        return _onednn(weight)
    half: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return half and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"


def plain(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [O, I] and bias [O], if `module` is nothing but their product with its input.

    That excludes modules whose call somebody changed, and weights that live in several processes.
    """
    if isinstance(module, StandIn) and type(module).forward is StandIn.forward:
        weight: Any = module.dense
    elif type(module) in (nn.Linear, Conv1D):
        weight = module.weight
    else:
        return None
    if type(weight) not in (Tensor, nn.Parameter) or "forward" in vars(module):
        return None
    bias: Any = module.bias
    return weight.T if type(module) is Conv1D else weight, bias


@contextmanager
def swift(model: nn.Module, precision: torch.dtype | None = None) -> Iterator[None]:
    """Inside, plain linear layers of `model`, also those within stand-ins, are called otherwise.

    With a `precision`, they multiply in it, from copies of their weights, and give back the dtype
    that they were given. Without, float32 products on a processor go to oneDNN. Gradients reach
    inputs, not weights: where gradients are wanted, layers that are trained stay as they are.
    """
    changed = []
    try:
        for module in model.modules():
            found = plain(module)
            if found is not None and not trained(module):
                module.forward = _call(*found, precision)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _call(
    weight: Tensor, bias: Tensor | None, precision: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    work = weight.dtype if precision is None else precision
    weight, bias = weight.to(work), None if bias is None else bias.to(work)
    if precision is not None and not torch.is_grad_enabled() and _packs(weight):
        # Otherwise oneDNN lays the weight out anew for every product, a fifth of one of 32 rows.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return lambda x: _product(x.to(work), packed, bias, "none", [], "").to(x.dtype)
    if not _onednn(weight):
        return lambda x: F.linear(x.to(work), weight, bias).to(x.dtype)
    few = _FEW * weight.shape[1]

    def call(x: Tensor) -> Tensor:
        if x.numel() < few:
            return F.linear(x.to(work), weight, bias).to(x.dtype)
        return cast("Tensor", _Frozen.apply(x.to(work), weight, bias)).to(x.dtype)  # type: ignore[no-untyped-call]

    return call


class _Frozen(torch.autograd.Function):
    """OneDNN's linear layer, whose operator has no backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O]."""
        ctx.save_for_backward(weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[..., O] -> [..., I]; weight and bias get none."""
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.T, None, "none", [], ""), None, None
