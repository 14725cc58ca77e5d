"""`drawplate run` on a small DVC project: what is refused, what ran, and how it ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import cli
from flows.graph import end_group
from flows.local import figures_table
from stages.quiet import guarded

PARAMS = (Path(__file__).parents[1] / "params.yaml").read_text()
YAML = """
stages:
  prepare:
    cmd: exec python toy.py word corpus.txt
    deps: [toy.py, word]
    outs: [corpus.txt]
  evaluate:
    cmd: exec python toy.py corpus.txt metrics/evaluate.json
    deps: [toy.py, corpus.txt]
    metrics: [metrics/evaluate.json: {cache: false}]
"""
# It does what the word says, which its exit code may be.
TOY = """
import os, pathlib, signal, sys, time
word = pathlib.Path(sys.argv[1]).read_text()
print("said:", word)
if word == "slow":
    pathlib.Path("begun").touch()
    time.sleep(60)
if word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if word.isdigit():
    sys.exit(int(word))
if word == "damaged":
    print("drawplate: corpus.txt was altered", file=sys.stderr)
    sys.exit(3)
place = pathlib.Path(sys.argv[2])
place.parent.mkdir(exist_ok=True)
place.write_text('{"toy.stored_bytes": 1234}' if place.suffix == ".json" else word)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two stages in a repository of their own, and the params.yaml that is shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "dvc.yaml").write_text(YAML)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "word").write_text("one")
    return tmp_path


@pytest.fixture
def run(project, capfd):
    """`drawplate run`: its exit code, and the lines of both streams."""

    def call(*arguments):
        capfd.readouterr()
        try:
            code = guarded(lambda: cli.main(arguments or ("run",), standalone_mode=False))
        except SystemExit as leave:
            code = leave.code
        return code, *(text.splitlines() for text in capfd.readouterr())

    return call


def test_a_wrong_key_of_the_last_stage_is_refused_before_the_first_begins(project, run):
    (project / "params.yaml").write_text(PARAMS.replace("  documents:", "  documnets:"))
    code, out, (told,) = run()
    assert (code, out) == (2, [])
    assert told.startswith("drawplate: evaluate.documnets is not a key here (did you mean")
    assert not (project / "corpus.txt").exists()


def test_what_was_right_once_is_not_checked_again_until_it_changes(project, run, monkeypatch):
    checked = []
    monkeypatch.setattr("stages.check.check", checked.append)
    for changed, times in ((False, 1), (False, 1), (True, 2)):
        if changed:
            (project / "params.yaml").write_text(PARAMS.replace("documents: 150", "documents: 15"))
        assert run()[0] == 0
        assert len(checked) == times
    assert run("run", "-S", "evaluate.documents=15", "-S", "prepare.seed=7")[0] == 0
    assert run()[0] == 0
    assert len(checked) == times + 1


def test_it_runs_then_finds_nothing_to_do_and_shows_the_table(project, run):
    code, _, told = run("report")
    assert (code, told) == (
        2,
        [f"drawplate: {project}/metrics/evaluate.json does not exist yet: run the pipeline first"],
    )
    code, out, _ = run()
    assert code == 0
    assert [line for line in out if line.startswith("Running stage")] == [
        "Running stage 'prepare':",
        "Running stage 'evaluate':",
    ]
    assert sum(line.startswith("Done in ") for line in out) == 1
    (row,) = (line for line in out if line.startswith("toy "))
    assert "1,234" in row
    code, out, told = run()
    assert (code, told) == (0, [])
    assert "Nothing to do: every stage is up to date." in out
    assert row in out
    assert not [line for line in out if line.startswith(("Running", "Done"))]
    code, out, told = run("report")
    assert (code, row in out, told) == (0, True, [])
    (project / "word").write_text("two")
    code, out, _ = run("run", "prepare")
    assert code == 0
    assert not [line for line in out if "evaluate" in line or line == row]


def test_a_report_of_damaged_figures_is_one_line(project, run):
    file = project / "metrics" / "evaluate.json"
    file.parent.mkdir()
    file.write_text('{"toy.stored_by')
    code, out, (told,) = run("report")
    assert (code, out) == (3, [])
    assert told.startswith(f"drawplate: {file} holds no figures: ")


def test_each_model_has_its_row_whatever_its_name(project):
    (project / "metrics").mkdir()
    figures = {"llama-3.stored_bytes": 5, "llama-3.2.stored_bytes": 6, "llama-3.2.greedy": 0.5}
    (project / "metrics/evaluate.json").write_text(json.dumps(figures))
    titles, *rows = figures_table(project)
    assert [(row[0], row[titles.index("bytes")], row[titles.index("greedy")]) for row in rows] == [
        ("llama-3", "5", "-"),
        ("llama-3.2", "6", "50.0%"),
    ]


def test_a_run_that_is_not_tracked_makes_no_store(project, run):
    (project / "params.yaml").write_text(PARAMS.replace("tracking: true", "tracking: false"))
    code, out, _ = run()
    assert (code, sum(line.startswith("Done in ") for line in out)) == (0, 1)
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("word", "code", "out", "told"),
    [
        ("damaged", 3, ["drawplate: corpus.txt was altered"], []),
        ("7", 7, [], ["drawplate: stage prepare failed; what it said stands above"]),
        ("130", 130, [], ["drawplate: stage prepare failed; what it said stands above"]),
        *(
            (word, 4, [], [f"drawplate: stage prepare was ended by signal {said}"])
            for word, said in (
                ("killed", "9; most likely for its memory"),
                ("137", "9; most likely for its memory"),  # from a shell that outlived it
                ("139", "11"),
            )
        ),
    ],
)
def test_a_stage_that_fails_gives_its_exit_code_and_one_line(project, run, word, code, out, told):
    (project / "word").write_text(word)
    assert run() == (code, ["Running stage 'prepare':", f"said: {word}", *out], told)
    assert not (project / "metrics").exists()


def test_an_unknown_stage_or_folder_is_refused_with_the_choices(project, run, monkeypatch):
    said = "drawplate: no stage 'evaluat' (did you mean 'evaluate'?); there are: prepare, evaluate"
    assert run("run", "evaluat", "-S", "prepare.seed=7") == (2, [], [said])
    assert (project / "params.yaml").read_text() == PARAMS
    (project / "empty").mkdir()
    monkeypatch.chdir(project / "empty")
    code, out, (told,) = run()
    assert (code, out) == (2, [])
    assert told.startswith(f"drawplate: {project}/empty holds no pipeline")
    assert not list((project / "empty").iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["dvc", "repro"], []),
        (["flows.local"], ["run", "-S", "compress.ratio=0.4", "--preset", "rl/grpo"]),
    ],
)
def test_of_two_runs_at_once_the_second_is_told_who_is_at_work_and_changes_nothing(
    project, run, monkeypatch, command, arguments
):
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'src'}")
    (project / "word").write_text("slow")
    first = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (project / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        code, out, told = run(*arguments)
    finally:
        end_group(first)
    assert (project / "params.yaml").read_text() == PARAMS
    assert (code, out) == (4, [])
    assert told == [
        f"drawplate: {project} is busy: process {first.pid} runs its stages; wait for it or stop it"
    ]
