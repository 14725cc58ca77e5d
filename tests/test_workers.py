"""Pipelines on a real Prefect server with real workers: where, once, and through what (rows 8, 9,
20, 21, 24).

One server serves the module; each test has parameters of its own, so no result is another's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Scheduled
from workers_cases import ROOT, Farm, alive, git, until

from flows.local import change_params
from flows.slots import LEASE


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    with Farm(tmp_path_factory.mktemp("farm")) as farm:
        farm.server()
        farm.deploy()
        farm.worker("c1", "cpu")
        farm.worker("g1", "gpu")
        until(lambda: has_worker(farm, "gpu"), what="the worker of pool gpu is there")
        yield farm


def has_worker(farm, pool, count=1):
    with farm.client() as client:
        return len(client.read_workers_for_work_pool(pool)) >= count


def starts(farm, stage, value):
    return [fact for fact in farm.facts() if (fact["stage"], fact["value"]) == (stage, value)]


def ends(farm, stage, value):
    return [fact for fact in farm.facts("end") if (fact["stage"], fact["value"]) == (stage, value)]


def bytes_of(farm, path, ref):
    """A file of an experiment, as a user gets it from the remote."""
    lock = git(farm.project, "show", f"{ref}:dvc.lock")
    md5 = lock.split(f"path: {path}\n")[-1].split("md5: ")[1].split()[0]
    return (farm.folder / "remote/files/md5" / md5[:2] / md5[2:]).read_bytes()


def ref_of(farm, name):
    return next(
        r
        for r in git(farm.project, "for-each-ref", "--format=%(refname)").split()
        if r.endswith(f"/{name}")
    )


def undisturbed(seed, steps, corpus=b"0"):
    """What pretrain's numbers are when nothing goes wrong."""
    numbers = []
    while len(numbers) < steps:
        numbers.append((len(numbers) * 7919 + seed * 100) % 1000)
    return numbers


@pytest.mark.slow
def test_a_run_on_workers_lands_where_its_user_finds_it(farm):
    before = git(farm.project, "status", "--porcelain")
    run = farm.ask(
        name="first", targets=["pretrain"], revision=farm.branch("first", pretrain_seed=7)
    )
    state = farm.wait(run)
    assert state.is_completed(), state.message
    # Each stage in its pool, by a worker with a cache of its own: the data went through the remote.
    (prepare,), (pretrain,) = starts(farm, "prepare", 0), starts(farm, "pretrain", 7)
    assert (prepare["worker"], pretrain["worker"]) == ("c1", "g1")
    assert pretrain["gpu"].endswith(":0")
    # Not in the checkout, not in one workspace for both, and no workspace is left.
    places = {prepare["folder"], pretrain["folder"]}
    assert len(places) == 2
    assert not any(place.startswith(str(farm.project)) or os.path.exists(place) for place in places)
    assert git(farm.project, "status", "--porcelain") == before
    # Handed over as one DVC experiment, with parameters, lock and metrics; outputs in the remote.
    ref = ref_of(farm, "first")
    assert '"seed": 7' in git(farm.project, "show", f"{ref}:params.yaml")
    assert f'{{"loss": {undisturbed(7, 3)[-1]}}}' == git(
        farm.project, "show", f"{ref}:pretrain.json"
    )
    assert repr(undisturbed(7, 3)).encode() in bytes_of(farm, "base.txt", ref)
    # The flow runs show how far training is, and a table of what became of each stage.
    with farm.client() as client:
        artifacts = {a.key: a for a in client.read_artifacts()}
    assert artifacts["pretrain-train"].data == 100
    assert "ran" in artifacts["stages"].data
    assert "quantize" not in artifacts["stages"].data
    assert "`dvc pull prepare pretrain`" in artifacts["stages"].description


@pytest.mark.slow
def test_a_wrong_parameter_is_refused_before_a_run_exists(farm):
    from prefect.exceptions import PrefectHTTPStatusError

    with farm.client() as client:
        deployment = client.read_deployment_by_name("pipeline/on-demand")
        schema = deployment.parameter_openapi_schema
        known = len(client.read_flow_runs())
    text = str(schema)
    assert "'rl/dler'" in text
    assert "'pretrain'" in text
    for wrong in (
        {"targets": ["pretrian"]},
        {"presets": ["rl/dlr"]},
        {"overrides": ["pretrain.seed"]},
        {"overrides": ["nothing.seed=1"]},
        {"overrides": ["compress.method.name=nonsense"]},
        {"revision": ""},
        {"name": "../x"},
        {"extra": 1},
    ):
        with pytest.raises(PrefectHTTPStatusError):
            farm.ask(**wrong)
    for wrong in (
        {"parameters": ["compress.ratio"]},
        {"parameters": ["compress.ratio=0.1"], "targets": ["nonsense"]},
        {"parameters": ["compress.ratio=0.1"], "goals": ["x"]},
    ):
        with pytest.raises(PrefectHTTPStatusError):
            farm.ask("sweep/sweep", **wrong)
    with farm.client() as client:
        assert len(client.read_flow_runs()) == known


@pytest.mark.slow
def test_limits_of_inputs_that_nobody_asks_for_are_removed_and_those_held_are_not(farm):
    from flows.slots import forget

    with farm.client() as client:
        for name in ("inputs-free", "inputs-held", "gpu@x:0"):
            client.upsert_global_concurrency_limit_by_name(name, limit=1)
        client.increment_concurrency_slots(["inputs-held"], 1, "concurrency")
        known = {limit.name for limit in client.read_global_concurrency_limits()}
        assert forget(client) == 0
        assert forget(client, timedelta(0)) >= 1
        left = {limit.name for limit in client.read_global_concurrency_limits()}
        assert "inputs-free" in known - left
        assert {"inputs-held", "gpu@x:0"} <= left


HOLD = """
import sys, time
from flows import slots
if "forgets" in sys.argv:  # the control: a holder that does not renew its lease
    slots._renew = lambda *_: None
with slots.slot("inputs-test", lambda text: print(text, flush=True)):
    print("has it", time.time(), flush=True)
    sys.stdin.readline()
    print("leaves", time.time(), flush=True)
"""


def hold(farm, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments],
        cwd=ROOT,
        env=farm.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    farm.processes[f"hold-{process.pid}"] = process
    return process


@pytest.mark.slow
def test_a_slot_has_one_holder_beyond_its_lease_and_loses_one_that_does_not_renew(farm):
    first = hold(farm)
    assert first.stdout.readline().startswith("has it")
    second = hold(farm, "forgets")
    assert "is held by another run" in second.stdout.readline()
    time.sleep(LEASE + 30)
    released = time.time()
    first.communicate("go\n")
    assert float(second.stdout.readline().split()[-1]) >= released
    third = hold(farm)
    assert "is held by another run" in third.stdout.readline()
    lost = float(third.stdout.readline().split()[-1])
    print(f"a lease of {LEASE:.0f} s that nobody renewed was free after {lost - released:.0f} s")
    assert second.poll() is None
    second.kill()
    second.wait()
    third.communicate("go\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_the_server_takes_the_templates(farm, kind):
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import PrefectHTTPStatusError

    template = json.loads((ROOT / f"flows/templates/{kind}.json").read_text())
    with farm.client() as client:
        client.create_work_pool(WorkPoolCreate(name=kind, type=kind, base_job_template=template))
        # The control: a variable that nobody declares.
        del template["variables"]["properties"]["image"]
        with pytest.raises(PrefectHTTPStatusError, match="image"):
            client.create_work_pool(
                WorkPoolCreate(name=f"{kind}-bad", type=kind, base_job_template=template)
            )


@pytest.mark.slow
def test_what_pydantic_or_the_catalogue_refuses_runs_no_stage(farm):
    before = len(farm.facts())
    run = farm.ask(overrides=["compress.ratio=7"])
    other = farm.ask(revision="no-such-branch")
    state = farm.wait(run)
    assert state.is_failed()
    assert "compress.ratio" in state.message
    assert "has no revision 'no-such-branch'" in farm.wait(other).message
    assert len(farm.facts()) == before


@pytest.mark.slow
def test_what_one_worker_computed_no_other_computes_again(farm):
    """And two that ask for the same at once: one computes, the other takes the result."""
    change = ["prepare.seed=21", "pretrain.seed=21", "pretrain.training.steps=25"]
    branch = farm.branch("same", prepare_seed=21, pretrain_seed=21, pretrain_steps=25)
    farm.worker("g2", "gpu", DRAWPLATE_WORKSPACES=str(farm.folder / "workspaces2"))
    until(lambda: has_worker(farm, "gpu", 2), what="two workers of pool gpu")
    runs = [farm.ask(name=name, targets=["pretrain"], revision=branch) for name in ("a1", "a2")]
    assert all(farm.wait(run).is_completed() for run in runs)
    third = farm.ask(name="a3", targets=["pretrain"], overrides=change)
    assert farm.wait(third).is_completed()
    assert len(ends(farm, "prepare", 21)) == len(starts(farm, "prepare", 21)) == 1
    assert len(ends(farm, "pretrain", 21)) == len(starts(farm, "pretrain", 21)) == 1
    texts = {bytes_of(farm, "base.txt", ref_of(farm, name)) for name in ("a1", "a2", "a3")}
    assert len(texts) == 1
    farm.kill("g2")


@pytest.mark.slow
def test_one_stage_at_a_time_uses_a_gpu_and_a_cpu_works_beside_it(farm):
    """Two workers on one GPU take turns; the next test is the control, with two GPUs."""
    farm.worker("g3", "gpu")
    runs = [
        farm.ask(
            name=f"b{seed}",
            targets=["pretrain", "quantize"],
            revision=farm.branch(
                f"b{seed}", pretrain_seed=seed, pretrain_steps=40, quantize_bits=bits
            ),
        )
        for seed, bits in ((31, 2), (32, 3))
    ]
    assert all(farm.wait(run).is_completed() for run in runs)
    first, second = sorted(
        (starts(farm, "pretrain", seed)[0]["time"], ends(farm, "pretrain", seed)[0]["time"])
        for seed in (31, 32)
    )
    assert first[1] <= second[0]
    # While one stage had the GPU, the other run's (or its own) quantize had a CPU.
    quantized = [ends(farm, "quantize", bits)[0]["time"] for bits in (2, 3)]
    assert min(quantized) < second[1]
    farm.kill("g3")


@pytest.mark.slow
def test_two_gpus_compute_two_stages_at_once(farm):
    """Both are asked for before a worker looks, so that the first to look could take both."""
    farm.worker("g6", "gpu", gpu=1)
    until(lambda: (farm.folder / "g6.out").read_text().count("started"), what="g6 started")
    known = len(farm.children("finetune"))
    with farm.client() as client:
        client.update_work_pool("gpu", WorkPoolUpdate(is_paused=True))
        runs = [
            farm.ask(
                name=f"d{seed}",
                targets=["finetune"],
                revision=farm.branch(f"d{seed}", finetune_seed=seed, finetune_steps=100),
            )
            for seed in (36, 37)
        ]
        until(lambda: len(farm.children("finetune")) == known + 2, what="both are asked for")
        client.update_work_pool("gpu", WorkPoolUpdate(is_paused=False))
    assert all(farm.wait(run).is_completed() for run in runs)
    begun, ended = (
        [fact for seed in (36, 37) for fact in of(farm, "finetune", seed)] for of in (starts, ends)
    )
    assert {fact["gpu"].rsplit(":")[-1] for fact in begun} == {"0", "1"}
    assert max(fact["time"] for fact in begun) < min(fact["time"] for fact in ended)
    farm.kill("g6")


@pytest.mark.slow
def test_a_cancelled_run_saves_ends_and_goes_on_when_it_is_asked_again(farm):
    branch = farm.branch("cancelled", finetune_seed=41, finetune_steps=150)
    run = farm.ask(name="cancelled", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 41), what="finetune begins")
    time.sleep(3)
    from prefect.states import Cancelling

    with farm.client() as client:
        client.set_flow_run_state(run, Cancelling())
    asked = time.time()
    assert farm.wait(run).is_cancelled()
    until(lambda: not alive(fact["pid"]), what="the stage's process is gone")
    (stopped,) = [f for f in farm.facts("stopped") if f["value"] == 41]
    print(f"stage saved {stopped['time'] - asked:.1f} s after the cancel")
    child = farm.children("finetune")[-1]
    assert until(lambda: farm.state(child.id).is_final(), what="the stage's run ends")
    assert farm.state(child.id).is_cancelled()
    again = farm.ask(name="again", targets=["finetune"], revision=branch)
    assert farm.wait(again).is_completed()
    assert starts(farm, "finetune", 41)[-1]["what"] == stopped["what"].replace("stopped", "start")
    assert repr(undisturbed(41, 150)).encode() in bytes_of(farm, "tuned.txt", ref_of(farm, "again"))


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(farm):
    """SIGKILL of the worker alone: its stage saves and ends, and goes on at another worker."""
    farm.worker("g4", "gpu")
    until(lambda: (farm.folder / "g4.out").read_text().count("started"), what="g4 started")
    branch = farm.branch("killed", finetune_seed=51, finetune_steps=100)
    run = farm.ask(name="killed", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 51), what="finetune begins")
    time.sleep(2)
    killed = time.time()
    farm.kill(fact["worker"])
    until(lambda: not alive(fact["pid"]), what="the orphan is gone")
    second = until(lambda: starts(farm, "finetune", 51)[1:], what="finetune goes on")[0]
    print(f"running again {second['time'] - killed:.1f} s after SIGKILL")
    assert second["worker"] != fact["worker"]
    assert second["what"] != "start at 0"
    assert farm.wait(run).is_completed()
    assert len(ends(farm, "finetune", 51)) == 1
    assert repr(undisturbed(51, 100)).encode() in bytes_of(
        farm, "tuned.txt", ref_of(farm, "killed")
    )
    if fact["worker"] == "g1":
        farm.worker("g1", "gpu")
    if second["worker"] != "g1":
        farm.kill(second["worker"])


@pytest.mark.slow
def test_a_machine_that_is_gone_is_noticed_and_its_stage_goes_on(farm):
    """SIGKILL of a worker and all it started: only the missing heartbeat tells."""
    farm.worker("g5", "gpu")
    until(lambda: (farm.folder / "g5.out").read_text().count("started"), what="g5 started")
    branch = farm.branch("gone", finetune_seed=61, finetune_steps=100)
    run = farm.ask(name="gone", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 61), what="finetune begins")
    time.sleep(2)
    lose(farm.processes.pop(fact["worker"]))
    killed = time.time()
    second = until(lambda: starts(farm, "finetune", 61)[1:], what="finetune goes on")[0]
    print(f"running again {second['time'] - killed:.1f} s after SIGKILL of everything")
    assert second["what"] != "start at 0"
    assert farm.wait(run).is_completed()
    assert len(ends(farm, "finetune", 61)) == 1
    assert repr(undisturbed(61, 100)).encode() in bytes_of(farm, "tuned.txt", ref_of(farm, "gone"))
    if fact["worker"] == "g1":
        farm.worker("g1", "gpu")
    if second["worker"] != "g1":
        farm.kill(second["worker"])


@pytest.mark.slow
def test_a_pipeline_that_is_gone_starts_again_and_finds_its_stages(farm):
    """SIGKILL of the worker of pipelines and all it started, while a stage trains elsewhere."""
    branch = farm.branch("orphaned", finetune_seed=75, finetune_steps=900)
    run = farm.ask(name="orphaned", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 75), what="finetune begins")
    assert fact["worker"] != "c1"
    lose(farm.processes.pop("c1"))
    killed = time.time()
    farm.worker("c1", "cpu")
    with farm.client() as client:
        until(lambda: client.read_flow_run(run).run_count > 1, what="the pipeline begins again")
    print(f"the pipeline goes on {time.time() - killed:.1f} s after SIGKILL of its machine")
    state = farm.wait(run)
    assert state.is_completed(), state.message
    assert len(starts(farm, "finetune", 75)) == len(ends(farm, "finetune", 75)) == 1


@pytest.mark.slow
def test_a_flow_that_is_killed_goes_on(farm):
    """SIGKILL of a stage's flow alone: its worker tells, and what it trained ends with it."""
    branch = farm.branch("flow", finetune_seed=65, finetune_steps=100)
    run = farm.ask(name="flow", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 65), what="finetune begins")
    time.sleep(2)
    (engine,) = (
        pid
        for pid in descendants(farm.processes[fact["worker"]].pid)
        if b"prefect.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(engine, signal.SIGKILL)
    killed = time.time()
    until(lambda: not alive(fact["pid"]), what="the orphan is gone")
    second = until(lambda: starts(farm, "finetune", 65)[1:], what="finetune goes on")[0]
    print(f"running again {second['time'] - killed:.1f} s after SIGKILL of the flow")
    assert second["what"] != "start at 0"
    assert farm.wait(run).is_completed()
    assert len(ends(farm, "finetune", 65)) == 1
    assert repr(undisturbed(65, 100)).encode() in bytes_of(farm, "tuned.txt", ref_of(farm, "flow"))


@pytest.mark.slow
def test_a_machine_that_sleeps_for_two_minutes_has_its_stage_computed_once(farm):
    """SIGSTOP of a worker and all it started, for longer than a run may give no sign of life."""
    branch = farm.branch("asleep", finetune_seed=67, finetune_steps=100)
    run = farm.ask(name="asleep", targets=["finetune"], revision=branch)
    (fact,) = until(lambda: starts(farm, "finetune", 67), what="finetune begins")
    time.sleep(2)
    worker = farm.processes[fact["worker"]]
    asleep = [worker.pid, *descendants(worker.pid)]
    farm.worker("g7", "gpu", gpu=1)
    tell(asleep, signal.SIGSTOP)
    time.sleep(120)
    tell(asleep, signal.SIGCONT)
    state = farm.wait(run)
    assert state.is_completed(), state.message
    assert len(ends(farm, "finetune", 67)) == 1
    assert repr(undisturbed(67, 100)).encode() in bytes_of(
        farm, "tuned.txt", ref_of(farm, "asleep")
    )
    until(lambda: not held(farm), 3 * LEASE, "no slot is held for nothing")
    farm.kill("g7")


@pytest.mark.slow
def test_servers_and_workers_that_are_gone_at_once_come_back_to_their_runs(farm):
    branch = farm.branch("blackout", finetune_seed=69, finetune_steps=100)
    run = farm.ask(name="blackout", targets=["finetune"], revision=branch)
    until(lambda: starts(farm, "finetune", 69), what="finetune begins")
    time.sleep(2)
    for name in list(farm.processes):
        lose(farm.processes.pop(name))
    farm.server()
    farm.worker("c1", "cpu")
    farm.worker("g1", "gpu")
    # On its way it counts as crashed, until it is started again.
    until(lambda: farm.state(run).is_completed(), what="the run is completed")
    first, second = starts(farm, "finetune", 69)
    print(f"running again {second['time'] - first['time']:.1f} s after it began at first")
    assert second["what"] != "start at 0"
    assert len(ends(farm, "finetune", 69)) == 1
    until(lambda: not held(farm), 3 * LEASE, "no slot is held for nothing")


@pytest.mark.slow
def test_nights_without_a_worker_are_made_up_for_once(farm):
    """Three nights' runs wait for the worker that comes back; what they ask for is the same."""
    lose(farm.processes.pop("c1"))
    branch = farm.branch("nights", prepare_seed=73)
    request = {"revision": branch, "targets": ["prepare"], "preflight": False}
    now = datetime.now(UTC)
    with farm.client() as client:
        nightly = client.read_deployment_by_name("pipeline/nightly")
        runs = [
            client.create_flow_run_from_deployment(
                nightly.id,
                parameters={"request": request},
                state=Scheduled(scheduled_time=now - timedelta(days=days)),
            ).id
            for days in (3, 2, 1)
        ]
    farm.worker("c1", "cpu")
    states = [farm.wait(run) for run in runs]
    done = [state for state in states if state.is_completed()]
    assert done
    assert all(state.is_completed() or state.is_cancelled() for state in states), states
    assert len(starts(farm, "prepare", 73)) == len(ends(farm, "prepare", 73)) == 1


def held(farm):
    """Limits of which a slot is taken."""
    with farm.client() as client:
        limits = client.read_global_concurrency_limits(limit=200)
    return [limit.name for limit in limits if limit.active_slots]


def tell(processes, sign):
    for pid in processes:
        os.kill(pid, sign)


def lose(worker):
    """SIGKILL for a worker and all it started at once: nothing may notice that the rest is gone."""
    lost = [worker.pid, *descendants(worker.pid)]
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        tell(lost, sign)
    worker.wait()


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    for child in map(int, found.stdout.split()):
        yield child
        yield from descendants(child)


@pytest.mark.slow
def test_a_server_killed_in_the_middle_loses_nothing(farm):
    branch = farm.branch("restarted", finetune_seed=71, finetune_steps=60)
    run = farm.ask(name="restarted", targets=["finetune"], revision=branch)
    until(lambda: starts(farm, "finetune", 71), what="finetune begins")
    server = farm.processes.pop("server")
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    time.sleep(5)
    farm.server()
    assert farm.wait(run).is_completed()
    assert len(starts(farm, "finetune", 71)) == len(ends(farm, "finetune", 71)) == 1


@pytest.mark.slow
def test_a_rehearsal_on_the_worker_forecasts_what_will_run_and_refuses_what_will_not_fit(farm):
    def left(key):
        with farm.client() as client:
            return [a for a in client.read_artifacts() if a.key == key]

    branch = farm.branch("ahead", prepare_seed=92)
    run = farm.ask(name="ahead", targets=["prepare"], revision=branch, preflight=True)
    state = farm.wait(run)
    assert state.is_completed(), state.message
    (forecast,) = left("forecast")
    (row,) = json.loads(forecast.data)
    assert row["stage"] == "prepare"
    assert row["memory"] > 1e8
    assert "prepare" in left("forecast-and-actual")[0].data
    # What is up to date is not rehearsed again.
    again = farm.ask(name="ahead", targets=["prepare"], revision=branch, preflight=True)
    assert farm.wait(again).is_completed()
    assert len(left("forecast")) == 1
    # What cannot fit is refused before any stage of it runs.
    huge = ["pretrain.model.layers=300000", "pretrain.seed=93"]
    refused = farm.ask(targets=["pretrain"], overrides=huge, preflight=True)
    state = farm.wait(refused)
    assert state.is_failed()
    assert "make pretrain.model smaller" in state.message
    assert not starts(farm, "pretrain", 93)


def begin_sweep(farm, project, *arguments):
    command = [sys.executable, "-c", INTERRUPTIBLE, "sweep", "pretrain", *arguments]
    return subprocess.Popen(
        [*command, "--engine", "workers", "--goal", "pretrain:loss:min"],
        cwd=project,
        env=farm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_sweep_of_a_project_that_will_not_fit_has_no_trials(farm):
    huge = farm.folder / "huge"
    git(farm.folder, "clone", "-q", str(farm.project), str(huge))
    change_params(huge / "params.yaml", ["pretrain.model.layers=300000"], [])
    git(huge, "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "-am", "huge")
    git(huge, "push", "-q", "origin", "HEAD:refs/heads/huge")
    refused = begin_sweep(farm, huge, "-S", "pretrain.seed=85,86")
    said = refused.communicate(timeout=900)[0]
    assert refused.returncode == 2, said
    assert "make pretrain.model smaller" in said
    assert "--no-preflight goes ahead" in said
    assert not starts(farm, "pretrain", 85)
    # The experiment that was rehearsed is nobody's.
    assert "preflight-" not in git(farm.project, "for-each-ref", "--format=%(refname)")


@pytest.mark.slow
def test_trials_of_a_sweep_are_runs_on_the_workers(farm):
    """One that fails is named, what they share is computed once, an interrupt cancels them."""

    def sweep(*arguments):
        return begin_sweep(farm, farm.project, "--no-preflight", "--jobs", "2", *arguments)

    common = ["-S", "prepare.seed=80"]
    first = sweep(*common, "-S", "pretrain.seed=81,13")
    said = first.communicate(timeout=900)[0]
    assert first.returncode == 1, said
    assert "thirteen is no good seed" in said
    assert len(starts(farm, "prepare", 80)) == 1
    assert starts(farm, "pretrain", 81)[0]["gpu"].endswith(":0")
    assert "drawplate sweep: seed-80-seed-81" in git(
        farm.project, "for-each-ref", "--format=%(contents:subject)"
    )
    begun = len(farm.children())
    again = sweep(*common, "-S", "pretrain.seed=81")
    said = again.communicate(timeout=900)[0]
    assert again.returncode == 0, said
    assert "as before" in said
    assert len(farm.children()) == begun

    long = sweep("-S", "pretrain.training.steps=400", "-S", "pretrain.seed=82")
    (fact,) = until(lambda: starts(farm, "pretrain", 82), what="pretrain begins")
    time.sleep(2)
    long.send_signal(signal.SIGINT)
    said = long.communicate(timeout=120)[0]
    assert long.returncode == 130, said
    until(lambda: not alive(fact["pid"]), what="the stage is gone")
    assert [f["value"] for f in farm.facts("stopped") if f["value"] == 82]

    wanted = {"parameters": ["pretrain.seed=81,84"], "goals": ["pretrain:loss:min"]}
    wanted |= {"targets": ["pretrain"], "engine": "workers", "preflight": False}
    run = farm.ask("sweep/sweep", **wanted)
    state = farm.wait(run)
    assert state.is_completed(), state.message
    with farm.client() as client:
        (table,) = [a for a in client.read_artifacts() if a.key == "sweep"]
    assert "seed-84" in table.data


INTERRUPTIBLE = """
import signal
from flows.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
main()
"""


@pytest.mark.slow
def test_the_deployed_verify_reads_and_mends_what_workers_made(farm):
    branch = farm.branch("verified", prepare_seed=97)
    assert farm.wait(farm.ask(name="v", targets=["prepare"], revision=branch)).is_completed()
    assert not (farm.project / "dvc.lock").exists()
    made = bytes_of(farm, "corpus.txt", ref_of(farm, "v"))

    def verify(**parameters):
        with farm.client() as client:
            found = client.read_deployment_by_name("verify/verify")
            run = client.create_flow_run_from_deployment(found.id, parameters=parameters).id
        return farm.wait(run)

    whole = verify()
    assert whole.is_completed(), whole.message
    (stored,) = [
        f for f in (farm.folder / "remote").rglob("*") if f.is_file() and made == f.read_bytes()
    ]
    stored.chmod(0o644)
    stored.write_bytes(made[::-1])
    failed = verify()
    assert failed.is_failed()
    assert "damaged  remote   corpus.txt" in failed.message
    assert verify(mend=True).is_completed()
    assert stored.read_bytes() == made


@pytest.mark.slow
def test_a_schedule_fires_and_its_run_is_rehearsed_first(farm):
    """The shipped schedule's own kind, cron, at the next full minute instead of three at night."""
    from prefect.client.schemas.schedules import CronSchedule

    branch = farm.branch("nightly", prepare_seed=95)
    request = {"revision": branch, "targets": ["prepare"], "preflight": True}
    with farm.client() as client:
        deployment = client.read_deployment_by_name("pipeline/nightly")
        (shipped,) = deployment.schedules
        assert shipped.schedule.cron == "0 3 * * *"
        assert shipped.active
        assert deployment.parameters == {"request": {"revision": "HEAD", "preflight": True}}
        (weekly,) = client.read_deployment_by_name("verify/verify").schedules
        assert weekly.schedule.cron == "0 6 * * 0"
        (made,) = client.create_deployment_schedules(
            deployment.id,
            [(CronSchedule(cron="* * * * *", timezone="UTC"), True)],
            parameters={"request": request},
        )

        def fired():
            runs = client.read_flow_runs(sort="START_TIME_DESC")
            return [
                r
                for r in runs
                if r.auto_scheduled and r.start_time and r.deployment_id == deployment.id
            ]

        (run, *_) = until(fired, what="a scheduled run starts")
        client.delete_deployment_schedule(deployment.id, made.id)
    assert run.start_time >= run.expected_start_time
    state = farm.wait(run.id)
    assert state.is_completed(), state.message
    assert f"run-{str(run.id)[:8]}" in git(farm.project, "for-each-ref", "--format=%(refname)")
    (begun,) = starts(farm, "prepare", 95)
    rehearsals = farm.children("preflight", flow="preflight")
    assert any(one.end_time.timestamp() <= begun["time"] for one in rehearsals if one.end_time)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_walk_through_prefects_pages(farm):
    """Deployments, the form of one, a run with its stages, and what these leave to read."""
    branch = farm.branch("walked", pretrain_seed=91)
    run = farm.ask(name="walked", targets=["pretrain"], revision=branch)
    assert farm.wait(run).is_completed()
    home = f"http://127.0.0.1:{farm.port}"
    with farm.client() as client:
        asked = client.read_deployment_by_name("pipeline/on-demand").id
        left = {a.key: a.id for a in sorted(client.read_artifacts(), key=lambda a: a.created)}
    stage = farm.children("pretrain")[-1].id
    walk = {
        f"{home}/deployments": ["on-demand", "nightly", "sweep", "At 03:00 AM"],
        f"{home}/deployments/deployment/{asked}/run": ["Revision", "Targets", "Preflight"],
        f"{home}/runs/flow-run/{run}": ["Completed", "prepare", "pretrain"],
        f"{home}/artifacts/artifact/{left['stages']}": ["dvc exp apply walked", "pretrain"],
        f"{home}/runs/flow-run/{stage}": ["Completed"],
        f"{home}/artifacts/artifact/{left['pretrain-train']}": ["train 3/3"],
    }
    login = "localStorage.setItem('prefect-password', btoa('{}'))"
    with Browser(farm.folder / "browser", login.format("drawplate:test")) as browser:
        for address, expected in walk.items():
            browser.see(address, expected)
    # The control: without the password there is nothing to see.
    stranger = Browser(farm.folder / "stranger", login.format("drawplate:wrong"))
    with stranger as browser, pytest.raises(AssertionError, match="lacks"):
        browser.see(f"{home}/deployments", ["on-demand"], seconds=30)


@pytest.mark.slow
def test_a_machine_without_a_gpu_runs_everything(tmp_path):
    with Farm(tmp_path) as farm:
        farm.server()
        farm.deploy()
        farm.worker("c", "cpu")
        run = farm.ask(name="alone")
        assert farm.wait(run).is_completed()
        stages = {"prepare", "pretrain", "compress", "quantize", "finetune"}
        assert {fact["stage"] for fact in farm.facts("end")} == stages
        assert {fact["worker"] for fact in farm.facts()} == {"c"}


@pytest.mark.slow
def test_a_worker_runs_its_own_checkout_wherever_that_is(tmp_path):
    """The folder that was deployed from is on another machine: here it is nowhere."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("flows", "stages", "src"):
        shutil.copytree(ROOT / name, elsewhere / name)
    for name in ("prefect.yaml", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, elsewhere)
    with Farm(tmp_path) as farm:
        farm.server()
        # What a shell has set is not what the workers have.
        farm.environment["DRAWPLATE_CHECKOUT"] = str(elsewhere)
        farm.deploy(checkout=elsewhere)
        shutil.rmtree(elsewhere)
        farm.worker("c", "cpu")
        run = farm.ask(name="moved", targets=["prepare"])
        state = farm.wait(run)
        assert state.is_completed(), state.message
        assert {fact["worker"] for fact in farm.facts("end")} == {"c"}


def test_the_flows_for_workers_import_neither_torch_nor_mlflow():
    """An engine starts for every stage: seconds of imports would be paid each time."""
    script = "import sys, flows.stage, flows.pipeline\n"
    script += "print({'torch', 'mlflow', 'dvc'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
