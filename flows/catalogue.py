"""What there is to choose from, read off the file tree."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

import drawplate
from drawplate.core.method import Method, leaves

REQUIRED = "required"
"""Stands where a parameter has no default."""


def axes() -> dict[str, type[Method]]:
    """Every axis by its folder below `drawplate`, such as `compress/prune`."""
    root = Path(drawplate.__file__).parent
    found: dict[str, type[Method]] = {}
    for file in sorted(root.glob("**/__init__.py")):
        place = file.parent.relative_to(root)
        package = ".".join(("drawplate", *place.parts))
        for thing in vars(import_module(package)).values():
            if (
                isinstance(thing, type)
                and issubclass(thing, Method)
                and thing.__module__ == package
                and inspect.isabstract(thing)
            ):
                found[place.as_posix()] = thing
    return found


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Axis -> its methods, each with what it does, its paper and its parameters."""
    return {
        axis: [
            {
                "name": name,
                "does": _first_sentence(leaf),
                "paper": leaf.paper,
                "parameters": {
                    key: {
                        "does": " ".join((field.description or "").split()),
                        "default": _plain(field.get_default(call_default_factory=True)),
                    }
                    for key, field in leaf.model_fields.items()
                    if key != "name"
                },
            }
            for name, leaf in leaves(base).items()
        ]
        for axis, base in axes().items()
    }


def _plain(value: Any) -> Any:
    """As it would stand in params.yaml; of a method's own parameters those that differ."""
    if value is PydanticUndefined:
        return REQUIRED
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    plain = TypeAdapter(Any).dump_python(value, mode="json", exclude_defaults=True)
    return {"name": value.name} | plain if isinstance(value, Method) else plain


def assignment(key: str, default: Any) -> str:
    """`key = default`, much as params.yaml has it."""
    if default == REQUIRED:
        return f"{key}, {REQUIRED}"
    return f"{key} = {default if isinstance(default, str) else json.dumps(default)}"


def _first_sentence(leaf: type[Method]) -> str:
    module = inspect.getmodule(leaf)
    text = inspect.getdoc(module) or inspect.getdoc(leaf) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _link(paper: str) -> str:
    """Where a DOI, which begins with "10.", or an arXiv id leads."""
    return f"https://{'doi.org' if paper.startswith('10.') else 'arxiv.org/abs'}/{paper}"


def page() -> str:
    """docs/methods.md: every axis and method."""
    lines = [
        "# Methods",
        "",
        "Made from the source by `make docs`; do not edit. Choose a method by its name in",
        "`params.yaml`. Parameters stand with their defaults.",
    ]
    for axis, rows in catalogue().items():
        lines += ["", f"## {axis}"]
        for row in rows:
            anchor = f"{axis}-{row['name']}".replace("/", "-")
            paper = f" ([{row['paper']}]({_link(row['paper'])}))" if row["paper"] else ""
            lines += ["", f'### <a id="{anchor}"></a>{row["name"]}', "", row["does"] + paper]
            lines += [
                f"- `{assignment(key, parameter['default'])}`: {parameter['does']}".removesuffix(
                    ": "
                )
                for key, parameter in row["parameters"].items()
            ]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, type[BaseModel]]:
    """What stands in each section of params.yaml."""
    from stages import STAGES
    from stages.run import Execution

    stages = {name: getattr(import_module(f"stages.{name}"), name).params for name in STAGES}
    return {"execution": Execution, **stages}


def settings() -> str:
    """docs/settings.md: every section's own keys; those of methods stand in docs/methods.md."""
    lines = [
        "# Settings",
        "",
        "Made from the source by `make docs`; do not edit. What may stand in `params.yaml` and",
        "behind `-S`, with its default. Where a method is chosen by name, the link leads to the",
        "choices and their parameters.",
    ]
    names = {base: axis for axis, base in axes().items()}
    for section, kind in sections().items():
        lines += ["", f"## {section}", "", *_settings(section, kind, names)]
    return "\n".join(lines) + "\n"


def _settings(
    key: str, kind: type[BaseModel], names: dict[type[Method], str], given: Any = None
) -> Iterator[str]:
    """A line for each key of `kind`, with the values of `given` where there is one."""
    for name, field in kind.model_fields.items():
        inner = [each for each in _classes(field.annotation) if issubclass(each, BaseModel)]
        value = getattr(given, name) if given else field.get_default(call_default_factory=True)
        nested = isinstance(value, BaseModel) and not isinstance(value, Method)
        where = f"{key}.{name}" if nested else assignment(f"{key}.{name}", _plain(value))
        links = [
            f"[{names[each]}](methods.md#{names[each].replace('/', '')})"
            for each in inner
            if each in names
        ]
        does = " ".join([*(field.description or "").split(), *links])
        yield f"- `{where}`: {does}".removesuffix(": ")
        for each in inner:
            if not issubclass(each, Method):
                same = value if isinstance(value, each) else None
                yield from _settings(f"{key}.{name}", each, names, same)


def _classes(annotation: Any) -> list[type]:
    """The classes that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _classes(part)]


def keys() -> dict[str, list[str]]:
    """Every key of params.yaml, in order, with the methods that it chooses from, if any.

    A position in a list is `#`, and a key that anybody may give to a mapping `*`.
    """
    found: dict[str, list[str]] = {}
    for section, kind in sections().items():
        schema = kind.model_json_schema()
        _below(section, schema, schema.get("$defs", {}), found)
    return dict(sorted(found.items()))


def _below(
    key: str, node: dict[str, Any], defs: dict[str, Any], found: dict[str, list[str]]
) -> None:
    """Adds the keys below `key`, whose JSON schema is `node`."""
    if "$ref" in node:
        _below(key, defs[node["$ref"].rpartition("/")[2]], defs, found)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        _below(key, choice, defs, found)
    parts = list(node.get("properties", {}).items())
    if isinstance(node.get("items"), dict):
        parts.append(("#", node["items"]))
    parts += [("#", each) for each in node.get("prefixItems", ())]
    if node.get("type") == "object" and not parts and node.get("additionalProperties"):
        parts.append(("*", {}))
    for part, below in parts:
        name = f"{key}.{part}"
        known = found.setdefault(name, [])
        if part == "name" and "const" in below:
            found[name] = sorted({*known, below["const"]})
        _below(name, below, defs, found)


if __name__ == "__main__":
    Path("docs/methods.md").write_text(page(), encoding="utf-8")
    Path("docs/settings.md").write_text(settings(), encoding="utf-8")
    (Path(__file__).parent / "keys.json").write_text(json.dumps(keys(), indent=0) + "\n")
