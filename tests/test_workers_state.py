"""Where a stage keeps what must survive its machine: `DRAWPLATE_STATE`, and one writer there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from pathlib import Path
from drawplate.core.method import Frozen
from stages.run import Execution, Stage
class Empty(Frozen):
    pass
def body(params, inputs, run):
    seen = run.work / "steps"
    before = int(seen.read_text()) if seen.exists() else 0
    seen.write_text(str(before + 1))
    (run.folder / "data").write_text(str(before))
    print("work", run.work, "before", before, flush=True)
    if sys.argv[2] == "die":
        raise SystemExit(9)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    return Empty()
Stage("toy", Empty, Empty, body, "model")(Empty(), Empty(), Path(sys.argv[1]) / "out",
                                           execution=Execution(tracking=False))
"""


def start(folder, how, state):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how],
        env={**environment, **({"DRAWPLATE_STATE": str(state)} if state else {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("shared", [True, False])
def test_another_folder_goes_on_where_the_first_died_if_they_share_the_state(tmp_path, shared):
    """Unshared is the control: that one begins again."""
    state = tmp_path / "state" if shared else None
    first = start(tmp_path / "one", "die", state).communicate()[0]
    second = start(tmp_path / "two", "finish", state).communicate()[0]
    assert "before 0" in first
    assert f"before {int(shared)}" in second
    assert (str(tmp_path / "state") in second) == shared
    assert (tmp_path / "two/out/data").read_text() == str(int(shared))


def test_two_that_share_the_state_never_write_there_at_once(tmp_path):
    first = start(tmp_path / "one", "wait", tmp_path / "state")
    assert first.stdout.readline().startswith("work")
    second = start(tmp_path / "two", "finish", tmp_path / "state")
    told = second.communicate()[1]
    assert second.returncode != 0
    assert f"is being made by process {first.pid}" in told
    first.communicate("go on")
    assert first.returncode == 0
