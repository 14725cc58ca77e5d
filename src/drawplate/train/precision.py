"""Which numbers a run computes with, and whether its loss is compiled."""

from typing import Literal

import torch
from torch import nn

from drawplate.core.errors import UserError

Precision = Literal["auto", "bf16", "float32"]


def choose(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor multiplies it in hardware, float32 elsewhere."""
    if precision == "auto":
        if device.type == "cpu":
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else:
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all floating parameters to `dtype`, gradients to 32 bits; buffers stay as they are.

    Buffers hold rotary frequencies, levels and rotations, which 16 bits would spoil. Quantization
    scales are parameters, and follow.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if parameter.requires_grad and dtype is torch.bfloat16:
                parameter.grad_dtype = torch.float32


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` through torch.compile.

    Raises:
        UserError: the machine has no C++ compiler, which torch.compile needs on a CPU.
    """
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc  # takes a second, and few runs compile

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise UserError(
                "compile: true needs a C++ compiler (g++ or clang++) on the PATH; "
                "install one or set compile: false"
            ) from None
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]
