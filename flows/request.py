"""What a scheduled run can be asked for: a typed form, refused before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

from drawplate.core.errors import UserError
from stages import STAGES


def _presets() -> list[str]:
    """Names of `drawplate.settings.presets`, read off the files: a form needs no torch."""
    found = find_spec("drawplate")
    assert found is not None
    assert found.submodule_search_locations
    root = Path(found.submodule_search_locations[0]) / "presets"
    files = (file.relative_to(root) for file in root.glob("*/*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in files)


def _one_of(kind: str, choices: Iterable[str]) -> tuple[Callable[[str], str], dict[str, object]]:
    """A validator that knows `choices`, and the JSON schema that makes a form list them."""
    known = list(choices)

    def check(value: str) -> str:
        if value not in known:
            from drawplate import settings

            near = settings.nearest(value, known)
            raise ValueError(f"no {kind} {value!r}{near}; there are: {', '.join(known)}")
        return value

    return check, {"type": "string", "enum": known}


_stage, _stage_schema = _one_of("stage", STAGES)
_preset, _preset_schema = _one_of("preset", _presets())

StageName = Annotated[str, AfterValidator(_stage), WithJsonSchema(_stage_schema)]
PresetName = Annotated[str, AfterValidator(_preset), WithJsonSchema(_preset_schema)]
KEYS: dict[str, list[str]] = json.loads((Path(__file__).parent / "keys.json").read_bytes())
"""Every key of params.yaml, and the methods that it chooses from, none where it names none."""


_NEW = " (a new one? run `make docs`)"  # which writes keys.json


def known(key: str, values: Iterable[str]) -> None:
    """Refuses a key that params.yaml cannot have, and a method that nobody has written.

    Raises:
        UserError: one line that names key, method and choices.
    """
    from drawplate import settings

    form = re.sub(r"\.[0-9]+(?=\.|$)", ".#", key)
    # Of a mapping with keys of anybody's choice, such as globs of layers.
    free = next((name for name in KEYS if name.endswith(".*") and form.startswith(name[:-1])), form)
    if form not in KEYS and free not in KEYS:
        near = settings.nearest(form, KEYS)
        raise UserError(f"{key} is no key of params.yaml{near}{_NEW}")
    methods = KEYS.get(form)
    if not methods:
        return
    for value in values:
        chosen = settings.parse(value, key)
        if chosen not in methods:
            near = settings.nearest(str(chosen), methods)
            names = ", ".join(methods)
            raise UserError(f"{key}: no method {chosen!r}{near}; choose from: {names}{_NEW}")


def assignments(several: bool = False) -> dict[str, object]:
    """The JSON schema of `key=value`, or of `key=value,value`: what `known` takes.

    Of two forms, because Prefect's server quotes a form back at whoever misses the only one.
    """

    def any_of(keys: Iterable[str]) -> str:
        texts = (key.replace(".", r"\.").replace("#", "[0-9]+") for key in keys)
        return "|".join(text.replace("*", "[^=]+") for text in texts)

    def a(form: str, title: str) -> dict[str, str]:
        return {"title": title, "type": "string", "pattern": form}

    by_methods: dict[str, list[str]] = {}
    for key, methods in KEYS.items():
        if methods:
            by_methods.setdefault("|".join(methods), []).append(key)
    named = []
    for names, keys in by_methods.items():
        one = f"\\s*[\"']?({names})[\"']?\\s*"
        named.append(f"({any_of(keys)})={one}{f'(,{one})*' if several else ''}")
    plain = any_of(key for key, methods in KEYS.items() if not methods)
    both = [a(f"^({plain})=.*$", "a parameter"), a(f"^({'|'.join(named)})$", "a method")]
    return {"type": "string", "anyOf": both}


def choices() -> str:
    """The methods of the keys that choose the most, for those who read a form."""
    lines = [
        f"{key}: {', '.join(methods)}"
        for key, methods in KEYS.items()
        if methods and "#" not in key and key.count(".") == 2
    ]
    return f"Methods: {'; '.join(lines)}. docs/methods.md has all of them with their parameters."


def _assigns(value: str) -> str:
    from drawplate import settings

    key, equals, text = value.partition("=")
    try:
        if not equals:
            raise UserError(f"{value!r} is no key=value, such as compress.ratio=0.3")
        settings.parse(text, key)
        known(key, [text])
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


Override = Annotated[str, AfterValidator(_assigns), WithJsonSchema(assignments())]


class Request(BaseModel):
    """Which version of the project to bring up to date, how far, and with which changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    revision: str = Field(default="HEAD", min_length=1)
    """Branch, tag or commit of the source repository."""
    targets: list[StageName] = []
    """Stages to stop at, with everything before them; all where it is empty."""
    overrides: list[Override] = Field(
        default=[],
        description=f"Changes of params.yaml, such as `compress.ratio=0.3`. {choices()}",
    )
    presets: list[PresetName] = []
    """Papers' settings, laid over params.yaml before the overrides."""
    preflight: bool = True
    """Whether to rehearse first what is not computed yet, and refuse what will not fit; false goes
    ahead without."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    """Name of the DVC experiment that keeps the results; made from the run's id where null."""

    @field_validator("revision")
    @classmethod
    def _is_no_option(cls, value: str) -> str:
        if value.startswith("-") or re.search(r"[\s\x00-\x1f]", value):
            raise ValueError(f"{value!r} is no revision: give a branch, a tag or a commit")
        return value
