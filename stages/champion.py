"""What an evaluation does in MLflow: figures for each logged model, and perhaps a new champion.

The last model that was evaluated becomes a version of the registered model. The alias `champion`
moves to it where its checkup found nothing and, on the same problems, it solves no share worse than
the champion there is. Why it moved or stayed stands in the version and in the evaluation's run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drawplate.core.errors import UserError
from stages.tracking import legal, log_model, model_of

REGISTERED = "drawplate"
ALIAS = "champion"
_MOVED = "now version"


def evaluated(
    store: Any,
    where: str,
    run: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    report: Path,
    now: int,
) -> None:
    """Logs figures on the models' own runs and logged models, then decides about the champion.

    Args:
        store: MLflow's client.
        where: id of the experiment.
        run: the evaluation's run.
        facts: what the evaluation said of itself; `inputs` holds each model's content hash.
        metrics: `model.figure`.
        report: folder with the report's files.
        now: when the evaluation ended, in milliseconds.
    """
    from mlflow.entities import Metric

    corpus = {"dataset_name": "corpus", "dataset_digest": facts["inputs"]["corpus"][:36]}
    checkups = json.loads((report / "report.json").read_bytes())["checkups"]
    candidate, digest = None, ""
    for each in checkups:
        name = each["name"]
        digest = facts["inputs"][name]
        candidate = model_of(store, where, digest) or log_model(store, where, run, name, digest, {})
        own = candidate.source_run_id
        figures = figures_of(name, [one["name"] for one in checkups], metrics).items()
        named = {"model_id": candidate.model_id, **corpus}
        store.log_batch(own, [Metric(legal(f"eval.{k}"), v, now, 0, **named) for k, v in figures])
        store.set_tag(own, "drawplate.evaluated_by", run)
    if candidate is not None:
        _decide(store, run, candidate, digest, checkups[-1], report)


def figures_of(name: str, names: Iterable[str], metrics: Mapping[str, float]) -> dict[str, float]:
    """A model's own figures, no comparisons; another of `names` may go on where `name` ends."""
    others = tuple(f"{other}." for other in names if other.startswith(f"{name}."))
    return {
        key.removeprefix(f"{name}."): value
        for key, value in metrics.items()
        if key.startswith(f"{name}.") and not key.startswith((*others, f"{name}.vs_"))
    }


def _decide(
    store: Any, run: str, model: Any, digest: str, checkup: Mapping[str, Any], report: Path
) -> None:
    """Registers the candidate and moves the alias to it where nothing speaks against it.

    The decision is noted before it is carried out: when it is sent again, it stays what it was.
    """
    version = _version(store, model, digest)
    said = store.get_run(run).data.tags.get("drawplate.champion") or _verdict(
        store, version, digest, checkup, report
    )
    store.set_tag(run, "drawplate.champion", said)
    if said.startswith(_MOVED):
        store.set_registered_model_alias(REGISTERED, ALIAS, version)
    found = {"drawplate.evaluation": run, "drawplate.name": checkup["name"]}
    for key, value in found.items():
        store.set_model_version_tag(REGISTERED, version, key, value)
    store.update_model_version(
        REGISTERED, version, f"{model.name}, {digest[:12]}. Champion: {said}"
    )


def _verdict(
    store: Any, version: str, digest: str, checkup: Mapping[str, Any], report: Path
) -> str:
    """Whether the alias moves to this version, and why, as a sentence."""
    champion = _champion(store)
    if champion is not None and champion.tags.get("drawplate.hash") == digest:
        return f"version {champion.version} is this very model."
    reasons = [*checkup["reasons"], *_worse(store, champion, checkup["name"], report)]
    if reasons:
        return f"not version {version}: {'; '.join(reasons)}."
    before = f" after version {champion.version}" if champion is not None else ""
    return f"{_MOVED} {version}{before}."


def _version(store: Any, model: Any, digest: str) -> str:
    """The version of the registered model that is this logged model; made where it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        store.create_registered_model(
            REGISTERED,
            description="Checkpoints that were evaluated last in their run. `champion` is the one "
            "that is healthy and was not worse than the champion before it.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in store.search_model_versions(f"name = '{REGISTERED}'"):
        if known.tags.get("drawplate.hash") == digest:
            return str(known.version)
    made = store.create_model_version(
        REGISTERED,
        source=f"models:/{model.model_id}",
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags={"drawplate.hash": digest},
    )
    versions = json.dumps([{"name": REGISTERED, "version": str(made.version)}])
    store.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})
    return str(made.version)


def _champion(store: Any) -> Any:
    """The version that has the alias, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return store.get_model_version_by_alias(REGISTERED, ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _worse(store: Any, champion: Any, name: str, report: Path) -> list[str]:
    """Where the candidate is worse than the champion, or why that cannot be said."""
    if champion is None:
        return []
    from drawplate.evaluate.rival import FILES, against

    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            store.download_artifacts(champion.tags["drawplate.evaluation"], file, folder)
        try:
            verdicts = against(report, name, Path(folder), champion.tags["drawplate.name"])
        except UserError as error:
            return [str(error)]
    return [
        f"{one.metric} is worse than the champion's: {one.child:.1%} after {one.parent:.1%}"
        for one in verdicts
        if one.verdict == "worse"
    ]
