"""`@law(Axis)` runs a test over every leaf of an axis, each built with its defaults.

A leaf that declares a law in `breaks` is expected to fail it, strictly: an exempted law that holds
fails the suite.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from pydantic import ValidationError

from drawplate.core.method import Method, leaves


def law(axis: type[Method], **given: Any) -> Callable[[Callable[..., None]], Any]:
    """Parametrise `test(method)` over the leaves of `axis`; `given` fills fields they have."""

    def wrap(test: Callable[..., None]) -> Any:
        cases = []
        for name, leaf in leaves(axis).items():
            reason = leaf.breaks.get(test.__name__)
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            fields = {key: value for key, value in given.items() if key in leaf.model_fields}
            cases.append(pytest.param(leaf(**fields), id=name, marks=marks))
        return pytest.mark.parametrize("method", cases)(test)

    return wrap


def changed(method: Method, field: str, tries: Iterable[Any]) -> list[Method]:
    """The leaf with those other values of `field` that are legal, of which there has to be one."""
    found = []
    for value in tries:
        try:
            other = type(method).model_validate(method.model_dump() | {field: value})
        except ValidationError:
            continue
        if other != method:
            found.append(other)
    assert found, f"no other legal value of {field} was found"
    return found
