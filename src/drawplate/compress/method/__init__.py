"""Method: the families of compression, each a composition of smaller axes.

A family either treats a model layer by layer (`compress.layerwise`) or narrows the residual stream
that runs through all of them (`compress.stream`); each of the two has a driver.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import Field

from drawplate.core.method import Method, leaves


def default(axis: type[Method], name: str) -> Any:
    """A field whose default is the leaf `name` of `axis`, with that leaf's own defaults."""
    return Field(default_factory=lambda: leaves(axis)[name].model_validate({"name": name}))


class Compression(Method):
    """Contract: what is stored afterwards is no more than the byte budget."""

    refuses: ClassVar[frozenset[str]] = frozenset({"quantized", "adapter"})
    """Names of the edits that a model must not have yet."""
    whole: ClassVar[bool] = False
    """Whether two plain factors are one layer to it, which it replaces; it then refuses others."""

    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Parts of `Stats` that solving reads."""
