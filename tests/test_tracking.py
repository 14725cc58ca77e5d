"""What stages tell MLflow arrives once, whatever dies in between; what the store then shows."""

import fcntl
import json
import os
import shutil
import string
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from drawplate import lineage
from drawplate.core.artifact import publish
from stages.journal import Tracker
from stages.tracking import Sender, client, drain, execution_run, experiment, rows
from tests.tracking_cases import Server, counted, empty_database, facts, free_port, journal

ROOT = Path(__file__).parents[1]
DONE = {"status": "FINISHED", "metrics": {"size": 2.0}}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database with tables; making them takes longer than most tests."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{file}"
    client().search_experiments()
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before
    return file


@pytest.fixture
def store(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_database(template, tmp_path))
    return client()


def runs(store):
    return {run.info.run_name: run for run in store.search_runs([experiment(store)])}


def test_a_journal_may_be_sent_again_from_any_line(store, tmp_path):
    model = {"drawplate.kind": "model", "drawplate.output": "a" * 64}
    folder = journal(tmp_path / "j", facts(), close=DONE | {"tags": model}, files={"a.txt": "a"})
    Sender(folder).send()
    first = runs(store)
    assert counted(tmp_path / "mlflow.db", "loss") == {f"{tmp_path.name}j": (3, 3)}
    ends = [0, *(end for _, end in rows(folder / "log.jsonl", 0))]
    for end in ends[:-1]:
        (folder / "sent").write_text(str(end))
        Sender(folder).send()
    again = runs(store)
    assert counted(tmp_path / "mlflow.db", "loss") == {f"{tmp_path.name}j": (3, 3)}
    assert {n: r.info.run_id for n, r in again.items()} == {
        n: r.info.run_id for n, r in first.items()
    }
    assert len(store.search_logged_models([experiment(store)])) == 1
    assert [file.path for file in store.list_artifacts(again["toy"].info.run_id)] == ["a.txt"]
    assert again["toy"].data.metrics["final.size"] == 2
    assert again["toy"].info.end_time == 1_000_004


def test_an_output_may_be_called_what_no_logged_model_may(store, tmp_path):
    model = {"drawplate.kind": "model", "drawplate.output": "a" * 64}
    said = facts(output="""models/a.b:c%d'e"f""")
    journal(tmp_path / ".drawplate/unsent/a", said, close=DONE | {"tags": model})
    assert drain(tmp_path) == {}
    assert runs(store)["toy"].info.status == "FINISHED"
    assert runs(store)["toy"].data.metrics["final.size"] == 2
    (made,) = store.search_logged_models([experiment(store)])
    assert (made.name, made.tags["drawplate.hash"]) == ("a-b-c-d-e-f", "a" * 64)


def test_half_a_line_waits_for_its_other_half(store, tmp_path):
    folder = journal(tmp_path / "j", facts(), steps=2)
    log = folder / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-5])
    sender = Sender(folder)
    sender.send()
    assert list(counted(tmp_path / "mlflow.db", "loss").values()) == [(1, 1)]
    log.write_text(whole)
    sender.send()
    assert list(counted(tmp_path / "mlflow.db", "loss").values()) == [(2, 2)]


def test_what_ended_stages_left_is_drained_and_what_is_at_work_is_not(store, tmp_path):
    project = tmp_path / "project"
    done = journal(project / "models/.drawplate/unsent/a", facts("a"), close=DONE)
    killed = journal(project / ".drawplate/b-1/journal", facts("b"))
    working = journal(project / ".drawplate/c-1/journal", facts("c"))
    with (working / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert drain(project) == {}
    found = runs(store)
    assert {name: run.info.status for name, run in found.items() if name in "abc"} == {
        "a": "FINISHED",
        "b": "KILLED",
    }
    assert not done.exists()
    assert killed.exists()  # the stage may go on
    drain(project)
    drain(project)
    assert runs(store)["c"].info.status == "KILLED"
    assert set(counted(tmp_path / "mlflow.db", "loss").values()) == {(3, 3)}


def test_a_journal_whose_sender_is_only_starting_is_left_alone(store, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nread -r _\nexit 75\n")  # has sent nothing when the stage ends
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    tracker = Tracker(facts(), tmp_path / ".drawplate/toy-1")
    tracker.start()
    tracker.point(1, {"loss": 1.0})
    written = (tracker.folder / "log.jsonl").read_text()
    assert drain(tmp_path) == {}
    assert (tracker.folder / "log.jsonl").read_text() == written
    tracker.finish("FINISHED", metrics={}, tags={})
    assert drain(tmp_path) == {}
    assert runs(store)["toy"].info.status == "FINISHED"
    assert "drawplate.error" not in runs(store)["toy"].data.tags


def test_a_store_that_refuses_keeps_the_journal_and_is_told(store, tmp_path):
    folder = journal(tmp_path / ".drawplate/unsent/a", facts(params={"a" * 251: 1}), close=DONE)
    (problem,) = drain(tmp_path).values()
    assert "250 characters" in problem
    assert folder.exists()


def test_parameters_figures_and_inputs_may_have_any_name(store, tmp_path):
    """Overrides by globs are parameters; folders of models are roles and stand in figures."""
    name = string.printable.replace("/", "")
    said = facts(params={"overrides": {name: 1}}, inputs={name: "a" * 64})
    folder = journal(tmp_path / ".drawplate/unsent/a", said, close=DONE | {"metrics": {name: 2.0}})
    log = folder / "log.jsonl"
    log.write_text(log.read_text().replace('"loss"', json.dumps(name)))
    assert drain(tmp_path) == {}
    run = runs(store)["toy"]
    (param,) = run.data.params
    shown = param.removeprefix("overrides.")
    assert len(shown) == len(name)
    assert run.data.metrics == {shown: 1 / 3, f"final.{shown}": 2.0}
    assert run.data.tags[f"drawplate.input.{shown}"] == "a" * 64
    assert run.info.status == "FINISHED"


def test_two_stages_that_begin_at_once_share_one_execution(store, monkeypatch):
    where = experiment(store)
    first = store.create_run(where, tags={"drawplate.execution": "two"}).info.run_id
    search = store.search_runs
    looks = []

    def first_is_blind(*given, **named):  # the other stage's run came after the first look
        looks.append(given)
        return [] if len(looks) == 1 else search(*given, **named)

    monkeypatch.setattr(store, "search_runs", first_is_blind)
    chosen = {execution_run(store, where, "two"), execution_run(store, where, "two")}
    monkeypatch.undo()
    assert chosen == {first}
    assert len(store.search_runs([where], "tags.`drawplate.execution` = 'two'")) == 1


@pytest.fixture
def server(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty_database(template, tmp_path)
    one = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one.uri)
    one.start()
    yield one
    one.kill()


def flood(server, folder, writers, points, kills, pause):
    """Writers log points in turn while the server is killed and started again `kills` times.

    In the middle the first writer's stage is lost, and goes on from a checkpoint further back. A
    naive sender logs every 50th point by a call of its own, as a training loop would.
    """
    figure = folder / "figure.txt"
    figure.write_text("shown")
    trackers = [Tracker(facts(f"writer-{i}"), folder / f".drawplate/w-{i}") for i in range(writers)]
    for tracker in trackers:
        tracker.start()
    store = client()
    naive = store.create_run(experiment(store), run_name="naive").info.run_id
    tried = 0
    away = {points * (2 * i + 1) // (2 * kills + 1) for i in range(kills)}
    back = {points * (2 * i + 2) // (2 * kills + 1) for i in range(kills)}
    step = 0
    while step < points:
        step += 1
        for number, tracker in enumerate(trackers):
            tracker.point(step, {"loss": number + 1 / step})
        if step % 50 == 0:
            tried += 1
            with suppress(Exception):  # as in loops that log and carry on
                store.log_metric(naive, "loss", 1.0, step=step)
        time.sleep(pause)
        if step in away:
            server.kill()
        if step in back:
            server.start()
        if step == points // 2:
            lost = trackers[0]
            lost._sender.stdin.close()  # what the sender sees of a stage that was killed
            lost._log.close()
            trackers[0] = again = Tracker(lost.facts, folder / ".drawplate/w-0")
            again.start()
            for earlier in range(points // 3, points // 2 + 1):
                again.point(earlier, {"loss": 0.0})
    for tracker in trackers:
        tracker.keep([figure])
        tracker.finish("FINISHED", metrics=DONE["metrics"], tags={})
    began = time.monotonic()
    while drain(folder):
        time.sleep(0.5)
    found = runs(store)
    for name, run in found.items():
        if name.startswith("writer"):
            assert run.info.status == "FINISHED"
            assert run.data.metrics["final.size"] == 2
            assert [file.path for file in store.list_artifacts(run.info.run_id)] == ["figure.txt"]
    history = store.get_metric_history(found["writer-0"].info.run_id, "loss")
    assert all(point.value == 1 / point.step for point in history)
    arrived = len(store.get_metric_history(naive, "loss"))
    print(
        f"{writers} writers x {points} points, server killed {kills} times: rows (all, different) "
        f"{sorted(counted(server.database, 'loss').values())}; drained in "
        f"{time.monotonic() - began:.1f} s; a naive sender: {arrived} of {tried}"
    )
    return arrived, tried


def test_no_point_is_lost_or_doubled_when_the_server_is_killed(server, tmp_path):
    arrived, tried = flood(server, tmp_path, writers=2, points=300, kills=1, pause=0.02)
    assert list(counted(server.database, "loss").values()) == [(300, 300)] * 2
    assert arrived < tried  # the check can fail: a sender without a journal fails it


@pytest.mark.slow
def test_no_point_of_eight_writers_is_lost_in_five_kills(server, tmp_path):
    arrived, tried = flood(server, tmp_path, writers=8, points=5000, kills=5, pause=0.01)
    assert list(counted(server.database, "loss").values()) == [(5000, 5000)] * 8
    assert arrived < tried


def test_a_stage_ends_well_without_its_server_and_is_sent_later(store, tmp_path, monkeypatch):
    there = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    tracker = Tracker(facts("late"), tmp_path / ".drawplate/late-1")
    tracker.start()
    tracker.point(1, {"loss": 1.0})
    tracker.finish("FAILED", metrics={}, tags={"drawplate.error": "x"})
    assert "refused" in tracker.problem or "Max retries" in tracker.problem
    assert tracker.run_id is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    assert drain(tmp_path) == {}
    late = runs(store)["late"]
    assert (late.info.status, late.data.metrics["loss"]) == ("FAILED", 1.0)


def report(folder, name, right, reasons=(), problems=40, samples=2):
    """What an evaluation of one model leaves: `right` of the problems are solved, each time."""
    asked = {"problems": problems, "samples": samples, "temperature": 1.0, "filters": []}
    params = asked | {"max_new": 8, "seed": 0, "chance": {"resamples": 200}}
    folder.mkdir()
    checkup = {"name": name, "reasons": list(reasons)}
    (folder / "report.json").write_text(json.dumps({"params": params, "checkups": [checkup]}))
    lines = [f"problem,id,task,{name}.greedy,{name}.solved,{name}.tokens,{name}.cut"]
    lines += [
        f"{i},p{i},add,{int(i < right)},{samples * int(i < right)},9,0" for i in range(problems)
    ]
    (folder / "problems.csv").write_text("\n".join(lines) + "\n")
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_the_champion_moves_only_to_what_is_healthy_and_not_worse(store, tmp_path):
    """Each evaluation is of another model; the alias follows, and says why where it does not."""
    cases = [
        ("sick", 40, ["9.0% of answers are empty"], {}, None, "9.0% of answers are empty"),
        ("first", 20, [], {}, "first", "now version 2."),
        ("worse", 5, [], {}, "first", "greedy is worse than the champion's: 12.5% after 50.0%"),
        ("same", 20, [], {}, "same", "now version 4 after version 2."),
        ("other", 40, [], {"problems": 30}, "same", "evaluate.problems is 30 and was 40"),
        ("better", 40, [], {}, "better", "now version 6 after version 4."),
    ]
    for number, (name, right, reasons, more, champion, said) in enumerate(cases):
        files = report(tmp_path / name, name, min(right, more.get("problems", 40)), reasons, **more)
        digest = f"{number}" * 64
        made = {"drawplate.kind": "model", "drawplate.output": digest}
        unsent = tmp_path / ".drawplate/unsent"
        journal(
            unsent / f"{number}a", facts("finetune", name, output=f"models/{name}"),
            close=DONE | {"tags": made},
        )  # fmt: skip
        read = {name: digest, "corpus": "c" * 64}
        figures = {f"{name}.pass_at_1": right / 40, f"{name}.vs_x.greedy.verdict": 0.0}
        journal(
            unsent / f"{number}b", facts("evaluate", name, inputs=read),
            close=DONE | {"metrics": figures, "tags": {"drawplate.kind": "report"}}, files=files,
        )  # fmt: skip
        shutil.copytree(unsent / f"{number}b", unsent / f"{number}c")
        assert drain(tmp_path) == {}  # the copy is the same evaluation, sent again
        (evaluation,) = (
            run
            for run in store.search_runs([experiment(store)])
            if run.data.tags.get(f"drawplate.input.{name}")
        )
        assert said in evaluation.data.tags["drawplate.champion"]
        assert (
            f"Champion: {evaluation.data.tags['drawplate.champion']}"
            in (evaluation.data.tags["mlflow.note.content"])
        )
        if champion is None:
            with pytest.raises(MlflowException, match="alias"):
                store.get_model_version_by_alias("drawplate", "champion")
        else:
            version = store.get_model_version_by_alias("drawplate", "champion")
            assert version.tags["drawplate.name"] == champion
    models = {m.name: m for m in store.search_logged_models([experiment(store)])}
    assert set(models) == {case[0] for case in cases}
    (found,) = (m for m in models["first"].metrics if m.key == "eval.pass_at_1")
    assert (found.value, found.dataset_name, found.dataset_digest) == (0.5, "corpus", "c" * 36)
    best = store.search_logged_models(
        [experiment(store)],
        "metrics.`eval.pass_at_1` > 0.6",
        order_by=[{"field_name": "metrics.eval.pass_at_1", "ascending": False}],
    )
    assert {m.name for m in best} == {"sick", "other", "better"}
    assert json.loads(models["first"].tags["mlflow.modelVersions"]) == [
        {"name": "drawplate", "version": "2"}
    ]


def test_models_whose_names_begin_alike_have_their_own_figures(store, tmp_path):
    own = {"llama-3": 0.25, "llama-3.2": 0.5}
    files = report(tmp_path / "report", "llama-3.2", 20)
    told = json.loads(files["report.json"])
    told["checkups"] = [{"name": name, "reasons": []} for name in own]
    read = {name: str(number) * 64 for number, name in enumerate(own)} | {"corpus": "c" * 64}
    figures = {f"{name}.pass_at_1": value for name, value in own.items()}
    journal(
        tmp_path / ".drawplate/unsent/a", facts("evaluate", inputs=read),
        close=DONE | {"metrics": figures | {"llama-3.2.vs_llama-3.greedy.verdict": 0.0},
                      "tags": {"drawplate.kind": "report"}},
        files=files | {"report.json": json.dumps(told)},
    )  # fmt: skip
    assert drain(tmp_path) == {}
    models = store.search_logged_models([experiment(store)])
    assert {m.name: {one.key: one.value for one in m.metrics} for m in models} == {
        name.replace(".", "-"): {"eval.pass_at_1": value} for name, value in own.items()
    }


@pytest.fixture
def project(tmp_path):
    """A folder as DVC leaves it: prepare, then compress from it, each with record and figures."""
    root = tmp_path / "project"
    stages = {}
    for stage, out, parents in (
        ("prepare", "data/corpus", {}),
        ("compress", "models/small", {"corpus": root / "data/corpus"}),
    ):
        with publish(root / out, "model") as inside:
            (inside / "data").write_text(stage)
            node = lineage.Node(
                stage=stage, params={"overrides": {"*.up": 4}}, sources={"web": "1"}
            )
            lineage.write(lineage.trace(node, parents), inside)
        for place, value in (
            ("lineage", {"stage": stage, "output": out, "started": len(stages),
                         "hash": lineage.content_hash(root / out)}),
            ("metrics", {"loss": 1.5, "r=1.loss": 2.5}),
        ):  # fmt: skip
            (root / place).mkdir(exist_ok=True)
            (root / place / f"{stage}.json").write_text(json.dumps(value))
        stages[stage] = {"outs": [{"path": out, "md5": f"{stage}.dir"}], "deps": []}
    stages["compress"]["deps"] = [{"path": "data/corpus", "md5": "prepare.dir"}]
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))
    (root / "params.yaml").write_text("{}")
    return root


def computed(root, stage, out, execution, **inputs):
    """The unsent journal of a stage that made `out`."""
    digest = lineage.content_hash(root / out)
    tags = {"drawplate.kind": "model", "drawplate.output": digest}
    said = facts(stage, execution, inputs=inputs, tags={"drawplate.folder": str(root / out)})
    files = {lineage.FILE: (root / out / lineage.FILE).read_text()}
    journal(root / f".drawplate/unsent/{stage}", said, close=DONE | {"tags": tags}, files=files)
    return digest


def test_a_stage_that_was_not_computed_again_is_shown_with_a_link(store, project, capsys):
    from flows.cli import cli
    from flows.sync import sync

    corpus = computed(project, "prepare", "data/corpus", "one")
    computed(project, "compress", "models/small", "one", corpus=corpus)
    sync(project, "one", {"prepare": "ran", "compress": "ran"})
    first = runs(store)
    assert set(first) == {"pipeline one", "prepare", "compress"}
    tags = first["compress"].data.tags
    assert tags["dvc.out.models/small"] == "compress.dir"
    assert tags["dvc.dep.data/corpus"] == "prepare.dir"
    assert tags["drawplate.parent.corpus"] == first["prepare"].info.run_id
    for _ in range(2):  # the second time changes nothing
        sync(project, "two", {"prepare": "unchanged", "compress": "cached"})
    second = {n: r for n, r in runs(store).items() if n not in first}
    assert set(second) == {"pipeline two", "prepare (unchanged)", "compress (cached)"}
    assert len(store.search_runs([experiment(store)])) == 6
    parent, stand_in = second["pipeline two"], second["compress (cached)"]
    computed_by = first["compress"].info.run_id
    assert stand_in.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stand_in.data.tags["drawplate.cached_from"] == computed_by
    assert f"/runs/{computed_by})" in stand_in.data.tags["mlflow.note.content"]
    assert f"| compress | cached | [{computed_by[:8]}]" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["stage.compress.status"] == "cached"
    assert parent.data.tags["stage.compress.run_id"] == stand_in.info.run_id
    assert stand_in.data.metrics == {"final.loss": 1.5, "final.r-1.loss": 2.5}
    assert stand_in.data.params == {"overrides.-.up": "4"}
    assert set(parent.data.params) == {"prepare.overrides.-.up", "compress.overrides.-.up"}
    assert stand_in.outputs.model_outputs[0].model_id == tags["drawplate.model_id"]
    for run in (computed_by, stand_in.info.run_id):  # from a score of either to the raw text
        capsys.readouterr()
        cli.main(["lineage", run], standalone_mode=False)
        told = capsys.readouterr().out
        assert "source web: 1" in told
        assert "prepare" in told


def test_what_no_run_of_this_store_computed_has_no_producer(store, project):
    from flows.sync import sync

    for execution in ("one", "two"):
        sync(project, execution, {"prepare": "unchanged", "compress": "cached"})
    for run in store.search_runs([experiment(store)]):
        assert "drawplate.cached_from" not in run.data.tags
        if run.info.run_name.startswith("pipeline"):
            assert run.data.tags["mlflow.note.content"].count("no run of this store") == 2


def test_an_execution_is_brought_up_to_date_when_the_store_is_back(store, project, monkeypatch):
    from flows import sync as module

    there = os.environ["MLFLOW_TRACKING_URI"]
    corpus = computed(project, "prepare", "data/corpus", "one")
    computed(project, "compress", "models/small", "one", corpus=corpus)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert module.sync(project, "one", {"prepare": "ran", "compress": "ran"}) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    monkeypatch.chdir(project)
    module.main()
    assert set(runs(store)) == {"pipeline one", "prepare", "compress"}
    assert runs(store)["pipeline one"].data.tags["stage.compress.status"] == "ran"
    assert not list((project / ".drawplate/unsent").iterdir())


def test_a_run_of_a_clone_that_is_gone_is_walked_from_what_lies_here_or_its_record(
    store, project, capsys, monkeypatch
):
    from flows.cli import cli

    clone = project.rename(project.with_name("clone"))
    corpus = computed(clone, "prepare", "data/corpus", "one")
    computed(clone, "compress", "models/small", "one", corpus=corpus)
    assert drain(clone) == {}
    clone.rename(project)
    monkeypatch.chdir(project)
    run = runs(store)["compress"].info.run_id

    def told():
        capsys.readouterr()
        cli.main(["lineage", run], standalone_mode=False)
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    small, data = project / "models/small", project / "data/corpus"
    steps = [
        ["output:", "compress", lineage.content_hash(small)[:12], "verified", str(small)],
        ["source", "web:", "1"],
        ["corpus:", "prepare", corpus[:12], "verified", str(data)],
        ["source", "web:", "1"],
    ]
    assert told() == steps
    shutil.rmtree(small)
    assert told() == [[*steps[0][:3], "not", "found"], *steps[1:]]
    shutil.rmtree(data)
    assert told() == [
        [*steps[0][:3], "not", "found"], steps[1], [*steps[2][:3], "not", "found"], steps[3]
    ]  # fmt: skip


def test_a_run_is_said_to_be_missing_only_where_the_store_answers(store, monkeypatch, capsys):
    from flows.cli import cli
    from stages.quiet import guarded

    def told(run):
        assert guarded(lambda: cli.main(["lineage", run], standalone_mode=False)) == 2
        return capsys.readouterr().err

    for run in ("0" * 32, "models/none"):
        assert f"'{run}' is no folder, and no run in sqlite:" in told(run)
    away = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
    assert told("0" * 32).startswith(f"drawplate: MLflow at {away} does not answer (")


def test_asking_for_a_run_makes_no_store(tmp_path, monkeypatch, capsys):
    from flows.cli import cli
    from stages.quiet import guarded

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert guarded(lambda: cli.main(["lineage", "nosuchrun"], standalone_mode=False)) == 2
    assert "'nosuchrun' is no folder, and there are no runs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
