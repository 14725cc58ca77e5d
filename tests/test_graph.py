"""The pipeline through DVC: order, what ran, what was cached, and what is left after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.graph import inputs, nodes, outdated, reason, repro

DVC = [sys.executable, "-m", "dvc"]
YAML = """
stages:
  last:
    cmd: cp middle.txt last.txt
    deps: [middle.txt]
    outs: [last.txt]
    meta: {pool: gpu}
  first:
    cmd: python first.py
    deps: [first.py]
    params: [word]
    outs: [first.txt]
  middle:
    cmd: cp first.txt middle.txt
    deps: [first.txt]
    outs: [middle.txt]
"""
FIRST = """
import pathlib, time
word = pathlib.Path("params.yaml").read_text().split()[1]
pathlib.Path("pid").write_text(str(__import__("os").getpid()))
if word == "slow":
    time.sleep(60)
if word == "bad":
    raise SystemExit("drawplate: this word is bad")
pathlib.Path("first.txt").write_text(word)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Three stages in a repository of their own."""
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "dvc.yaml").write_text(YAML)
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "params.yaml").write_text("word: one\n")
    return tmp_path


def run(project, *targets, **how):
    return repro(project, targets, line=lambda text: None, **how)


def test_stages_come_after_what_they_need_whatever_the_order_of_the_file(project):
    found = nodes(project)
    assert [node.name for node in found] == ["first", "middle", "last"]
    assert [node.upstream for node in found] == [(), ("first",), ("middle",)]
    assert found[-1].meta == {"pool": "gpu"}


def test_it_is_told_what_ran_what_did_not_change_and_what_was_cached(project):
    every = ("first", "middle", "last")
    assert run(project).statuses == dict.fromkeys(every, "ran")
    assert run(project).statuses == dict.fromkeys(every, "unchanged")
    (project / "params.yaml").write_text("word: two\n")
    assert run(project).statuses == dict.fromkeys(every, "ran")
    (project / "params.yaml").write_text("word: one\n")
    assert run(project).statuses == dict.fromkeys(every, "cached")
    assert (project / "last.txt").read_text() == "one"


def test_a_text_of_the_user_is_an_input_whether_dvc_keeps_it_or_not(project):
    texts = project / "texts"
    texts.mkdir()
    (texts / "README.md").write_text("here")
    (project / "dvc.yaml").write_text(YAML.replace("[first.py]", "[first.py, texts]"))
    every = ("first", "middle", "last")
    assert run(project).statuses == dict.fromkeys(every, "ran")
    (texts / "notes.txt").write_text("one")
    assert run(project).statuses == {**dict.fromkeys(every, "unchanged"), "first": "ran"}
    subprocess.run([*DVC, "add", "texts/notes.txt"], cwd=project, check=True, capture_output=True)
    for name in ("notes.txt.dvc", ".gitignore"):
        assert (texts / name).exists()
    run(project)
    (texts / "notes.txt").write_text("two")
    told = []
    assert repro(project, line=told.append).statuses["first"] == "ran"
    assert repro(project, line=told.append).statuses == dict.fromkeys(every, "unchanged")
    assert not [line for line in told if "skipping" in line and ".dvc" in line]
    assert [node.name for node in nodes(project)] == list(every)
    assert outdated(project, every) == []
    read = inputs(project, "first")
    assert (read.made, read.added) == ((), ("texts/notes.txt",))


def test_stages_run_for_an_account_without_a_shell(project, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/false")
    assert run(project).statuses == dict.fromkeys(("first", "middle", "last"), "ran")
    assert (project / "last.txt").read_text() == "one"


def test_one_stage_alone_leaves_the_others(project):
    run(project)
    (project / "params.yaml").write_text("word: two\n")
    assert run(project, "middle", single=True).statuses == {"middle": "unchanged"}


def test_a_failing_stage_fails_the_call_and_shows_its_last_words(project):
    (project / "params.yaml").write_text("word: bad\n")
    done = run(project)
    assert done.code != 0
    assert reason(done.tail) == "drawplate: this word is bad"
    assert not (project / "last.txt").exists()
    (project / "first.py").write_text("1 / 0")
    assert reason(run(project).tail) == (
        "failed to reproduce 'first': failed to run: python first.py, exited with 1"
    )
    assert reason("") == "no output"


CALL = """
import signal, sys
from pathlib import Path
from flows.graph import repro
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
repro(Path(sys.argv[1]))
"""


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_call_leaves_no_process_behind(project, sign):
    (project / "params.yaml").write_text("word: slow\n")
    script = CALL
    if sign == signal.SIGTERM:
        script = CALL.replace("repro(", "signal.signal(15, lambda *_: sys.exit(1))\nrepro(")
    caller = subprocess.Popen(
        [sys.executable, "-c", script, str(project)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (project / "pid").exists() or not (project / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stage = int((project / "pid").read_text())
    assert alive(stage)
    os.kill(caller.pid, sign)
    caller.wait(timeout=60)
    assert not alive(stage)
    # Nothing is in the way of the next run.
    (project / "params.yaml").write_text("word: one\n")
    assert run(project).code == 0
