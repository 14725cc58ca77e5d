"""What a person sees: DVC's plots, and MLflow's pages in a real browser."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.tracking import client, drain, experiment
from tests.browser import CHROMIUM
from tests.test_tracking import DONE, computed, project, report, template  # noqa: F401
from tests.tracking_cases import Server, empty_database, facts, journal

ROOT = Path(__file__).parents[1]


def test_every_plot_of_the_pipeline_is_drawn(tmp_path):
    """`dvc plots show` and `diff` on reports of two states fill each template with their rows."""
    given = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots")
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML().dump({"plots": given["plots"]}, file)
    wanted = {}
    for plot in given["plots"]:
        ((name, spec),) = plot.items()
        ((source, column),) = spec["y"].items()
        wanted.setdefault(source, {spec["x"], "model"}).add(column)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    for state in (1, 2):
        for source, columns in wanted.items():
            (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
            rows = [[f"m{row}" if c == "model" else state * row for c in columns] for row in (1, 2)]
            lines = [",".join(map(str, row)) for row in [list(columns), *rows]]
            (tmp_path / source).write_text("\n".join(lines) + "\n")
        subprocess.run([*git, "add", "-A"], cwd=tmp_path, check=True)
        subprocess.run([*git, "commit", "-qm", "state"], cwd=tmp_path, check=True)
    for command, states in (["show"], 1), (["diff", "HEAD~1"], 2):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "plots", *command, "--json"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        drawn = json.loads(done.stdout)["data"]
        assert set(drawn) == {next(iter(plot)) for plot in given["plots"]}
        for plot in given["plots"]:
            ((name, spec),) = plot.items()
            content = drawn[name][0]["content"]
            content = json.loads(content) if isinstance(content, str) else content
            assert len(content["data"]["values"]) == 2 * states
            ((_, column),) = spec["y"].items()
            assert f'"{spec["x"]}"' in json.dumps(content["encoding"])
            assert column in content["data"]["values"][0]
            if spec["template"] == "frontier":
                assert content["layer"][1]["encoding"]["text"]["field"] == "model"


def seen(address: str, picture: Path) -> str:
    """The text of a page after its scripts ran; what it looks like is left as `picture`."""
    common = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={picture.parent / 'browser'}", "--window-size=1500,1400"),
        *("--timeout=60000", "--virtual-time-budget=40000", f"--screenshot={picture}"),
    ]
    done = subprocess.run(
        [*common, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_walk_through_mlflow(template, tmp_path, project, monkeypatch):  # noqa: F811
    """Experiment, execution, a cached stage, evaluation, models, registered model: all say it."""
    from flows.sync import sync

    empty_database(template, tmp_path)
    server = Server(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        server.start()
        corpus = computed(project, "prepare", "data/corpus", "one")
        small = computed(project, "compress", "models/small", "one", corpus=corpus)
        read = {"small": small, "corpus": corpus}
        journal(
            project / ".drawplate/unsent/evaluate", facts("evaluate", "one", inputs=read),
            close=DONE | {"metrics": {"small.pass_at_1": 0.625},
                          "tags": {"drawplate.kind": "report"}},
            files=report(tmp_path / "report", "small", 20) | {"index.html": "<h1>It is here</h1>"},
        )  # fmt: skip
        sync(project, "one", {"prepare": "ran", "compress": "ran"})
        sync(project, "two", {"prepare": "unchanged", "compress": "cached"})
        assert drain(project) == {}
        store = client()
        where = experiment(store)
        runs = {run.info.run_name: run.info.run_id for run in store.search_runs([where])}
        (model,) = (
            m for m in store.search_logged_models([where]) if m.tags["drawplate.hash"] == small
        )
        page = f"{server.uri}/#/experiments/{where}"
        walk = {
            f"{page}/runs": ["pipeline one", "pipeline two"],
            f"{page}/runs/{runs['pipeline two']}": ["compress (cached)", "computed by", "0.5"],
            f"{page}/runs/{runs['compress (cached)']}": [
                "Not computed again", f"/runs/{runs['compress']}", "final.loss", "pipeline two",
            ],
            f"{page}/runs/{runs['evaluate']}": ["the report", "Champion: now version 1", "corpus"],
            f"{page}/models": [model.name, "Ready"],
            f"{page}/models/{model.model_id}": ["eval.pass_at_1", "0.625", "drawplate"],
            f"{server.uri}/#/models/drawplate": ["Version 1", "champion"],
            f"{server.uri}/#/models/drawplate/versions/1": ["Champion: now version 1"],
        }  # fmt: skip
        for number, (address, expected) in enumerate(walk.items()):
            picture = tmp_path / f"page-{number}.png"
            text = seen(address, picture)
            assert [each for each in expected if each not in text] == [], address
            assert Image.open(picture).convert("L").getextrema() != (255, 255), address
    finally:
        server.kill()
