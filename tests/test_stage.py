"""What every stage shares, on a small stage of the test's own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from drawplate import lineage
from drawplate.core.artifact import publish, verify
from drawplate.core.errors import Exhausted, UserError
from drawplate.core.method import Frozen
from stages.run import Execution, Run, Stage


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


def test_a_damaged_input_is_refused_before_any_work(tmp_path, source):
    (source / "manifest.json").write_text("{}")
    with pytest.raises(Exception, match="manifest"):
        stage(Knobs(), Inputs(source=source), tmp_path / "out", execution=quiet)
    assert not (tmp_path / "out").exists()


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_stage
from pathlib import Path
def body(params, inputs, run):
    print("working", flush=True)
    time.sleep(60)
stage = test_stage.Stage("toy", test_stage.Knobs, test_stage.Inputs, body, "model")
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
