"""DVC killed at any moment: nobody goes on behind its back, and plain calls put all of it right.

And eight runners of one stage at once: one of them makes it.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import STAGES

TOY = """
import sys, time
from stages.quiet import begin, guarded

begin()
from pathlib import Path
from drawplate.core.method import Frozen
from stages.run import Stage, command

class Knobs(Frozen):
    word: str

class Inputs(Frozen):
    source: tuple[Path, ...] = ()

class Report(Frozen):
    files: int

def body(params, inputs, run):
    before = "".join((folder / "0").read_text()[:9] for folder in inputs.source)
    for number in range(40):
        (run.folder / str(number)).write_text(f"{before}{params.word}{number}" * 100)
        time.sleep(0.01)
    return Report(files=40)

stage = Stage(sys.argv.pop(1), Knobs, Inputs, body, "model")
given = ["--params", "params.yaml", *sys.argv[1:]]
sys.exit(guarded(lambda: command(stage, "A stage.").main(given, standalone_mode=False)))
"""
DVC = [sys.executable, "-m", "dvc"]
ROOT = Path(__file__).parents[1]


def make(folder):
    """Six stages in a row, and a remote beside them."""
    stages, before = {}, None
    for name in STAGES:
        source = f"--source out/{before} " if before else ""
        stages[name] = {
            "cmd": f"exec python toy.py {name} {source}--out out/{name}",
            "deps": ["toy.py", *([f"out/{before}"] if before else [])],
            "params": [f"{name}.word"],
            "outs": [f"out/{name}"],
        }
        before = name
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    YAML().dump({"stages": stages}, folder / "dvc.yaml")
    write_params(folder, "none")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "remote", "add", "-q", "-d", "store", str(folder.with_suffix(".remote")))
    return folder


def write_params(folder, word):
    sections = {name: {"word": word} for name in STAGES}
    YAML().dump(sections | {"execution": {"tracking": False}}, folder / "params.yaml")


def environment():
    """As cron and containers have it: no SHELL, so that DVC takes what /bin/sh is."""
    given = {key: value for key, value in os.environ.items() if key != "SHELL"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{given['PATH']}"
    return given | {"PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


def dvc(folder, *arguments):
    done = subprocess.run(
        [*DVC, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def stages_of(folder):
    """Process ids of stages in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = (process / "cwd").readlink() == folder
            if here and b"toy.py" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def killed(folder, seconds, *arguments):
    """Kills `dvc` itself, and only it, after so long.

    Returns whether it was still at work, and after how many seconds its stage was gone.
    """
    process = subprocess.Popen(
        [*DVC, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = time.monotonic()
    while stages_of(folder):
        assert time.monotonic() < ended + 10, f"{arguments} after {seconds:.2f} s left its stage"
        time.sleep(0.02)
    return alive, time.monotonic() - ended


def outputs(folder):
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    return {name: stage["outs"] for name, stage in lock["stages"].items()}


@pytest.mark.slow
def test_dvc_killed_at_random_moments_leaves_nothing_that_plain_calls_do_not_put_right(tmp_path):
    seed = random.SystemRandom().randrange(1 << 16)
    chance = random.Random(seed)
    quiet, project = make(tmp_path / "quiet"), make(tmp_path / "project")
    write_params(quiet, "last")
    began = time.monotonic()
    dvc(quiet, "repro")
    whole = time.monotonic() - began
    kills, slowest = {"repro": 0, "push": 0, "pull": 0, "gc": 0}, 0.0
    for number in range(20):
        write_params(project, f"word{number // 5}")
        alive, gone = killed(project, chance.uniform(0.2, 0.4 * whole), "repro")
        kills["repro"] += alive
        slowest = max(slowest, gone)
    write_params(project, "last")
    dvc(project, "repro")
    assert outputs(project) == outputs(quiet)
    for name in ("push", "gc", "pull"):
        given = ("gc", "-w", "-f") if name == "gc" else (name,)
        began = time.monotonic()
        dvc(project, *given)
        whole = time.monotonic() - began
        for _ in range(10):
            gone = {"push": ["../project.remote"], "gc": [], "pull": [".dvc/cache", "out"]}[name]
            subprocess.run(["rm", "-rf", *gone], cwd=project, check=True)
            kills[name] += killed(project, chance.uniform(0.1, 0.9) * whole, *given)[0]
        dvc(project, *given)
    print(f"seed {seed}: killed {kills}, stages gone after {slowest:.2f} s at most")
    assert min(kills.values()) > 0
    assert sum(kills.values()) >= 30
    dvc(project, "push")
    assert "in sync" in dvc(project, "status", "-c")
    subprocess.run(["rm", "-rf", ".dvc/cache", "out"], cwd=project, check=True)
    dvc(project, "pull")
    assert "up to date" in dvc(project, "status")
    assert outputs(project) == outputs(quiet)
    for name in STAGES:
        for file in (quiet / "out" / name).iterdir():
            assert (project / "out" / name / file.name).read_bytes() == file.read_bytes()


CONTESTED = TOY.replace(
    "def body(params, inputs, run):",
    """def body(params, inputs, run):
    import os, uuid
    me = uuid.uuid4().hex
    with open("history", "a") as history:
        history.write(f"begins {me}\\n")
    for number in range(20):
        (run.folder / f"by-{number}").write_text(me)
    while not Path("go").exists():
        time.sleep(0.05)
    for number in range(20, 40):
        (run.folder / f"by-{number}").write_text(me)
    with open("history", "a") as history:
        history.write(f"ends {me}\\n")
""",
)
TASK = """
from pathlib import Path
from prefect import flow
from flows.pipeline import Local, run_stage

@flow
def one():
    return run_stage(Local(name="prepare", root=Path.cwd(), execution="task"))

print(one().status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_of_eight_runners_of_one_stage_one_makes_it_and_the_others_are_told_who_does(
    tmp_path, apart
):
    """DVC, the stage's own command and a Prefect task; `apart`, all in PID namespaces of their own.

    Process ids say nothing there, and DVC's own lock, which consists of them, is no lock any more.
    """
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"] if apart else []
    if apart and subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    project = make(tmp_path / "project")
    (project / "toy.py").write_text(CONTESTED)
    (project / "task.py").write_text(TASK)
    direct = [sys.executable, "toy.py", "prepare", "--out", "out/prepare"]
    commands = [direct, [*DVC, "repro", "prepare"]] * 3 + [[sys.executable, "task.py"]] * 2
    random.shuffle(commands)
    patient = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    began = time.monotonic()
    runners = [
        subprocess.Popen(
            [*inside, *command],
            cwd=project,
            env=environment() | patient | {"PREFECT_HOME": str(tmp_path / f"prefect-{place}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for place, command in enumerate(commands)
    ]
    tasks = [runner for runner, c in zip(runners, commands, strict=True) if "task.py" in c]
    others = [runner for runner in runners if runner not in tasks]
    while sum(runner.poll() is None for runner in others) > (len(starts(project)) > 0):
        assert time.monotonic() < began + 180
        time.sleep(0.1)
    settled = time.monotonic() - began
    assert len(starts(project)) == 1
    (project / "go").touch()
    said = {runner: runner.communicate(timeout=180)[0] for runner in runners}
    print(f"{len(others)} runners settled after {settled:.1f} s")
    losers = [runner for runner in others if runner.returncode]
    assert len(losers) >= len(others) - 1
    for runner in losers:
        assert re.search(r"by process \d+|\(PID \d+\)|acquire lock", said[runner]), said[runner]
    # A task tries again, and takes what DVC made; what others made, DVC makes once more. Without
    # its lock DVC may fail and say nothing, which plain calls put right.
    assert apart or [task.returncode for task in tasks] == [0, 0], said[tasks[0]]
    dvc(project, "repro", "prepare")
    history = (project / "history").read_text().split()
    made = history[1::4]
    assert history == [word for me in made for word in ("begins", me, "ends", me)]
    assert len(made) <= (4 if apart else 2)
    assert {file.read_text() for file in (project / "out" / "prepare").glob("by-*")} == {made[-1]}


def starts(project):
    """Who began to make the stage."""
    history = project / "history"
    return re.findall(r"begins (\w+)", history.read_text()) if history.exists() else []
