"""`@law(Axis)` runs a test over every leaf of an axis, each built with its defaults.

A leaf that declares a law in `breaks` is expected to fail it, strictly: an exempted law that holds
fails the suite.
"""

from collections.abc import Callable
from typing import Any

import pytest

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
