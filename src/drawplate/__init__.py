"""drawplate: text in, a small, fast, evaluated reasoning language model out.

Importing the package teaches transformers to load what any stage wrote, as soon as transformers is
imported, before or after: what needs no model does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from drawplate.core.hf import load, load_tokenizer

__all__ = ["load", "load_tokenizer"]


@wrapt.when_imported("transformers")
def _teach(_transformers: Any) -> None:
    import_module("drawplate.core.hf")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("drawplate.core.hf"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
