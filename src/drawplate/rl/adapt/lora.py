"""Low-rank adapters: y = base(x) + alpha / rank B A x, with A random and B zero.

Paper: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, eq. 3;
on quantized bases Dettmers et al. 2023, QLoRA, arXiv:2305.14314. Norms beside
them: Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv:2312.11420.
Deviation: none.
Cost: rank (O + I) parameters and multiply-adds a layer; none after merging into a dense layer.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from drawplate.rl.adapt import Adapt, add_adapter, inputs, is_linear, is_norm, merge_adapter


class Lora(Adapt):
    """Every linear layer stays as it is stored and gets a trained term beside it."""

    name: Literal["lora"] = "lora"
    paper: ClassVar[str] = "2106.09685"
    rank: PositiveInt = 16
    """Width of the adapters."""
    alpha: PositiveFloat = 32.0
    """The term is scaled by alpha / rank."""
    norms: bool = False
    """Whether norms move too: the last one sets how sharp the distribution over tokens is."""

    def fits(self, model: nn.Module, module: nn.Module) -> bool:
        """Linear layers and their stand-ins, but for the output head; norms where asked for."""
        return is_linear(model, module) or (self.norms and is_norm(module))

    def attach(self, model: nn.Module, path: str, random: torch.Generator) -> list[nn.Parameter]:
        """A from a normal distribution of variance 1 / I, B zero; norms as they are."""
        if is_norm(model.get_submodule(path)):
            return list(model.get_submodule(path).parameters())
        width = inputs(model, path)
        down = torch.randn(self.rank, width, generator=random) / width**0.5
        return add_adapter(model, path, down, self.alpha / self.rank)

    def detach(self, model: nn.Module, path: str) -> None:
        """Dense layers take the term in; codes, masks and factors keep the adapter."""
        if not is_norm(model.get_submodule(path)):
            merge_adapter(model, path)
