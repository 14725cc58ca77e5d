"""The Prefect flow over a small DVC project, on a server that Prefect starts for the test."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from workers_cases import alive

from drawplate.core.errors import UserError
from flows.graph import Node
from flows.pipeline import StageFailed, wanted
from stages.quiet import guarded

ORDER = [Node("a", (), {}), Node("b", ("a",), {}), Node("c", ("b",), {}), Node("d", ("a",), {})]


def test_targets_bring_what_they_need_in_order():
    assert [node.name for node in wanted(ORDER, ["c"])] == ["a", "b", "c"]
    assert [node.name for node in wanted(ORDER, ["d", "b"])] == ["a", "b", "d"]
    assert wanted(ORDER, None) == ORDER
    with pytest.raises(UserError, match="no stage 'x'; there are: a, b, c, d"):
        wanted(ORDER, ["x"])


def test_only_a_lock_is_worth_another_try():
    assert StageFailed("a", "ERROR: '/x' is busy, it is being used").busy
    assert StageFailed("a", "Unable to acquire lock").busy
    error = StageFailed("a", "drawplate: compress.ratio is wrong")
    assert not error.busy
    assert str(error) == "stage a: compress.ratio is wrong"


@pytest.mark.parametrize(("said", "code"), [(3, 3), (130, 130), (-9, 4), (137, 4), (None, 1)])
def test_a_stage_that_failed_is_one_line_with_its_exit_code(capsys, said, code):
    dvc = f"ERROR: failed to reproduce 'a': failed to run: python a.py, exited with {said}"

    def fails():
        raise StageFailed("a", f"drawplate: b is damaged\n{dvc}")

    assert guarded(fails) == code
    assert capsys.readouterr().err == "drawplate: stage a: b is damaged\n"


ROOT = Path(__file__).parents[1]
YAML = """
stages:
  last: {cmd: cp first.txt last.txt, deps: [first.txt], outs: [last.txt]}
  first: {cmd: python first.py, deps: [first.py], outs: [first.txt]}
"""
FLOW = """
import sys
from pathlib import Path
from flows.pipeline import in_place
for _ in range(2):
    print("RESULT", [(r.name, r.status, sorted(r.outputs)) for r in in_place(Path(sys.argv[1]))])
def failed():
    try:
        in_place(Path(sys.argv[1]))
    except Exception as error:
        print("FAILED", error)
Path(sys.argv[1], "first.py").write_text("raise SystemExit('drawplate: it is broken')")
failed()
params = Path(sys.argv[1], "params.yaml")
params.write_text(params.read_text().replace("  documents:", "  documnets:"))
Path(sys.argv[1], "first.py").write_text("open('begun', 'w')")
failed()
"""


@pytest.fixture
def project(tmp_path):
    """Two stages in a repository of their own."""
    project = tmp_path / "project"
    project.mkdir()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    (project / "dvc.yaml").write_text(YAML)
    shutil.copy(ROOT / "params.yaml", project)
    return project


def flow(project, *command):
    """A process that runs a flow, and with it a server of its own."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(project.parent),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "PREFECT_HOME": str(project.parent / "prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{project.parent / 'mlflow.db'}",
        },
    )


SLOW = """
import os, time
from pathlib import Path
Path("begun").write_text(f"{os.getpid()} {os.getpgid(0)}")
time.sleep(600)
"""


def test_a_flow_that_a_terminal_interrupts_ends_with_its_stage(project):
    """A terminal interrupts the server that Prefect started too, but not the stage."""
    (project / "first.py").write_text(SLOW)
    caller = flow(project, "-m", "flows.pipeline")
    begun = project / "begun"
    try:
        deadline = time.monotonic() + 240
        while not begun.exists() or not begun.read_text():
            assert caller.poll() is None, caller.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stage, group = map(int, begun.read_text().split())
        assert group != os.getpgid(caller.pid)
        os.killpg(caller.pid, signal.SIGINT)
        # Ten seconds of a machine that does nothing else, half of which the server has to end.
        _, said = caller.communicate(timeout=40)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(caller.pid, signal.SIGKILL)
    assert caller.returncode == 130
    assert "drawplate: interrupted" in said
    assert not alive(stage)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_the_flow_runs_in_order_then_finds_nothing_to_do_then_says_what_is_wrong(project):
    (project / "first.py").write_text("open('first.txt', 'w').write('1')")
    told, logged = flow(project, "-c", FLOW, str(project)).communicate()
    results = [line for line in told.splitlines() if line.startswith("RESULT")]
    assert results == [
        "RESULT [('first', 'ran', ['first.txt']), ('last', 'ran', ['last.txt'])]",
        "RESULT [('first', 'unchanged', ['first.txt']), ('last', 'unchanged', ['last.txt'])]",
    ], logged[-3000:]
    assert "FAILED stage first:" in told
    assert "FAILED evaluate.documnets is not a key here (did you mean 'documents'?)" in told
    assert not (project / "begun").exists()
    assert "it is broken" in told + logged
