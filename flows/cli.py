"""The `drawplate` command. Each command imports what it needs when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from drawplate.core.errors import Damaged, UserError
from stages import STAGES
from stages.quiet import guarded, quiet_environment

if TYPE_CHECKING:
    from drawplate.lineage import Step


class Commands(click.Group):
    """Stages are commands with options from their inputs, imported when asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Stages in pipeline order, then the rest."""
        return [*STAGES, *sorted(set(self.commands) - set(STAGES))]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """A command of this module, or a stage's."""
        if name not in STAGES:
            return super().get_command(context, name)
        from stages.run import command_of

        return command_of(name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists commands without importing the stages."""
        rows = [
            (name, STAGES.get(name) or self._short(name)) for name in self.list_commands(context)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _short(self, name: str) -> str:
        return self.commands[name].get_short_help_str(limit=90)


@click.group(cls=Commands, no_args_is_help=True)
@click.version_option(package_name="drawplate")
def cli() -> None:
    """Text in; a small, fast, evaluated reasoning language model out.

    \b
    Examples:
      drawplate run                                  all six stages, through DVC
      drawplate run evaluate -S compress.ratio=0.4   one changed parameter, what depends on it
      drawplate compress --model IN --corpus TEXT --out OUT -S compress.ratio=0.3
      drawplate chat --model models/tuned
    """


@cli.command()
@click.argument("stages", nargs=-1)
@click.option(
    "-S", "changes", multiple=True, metavar="KEY=VALUE", help="Changes params.yaml first."
)
@click.option("--preset", "names", multiple=True, help="Settings of a paper, such as rl/dler.")
def run(stages: tuple[str, ...], changes: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Bring the pipeline of this folder up to date (all of it, or the named stages).

    \b
    Example:
      drawplate run finetune --preset rl/grpo -S finetune.steps=50
    """
    from flows.local import run_pipeline

    sys.exit(run_pipeline(Path.cwd(), stages, changes, names))


@cli.command()
@click.argument("targets", nargs=-1)
@click.option(
    "-S",
    "parameters",
    multiple=True,
    required=True,
    metavar="KEY=VALUES",
    help="0.2,0.4 or 2..4 or 0.1..0.5 or 1e-4..1e-2:log; once for each key.",
)
@click.option("--study", type=click.IntRange(1), help="Trials of a search; else every combination.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--goal", "goals", multiple=True, metavar="[FILE:]METRIC:max|min")
@click.option("--keep", multiple=True, metavar="[FILE:]METRIC<=NUMBER", help="A bound, or >=.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Side by side.")
@click.option(
    "--engine",
    type=click.Choice(["processes", "dask", "workers"]),
    default="processes",
    show_default=True,
)
@click.option(
    "--preflight/--no-preflight",
    default=True,
    show_default=True,
    help="Whether workers forecast the parameters as committed first.",
)
def sweep(**request: Any) -> None:
    """Run many settings, each as a DVC experiment, and show which no other beats.

    \b
    Examples:
      drawplate sweep -S compress.ratio=0.2,0.4 -S quantize.bits=2,3,4 --jobs 2
      drawplate sweep -S compress.ratio=0.1..0.5 --study 20 --keep 'tuned.stored_bytes<=2e6'
    """
    from flows.sweep.run import main

    sys.exit(main(request, Path.cwd()))


@cli.command()
@click.argument("what")
@click.argument("contenders", nargs=-1)
@click.option("-S", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of params.yaml's.")
@click.option(
    "--params", "file", type=click.Path(path_type=Path), help="Instead of params.yaml here."
)
@click.option("--model", type=click.Path(path_type=Path), help="What contenders start from.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Folder that prepare wrote.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make; usual: bench/WHAT.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--quick", is_flag=True, help="One seed and small settings: minutes, no intervals.")
def bench(what: str, contenders: tuple[str, ...], **request: Any) -> None:
    """Compare the presets of a stage, or the methods that a key can choose, at one budget.

    \b
    Examples:
      drawplate bench quantize.grid --quick
      drawplate bench compress.method low_rank slice -S compress.ratio=0.3
      drawplate bench rl dler grpo
    """
    from flows.bench.run import bench as compare

    click.echo(compare(Path.cwd(), what, contenders, **request))


@cli.command()
@click.argument("stages", nargs=-1)
@click.option("-S", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of params.yaml's.")
@click.option("--preset", "names", multiple=True, help="Settings of a paper, such as rl/dler.")
@click.option("--after", is_flag=True, help="Compare the last forecast with what happened.")
def preflight(
    stages: tuple[str, ...], changes: tuple[str, ...], names: tuple[str, ...], after: bool
) -> None:
    """Forecast memory, time and disk of a run; refuse what does not fit (exit code 4).

    \b
    Examples:
      drawplate preflight pretrain -S pretrain.model.layers=12
      drawplate preflight --after
    """
    from flows.preflight import compared, preflight

    if not after:
        click.echo(preflight(Path.cwd(), stages, changes, names))
        return
    if stages or changes or names:
        raise UserError("preflight --after compares the last forecast as it is: leave out the rest")
    found = compared(Path.cwd())
    if found is None:
        raise UserError("no forecast yet: run `drawplate preflight` before the pipeline")
    click.echo(found)


@cli.command()
@click.argument("axis", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def methods(axis: str | None, as_json: bool) -> None:
    """List the methods of every axis, or of one with their parameters and defaults.

    \b
    Example:
      drawplate methods compress/prune
    """
    from drawplate.settings import nearest
    from flows.catalogue import assignment, catalogue

    found = catalogue()
    if axis is not None and axis not in found:
        raise UserError(f"no axis {axis!r}{nearest(axis, found)}; there are: {', '.join(found)}")
    shown = {name: rows for name, rows in found.items() if axis in (None, name)}
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for name, rows in shown.items():
        click.echo(f"\n{name}")
        for row in rows:
            click.echo(
                f"  {row['name']:18} {row['does']}"
                + (f"  [{row['paper']}]" if row["paper"] else "")
            )
            for key, parameter in row["parameters"].items() if axis else ():
                click.echo(f"    {assignment(key, parameter['default'])}: {parameter['does']}")


@cli.command()
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def lineage(target: str, as_json: bool) -> None:
    """Walk from a FOLDER or an MLflow RUN back to the raw text, verifying hashes on the way.

    \b
    Examples:
      drawplate lineage models/tuned
      drawplate lineage 3f2a...   (a run id)
    """
    from drawplate.lineage import walk

    folder = Path(target)
    if folder.is_file():
        raise UserError(f"{target} is a file; name a folder or an MLflow run")
    steps = list(walk(folder) if folder.is_dir() else _steps_of_run(target))
    if as_json:
        click.echo(json.dumps([step.model_dump(mode="json") for step in steps], indent=1))
    else:
        for step in steps:
            _show(step)
    problems = [step.problem for step in steps]
    problems += [raw.problem for step in steps for raw in step.sources]
    problems = list(filter(None, problems))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise Damaged(f"{problems[0]}{more}")


def _show(step: Step) -> None:
    """A step of a lineage and its raw inputs, a line each."""
    made = f"{step.role}: {step.node.stage}  {step.hash[:12]}  {step.state}"
    click.echo("  " * step.depth + "  ".join([made, *filter(None, [step.folder])]))
    for raw in step.sources:
        # A whole hash is of use to nobody; a version is.
        told = raw.digest if raw.state is None else f"{raw.digest[:12]}  {raw.state}"
        shown = "  ".join(filter(None, [raw.name, told]))
        click.echo(f"{'  ' * (step.depth + 1)}source {raw.source}: {shown}")


def _steps_of_run(run_id: str) -> Iterator[Step]:
    """The walk from what an MLflow run made: where that lies here, else from the run's record."""
    quiet_environment()
    from mlflow.exceptions import MlflowException

    from drawplate.lineage import FILE, published, read, walk, walk_record
    from stages.tracking import answering, client, exists, uri

    if not exists():
        raise UserError(f"{run_id!r} is no folder, and there are no runs: {uri()} does not exist")
    store = client()
    with answering("name a folder"):
        try:
            tags = store.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            tags = None
    if tags is None:
        raise UserError(f"{run_id!r} is no folder, and no run in {uri()}")
    if "drawplate.output" not in tags:
        raise UserError(f"run {run_id} made no artifact: it is a whole execution, or it failed")
    here, digest = Path.cwd(), tags["drawplate.output"]
    made = Path(tags["drawplate.folder"])
    folder = (published(made.parent) | published(here)).get(digest)
    if folder is not None:
        return walk(folder)
    # The run of a stage that was not computed again shows no files; the one that computed it does.
    computed = tags.get("drawplate.cached_from", run_id)
    with TemporaryDirectory() as temporary:
        try:
            store.download_artifacts(computed, FILE, temporary)
        except (MlflowException, OSError) as error:
            raise Damaged(f"run {computed} has no {FILE}: {str(error).splitlines()[0]}") from None
        return walk_record(read(Path(temporary)), digest, here)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--repair", is_flag=True, help="Replace what is damaged by whole copies.")
def verify(folder: Path | None, repair: bool) -> None:
    """Compare every byte of a FOLDER with its manifest, or of this project with dvc.lock.

    Without FOLDER: all that dvc.lock names, in the checkout, DVC's cache and its remote.

    \b
    Examples:
      drawplate verify models/tuned
      drawplate verify --repair
    """
    from drawplate.core.artifact import verify as compare

    if folder is None:
        from flows.verify import verify_project

        verify_project(Path.cwd(), repair)
        return
    if repair:
        raise UserError("--repair is for the whole project: call it without a folder")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist or is not a folder")
    manifest = compare(folder)
    what = f"{manifest.kind}, {manifest.tree_hash[:12]}"
    click.echo(f"{folder}: {len(manifest.files)} files are whole ({what})")


@cli.command()
@click.argument("prompt")
@click.option(
    "--model", type=click.Path(path_type=Path), default=Path("models/tuned"), show_default=True
)
@click.option("--max-new", default=128, show_default=True, help="Most tokens of the answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--runtime",
    "how",
    default="plain",
    show_default=True,
    help="How it computes; `drawplate methods model/runtime` lists the names.",
)
def generate(
    prompt: str, model: Path, max_new: int, temperature: float, seed: int, how: str
) -> None:
    """Answer one PROMPT.

    \b
    Examples:
      drawplate generate "61+17-25=?"
      drawplate generate --runtime flash_svd --model models/compressed "61+17-25=?"
    """
    from drawplate.evaluate.results import Evaluate
    from drawplate.model.runtime import attached
    from drawplate.settings import validate
    from flows.talk import Talker

    runtime = validate(Evaluate, {"runtime": {"name": how}}, "generate").runtime
    talker = Talker(model)
    text = talker.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with attached(runtime, talker.model, text) as figures:
        click.echo(talker(prompt, max_new, temperature, seed))
    if found := figures():
        told = ", ".join(f"{name} {value:g}" for name, value in found.items())
        click.echo(f"{how}: {told}", err=True)


@cli.command()
@click.option(
    "--model", type=click.Path(path_type=Path), default=Path("models/tuned"), show_default=True
)
@click.option("--max-new", default=128, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
def chat(model: Path, max_new: int, temperature: float) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it.

    \b
    Example:
      drawplate chat --model models/base
    """
    from flows.talk import Talker

    talker = Talker(model)
    for line in talker.greeting():
        click.echo(line)
    number = 0
    while True:
        try:
            prompt = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            return
        if not prompt:
            return
        try:
            click.echo(talker(prompt, max_new, temperature, number))
        except UserError as error:  # such as a prompt that is too long: the next one may be right
            click.echo(f"drawplate: {error}", err=True)
        number += 1


@cli.command()
def report() -> None:
    """Print the summary table and where the report, the model and the MLflow UI are.

    \b
    Example:
      drawplate report
    """
    from flows.local import summary

    click.echo(summary(Path.cwd()))


def main() -> None:
    """The console script."""
    quiet_environment()
    sys.exit(guarded(lambda: cli.main(standalone_mode=False)))


if __name__ == "__main__":
    main()
