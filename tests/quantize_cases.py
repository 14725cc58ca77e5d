"""Weights, statistics and fields for the laws of grids and roundings, and their oracles."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

import torch

from drawplate.core.method import Method
from drawplate.core.stats import Stats
from tests.laws import changed

BITS = (2, 3, 4, 8)
PAIRS = (2, 3, 4)
"""Widths at which there are points for pairs of weights."""


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed weights in float64, none of them centred on zero."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return 0.05 * (normal + 0.3 * normal**3 + 0.2)


def stats(inputs: int, seed: int = 0, tokens: int = 0) -> Stats:
    """Statistics of correlated inputs, some of which are much larger than others."""
    draw = torch.Generator().manual_seed(1000 + seed)
    rows = tokens or 3 * inputs
    mix = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64) / inputs**0.5
    size = torch.rand(inputs, generator=draw, dtype=torch.float64).mul(3).exp()
    x = (torch.randn(rows, inputs, generator=draw, dtype=torch.float64) @ mix + 0.5) * size
    return Stats(count=rows, gram=x.T @ x / rows)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    """Bool, about half of it True."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2000 + seed)) < 0.5


def oracle(method: Method) -> Any:
    """The module that says in plain Python what this leaf should do."""
    return import_module(f"tests.oracle.{type(method).__module__.removeprefix('drawplate.')}")


def fields(method: Method) -> dict[str, Any]:
    """The leaf's own parameters."""
    return method.model_dump(exclude={"name"})


def neighbours(method: Method) -> Iterator[tuple[str, list[Method]]]:
    """For each field, the leaf with other legal values of that field."""
    for name, value in fields(method).items():
        tries = list(get_args(type(method).model_fields[name].annotation))
        if not tries and isinstance(value, int | float):
            tries = [value * 4, value / 4, value // 4, 1, 0.9]
        yield name, changed(method, name, tries)
