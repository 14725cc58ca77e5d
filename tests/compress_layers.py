"""Small layers with their statistics, oracles by path, and other legal field values."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from drawplate.core.method import Method
from drawplate.core.stats import Stats
from tests.laws import changed


def stats_of(x: Tensor) -> Stats:
    """Inputs [N, I] -> their statistics in the dtype of x."""
    return Stats(
        count=len(x),
        gram=x.T @ x / len(x),
        mean=x.mean(0),
        absmean=x.abs().mean(0),
        peak=x.abs().amax(0),
    )


def layer(rows: int = 6, columns: int = 8, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Stats]:
    """Weight [rows, columns] and statistics of correlated inputs of unequal size, float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mix = torch.eye(columns, dtype=torch.float64) + 0.4 * normal(columns, columns)
    return normal(rows, columns), stats_of(
        normal(tokens, columns) @ mix * (0.3 + normal(columns).abs())
    )


SHAPES = ((6, 8), (8, 6), (7, 4), (4, 12))
LAYERS = [layer(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]


def oracle(path: str, name: str = "reference") -> Callable[..., Any]:
    """The function `name` of the oracle at tests/oracle/`path`.py."""
    file = Path(__file__).parent / "oracle" / f"{path}.py"
    spec = spec_from_file_location("oracle_" + path.replace("/", "_"), file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def others(method: Method, field: str) -> list[Any]:
    """Copies of `method` in which only `field` has another legal value."""
    info = type(method).model_fields[field]
    now = getattr(method, field)
    if isinstance(now, str):
        values = chain(get_args(info.annotation))
    elif isinstance(now, int):
        values = chain((now + 1, now - 1, 2 * now + 1))
    else:
        values = chain((2 * now + 0.3, now / 3, 0.0))
    return changed(method, field, values)


def fields(method: Method) -> list[str]:
    """Names of the fields that are parameters."""
    return [name for name in type(method).model_fields if name != "name"]
