"""Sweeps of a small DVC project: shared work, experiments, failures, interruptions, engines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from drawplate import settings
from drawplate.core.errors import UserError
from flows.cli import cli
from flows.graph import Repro
from flows.request import Request, known
from flows.sweep import engines, space, trial
from flows.sweep.plan import Spec, committed, steps
from flows.sweep.run import Sweep, run
from flows.sweep.trial import record, recorded
from flows.workspace import git, workspace
from stages.check import check
from stages.quiet import guarded

ROOT = Path(__file__).parents[1]

HOME = Path(__file__).parents[1]
DVC = [sys.executable, "-m", "dvc"]
STAGE = """
import json, os, sys, time
from pathlib import Path
from ruamel.yaml import YAML
name, source = sys.argv[1:]
own = YAML(typ="safe").load(Path("params.yaml"))[name]
with open(os.environ["COUNTS"], "a") as file:
    file.write(f"{name} {os.getpid()}\\n")
time.sleep(float(os.environ.get("PACE", 0)))
before = json.loads(Path(source).read_text()) if source != "-" else {"up": 0, "down": 0}
if own.get("ratio") == 0.9:
    sys.exit("drawplate: nothing would be left")
gain = own.get("bits", 10 * own.get("ratio", 0))
made = json.dumps({"up": before["up"] + gain, "down": before["down"] + gain**2})
Path(f"{name}.json").write_text(made)
Path("metrics").mkdir(exist_ok=True)
Path(f"metrics/{name}.json").write_text(made)
"""
PARAMS = {
    "execution": {"tracking": False},
    "prepare": {
        "sources": [{"name": "docstrings", "packages": ["numpy"]}],
        "tasks": [{"name": "chain_sum"}],
    },
    "pretrain": {"batch": 4},
    "compress": {"ratio": 0.3},
    "quantize": {"bits": 4},
}


def stage(name, source):
    return {
        "cmd": f"python stage.py {name} {source}",
        "deps": ["stage.py", *([source] if source != "-" else [])],
        "params": [name],
        "outs": [f"{name}.json"],
        "metrics": [{f"metrics/{name}.json": {"cache": False}}],
    }


def commit(root):
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-qm", "as it is"], cwd=root, check=True)


def made(root):
    """Three stages in a repository of their own; JSON is YAML too."""
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    chain = {
        "quantize": stage("quantize", "compress.json"),
        "pretrain": stage("pretrain", "-"),
        "compress": stage("compress", "pretrain.json"),
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": chain}))
    (root / "stage.py").write_text(STAGE)
    (root / "params.yaml").write_text(json.dumps(PARAMS))
    (root / ".gitignore").write_text("/*.json\n/.drawplate\n/mlflow.db\n/mlartifacts\n")
    git(root, "init", "-q")
    git(root, "config", "user.name", "t")
    git(root, "config", "user.email", "t@localhost")
    commit(root)
    return root


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project, and an environment in which its stages tell when they run.

    Git knows a user in this repository only, so a clone of it has none.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in os.environ:
        if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER", "GIT_CONFIG", "XDG_CONFIG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts"))
    monkeypatch.setenv("DRAWPLATE_WORKSPACES", str(tmp_path / "workspaces"))
    monkeypatch.setenv("PYTHONPATH", f"{HOME}{os.pathsep}{HOME / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made(tmp_path / "project")


def counted(root):
    file = root.parent / "counts"
    lines = file.read_text().splitlines() if file.exists() else []
    return Counter(line.split()[0] for line in lines)


def request(*parameters, goals=("quantize:up:max", "quantize:down:min"), **more):
    return Sweep(parameters=parameters, goals=goals, **more)


def shown(root):
    """Experiments by name, as `dvc exp show` lists them."""
    done = subprocess.run(
        [*DVC, "exp", "show", "--json"], cwd=root, check=True, capture_output=True, text=True
    )
    return {
        experiment["name"]: experiment["revs"][-1]["data"]
        for base in json.loads(done.stdout)
        for experiment in base.get("experiments") or []
    }


@pytest.mark.slow
def test_trials_share_what_they_have_in_common_and_are_experiments(project):
    wanted = request("compress.ratio=0.2,0.9", "quantize.bits=2,3", jobs=2)
    first = run(wanted, project)
    # One trial of 0.9 found out that it breaks; the other took its word.
    assert counted(project) == {"pretrain": 1, "compress": 2, "quantize": 2}
    errors = {row.name: row.outcome.error for row in first.rows if row.outcome.error}
    assert len(errors) == 2
    assert sorted(error.startswith("as in") for error in errors.values()) == [False, True]
    assert all(error.endswith("nothing would be left") for error in errors.values())
    assert first.failed

    done = {row.name: row for row in first.rows if row.name not in errors}
    found = shown(project)
    assert set(found) == set(done)
    for name, data in found.items():
        bits = int(done[name].changes["quantize.bits"])
        assert data["params"]["params.yaml"]["data"]["quantize"] == {"bits": bits}
        assert data["metrics"]["metrics/quantize.json"]["data"] == {
            "up": 2 + bits,
            "down": 4 + bits**2,
        }
    assert not git(project, "status", "--porcelain")
    assert not list((project.parent / "workspaces").iterdir())

    # What is there is not computed again, by whichever sweep.
    again = run(request("compress.ratio=0.2", "quantize.bits=2,3"), project)
    assert {row.name for row in again.rows if row.outcome.earlier} == set(done)
    assert counted(project) == {"pretrain": 1, "compress": 2, "quantize": 2}
    assert not again.failed
    kept = json.loads((again.folder / "sweep.json").read_text())
    assert set(kept["front"]) == set(done)
    assert (again.folder / "front.svg").exists()

    (name, row), _ = done.items()
    subprocess.run([*DVC, "exp", "apply", "-q", name], cwd=project, check=True, capture_output=True)
    bits = int(row.changes["quantize.bits"])
    assert json.loads((project / "quantize.json").read_text())["up"] == 2 + bits
    assert f"bits: {bits}" in (project / "params.yaml").read_text().replace('"', "")
    # What is not committed is not what trials would see.
    with pytest.raises(UserError, match=r"params\.yaml differs from the last commit"):
        run(wanted, project)


def test_what_trials_would_not_see_is_refused(project):
    order = steps(project, ())
    assert [step.name for step in order] == ["pretrain", "compress", "quantize"]
    assert [step.name for step in steps(project, ("compress",))] == ["pretrain", "compress"]
    assert order[2].keys == {"pretrain", "compress", "quantize"}
    (project / "notes.txt").write_text("no stage reads this")
    (project / "metrics").mkdir()
    (project / "metrics" / "quantize.json").write_text("{}")
    (project / "pretrain.json").write_text("{}")
    assert committed(project, order) == git(project, "rev-parse", "HEAD")
    (project / "stage.py").write_text(STAGE + "# more\n")
    with pytest.raises(UserError, match=r"stage\.py differs"):
        committed(project, order)
    with pytest.raises(UserError, match="no stage 'nope'; there are: pretrain, compress, quantize"):
        steps(project, ("nope",))
    (project / "below").mkdir()
    with pytest.raises(UserError, match="is not the root"):
        committed(project / "below", order)


def test_a_trial_waits_for_another_sweep_that_makes_the_same(project, monkeypatch):
    @contextmanager
    def place(origin, revision):
        yield SimpleNamespace(root=project, dvc=lambda *_: None, environment=dict)

    said = iter(["drawplate: /x is being made by process 7; wait for it or stop it", "it is wrong"])
    monkeypatch.setattr("flows.graph.repro", lambda *_, **__: Repro({}, 1, next(said)))
    monkeypatch.setattr("flows.graph.time.sleep", lambda seconds: None)
    monkeypatch.setattr(trial, "workspace", place)
    spec = Spec(
        root=project, revision="HEAD", name="a", session="s", params="", changes={}, turns=[],
        targets=["quantize"], metrics=[], parent=None, environment={},
    )  # fmt: skip
    assert trial.run(spec).error == "it is wrong"


def test_a_text_in_dvcs_care_reaches_trials_before_dvc_lock_is_committed(project):
    described = json.loads((project / "dvc.yaml").read_text())
    described["stages"]["pretrain"]["deps"].append("texts")
    described["stages"]["pretrain"]["cmd"] = "cat texts/notes.txt && python stage.py pretrain -"
    (project / "dvc.yaml").write_text(json.dumps(described))
    (project / "texts").mkdir()
    (project / "texts" / "notes.txt").write_text("a text of the user's own")
    subprocess.run([*DVC, "add", "-q", "texts/notes.txt"], cwd=project, check=True)
    commit(project)
    assert [step.name for step in steps(project, ())] == ["pretrain", "compress", "quantize"]
    found = run(
        request("pretrain.batch=4", goals=("pretrain:up:max",), targets=["pretrain"]), project
    )
    assert [row.outcome.error for row in found.rows] == [None]
    assert counted(project) == {"pretrain": 1}
    notes = project / "texts" / "notes.txt"
    notes.write_text("another one")
    with pytest.raises(UserError, match=r"^texts/notes\.txt differs from what `dvc add` noted"):
        committed(project, steps(project, ()))
    notes.unlink()  # trials have it all the same
    assert committed(project, steps(project, ())) == git(project, "rev-parse", "HEAD")


WRONG = [
    (["-S", "compress.ratio"], "expected dotted.key=values"),
    (["-S", "compress.ratio=0.1..0.5"], "a grid needs a step"),
    (["-S", "compress.ratoi=0.1,0.2"], "compress.ratoi is no key of params.yaml (did you mean"),
    (["-S", "compress.method.name=slice,slcie"], "no method 'slcie' (did you mean 'slice'?); choo"),
    (["-S", "compress.method.name=slice", "-S", "compress.method.rank=1"], "is no key of params"),
    (["-S", "compress.method.name=slice", "-S", "compress.method.turns=1"], "is not a key here"),
    (["-S", "compress.ratio=0.1,1.5"], "trial compress.ratio=1.5: compress.ratio: input should"),
    (["-S", "compress.ratio=0.1..1.5", "--study", "3"], "trial compress.ratio=1.5: "),
    (["-S", "quantize.bits=2,3", "--goal", "quantize:up"], "expected [file:]key:max"),
    (["-S", "quantize.bits=2,3", "--keep", "up<1"], "expected [file:]key<=number"),
    (["-S", "quantize.bits=2,3", "--goal", "evaluate:up:max"], "write no metrics 'evaluate'"),
    (["-S", "quantize.bits=2,3", "nope"], "no stage 'nope'"),
]


def test_a_wrong_sweep_is_one_line_and_nothing_runs(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr("stages.quiet.interruptible", lambda: None)
    for given, says in WRONG:
        arguments = given if "--goal" in given else [*given, "--goal", "quantize:up:max"]
        call = ["sweep", *arguments]
        assert guarded(lambda call=call: cli.main(call, standalone_mode=False)) == 2, given
        text = capsys.readouterr().err
        assert says in text
        assert len(text.strip().splitlines()) == 1
    assert not counted(project)
    assert not (project / ".drawplate").exists()


def test_a_trial_is_recorded_where_only_the_project_says_who_its_user_is(project):
    with workspace(str(project)) as place:
        commit = git(project, "rev-parse", "HEAD")
        spec = Spec(
            root=project, revision=commit, name="one", changes={}, params="",
            targets=("pretrain",), turns=(), metrics=("metrics/pretrain.json",), session="s",
            parent=None, environment={},
        )  # fmt: skip
        (place.root / "params.yaml").write_text(json.dumps(PARAMS | {"pretrain": {"batch": 8}}))
        for file in ("pretrain.json", "metrics/pretrain.json"):
            (place.root / file).parent.mkdir(exist_ok=True)
            (place.root / file).write_text("{}")
        record(place, spec)
    assert list(recorded(project, commit)) == ["one"]


def test_a_form_is_refused_before_a_flow_begins():
    for bad in (
        {"parameters": ["a"]},
        {"parameters": []},
        {"parameters": ["compress.ratio=1"], "goals": ["a"]},
        {"parameters": ["compress.ratio=1"], "keep": ["a<1"]},
        {"parameters": ["compress.rato=1"]},
        {"parameters": ["compress.method.name=slice,slcie"]},
        {"parameters": ["compress.ratio=1"], "targets": ["nonsense"]},
        {"parameters": ["compress.ratio=1"], "jobs": 0},
        {"parameters": ["compress.ratio=1"], "engine": "slurm"},
        {"parameters": ["compress.ratio=1"], "more": 1},
    ):
        with pytest.raises(ValueError, match="validation error"):
            Sweep.model_validate(bad)


@pytest.mark.parametrize(
    ("key", "said"), [("compress.method.name", "no method 'mine'"), ("compress.mine", "is no key")]
)
def test_who_wrote_a_method_is_told_how_to_make_it_known(key, said):
    with pytest.raises(UserError, match=f"{said}.*make docs"):
        known(key, ["mine"])


SCHEMA = Draft202012Validator(Sweep.model_json_schema())


def test_the_form_that_a_server_has_refuses_the_same():
    for bad in (
        {"parameters": ["compress.ratio"]},
        {"parameters": []},
        {"parameters": ["compress.rato=1,2"]},
        {"parameters": ["compress.method.name=slice,slcie"]},
        {"parameters": ["quantize.bits=2"], "targets": ["nonsense"]},
        {"parameters": ["quantize.bits=2"], "goals": ["x"]},
        {"parameters": ["quantize.bits=2"], "keep": ["a<1"]},
    ):
        assert not SCHEMA.is_valid(bad), bad
    for good in (
        {"parameters": ["quantize.bits=2..4", "compress.method.name=slice, 'low_rank'"]},
        {"parameters": ["finetune.optimizer.rest.rate=1e-4..1e-2:log"], "study": 3},
        {
            "parameters": ["prepare.tasks.0.name=gcd"],
            "targets": ["prepare"],
            "goals": ["evaluate:tuned.greedy:max", "up:min"],
            "keep": ["evaluate:tuned.stored_bytes <= 2e6"],
        },
    ):
        assert SCHEMA.is_valid(good), good
        Sweep.model_validate(good)


@pytest.mark.parametrize("form", [Sweep, Request])
def test_every_field_of_a_form_says_what_it_is_for(form):
    missing = [name for name, field in form.model_fields.items() if not field.description]
    assert missing == []


def test_every_example_of_the_help_is_one_that_stages_take():
    """Keys exist, and all values at the ends of a range are legal."""
    tree = settings.read(ROOT / "params.yaml")
    asked = CliRunner().invoke(cli, ["sweep", "--help"]).output
    texts = {
        "sweep": asked,
        **{
            f"{form.__name__}.{name}": f"`{field.description}`"
            for form in (Sweep, Request)
            for name, field in form.model_fields.items()
        },
    }
    found = [
        (where, example)
        for where, text in texts.items()
        for example in re.findall(r"(?:(?<=`)|(?<=-S ))[a-z_]+(?:\.[a-z_0-9]+)+=[^\s`]+", text)
    ]
    assert {where for where, _ in found} == {"sweep", "Sweep.parameters", "Request.overrides"}
    assert len(found) >= 7
    for where, example in found:
        axis = space.axis(example)
        for value in space.ends(axis):
            try:
                check(settings.override(tree, [f"{axis.key}={value}"]))
            except UserError as error:
                pytest.fail(f"{where}: {example}: {error}")
    # The forms without a key stand as one of theirs would.
    assert "0.2,0.4 or 2..4 or 0.1..0.5 or 1e-4..1e-2:log" in " ".join(asked.split())
    goals = re.findall(r"--goal (\S+:(?:max|min))", asked)
    keeps = re.findall(r"--keep '(\S+)'", asked)
    assert keeps
    Sweep(parameters=["compress.ratio=0.3"], goals=goals, keep=keeps)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(UserError, match=r"pip install 'drawplate\[dask\]'"):
        engines.dask(2)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


CALL = """
import signal, sys
from flows.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
main()
"""


def start(project, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CALL, "sweep", *arguments],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


SMALL = ["-S", "quantize.bits=2,3,8", "--jobs", "2", "--goal", "quantize:up:max"]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_leaves_no_process_and_goes_on(project, sign):
    caller = start(project, *SMALL, PACE="12")
    refs = ("for-each-ref", "--format=%(refname)", "refs/exps/")
    wait_for(
        lambda: counted(project)["quantize"] == 3 and len(git(project, *refs).splitlines()) == 2
    )
    pids = [int(line.split()[1]) for line in (project.parent / "counts").read_text().splitlines()]
    assert alive(pids[-1])
    os.kill(caller.pid, sign)
    said = caller.communicate(timeout=60)[0]
    if sign == signal.SIGINT:
        assert caller.returncode == 130
        assert "stopped" in said
        assert not any(alive(pid) for pid in pids)
    wait_for(lambda: not any(alive(pid) for pid in pids), 30)
    before = set(shown(project))
    assert len(before) == 2
    result = run(request("quantize.bits=2,3,8", goals=("quantize:up:max",), jobs=2), project)
    assert {row.name for row in result.rows if row.outcome.earlier} == before
    assert not result.failed
    assert counted(project) == {"pretrain": 1, "compress": 1, "quantize": 4}
    assert not list((project.parent / "workspaces").iterdir())


@pytest.mark.slow
def test_a_search_is_repeated_from_what_is_there_and_respects_its_bound(project):
    wanted = request(
        "compress.ratio=0.1..0.8",
        "quantize.bits=2,3,8",
        study=4,
        seed=3,
        keep=["quantize:down<=60"],
    )
    first = run(wanted, project)
    assert len(first.rows) == 4
    assert counted(project)["pretrain"] == 1
    before = counted(project)
    again = run(wanted, project)
    assert [row.changes for row in again.rows] == [row.changes for row in first.rows]
    assert counted(project) == before
    kept = json.loads((again.folder / "sweep.json").read_text())
    down = {trial["name"]: trial["metrics"]["quantize"]["down"] for trial in kept["trials"]}
    assert {name for name, value in down.items() if value <= 60} == {
        trial["name"] for trial in kept["trials"] if trial["kept"]
    }
    assert all(down[name] <= 60 for name in kept["front"])


@pytest.mark.slow
def test_mlflow_has_the_sweep_with_its_trials_below_it(project):
    tracked = PARAMS | {"execution": {"tracking": True}}
    (project / "params.yaml").write_text(json.dumps(tracked))
    commit(project)
    result = run(request("quantize.bits=2,3", jobs=2), project)
    assert not result.failed
    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (place,) = [e.experiment_id for e in store.search_experiments() if e.name == "drawplate"]
    (parent,) = store.search_runs([place], "attributes.run_name = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"front": 2, "trials": 2, "failed": 0}
    files = {file.path for file in store.list_artifacts(parent.info.run_id)}
    assert files == {"front.svg", "sweep.json", "table.txt"}
    below = store.search_runs([place], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.data.tags["drawplate.experiment"] for run in below} == set(shown(project))
    for row in result.rows:
        one = store.get_run(parent.data.tags[f"trial.{row.name}"])
        assert one.data.params == row.changes
        assert one.data.metrics["quantize.up"] == row.outcome.metrics["quantize"]["up"]


@pytest.mark.slow
def test_trials_run_on_a_task_runner(project, tmp_path):
    pytest.importorskip("prefect_dask")
    caller = start(project, *SMALL, "--engine", "dask", PREFECT_HOME=str(tmp_path / "prefect"))
    said = caller.communicate(timeout=500)[0]
    assert caller.returncode == 0, said
    assert len(shown(project)) == 3
    assert counted(project) == {"pretrain": 1, "compress": 1, "quantize": 3}
