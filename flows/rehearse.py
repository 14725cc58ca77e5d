"""One process of a rehearsal: a stage is carried out on a small scale, timed and weighed.

    python -m flows.rehearse STAGE

reads orders as JSON lines from standard input and answers each by a JSON line on standard output.
`flows.preflight` gives the orders. The process imports what a process of that stage would import
and carries out each order in a fork of itself: every one begins where a fresh process would, and
what one leaves in memory is not charged to the next.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np

from drawplate.core.errors import DrawplateError
from drawplate.core.memory import file_memory
from drawplate.core.progress import Watch
from stages.run import Execution, Run, Stage, prepare_process

Answer = dict[str, Any]
_QUANTILES = [(2 * i + 1) / 40 for i in range(20)]
_SAMPLE = 16 << 20
"""Bytes written to see how fast a checkpoint is written."""


@dataclass
class Heard(Run):
    """A run whose watches write down when they were called, and say nothing."""

    marks: dict[str, list[float]] = field(default_factory=dict)

    def part(self, label: str) -> Watch:
        """A watch that notes the time."""
        times = self.marks.setdefault(label, [])

        def watch(step: int, total: int, metrics: Mapping[str, float]) -> None:
            times.append(time.perf_counter())

        return watch

    def say(self, text: str) -> None:
        """Nothing."""


_FILES = 0
"""Bytes of files, such as libraries, that were in the memory of this process before it forked."""


def rehearse(
    stage: Stage[Any, Any, Any], params: Any, inputs: Any, out: Path, execution: Execution
) -> Answer:
    """Carries the stage out; its record gives seconds and memory as it will for the real run."""
    marks: dict[str, list[float]] = {}
    work: list[int] = []

    def body(params: Any, inputs: Any, run: Run) -> Any:
        given = {each.name: getattr(run, each.name) for each in fields(Run)}
        report = stage.body(params, inputs, Heard(**given, marks=marks))
        work.append(folder_size(run.work))
        return report

    on_device = execution.device.startswith("cuda")
    if on_device:
        import torch

        torch.cuda.reset_peak_memory_stats(execution.device)
    heard = replace(stage, body=body)
    record = out.with_suffix(".record.json")
    report = heard(params, inputs, out, record=record, execution=execution)
    told = json.loads(record.read_bytes())
    # Pages of libraries that the import touched are not counted for a fork until it touches them.
    unseen = max(_FILES - file_memory(), 0)
    return {
        "seconds": told["seconds"],
        "memory": told["peak_memory"] + unseen,
        "device": torch.cuda.max_memory_allocated(execution.device) if on_device else None,
        "disk": folder_size(out),
        "work": work[0],
        "marks": marks,
        "figures": report.model_dump(mode="json"),
    }


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def do_nothing(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """Answered when all imports are done."""
    return {}


def do_stage(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """The stage itself; with `layers`, on that many layers of the model that it would adopt."""
    params = _params(stage, order)
    out = Path(order["out"])
    if order["layers"] is not None:
        params = params.model_copy(update={"adopt": _cut(params.adopt, order["layers"], out)})
    inputs = stage.inputs(**order["inputs"])
    answer = rehearse(stage, params, inputs, out, _execution(order))
    weights = out.glob("*.safetensors")
    return answer | {"stored": sum(file.stat().st_size for file in weights)}


def do_prepare(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """The prepare stage on a share of its sources; tells quantiles of a solution's length too."""
    from drawplate.core.corpus import Corpus

    out, step = Path(order["out"]), order["step"]
    with TemporaryDirectory(dir=out.parent) as folder:
        params = _params(stage, order)
        some = tuple(
            _some(source, step, Path(folder) / str(number))
            for number, source in enumerate(params.sources)
        )
        params = params.model_copy(update={"sources": some})
        answer = rehearse(stage, params, stage.inputs(), out, _execution(order))
    stream = Corpus(out).stream("problems-train")
    sizes = stream.offsets[1:] - stream.offsets[:-1] - stream.prompts
    return answer | {"answers": np.quantile(sizes, _QUANTILES).tolist()}


def do_extent(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """Bytes of the files that the sources would read, and those left of them by each step."""
    sources = _params(stage, order).sources
    bytes_ = [sum(path.stat().st_size for path in _files(source)) for source in sources]
    left = [sum(_left(source, step) for source in sources) for step in order["steps"]]
    return {"bytes": sum(bytes_), "left": left}


def do_sample(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """Answers to one batch of finetuning's prompts, none of which ends before the limit."""
    import torch

    from drawplate.core import hf
    from drawplate.core.corpus import Corpus
    from drawplate.edits import materialized
    from drawplate.model.sample import sample
    from stages.problems import problems

    how = _params(stage, order)
    model = hf.load(order["model"]).to(_execution(order).device)
    corpus = Corpus(Path(order["corpus"]))
    prompts = problems(corpus, "train").prompts
    asked = [prompts[i % len(prompts)] for i in range(how.prompts) for _ in range(how.samples)]
    started = time.perf_counter()
    with torch.no_grad(), materialized(model, whole=True):
        sample(
            model,
            asked,
            max_new=how.length.limit(0, how.steps),
            end=corpus.end,
            temperature=how.temperature,
            batch_size=how.parallel,
        )
    return {"seconds": time.perf_counter() - started}


def do_probe(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """The measurement of a model's memory and speed, in a fresh process or in this one."""
    import torch

    from drawplate.evaluate.cost import Probe, Trial, measure
    from drawplate.evaluate.probe import run

    probe, folder = Probe.model_validate(order["probe"]), Path(order["model"])
    device = _execution(order).device
    started = time.perf_counter()
    if order["fresh"]:
        measure(folder, probe, device)
    else:
        run(folder, torch.device(device), Trial(probe=probe))
    return {"seconds": time.perf_counter() - started}


def do_rate(stage: Stage[Any, Any, Any], order: Answer) -> Answer:
    """Bytes a second of writing a folder, flushing and hashing it."""
    from drawplate.core.artifact import publish

    with TemporaryDirectory(dir=order["folder"]) as inside:
        started = time.perf_counter()
        with publish(Path(inside) / "sample", "checkpoint") as folder:
            (folder / "data").write_bytes(os.urandom(_SAMPLE))
        return {"rate": _SAMPLE / (time.perf_counter() - started)}


def _params(stage: Stage[Any, Any, Any], order: Answer) -> Any:
    from drawplate import settings

    return settings.validate(stage.params, order["params"], stage.name)


def _execution(order: Answer) -> Execution:
    return Execution(**order["execution"], tracking=False)


def _cut(folder: Path, layers: int, out: Path) -> Path:
    """A model of the same shape with `layers` layers and random weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from drawplate.core import hf

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.num_hidden_layers = layers
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = kinds[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    smaller = out.with_name(f"{out.name}-adopted")
    if not smaller.exists():
        smaller.mkdir()
        hf.save(model, smaller, hf.load_tokenizer(folder))
    return smaller


# A source's fields say where its files are; each kind of field has one way to read less.


def _files(source: Any) -> list[Path]:
    from drawplate.data.source._files import files

    if hasattr(source, "packages"):
        found = (source._files(_distribution(package)) for package in source.packages)
        return [place for some in found for _, place in some]
    return [Path(name) for name in files(source.files)] if hasattr(source, "files") else []


def _left(source: Any, step: int) -> float:
    """Bytes that `_some` leaves of a source."""
    if not hasattr(source, "packages"):
        return sum(path.stat().st_size for path in _files(source)) / step
    found = (source._files(_distribution(package))[::step] for package in source.packages)
    return float(sum(place.stat().st_size for some in found for _, place in some))


def _distribution(package: str) -> Any:
    from importlib.metadata import distribution

    return distribution(package)


def _some(source: Any, step: int, folder: Path) -> Any:
    """The source with one in `step` of its files, rows or bytes."""
    if step == 1:
        return source
    if hasattr(source, "packages"):
        kind: Any = type(source)

        class Some(kind):  # type: ignore[misc]
            """Every `step`-th file of each package."""

            def _files(self, package: Any) -> Any:
                return super()._files(package)[::step]

        return Some(**source.model_dump())
    if hasattr(source, "files"):
        return source.model_copy(update={"files": _fewer(_files(source), step, folder)})
    if hasattr(source, "split") and "[" not in source.split:
        return source.model_copy(update={"split": f"{source.split}[:{max(100 // step, 1)}%]"})
    return source


def _fewer(found: list[Path], step: int, folder: Path) -> str:
    """A pattern for one in `step` of many files, or for the first part of each of a few."""
    folder.mkdir()
    few = len(found) < 2 * step
    for number, path in enumerate(found if few else found[::step]):
        place = folder / f"{number:08d}-{path.name}"
        if few:
            _head(path, step, place)
        else:
            place.symlink_to(path.resolve())
    return f"{folder}/*"


def _head(path: Path, step: int, place: Path) -> None:
    """The first lines or rows of a file, one in `step`."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile, write_table

        with ParquetFile(path) as table:
            rows = max(table.metadata.num_rows // step, 1)
            write_table(table.read().slice(0, rows), place)
        return
    packed = path.suffix == ".gz"
    room = path.stat().st_size // step
    with gzip.open(path) if packed else path.open("rb") as stream, place.open("wb") as raw:
        out = gzip.GzipFile(fileobj=raw, mode="wb") if packed else raw
        for line in stream:
            out.write(line)
            if raw.tell() >= room:
                break
        if packed:
            out.close()


def main(name: str) -> None:
    """Answers orders until there are no more."""
    global _FILES
    prepare_process()
    stage = getattr(import_module(f"stages.{name}"), name)
    # Whatever a library prints must not come between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    _FILES = file_memory()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(stage, json.loads(line), answers)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"ended by {os.waitstatus_to_exitcode(status)}")


def _answer(stage: Stage[Any, Any, Any], order: Answer, answers: int) -> NoReturn:
    """Carries out one order in this fork and ends it."""
    code = 1
    try:
        try:
            answer = _ORDERS[order["do"]](stage, order)
        except DrawplateError as error:
            answer = {"error": str(error), "code": error.code}
        os.write(answers, (json.dumps(answer) + "\n").encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # nothing of the parent's is flushed or closed twice


_ORDERS = {
    name.removeprefix("do_"): thing for name, thing in globals().items() if name.startswith("do_")
}

if __name__ == "__main__":
    main(sys.argv[1])
