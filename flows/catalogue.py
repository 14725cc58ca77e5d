"""What there is to choose from, read off the file tree."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import drawplate
from drawplate.core.method import Method, leaves


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
                    key: field.description or ""
                    for key, field in leaf.model_fields.items()
                    if key != "name"
                },
            }
            for name, leaf in leaves(base).items()
        ]
        for axis, base in axes().items()
    }


def _first_sentence(leaf: type[Method]) -> str:
    module = inspect.getmodule(leaf)
    text = inspect.getdoc(module) or inspect.getdoc(leaf) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def page() -> str:
    """docs/methods.md: every axis and method."""
    lines = [
        "# Methods",
        "",
        "Made from the source by `make docs`; do not edit. Choose a method by its name in",
        "`params.yaml`.",
    ]
    for axis, rows in catalogue().items():
        lines += ["", f"## {axis}"]
        for row in rows:
            anchor = f"{axis}-{row['name']}".replace("/", "-")
            paper = (
                f" ([{row['paper']}](https://arxiv.org/abs/{row['paper']}))" if row["paper"] else ""
            )
            lines += ["", f'### <a id="{anchor}"></a>{row["name"]}', "", row["does"] + paper]
            lines += [
                f"- `{key}`: {' '.join(text.split())}" if text else f"- `{key}`"
                for key, text in row["parameters"].items()
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path("docs/methods.md").write_text(page(), encoding="utf-8")
