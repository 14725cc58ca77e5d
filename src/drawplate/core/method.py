"""The base of every method, and the loader that turns a folder of files into a choice.

An *axis* is an abstract `Method` defined in a package's `__init__`; each other public module of
that package holds one *leaf*, a concrete subclass whose `name` equals the file's stem. Nothing is
registered anywhere: the file tree is the registry.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema

from drawplate.core.errors import UserError


class Frozen(BaseModel):
    """A value: immutable, hashable, no unknown keys, numbers finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Method(Frozen):
    """One choice on an axis: fields are its parameters, one verb given by the axis does the work.

    `paper` is an arXiv id or a DOI ("" where the method predates papers); `needs` names the parts
    of the axis' input record that the leaf reads; `breaks` maps a law's name to the mathematical
    reason why the leaf is exempt from it.
    """

    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[dict[str, str]] = {}

    name: str


M = TypeVar("M", bound=Method)


@cache
def _leaves(axis: type[Method]) -> dict[str, type[Method]]:
    package = import_module(axis.__module__)
    found: dict[str, type[Method]] = {}
    for file in iter_modules(package.__path__):
        if file.name.startswith("_"):
            continue
        module = import_module(f"{package.__name__}.{file.name}")
        own = [
            thing
            for thing in vars(module).values()
            if isinstance(thing, type)
            and issubclass(thing, axis)
            and thing.__module__ == module.__name__
        ]
        if len(own) != 1:
            names = ", ".join(thing.__name__ for thing in own) or "none"
            raise UserError(
                f"{module.__file__}: expected one subclass of {axis.__name__}, found {names}; put "
                "helpers into a file whose name begins with _"
            )
        found[file.name] = own[0]
        name = own[0].model_fields["name"].default
        if name != file.name:
            raise UserError(
                f"{module.__file__}: the name of {own[0].__name__} is {name!r}, "
                f"it must be that of the file, {file.name!r}"
            )
    return found


def leaves(axis: type[M]) -> dict[str, type[M]]:
    """Every leaf of `axis` by name: one public file, one class; import errors propagate.

    Raises:
        UserError: a file holds no leaf or several, or one of another name.
    """
    return cast("dict[str, type[M]]", _leaves(axis))


class OneOf:
    """`Annotated[Prune, OneOf()]`: typed as the axis, validated as a union tagged by `name`."""

    def __get_pydantic_core_schema__(
        self, axis: type[Method], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        choices: dict[Any, core_schema.CoreSchema] = {
            name: handler.generate_schema(leaf) for name, leaf in leaves(axis).items()
        }
        return core_schema.tagged_union_schema(choices, discriminator="name")
