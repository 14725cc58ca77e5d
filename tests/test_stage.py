"""What every stage shares, on a small stage of the test's own."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
from pydantic import Field, ValidationError

from drawplate import lineage
from drawplate.core.artifact import publish, verify
from drawplate.core.errors import Exhausted, UserError
from drawplate.core.method import Frozen
from stages import STAGES
from stages.quiet import guarded
from stages.run import Execution, Run, Stage, command, device_of
from tests import faults


class Knobs(Frozen):
    text: str = "a"
    fail: bool = False


class Inputs(Frozen):
    source: Path = Field(description="Anything.")


class Report(Frozen):
    size: int
    nested: dict[str, float]


def body(params: Knobs, inputs: Inputs, run: Run) -> Report:
    watch = run.part("train")
    for step in range(1, 41):
        watch(step, 40, {"loss": 1 / step})
    (run.folder / "data").write_text(params.text + (inputs.source / "data").read_text())
    if params.fail:
        raise UserError("asked to fail")
    (run.folder / "curve.json").write_text("[]")
    run.artifacts.append("curve.json")
    return Report(size=len(params.text), nested={"half": 0.5})


stage = Stage("toy", Knobs, Inputs, body, "model")
quiet = Execution(tracking=False)


@pytest.fixture
def source(tmp_path):
    with publish(tmp_path / "source", "corpus") as inside:
        (inside / "data").write_text("text")
        lineage.write(lineage.trace(lineage.Node(stage="prepare"), {}), inside)
    return tmp_path / "source"


def test_the_output_is_whole_and_carries_its_lineage(tmp_path, source):
    out = tmp_path / "out"
    report = stage(
        Knobs(), Inputs(source=source), out,
        metrics=tmp_path / "m.json", record=tmp_path / "r.json", execution=quiet,
    )  # fmt: skip
    assert report == Report(size=1, nested={"half": 0.5})
    verify(out)
    node = lineage.read(out).node
    assert node.parents == {"source": lineage.content_hash(source)}
    assert node.params == {"text": "a", "fail": False}
    assert json.loads((tmp_path / "m.json").read_text()) == {"size": 1, "nested.half": 0.5}
    assert json.loads((tmp_path / "r.json").read_text())["hash"] == lineage.content_hash(out)


def test_equal_calls_give_equal_bytes_and_other_parameters_do_not(tmp_path, source):
    hashes = []
    for number, text in enumerate(["a", "a", "b"]):
        stage(Knobs(text=text), Inputs(source=source), tmp_path / f"{number}", execution=quiet)
        hashes.append(lineage.content_hash(tmp_path / f"{number}"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_failure_leaves_the_earlier_output_as_it_was(tmp_path, source):
    out = tmp_path / "out"
    stage(Knobs(), Inputs(source=source), out, execution=quiet)
    before = lineage.content_hash(out)
    with pytest.raises(UserError, match="asked to fail"):
        stage(Knobs(fail=True), Inputs(source=source), out, execution=quiet)
    verify(out)
    assert lineage.content_hash(out) == before


def test_what_other_code_began_is_not_gone_on_with(tmp_path, source, monkeypatch):
    written = tmp_path / "code"
    (written / "inner").mkdir(parents=True)
    (written / "inner" / "leaf.py").write_text("one = 1")
    monkeypatch.setattr("stages.run.ROOTS", (written,))
    works = []

    def fails(params, inputs, run):
        works.append(run.work)
        raise UserError("seen")

    for change in ("", "notes.txt", "inner/leaf.py", "inner/new.py"):
        if change:
            (written / change).write_text("two = 2")
        with pytest.raises(UserError, match="seen"):
            replace(stage, body=fails)(Knobs(), Inputs(source=source), tmp_path / "out")
    assert works[0] == works[1]
    assert len(set(works)) == 3


@pytest.mark.parametrize("what", ["params", "code"])
def test_what_changes_below_dvc_while_it_runs_is_published_under_no_settings(
    tmp_path, source, monkeypatch, what
):
    file, module = tmp_path / "params.yaml", tmp_path / "imported.py"
    rest = "execution: {tracking: false}\n"
    file.write_text(f"prepare: {{text: a}}\n{rest}")
    module.write_text("one = 1\n")
    monkeypatch.setitem(sys.modules, "imported", SimpleNamespace(__file__=str(module)))
    monkeypatch.setattr("stages.run.ROOTS", (tmp_path,))
    monkeypatch.setattr("stages.run.prepare_process", lambda: None)
    made = [tmp_path / name for name in ("out", "metrics", "record")]

    def call(edit):
        def edits(params, inputs, run):
            edit()
            return body(params, inputs, run)

        options = {"source": source, "params": file, **{path.name: path for path in made}}
        arguments = [str(part) for key, path in options.items() for part in (f"--{key}", path)]
        toy = command(replace(stage, name="prepare", body=edits), "A stage.")
        toy.main(arguments, standalone_mode=False)

    def edit():
        if what == "params":
            file.write_text(f"prepare: {{text: b}}\n{rest}")
        else:
            module.write_text("two = 2\n")

    monkeypatch.setenv("DVC_STAGE", "prepare")
    with pytest.raises(UserError, match="changed while"):
        call(edit)
    assert not any(path.exists() for path in made)
    file.write_text(f"prepare: {{text: a}}\n{rest}")
    call(lambda: file.write_text(f"prepare: {{text: a}}\nquantize: {{bits: 3}}\n{rest}"))
    verify(tmp_path / "out")
    monkeypatch.delenv("DVC_STAGE")
    call(edit)


def test_an_adopted_model_is_an_input_by_its_content(tmp_path, source):
    made, works = import_module("stages.pretrain"), []
    adopted, out = tmp_path / "adopted", tmp_path / "out"

    def fills(params, inputs, run):
        works.append(run.work)
        (run.folder / "data").write_text("made")
        return Report(size=1, nested={})

    for text in ("one", "two"):
        stage(Knobs(text=text), Inputs(source=source), adopted, execution=quiet)
        params, inputs = made.Pretrain(adopt=adopted), made.Inputs(corpus=source)
        replace(made.pretrain, body=fills)(params, inputs, out, execution=quiet)
        found = lineage.read(out)
        assert found.node.parents["adopt"] == lineage.content_hash(adopted)
        assert {lineage.content_hash(f) for f in (source, adopted)} == set(found.ancestors)
    assert works[0] != works[1]


@pytest.mark.parametrize(
    ("given", "what"),
    [({"sharded": True}, "set nproc or nnodes"), ({"address": "10.0.0.7"}, "set nnodes")],
)
def test_options_for_several_processes_or_machines_are_refused_for_one(given, what):
    with pytest.raises(ValidationError, match=what):
        Execution.model_validate(given)
    assert Execution.model_validate(given | {"nnodes": 2})


def test_a_damaged_input_is_refused_before_any_work(tmp_path, source):
    os.truncate(source / "manifest.json", 60)
    with pytest.raises(Exception, match="manifest"):
        stage(Knobs(), Inputs(source=source), tmp_path / "out", execution=quiet)
    assert not (tmp_path / "out").exists()


def all_inputs():
    """Every input of every stage: its role, or the key of the parameter that names it."""
    for name in STAGES:
        made = getattr(import_module(f"stages.{name}"), name)
        yield from ((made, role, {}) for role in made.inputs.model_fields)
    synthetic = {"name": "self_lengthen", "model": "read"}
    needed = {"sources": [{"name": "text"}], "tasks": [{"name": "chain_sum"}]}
    for key, value in (("tokenizer", "read"), ("synthetic", synthetic)):
        yield import_module("stages.prepare").prepare, "", needed | {key: value}
    yield import_module("stages.pretrain").pretrain, "", {"adopt": "read"}


@pytest.mark.parametrize("out", ["read", ".", "read/x"])
def test_no_stage_replaces_or_changes_what_it_reads(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("read", "../other"):
        with publish(Path(folder), "model") as inside:
            (inside / "data").write_text(folder)
    before = lineage.content_hash(Path("read"))
    for made, role, given in all_inputs():
        fields = made.inputs.model_fields
        folders = {key: "read" if key == role else "../other" for key in fields}
        several = {key for key in fields if "tuple" in str(fields[key].annotation)}
        inputs = made.inputs(**{k: (v,) if k in several else v for k, v in folders.items()})
        params = made.params.model_validate(given)
        with pytest.raises(UserError, match=rf"^{re.escape(out)} would .* read, which"):
            made(params, inputs, Path(out), execution=quiet)
        assert lineage.content_hash(Path("read")) == before
        assert [path.name for path in Path().iterdir()] == ["read"]


@pytest.mark.parametrize("option", ["metrics", "record"])
@pytest.mark.parametrize("place", ["source", "out"])
def test_figures_do_not_go_into_what_is_read_or_made(tmp_path, source, option, place):
    note = {option: tmp_path / place / "note.json"}
    with pytest.raises(UserError, match=f"note.json would change .*{place}; name a file elsewhere"):
        stage(Knobs(), Inputs(source=source), tmp_path / "out", execution=quiet, **note)
    verify(source)
    assert not (tmp_path / "out").exists()


def full(disk):
    """Fills a small disk to the last byte."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("place", ["metrics", "record", "state"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, source, monkeypatch, capsys, place):
    out, notes = tmp_path / "out", tmp_path / "notes"
    folders = dict.fromkeys(("metrics", "record"), notes) | {"state": tmp_path / "state"}
    with faults.small_disk(tmp_path / "disk", 1) as disk:
        folders[place] = disk / "here"
        monkeypatch.setenv("DRAWPLATE_STATE", str(folders["state"]))

        def make(text):
            files = {name: folders[name] / f"{name}.json" for name in ("metrics", "record")}
            call = Knobs(text=text), Inputs(source=source), out
            return guarded(lambda: stage(*call, execution=quiet, **files))

        def left():
            files = [folders[name] / f"{name}.json" for name in ("metrics", "record")]
            return lineage.content_hash(out), [file.read_text() for file in files]

        assert make("old") == 0
        before = left()
        capsys.readouterr()
        full(disk)
        assert make("new one") == 4
        (said,) = [line for line in capsys.readouterr().err.splitlines() if "[toy]" not in line]
        assert said.startswith(f"drawplate: {disk}/here/")
        assert "no space left" in said
        assert left() == before
        verify(out)
        (disk / "filler").unlink()
        # The same call again, as `dvc repro` makes it, finishes.
        assert make("new one") == 0
        digest, (figures, record) = left()
        assert json.loads(figures)["size"] == len("new one")
        assert json.loads(record)["hash"] == digest != before[0]
        for name in ("metrics", "record"):
            assert not list(folders[name].glob("*.json.*"))


def test_what_the_journal_shows_and_its_end_have_their_room_before_the_output(
    tmp_path, source, store, monkeypatch, capsys
):
    from stages.tracking import experiment

    def filling(params, inputs, run):
        report = body(params, inputs, run)
        full(run.work.parents[1])
        return report

    with faults.small_disk(tmp_path / "disk", 1) as disk:
        monkeypatch.setenv("DRAWPLATE_STATE", str(disk / "here"))
        call = Knobs(), Inputs(source=source), tmp_path / "out"
        assert guarded(lambda: replace(stage, body=filling)(*call)) == 4
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.match(rf"drawplate: {disk}/here/.* no space left", said)
        assert not (tmp_path / "out").exists()
        (run,) = [
            run for run in store.search_runs([experiment(store)])
            if run.data.tags.get("drawplate.stage")
        ]  # fmt: skip
        assert run.info.status == "FAILED"


@pytest.mark.parametrize("option", ["metrics", "record"])
def test_figures_that_cannot_be_written_are_said_before_the_output_is_there(
    tmp_path, source, capsys, option
):
    (tmp_path / "file").write_text("")
    for wrong in ("file/note.json", "."):
        call = Knobs(), Inputs(source=source), tmp_path / "here" / "out"
        note = {option: tmp_path / wrong}
        assert guarded(lambda c=call, n=note: stage(*c, execution=quiet, **n)) == 2
        assert str(tmp_path / wrong.split("/")[0]) in capsys.readouterr().err.splitlines()[-1]
        assert not call[2].exists()


def test_a_device_without_64_bit_numbers_is_refused(tmp_path):
    run = Run(tmp_path, tmp_path, Execution(device="mps:0"), "toy")
    with pytest.raises(UserError, match=r"execution\.device 'mps:0' has no 64-bit numbers"):
        device_of(run)


def test_a_folder_below_a_file_is_one_line(tmp_path, source, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert guarded(lambda: stage(Knobs(), Inputs(source=source), out, execution=quiet)) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"drawplate: {tmp_path}/file.*: not a directory; .*\n", said)


def test_of_eight_that_begin_at_once_one_makes_it_and_the_others_learn_who(tmp_path, source):
    fork = multiprocessing.get_context("fork")
    gate, out = fork.Barrier(8), tmp_path / "out"

    def slow(params, inputs, run):
        """Until all others have been refused."""
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("refused-*"))) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        return body(params, inputs, run)

    def attempt():
        gate.wait()
        try:
            replace(stage, body=slow)(Knobs(), Inputs(source=source), out, execution=quiet)
            (tmp_path / f"made-{os.getpid()}").touch()
        except Exhausted as error:
            (tmp_path / f"refused-{os.getpid()}").write_text(str(error))

    attempts = [fork.Process(target=attempt) for _ in range(8)]
    for process in attempts:
        process.start()
    for process in attempts:
        process.join(120)
    (winner,) = tmp_path.glob("made-*")
    number = winner.name.removeprefix("made-")
    told = {file.read_text() for file in tmp_path.glob("refused-*")}
    assert told == {f"{out} is being made by process {number}; wait for it or stop it"}
    verify(out)


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_stage
from pathlib import Path
def body(params, inputs, run):
    print("working", flush=True)
    time.sleep(60)
stage = test_stage.Stage("toy", test_stage.Knobs, test_stage.Inputs, body, "model")
from stages import STAGES
from stages.quiet import guarded
from stages.run import prepare_process
prepare_process()
sys.exit(guarded(lambda: stage(
    test_stage.Knobs(), test_stage.Inputs(source=Path(sys.argv[2])), Path(sys.argv[3]),
    execution=test_stage.quiet)))
"""


def slow_run(source, out):
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(source), str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "working\n"
    return process


def test_two_runs_at_once_one_is_told_who_holds_it(tmp_path, source):
    process = slow_run(source, tmp_path / "out")
    try:
        with pytest.raises(Exhausted, match=str(process.pid)):
            stage(Knobs(), Inputs(source=source), tmp_path / "out", execution=quiet)
    finally:
        process.kill()
        process.communicate()
    # A holder that was killed holds nothing.
    stage(Knobs(), Inputs(source=source), tmp_path / "out", execution=quiet)


def test_steps_that_say_no_time_left_are_given_one_by_their_pace(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 110.0, 140.0, 150.0, 160.0, 170.0, 180.0, 190.0])
    monkeypatch.setattr("stages.run.time.monotonic", lambda: next(clock))
    watch = Run(tmp_path, tmp_path, quiet, "toy").part("a")
    watch(3, 10, {"loss": 1.0})  # it goes on where an earlier run stopped
    watch(5, 10, {"loss": 0.5})
    watch(6, 10, {"eta": 5})
    watch(10, 10, {})
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "[toy] a 3/10  loss 1.000",
        "[toy] a 5/10  loss 0.500  1:40 left",
        "[toy] a 6/10  0:05 left",
        "[toy] a 10/10",
    ]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path, source, sign):
    process = slow_run(source, tmp_path / "out")
    os.kill(process.pid, sign)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("DRAWPLATE_EXECUTION", "test")
    from stages.tracking import client

    return client()


def test_git_is_asked_about_the_code_that_runs_and_may_be_missing(
    tmp_path, source, store, monkeypatch
):
    def recorded(name):
        record = tmp_path / f"{name}.json"
        stage(Knobs(), Inputs(source=source), tmp_path / name, record=record)
        made = json.loads(record.read_text())
        commit = store.get_run(made["mlflow_run"]).data.tags["mlflow.source.git.commit"]
        return made["git_commit"], made["git_dirty"], commit

    for arguments in (["init"], ["commit", "--allow-empty", "-m", "theirs"]):
        given = ["-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(["git", *given], check=True, capture_output=True, cwd=tmp_path)
    ours = ["git", "-C", Path(__file__).parents[1], "rev-parse", "HEAD"]
    head = subprocess.run(ours, capture_output=True, text=True, check=False).stdout.strip()
    assert recorded("there") == (head or None, ANY, head)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded("missing") == (None, None, "")


def test_mlflow_has_parameters_points_model_and_parents(tmp_path, source, store):
    from stages.tracking import experiment, producer_of

    first, second = tmp_path / "one", tmp_path / "two"
    stage(Knobs(), Inputs(source=source), first, record=tmp_path / "r.json")
    stage(Knobs(text="b"), Inputs(source=first), second)
    where = experiment(store)
    runs = {
        r.data.tags["drawplate.output"]: r
        for r in store.search_runs([where])
        if "drawplate.output" in r.data.tags
    }
    one, two = (runs[lineage.content_hash(folder)] for folder in (first, second))
    assert one.info.run_id == json.loads((tmp_path / "r.json").read_text())["mlflow_run"]
    assert two.data.params == {"text": "b", "fail": "False"}
    points = store.get_metric_history(two.info.run_id, "train.loss")
    assert sorted((p.step, p.value) for p in points) == [(s, 1 / s) for s in range(1, 41)]
    assert two.data.metrics["final.size"] == 1
    # Parents, both ways, and the dataset with the digest of what was read.
    assert two.data.tags["drawplate.parent.source"] == one.info.run_id
    fresh = store.get_run(one.info.run_id)
    assert fresh.data.tags["drawplate.child.toy"] == two.info.run_id
    (dataset,) = two.inputs.dataset_inputs
    assert lineage.content_hash(first).startswith(dataset.dataset.digest)
    # Both under one run of the execution, and each output a logged model.
    (parent,) = {r.data.tags["mlflow.parentRunId"] for r in (one, two)}
    assert store.get_run(parent).data.tags["stage.toy.run_id"] == two.info.run_id
    assert {r.info.status for r in (one, two, store.get_run(parent))} == {"FINISHED"}
    model = store.get_logged_model(fresh.data.tags["drawplate.model_id"])
    assert model.tags["drawplate.hash"] == lineage.content_hash(first)
    assert [m.model_id for m in store.get_run(two.info.run_id).inputs.model_inputs] == [
        model.model_id
    ]
    assert producer_of(store, where, lineage.content_hash(second)).info.run_id == two.info.run_id
    assert {f.path for f in store.list_artifacts(two.info.run_id)} >= {"curve.json", "lineage.json"}


def test_a_failed_run_says_so_in_mlflow(tmp_path, source, store):
    from stages.tracking import experiment

    with pytest.raises(UserError):
        stage(Knobs(fail=True), Inputs(source=source), tmp_path / "out")
    (run,) = [
        r for r in store.search_runs([experiment(store)]) if r.data.tags.get("drawplate.stage")
    ]
    assert run.info.status == "FAILED"
    assert run.data.tags["drawplate.error"] == "asked to fail"


def test_a_store_that_is_away_costs_no_result_and_is_said(tmp_path, source, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{blocked}/mlflow.db")
    stage(Knobs(), Inputs(source=source), tmp_path / "out")
    verify(tmp_path / "out")
    assert "MLflow did not take everything" in capsys.readouterr().err
