"""Reading params.yaml: one YAML 1.2 reader, one set of overrides, errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from drawplate.core.errors import UserError

P = TypeVar("P", bound=BaseModel)
Tree = dict[str, Any]
_LONG = 60
"""Characters of a value beyond which an error does not repeat it: the key says where it stands."""


def parse(text: str, where: str) -> Any:
    """One YAML 1.2 document -> plain values, as DVC reads them; duplicate keys are refused."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
        raise UserError(f"{place}: {problem}") from None


def read(path: Path) -> Tree:
    """The file's sections; `UserError` where it is missing or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} should hold sections such as 'compress:', found {type(tree).__name__}"
        )
    return tree


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> Tree:
    """Applies `dotted.key=value` in order; values are YAML.

    Choosing another method (`...name=other`) drops the parameters of the one it replaces.

    Raises:
        UserError: an assignment has no `=`, or a part of its key is not a section.
    """
    changed: Tree = _copy(tree)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(
                f"-S {assignment}: expected dotted.key=value, such as compress.ratio=0.3"
            )
        _set(changed, key, parse(text, f"-S {key}"))
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    here: Any = tree
    for depth, part in enumerate(path):
        here = _step(here, part, ".".join(path[: depth + 1]), make=True)
    if isinstance(here, list):
        here[_index(here, last, key)] = value
        return
    if last == "name" and here.get("name", value) != value:
        here.clear()
    here[last] = value


def _step(here: Any, part: str, key: str, make: bool) -> Any:
    if isinstance(here, list):
        found = here[_index(here, part, key)]
    else:
        found = here.setdefault(part, {}) if make else here.get(part)
    if found is None and make:
        found = here[part] = {}
    if not isinstance(found, dict | list):
        raise UserError(f"-S {key}: {part!r} is the value {found!r}, not a section")
    return found


def _index(here: list[Any], part: str, key: str) -> int:
    if not here:
        whole = key.removesuffix(f".{part}")
        raise UserError(
            f"-S {key}: the list is empty; give the whole list, as in -S '{whole}=[...]'"
        )
    if not (part.isascii() and part.isdecimal()) or int(part) >= len(here):
        raise UserError(f"-S {key}: expected a position from 0 to {len(here) - 1}, got {part!r}")
    return int(part)


def merge(tree: Mapping[str, Any], differences: Mapping[str, Any]) -> Tree:
    """`differences` laid over `tree`; a section that names another method replaces the old one."""
    merged: Tree = _copy(tree)
    for key, value in differences.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            other = "name" in value and value["name"] != old.get("name", value["name"])
            merged[key] = _copy(value) if other else merge(old, value)
        else:
            merged[key] = _copy(value)
    return merged


def presets() -> dict[str, Tree]:
    """Every preset by name, such as `rl/dler`: a paper as a combination of methods."""
    root = files("drawplate") / "presets"
    found: dict[str, Tree] = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if not folder.is_dir():
            continue
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.name.endswith(".yaml"):
                name = f"{folder.name}/{file.name.removesuffix('.yaml')}"
                found[name] = parse(file.read_text(encoding="utf-8"), name)
    return found


def preset(name: str) -> Tree:
    """The differences that a preset makes, without the paper it names.

    Raises:
        UserError: there is no such preset.
    """
    known = presets()
    if name not in known:
        raise UserError(f"no preset {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return {key: value for key, value in known[name].items() if key != "paper"}


def validate(kind: type[P], tree: Any, where: str) -> P:
    """A section's values -> its typed parameters.

    Raises:
        UserError: one line that names key, value and choices.
    """
    try:
        return kind.model_validate(tree if tree is not None else {})
    except ValidationError as error:
        raise UserError(explain(error, kind, where)) from None


def explain(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """The first problem of a validation, in one line."""
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for part in problem["loc"]]
    key = ".".join([where, *_without_tags(parts, kind)])
    kinds: dict[str, str] = {
        "extra_forbidden": "is not a key here",
        "missing": "is missing",
    }
    if problem["type"] == "union_tag_not_found":
        return f"{key}: choose a method with `name:`"
    if problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        chosen = str(context.get("tag"))
        choices = [choice.strip("' ") for choice in str(context.get("expected_tags")).split(",")]
        near = nearest(chosen, choices)
        return f"{key}.name: no method {chosen!r}{near}; choose from: {', '.join(choices)}"
    if problem["type"] == "extra_forbidden":
        siblings = _keys(kind, parts[:-1])
        listed = f"; keys here: {', '.join(siblings)}" if siblings else ""
        return f"{key} {kinds['extra_forbidden']}{nearest(parts[-1], siblings)}{listed}"
    if problem["type"] == "missing":
        return f"{key} {kinds['missing']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    given = problem["input"]
    got = "" if isinstance(given, Mapping) or len(repr(given)) > _LONG else f", got {given!r}"
    return f"{key}: {message.removeprefix('value error, ')}{got}"


def nearest(word: str, choices: Any) -> str:
    """` (did you mean ...?)` where a choice is close to `word`, else nothing."""
    close = get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _walk(kind: type[BaseModel], parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(parts that are keys, fields where they end), without the tags that pydantic inserts."""
    from typing import get_args

    from drawplate.core.method import Method, OneOf, leaves

    keys: list[str] = []
    fields = kind.model_fields
    choices: dict[str, type[Method]] = {}
    for part in parts:
        if part in choices:
            fields, choices = choices[part].model_fields, {}
            continue
        keys.append(part)
        field = fields.get(part)
        if field is None:
            if not part.isdigit():
                fields = {}
            continue
        fields, choices = {}, {}
        pending: list[Any] = [field.annotation]
        marks = list(field.metadata)
        while pending:
            annotation = pending.pop()
            marks += getattr(annotation, "__metadata__", ())
            if (
                isinstance(annotation, type)
                and issubclass(annotation, Method)
                and any(isinstance(mark, OneOf) for mark in marks)
            ):
                choices = dict(leaves(annotation))
            elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
                fields = annotation.model_fields
            pending += [arg for arg in get_args(annotation) if arg is not Ellipsis]
    return keys, list(fields)


def _without_tags(parts: Sequence[str], kind: type[BaseModel]) -> list[str]:
    return _walk(kind, parts)[0]


def _keys(kind: type[BaseModel], parts: Sequence[str]) -> list[str]:
    return _walk(kind, parts)[1]
