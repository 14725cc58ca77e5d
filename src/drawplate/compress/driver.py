"""The driver of the compress stage: survey all layers, share out the bytes, solve block by block.

Families that narrow the residual stream instead have their own driver, `compress.stream`; those
whose layers share factors are solved between the two passes, by `compress.joint`.

Pass 1 profiles every layer on the model as it came; the allocation then decides on all layers at
once. Pass 2 walks the blocks again, each on the outputs of the compressed blocks before it. With a
work folder a run that was killed goes on after the last finished block and ends with the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from hashlib import sha256
from math import floor
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate import edits
from drawplate.compress import joint
from drawplate.compress.allocation import Profile
from drawplate.compress.layerwise import Layerwise, dense
from drawplate.compress.ledger import Ledger as Ledger
from drawplate.compress.ledger import Row, part
from drawplate.compress.method import Compression, default
from drawplate.compress.residual import Residual
from drawplate.compress.stream import narrow
from drawplate.core.artifact import kept_whole, publish
from drawplate.core.blocks import Outcome, Site, walk
from drawplate.core.calibration import require_room
from drawplate.core.errors import UserError
from drawplate.core.hf import blocks, stored_bytes
from drawplate.core.linalg import output_error
from drawplate.core.method import Frozen, OneOf
from drawplate.core.progress import Watch, silent
from drawplate.core.stats import Stats
from drawplate.edits.low_rank import edited, full_rank
from drawplate.edits.quantized_embedding import is_tied
from drawplate.train.loop import fingerprint

T = TypeVar("T")
Look = Callable[[int, list[Site]], list[T]]
"""What to make of the layers of a block, given its number."""


class Compress(Frozen):
    """What the compress stage is asked to do."""

    ratio: float = Field(0.3, ge=0, lt=1)
    """Share of the model's stored bytes to remove, embeddings and norms counted among them."""
    method: Annotated[Compression, OneOf()] = default(Compression, "low_rank")
    """The family of compression and its parts."""
    exclude: tuple[str, ...] = ()
    """Layers left as they are, as shell patterns of their paths, for example "*.down_proj"."""
    head: bool = False
    """Whether the output head is compressed too, where it has weights of its own."""


def compress(
    model: PreTrainedModel,
    tokens: Tensor,
    params: Compress,
    work: Path | None = None,
    watch: Watch = silent,
    batch: int = 8,
) -> Ledger:
    """Removes `params.ratio` of the model's stored bytes, in place, and says what was done.

    Args:
        model: any Hugging Face decoder, also one that was edited before.
        tokens: [N, T] calibration rows.
        params: what to do.
        work: folder for finished blocks, kept apart for each model, tokens and params.
        watch: told after every block of either pass.
        batch: calibration rows that run together.

    Raises:
        UserError: the ratio cannot be reached, an option has no effect, an earlier edit forbids it,
            rows are longer than the model reads.
        NotFinite: weights or activations are NaN or infinite.
    """
    refuse(model, params)
    require_room(model, "compress.calibration.length", tokens.shape[-1])
    method = params.method
    if work is not None:
        work = work / _fingerprint(model, tokens, params)
    if isinstance(method, Residual):
        if params.exclude or params.head:
            raise UserError(
                f"compress.exclude and compress.head: method {method.name} narrows the stream that "
                "runs through all layers and the head, so that none can be left out; drop both"
            )
        return narrow(model, tokens, method, params.ratio, work, watch, batch)
    assert isinstance(method, Layerwise | joint.Joint)
    targets = _targets(model, params)
    before = stored_bytes(model)
    own = sum(edits.weight_bytes(module) for module in targets.values())
    budget = floor((1 - params.ratio) * before) - (before - own)
    prefix, _ = blocks(model)
    head = any(_block(path, prefix) < 0 for path in targets)
    through = partial(
        walk, model, tokens, wanted=targets, head=head, whole=method.whole, batch=batch
    )
    survey = partial(_survey, through, model, method, targets, _shifted(watch, 0))
    solver: Layerwise | joint.Shares
    if isinstance(method, joint.Joint):
        members = survey(lambda number, sites: [joint.Member(number, site) for site in sites])
        pools = joint.pools(method, members, budget)
        _affordable(params, [pool.profile for pool in pools], before, budget)
        solver = joint.Shares(method, pools, budget)
        plan, groups = solver.plan, solver.groups
    else:
        solver, groups = method, ()
        plan = _plan(params, method, survey, before, budget, work)

    def visit(number: int, sites: list[Site]) -> Outcome[Row]:
        started = perf_counter()
        solved = solver.changes(sites, plan)
        seconds = (perf_counter() - started) / max(len(sites), 1)
        changes = [change for each in solved for change in each.changes]
        new = {path: weight for each in solved for path, weight in each.weights.items()}
        rows = [_row(number, site, plan, changes, new, seconds) for site in sites]
        return Outcome(changes, rows)

    needs = method.reads() | {"gram"}
    rows = through(needs, visit, Row, work=work, watch=_shifted(watch, 1))
    after = stored_bytes(model)
    return Ledger(bytes_before=before, bytes_after=after, rows=tuple(rows), groups=groups)


_PLAN = "plan.json"
_plans = TypeAdapter(dict[str, int | None])


def _plan(
    params: Compress,
    method: Layerwise,
    survey: Callable[[Look[Profile]], list[Profile]],
    before: int,
    budget: int,
    work: Path | None,
) -> dict[str, int | None]:
    """What becomes of each layer, taken up from `work` where an earlier run has decided it."""
    known = None if work is None else _known_plan(work)
    if known is not None:
        return known
    profiles = survey(method.profiles)
    _affordable(params, profiles, before, budget)
    plan = method.plan(profiles, budget)
    if work is not None:
        with publish(work / "plan", "plan") as folder:
            (folder / _PLAN).write_bytes(_plans.dump_json(plan))
    return plan


def refuse(model: PreTrainedModel, params: Compress) -> None:
    """Checks the hand-over: the edits hold what they promise, and the family can follow them.

    Raises:
        UserError: the model has an edit that the method refuses.
        Damaged: an edit does not hold what it promises.
    """
    edits.check(model)
    method = params.method
    for edit in edits.of(model):
        if edit.name in method.refuses:
            raise UserError(
                f"{edit.module} is already {edit.name}: method {method.name} cannot follow, "
                f"it refuses {', '.join(sorted(method.refuses))}; give the model from before"
            )
    for path, module in model.named_modules() if method.whole else ():
        if edited(module):
            raise UserError(
                f"{path} is already two factors, and those were edited: method {method.name} "
                "cannot follow; give the model from before"
            )


def _targets(model: PreTrainedModel, params: Compress) -> dict[str, nn.Module]:
    """The layers to compress by path, in the order of the model."""
    prefix, _ = blocks(model)
    found = {
        path: module
        for path, module in edits.linears(model, params.method.whole).items()
        if path.startswith(f"{prefix}.")
    }
    if params.head:
        head = cast("Any", model).get_output_embeddings()
        if is_tied(model):
            raise UserError("compress.head: the output head shares the embedding's weights")
        (path,) = (path for path, module in model.named_modules() if module is head)
        edits.require_editable(path, head, "leave out compress.head", params.method.whole)
        found[path] = head
    for pattern in params.exclude:
        if not any(fnmatch(path, pattern) for path in found):
            raise UserError(
                f"compress.exclude: {pattern!r} matches no linear layer; there are for example "
                f"{', '.join(list(found)[:3])}"
            )
    left = {
        path: module
        for path, module in found.items()
        if not any(fnmatch(path, pattern) for pattern in params.exclude)
    }
    if not left:
        raise UserError("compress: no linear layer is left to compress")
    return left


def _survey(
    through: Callable[..., list[Row]],
    model: PreTrainedModel,
    method: Layerwise | joint.Joint,
    targets: Mapping[str, nn.Module],
    watch: Watch,
    look: Look[T],
) -> list[T]:
    """What `look` finds in each block of the model as it came."""
    found: list[T] = []

    def visit(number: int, sites: list[Site]) -> Outcome[Row]:
        found.extend(look(number, sites))
        return Outcome([], [])

    needs = method.surveys()
    if needs:
        through(needs, visit, Row, watch=watch)
        return found
    prefix, layers = blocks(model)
    for number in (*range(len(layers)), -1):
        inside = [path for path in targets if _block(path, prefix) == number]
        visit(number, [Site(path, targets[path], Stats(count=0)) for path in inside])
    return found


def _block(path: str, prefix: str) -> int:
    """Number of the block that a layer belongs to; -1 outside of the blocks."""
    inside = path.removeprefix(f"{prefix}.")
    return -1 if inside == path else int(inside.partition(".")[0])


def _affordable(params: Compress, profiles: list[Profile], before: int, budget: int) -> None:
    """Refuses a ratio that not even the smallest form of every layer reaches."""
    least = sum(int(profile.bytes[0]) for profile in profiles)
    if least > budget:
        fixed = floor((1 - params.ratio) * before) - budget
        most = floor((1 - (fixed + least) / before) * 10_000) / 10_000
        raise UserError(
            f"compress.ratio {params.ratio:g} cannot be reached: method {params.method.name} can "
            f"remove at most {most:g} of this model's {before} stored bytes, since {fixed} of them "
            f"are embeddings, norms and other parts that it leaves alone{_hint(params.method)}"
        )


def _hint(method: Compression) -> str:
    """What else would let a family go further."""
    if not isinstance(method, joint.Joint):
        return ""
    return f"; a compress.method.grouping.error above {method.grouping.error:g} allows more"


def _row(
    number: int,
    site: Site,
    plan: Mapping[str, int | None],
    changes: list[edits.Change],
    new: Mapping[str, Tensor],
    seconds: float,
) -> Row:
    old = dense(site)
    now = new.get(site.path, old)
    mine = [(edit, tensors) for edit, tensors in changes if edit.module == site.path]
    size = edits.weight_bytes(site.module)
    units = plan.get(site.path)
    return Row(
        path=site.path,
        block=number,
        rows=old.shape[0],
        columns=old.shape[1],
        edit=mine[0][0].name if mine else "",
        units=full_rank(site.module) if units is None else units,
        sparsity=float((now == 0).double().mean()),
        weight_error=part(
            float((old - now).double().square().sum()), float(old.double().square().sum())
        ),
        activation_error=part(
            float(output_error(old - now, site.stats.gram)),
            float(output_error(old, site.stats.gram)),
        ),
        bytes_before=size,
        bytes_after=sum(t.nbytes for _, tensors in mine for t in tensors.values()) or size,
        seconds=seconds,
    )


def _shifted(watch: Watch, which: int) -> Watch:
    """A watch for pass `which` of two passes of equal length."""

    def shifted(step: int, total: int, metrics: Mapping[str, float]) -> None:
        watch(which * total + step, 2 * total, metrics)

    return shifted


def _known_plan(work: Path) -> dict[str, int | None] | None:
    """The plan of an earlier run, None where there is nothing whole."""
    if not kept_whole(work / "plan"):
        return None
    return _plans.validate_json((work / "plan" / _PLAN).read_bytes())


def _fingerprint(model: PreTrainedModel, tokens: Tensor, params: Compress) -> str:
    """Name of the work of these inputs: finished blocks of any other inputs are never taken up."""
    digest = sha256(params.model_dump_json(include=set(Compress.model_fields)).encode())
    digest.update(fingerprint(model).encode())
    digest.update(f"{tokens.dtype} {tuple(tokens.shape)}".encode())
    digest.update(tokens.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
