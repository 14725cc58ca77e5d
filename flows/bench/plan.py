"""Who is compared: the methods of an axis or the presets of a stage, at one budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, get_args, get_origin

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, Method, leaves
from drawplate.settings import Tree, merge, nearest, override, preset, presets, validate

NONE = "none"
USUAL = "usual"
ALIASES = {"rl": "finetune", "evaluate.sampler": "evaluate.filters"}
SEEDS = {
    "pretrain": ("pretrain.seed", "pretrain.training.seed"),
    "compress": ("compress.calibration.seed", "compress.recover.seed"),
    "quantize": ("quantize.calibration.seed", "quantize.seed"),
    "finetune": ("finetune.seed",),
    "evaluate": ("evaluate.seed",),
}
"""Stage -> the keys that a seed sets; one in a section that is switched off is left out."""
BUDGET = {
    "pretrain": ("batch", "length", "training.steps"),
    "compress": ("ratio",),
    "quantize": ("bits",),
    "finetune": ("steps", "prompts", "samples"),
    "evaluate": ("documents", "problems", "samples"),
}
"""Stage -> what every contender gets alike, whatever its preset asks for. Steps of finetune count
for as many as a batch of rollouts serves: sampling is what costs. A preset that plans its own steps
from a budget gets the operations of the others."""
QUICK = {
    "pretrain": ("training.steps=40", "training.save_every=40"),
    "compress": ("calibration.rows=16", "recover=null"),
    "quantize": ("calibration.rows=16",),
    "finetune": ("steps=2", "prompts=2", "samples=12"),
    "finetune.self_play": ("steps=60",),
    "evaluate": (
        *("documents=10", "problems=40", "samples=1", "passes=[1]"),
        *("max_new=64", "probe=null"),
    ),
    "evaluate.runtime": ("probe={repeats: 1}",),
}
"""Stage or key -> smaller settings for a first look."""


class Plan(NamedTuple):
    """What is compared."""

    key: str
    """The stage, or the dotted key whose methods are compared."""
    stage: str
    contenders: dict[str, Tree]
    """Name -> parameter tree; the first is what the others are compared with."""

    def used(self, tree: Tree) -> Tree:
        """The sections of a contender that are run."""
        return {key: tree[key] for key in (self.stage, "evaluate") if key in tree}


def plan(
    what: str,
    only: Sequence[str],
    tree: Mapping[str, Any],
    quick: bool,
    changes: Sequence[str] = (),
) -> Plan:
    """The contenders of `what`: a stage's presets, or the methods that a dotted key can choose.

    Args:
        what: `quantize` (its presets and the settings as they are) or `quantize.grid`.
        only: Names of the contenders to take; all where it is empty.
        tree: Parameters as params.yaml gives them.
        quick: Whether `QUICK` is laid over them.
        changes: `KEY=VALUE` as `-S` gives them, the last word.

    Raises:
        UserError: no such stage, key or contender, a change without effect, or nothing to compare.
    """
    key = key_of(what)
    stage, _, rest = key.partition(".")
    if stage not in SEEDS:
        known = (*SEEDS, *ALIASES)
        raise UserError(
            f"bench {what}: no stage {stage!r}{nearest(stage, known)}; choose from "
            f"{', '.join(known)}, or a key such as quantize.grid"
        )
    _refuse_idle(what, stage, changes)
    if quick:
        for name in dict.fromkeys((stage, "evaluate", key)):
            owner = name.partition(".")[0]
            tree = override(tree, [f"{owner}.{each}" for each in QUICK.get(name, ())])
    tree = override(tree, changes)
    found = _methods(stage, rest, tree) if rest else _presets(stage, tree)
    for name in only:
        if name not in found:
            raise UserError(
                f"bench {what}: no contender {name!r}{nearest(name, found)}; there are: "
                f"{', '.join(found)}"
            )
    chosen = {name: tree for name, tree in found.items() if not only or name in only}
    if len(chosen) < 2:
        raise UserError(f"bench {what}: nothing to compare {', '.join(chosen)} with")
    return Plan(key, stage, chosen)


def _refuse_idle(what: str, stage: str, changes: Sequence[str]) -> None:
    # Of prepare, a budget of pretrain takes the vocabulary.
    read = {stage, "evaluate", "execution", *(["prepare"] if stage == "pretrain" else [])}
    for change in changes:
        key = change.partition("=")[0]
        section = key.partition(".")[0]
        if section not in read:
            raise UserError(
                f"-S {change} has no effect on bench {what}{nearest(section, read)}, which reads "
                f"{', '.join(sorted(read))}; leave it out"
            )
        if key in (*SEEDS[stage], *SEEDS["evaluate"]):
            raise UserError(
                f"-S {change} has no effect on bench {what}, where seeds are 0, 1, ... up to what "
                "--seeds says; leave it out"
            )


def key_of(what: str) -> str:
    """The stage or dotted key that a user's words name."""
    first, dot, after = what.partition(".")
    return ALIASES.get(what, f"{ALIASES.get(first, first)}{dot}{after}")


def seeded(stage: str, tree: Mapping[str, Any], seed: int) -> Tree:
    """`tree` with all of the stage's seeds set to `seed`."""
    params = params_of(stage)
    made = validate(params, tree.get(stage), stage)
    return override(tree, [f"{key}={seed}" for key in SEEDS[stage] if _reaches(made, key)])


def params_of(stage: str) -> type[Frozen]:
    """The class of a stage's parameters."""
    kind: type[Frozen] = getattr(import_module(f"stages.{stage}"), stage).params
    return kind


def _presets(stage: str, tree: Mapping[str, Any]) -> dict[str, Tree]:
    made = validate(params_of(stage), tree.get(stage), stage)
    budget = [f"{stage}.{key}={json.dumps(_at(made, key.split('.')))}" for key in BUDGET[stage]]
    found = {USUAL: dict(tree)}
    for name, differences in presets().items():
        if set(differences) - {"paper"} == {stage}:
            theirs = override(merge(tree, preset(name)), budget)
            if stage == "finetune":
                now = _at(made, ["updates"])
                steps = _at(made, ["steps"]) * theirs[stage].get("updates", now) // now
                theirs = override(theirs, [f"finetune.steps={steps}"])
            if theirs[stage].get("budget"):
                flops = f"pretrain.budget.flops={_operations(made, tree)}"
                theirs = override(theirs, ["pretrain.training.steps=null", flops])
            found[name.partition("/")[2]] = theirs
    return found


def _operations(pretrain: Any, tree: Mapping[str, Any]) -> float:
    """What a pretraining spends, as budgets count it: 6 for each weight and token."""
    from drawplate.pretrain.budget import parameters

    prepare = validate(params_of("prepare"), tree.get("prepare"), "prepare")
    tokens: int = pretrain.training.steps * pretrain.batch * pretrain.length
    return 6.0 * parameters(pretrain.model, _at(prepare, ["vocabulary"])) * tokens


def _methods(stage: str, rest: str, tree: Mapping[str, Any]) -> dict[str, Tree]:
    made = validate(params_of(stage), tree.get(stage), stage)
    key, (*path, last) = f"{stage}.{rest}", rest.split(".")
    owner = _at(made, path)
    field = type(owner).model_fields.get(last) if isinstance(owner, Frozen) else None
    axis = _axis(field.annotation) if field else None
    if axis is None:
        raise UserError(
            f"bench {key}: this key chooses no method in the settings as they are; "
            f"{_elsewhere(stage, last) or '`drawplate methods` lists the axes'}"
        )
    now = getattr(owner, last)
    if isinstance(now, tuple):
        choices = {name: override(tree, [f"{key}=[{{name: {name}}}]"]) for name in leaves(axis)}
        return {NONE: override(tree, [f"{key}=[]"]), **choices}
    shared = _shared(tree, key.split("."), axis)
    choices = {name: override(tree, [f"{key}.name={name}", *shared]) for name in leaves(axis)}
    if now is None:
        return {NONE: dict(tree), **choices}
    return {now.name: choices[now.name], **choices}


def _shared(tree: Mapping[str, Any], path: Sequence[str], axis: type[Method]) -> list[str]:
    """What is set of the fields that all methods of an axis have, which another name would drop."""
    section: Any = tree
    for part in path:
        section = section.get(part) if isinstance(section, Mapping) else None
    given = section if isinstance(section, Mapping) else {}
    key = ".".join(path)
    return [
        f"{key}.{field}={json.dumps(given[field])}"
        for field in sorted(axis.model_fields.keys() & given.keys() - {"name"})
    ]


def _elsewhere(stage: str, name: str) -> str:
    """Where a key `name` chooses a method once another method is chosen around it."""
    return ", or ".join(
        f"with -S '{stage}.{key}={{name: {around}}}' {stage}.{key}.{name} does"
        for key, field in params_of(stage).model_fields.items()
        if (axis := _axis(field.annotation))
        for around, leaf in leaves(axis).items()
        if name in leaf.model_fields and _axis(leaf.model_fields[name].annotation)
    )


def _at(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        value = getattr(value, part, None)
    return value


def _reaches(params: Frozen, key: str) -> bool:
    *path, _ = key.split(".")[1:]
    return _at(params, path) is not None


def _axis(annotation: Any) -> type[Method] | None:
    """The axis that a field's annotation names, however it is wrapped."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Method) else None
    return next(filter(None, map(_axis, get_args(annotation))), None)
