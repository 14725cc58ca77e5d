"""Which stage is asked for when and where, and what is done about one that is lost; no server."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Failed, Running, Scheduled
from ruamel.yaml import YAML
from workers_cases import ROOT, alive

from flows import dispatch, graph
from flows.ahead import first
from flows.dispatch import STARTS, Dispatch
from flows.graph import Node, end_group
from flows.services import CHECKOUT
from flows.slots import patient
from flows.stage import StageFailed

REF = f"refs/exps/00/{'0' * 38}/one"
ORDER = [
    Node("prepare", (), {"pool": "cpu"}),
    Node("pretrain", ("prepare",), {"pool": "gpu"}),
    Node("quantize", ("prepare",), {}),
    Node("compress", ("pretrain",), {"pool": "gpu"}),
]


class Server:
    """What a run is asked for with, in order; each look at a run shows its next state."""

    def __init__(self, monkeypatch, gpu=True, **states):
        self.asked, self.runs, self.states, self.gpu = [], {}, states, gpu
        monkeypatch.setattr(dispatch, "run_deployment", self.run_deployment)

    def run_deployment(self, deployment, parameters, flow_run_name, idempotency_key, **_):
        known = [run for run in self.runs.values() if run.idempotency_key == idempotency_key]
        if known:
            return known[0]
        run = FlowRun(id=uuid4(), flow_id=uuid4(), name=flow_run_name, state=Scheduled())
        run.idempotency_key, run.run_count = idempotency_key, 1
        self.runs[run.id] = run
        self.asked.append((flow_run_name, deployment, parameters["request"]))
        return run

    def read_flow_run(self, number):
        run = self.runs[number]
        left = self.states.setdefault(run.name, [Running(), Completed(message="ran")])
        run.state = left.pop(0) if len(left) > 1 else left[0]
        return run

    def set_flow_run_state(self, number, state, force):
        assert force
        self.runs[number].run_count += 1

    def read_workers_for_work_pool(self, pool):
        if not self.gpu:
            raise ObjectNotFound(None)
        return ["one"]


def dispatched(server, order=ORDER):
    said = []
    return Dispatch(server, "run", REF, order, said.append), said


def test_a_stage_is_asked_for_when_what_it_needs_is_done_and_in_its_pool(monkeypatch):
    server = Server(monkeypatch)
    done = dispatched(server)[0].finish(0)
    assert [name for name, *_ in server.asked] == ["prepare", "pretrain", "quantize", "compress"]
    pools = {name: deployment for name, deployment, _ in server.asked}
    assert pools == {
        "prepare": "stage/cpu",
        "pretrain": "stage/gpu",
        "quantize": "stage/cpu",
        "compress": "stage/gpu",
    }
    assert server.asked[0][2] == {"stage": "prepare", "ref": REF}
    assert {run.state.message for run in done.values()} == {"ran"}
    # Asked again after its process was lost, it finds the same runs.
    dispatched(server)[0].finish(0)
    assert len(server.asked) == len(ORDER)


def test_a_pool_that_never_had_a_worker_is_replaced_and_that_is_said(monkeypatch):
    server = Server(monkeypatch, gpu=False)
    one, said = dispatched(server)
    one.finish(0)
    assert {deployment for _, deployment, _ in server.asked} == {"stage/cpu"}
    assert "pretrain: pool gpu never had a worker; it runs in pool cpu" in said


def test_a_rehearsal_of_all_comes_before_the_first_stage(monkeypatch):
    server = Server(monkeypatch)
    dispatched(server, first(ORDER))[0].finish(0)
    name, deployment, request = server.asked[0]
    assert (name, deployment) == ("preflight", "preflight/gpu")
    assert request == {"ref": REF, "stages": [node.name for node in ORDER]}
    refused = Server(monkeypatch, preflight=[Failed(message="too large")])
    with pytest.raises(StageFailed, match="too large"):
        dispatched(refused, first(ORDER))[0].finish(0)
    assert len(refused.asked) == 1


@pytest.mark.parametrize("lost", [1, STARTS - 1, STARTS])
def test_a_lost_run_is_started_again_but_not_for_ever(monkeypatch, lost):
    crashes = [Crashed(message="gone") for _ in range(lost)]
    server = Server(monkeypatch, pretrain=[Running(), *crashes, Completed(message="ran")])
    one, said = dispatched(server)
    if lost < STARTS:
        one.finish(0)
    else:
        with pytest.raises(StageFailed, match="gone"):
            one.finish(0)
    again = "pretrain: its worker was lost; it goes on from its checkpoint on another"
    assert said.count(again) == min(lost, STARTS - 1)
    assert [name for name, *_ in server.asked].count("pretrain") == 1


def test_what_fails_lets_others_finish_and_nothing_begins_after_it(monkeypatch):
    late = [Running() for _ in range(5)]
    server = Server(
        monkeypatch, quantize=[Failed(message="thirteen")], pretrain=[*late, Completed(message="x")]
    )
    one, _ = dispatched(server)
    with pytest.raises(StageFailed, match="thirteen"):
        one.finish(0)
    assert "pretrain" in one.done
    assert "compress" not in [name for name, *_ in server.asked]


def test_a_call_waits_for_a_server_that_is_away_and_not_for_one_that_refuses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    answers = [httpx.ConnectError("away"), httpx.ReadTimeout("slow"), "here"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, str):
            return answer
        raise answer

    assert patient(call) == "here"
    answers[:] = [ObjectNotFound(httpx.ConnectError("no such run")), "never asked"]
    with pytest.raises(ObjectNotFound):
        patient(call)
    answers[:] = [httpx.ConnectError("away"), "too late"]
    with pytest.raises(httpx.ConnectError):
        patient(call, patience=-1)


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(request):
    """A process that hears no SIGINT, and SIGTERM only where it is not deaf; and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, request.param],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process, int(process.stdout.readline())
    process.stdout.close()


@pytest.mark.parametrize(("stubborn", "code"), [("deaf", -9), ("term", -15)], indirect=["stubborn"])
def test_a_group_that_does_not_want_to_end_is_ended_children_and_all(stubborn, code):
    process, child = stubborn
    assert os.getpgid(child) == process.pid
    end_group(process, grace=0.5)
    assert process.wait() == code
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.parametrize("stubborn", ["deaf"], indirect=True)
def test_a_group_that_hears_nothing_is_killed_after_ten_seconds(stubborn, monkeypatch):
    """By a clock that passes as it is waited for; most of the time is for saving."""
    passed, sent, killpg = [0.0], {}, os.killpg
    clock = SimpleNamespace(monotonic=lambda: sum(passed), sleep=passed.append)

    def send(group, sign):
        if sign:
            sent[sign] = clock.monotonic()
        killpg(group, sign)

    monkeypatch.setattr(graph, "time", clock)
    monkeypatch.setattr(os, "killpg", send)
    end_group(stubborn[0])
    assert stubborn[0].wait() == -9
    assert list(sent) == [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    assert sent[signal.SIGTERM] > 5
    assert sent[signal.SIGKILL] == pytest.approx(10, abs=0.3)


def test_a_run_finds_the_flows_in_the_folder_of_its_worker(tmp_path, monkeypatch):
    """As Prefect stores the step when it deploys, and reads it when a worker starts a run."""
    from prefect.utilities.templating import apply_values

    (step,) = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["pull"]
    monkeypatch.delenv(CHECKOUT, raising=False)
    stored = apply_values(step, {}, remove_notset=False)
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setenv(CHECKOUT, str(folder))
        (found,) = apply_values(stored, {}).values()
        assert found == {"directory": str(folder)}
    for kind in ("docker", "kubernetes"):
        template = json.loads((ROOT / f"flows/templates/{kind}.json").read_text())
        assert CHECKOUT in template["variables"]["properties"]["env"]["default"]
