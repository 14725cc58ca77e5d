"""The Prefect flow over a small DVC project, on a server that Prefect starts for the test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drawplate.core.errors import UserError
from flows.graph import Node
from flows.pipeline import StageFailed, wanted

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
    assert str(error) == "stage a: drawplate: compress.ratio is wrong"


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


def test_the_flow_runs_in_order_then_finds_nothing_to_do_then_says_what_is_wrong(
    tmp_path,
):
    project = tmp_path / "project"
    project.mkdir()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    (project / "dvc.yaml").write_text(YAML)
    shutil.copy(Path(__file__).parents[1] / "params.yaml", project)
    (project / "first.py").write_text("open('first.txt', 'w').write('1')")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FLOW, str(project)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": f"{root}:{root / 'src'}",
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        },
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == [
        "RESULT [('first', 'ran', ['first.txt']), ('last', 'ran', ['last.txt'])]",
        "RESULT [('first', 'unchanged', ['first.txt']), ('last', 'unchanged', ['last.txt'])]",
    ], done.stderr[-3000:]
    assert "FAILED stage first:" in done.stdout
    assert "FAILED evaluate.documnets is not a key here (did you mean 'documents'?)" in done.stdout
    assert not (project / "begun").exists()
    assert "it is broken" in done.stdout + done.stderr
