"""A stage in several processes: the same result, one error line, stops and losses survived."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drawplate import lineage
from drawplate.core.artifact import publish, verify
from drawplate.core.errors import DrawplateError, Exhausted, UserError
from drawplate.train import series
from stages.run import Execution, execution_id
from stages.together import launch
from tests import faults
from tests.together_stage import Inputs, Knobs, Report, stage


@pytest.fixture(scope="module", autouse=True)
def _importable(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        for name, value in faults.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "source"
    with publish(folder, "corpus") as inside:
        (inside / "data").write_text("text")
        lineage.write(lineage.trace(lineage.Node(stage="prepare"), {}), inside)
    return folder


def make(source, out, nproc, **knobs):
    execution = Execution(nproc=nproc, tracking=False, threads=1)
    return stage(Knobs(**knobs), Inputs(source=source), out, execution=execution)


@pytest.fixture(scope="module")
def two(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    return make(source, out, 2), out


def rows(out):
    return series.read(out / "history-toy.jsonl")


def test_the_output_is_one_whole_artifact_made_by_the_first(two):
    report, out = two
    verify(out)
    assert report == Report(loss=rows(out)[-1]["loss"], processes=2)
    assert lineage.read(out).node.environment["processes"] == "2"
    assert (out / "execution").read_text() == execution_id()
    assert not [path for path in out.parent.glob(".drawplate/stage-*") if path.is_dir()]


@pytest.mark.parametrize("nproc", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_processes_follow_the_same_series(source, two, tmp_path, nproc):
    assert make(source, tmp_path / "out", nproc).processes == nproc
    assert len(rows(two[1])) == 12
    for one, other in zip(rows(two[1]), rows(tmp_path / "out"), strict=True):
        for name in ("step", "loss", "grad_norm", "tokens"):
            assert one[name] == pytest.approx(other[name], rel=2e-4), name


def agent(source, out, pause, nproc, nnodes=1, inside=(), address="127.0.0.1"):
    """A run in a process of its own."""
    command = [sys.executable, "-m", "tests.together_stage", source, out, nproc, pause, nnodes]
    return subprocess.Popen(
        [str(part) for part in (*inside, *command, address)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start(source, out, pause, nproc=2):
    """A run in a process of its own, and those that it started, once it has trained some steps."""
    process = agent(source, out, pause, nproc)
    wait_for_steps(process, out)
    return process, children(process.pid)


def wait_for_steps(process, out):
    deadline = time.monotonic() + 120
    while not (found := list(out.parent.glob(".drawplate/stage-*/*/metrics.jsonl"))) or (
        len(found[0].read_bytes().splitlines()) < 3
    ):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    """Rank -> process id of the workers that `pid` started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {}
    for child in listed:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(child)
    return found


def gone(pids):
    """Waits until none of the processes is left."""
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def equal(one, other):
    models = [torch.load(out / "model.pt", weights_only=True) for out in (one, other)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert rows(one) == rows(other)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_lost_process_is_replaced_and_the_end_is_the_same(source, two, tmp_path, rank):
    process, workers = start(source, tmp_path / "out", 0.3)
    assert sorted(workers) == [0, 1]
    os.kill(workers[rank], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert f"process {rank} was ended by SIGKILL; starting again" in said
    assert "Traceback" not in said
    gone(workers.values())
    # The knob `pause` enters the lineage, not the training.
    equal(tmp_path / "out", two[1])


def test_a_signal_saves_and_the_same_call_goes_on_bit_by_bit(source, two, tmp_path):
    process, workers = start(source, tmp_path / "out", 0.3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert said.rstrip().splitlines()[-1].startswith("drawplate: interrupted; the same command")
    assert "Traceback" not in said
    gone(workers.values())
    assert not (tmp_path / "out").exists()
    (saved,) = tmp_path.glob(".drawplate/stage-*/*/metrics.jsonl")
    done = len(saved.read_bytes().splitlines())
    assert 3 <= done < 12
    make(source, tmp_path / "out", 2, pause=0.3)
    equal(tmp_path / "out", two[1])


def test_a_second_runner_of_the_same_output_is_told_at_once(source, tmp_path):
    first, workers = start(source, tmp_path / "out", 1.0)
    with pytest.raises(Exhausted, match=f"is being made by process {first.pid}; wait") as caught:
        make(source, tmp_path / "out", 2, pause=1.0)
    assert "\n" not in str(caught.value)
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    ends([first], 130)
    gone(workers.values())


@pytest.mark.slow
def test_processes_do_not_outlive_the_one_that_started_them(source, tmp_path):
    process, workers = start(source, tmp_path / "out", 0.5)
    process.kill()
    process.communicate()
    gone(workers.values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_is_told_once_and_nothing_starts_again(source, tmp_path, rank, capfd):
    with pytest.raises(DrawplateError, match=r"^this process was asked to fail$") as caught:
        make(source, tmp_path / "out", 2, fails=rank)
    assert caught.value.code == 2
    assert "starting again" not in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_operating_system_refuses_a_process_is_told_in_one_line_too(source, tmp_path):
    (tmp_path / "file").write_text("")
    call = Knobs(), Inputs(source=source), tmp_path / "out"
    execution = Execution(nproc=2, tracking=False, threads=1)
    with pytest.raises(DrawplateError, match=r"/file: file exists; ") as caught:
        stage(*call, metrics=tmp_path / "file" / "m.json", execution=execution)
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_losses_have_a_limit(source, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.together._attempt", lambda *_: "process 1 was ended by SIGKILL")
    execution = Execution(nproc=2, restarts=2, tracking=False)
    with pytest.raises(Exhausted, match=r"SIGKILL, after 2 new starts.*execution\.restarts"):
        launch(stage, Knobs(), Inputs(source=source), tmp_path / "out", None, None, execution)


def two_machines(source, out, pause, hosts=({}, {})):
    """Two agents, each with a process, that meet as those of two machines would."""
    return [agent(source, out, pause, 1, 2, **host) for host in hosts]


@pytest.fixture(scope="module")
def hosts():
    """Two hosts with a network between them: names as the kernel has them, and a cable."""
    names, cable = [f"dp{os.getpid()}{end}" for end in "ab"], [f"dp{os.getpid()}{e}" for e in "cd"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        found = []
        for number, (name, end) in enumerate(zip(names, cable, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
            inside = ("ip", "netns", "exec", name)
            found.append({"inside": inside, "address": f"10.99.0.{number}"})
        yield found
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ends(processes, *codes):
    """Waits for the processes; what each said."""
    found = [process.communicate(timeout=180)[0] for process in processes]
    assert tuple(process.returncode for process in processes) == codes, found
    assert not [said for said in found if "Traceback" in said]
    return [said.rstrip() for said in found]


def test_two_machines_make_what_two_processes_make(source, two, tmp_path):
    ends(two_machines(source, tmp_path / "out", 0.0), 0, 0)
    equal(tmp_path / "out", two[1])


@pytest.mark.slow
def test_two_hosts_with_a_network_between_them_do_too(source, two, tmp_path, hosts):
    ends(two_machines(source, tmp_path / "out", 0.0, hosts), 0, 0)
    equal(tmp_path / "out", two[1])


def test_where_no_other_machine_would_find_this_one_is_said(source, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("stages.together._attempt", lambda *_: "process 1 was ended by SIGKILL")

    def begin(**more):
        execution = Execution(nnodes=2, restarts=0, tracking=False, **more)
        launch(stage, Knobs(), Inputs(source=source), tmp_path / "out", None, None, execution)

    with pytest.raises(UserError, match=r"203\.0\.113\.1 is no address of this machine, .*127"):
        begin(address="203.0.113.1")
    with pytest.raises(UserError, match=r"^execution.address: no such host\.invalid: "):
        begin(address="no such host.invalid")
    for number, said in (("127.0.1.1", True), ("203.0.113.1", False)):
        monkeypatch.setattr("socket.gethostbyname", lambda _, number=number: number)
        capfd.readouterr()
        with pytest.raises(Exhausted):
            begin()
        told = capfd.readouterr().err
        assert ("give its address in the network by execution.address" in told) == said


@pytest.mark.slow
def test_a_process_lost_on_one_machine_is_replaced_on_both(source, two, tmp_path):
    machines = two_machines(source, tmp_path / "out", 0.3)
    wait_for_steps(machines[0], tmp_path / "out")
    ranks = [children(machine.pid) for machine in machines]
    (second,) = (workers[1] for workers in ranks if 1 in workers)
    os.kill(second, signal.SIGKILL)
    said = "".join(ends(machines, 0, 0))
    assert "process 1 was ended by SIGKILL; starting again" in said
    assert "a process on another machine was lost; starting again" in said
    equal(tmp_path / "out", two[1])


@pytest.mark.slow
def test_a_signal_to_one_machine_saves_and_ends_both(source, two, tmp_path):
    machines = two_machines(source, tmp_path / "out", 0.3)
    wait_for_steps(machines[0], tmp_path / "out")
    machines[1].send_signal(signal.SIGTERM)
    other, told = ends(machines, 143, 130)
    assert other.splitlines()[-1].startswith("drawplate: stopped by SIGTERM after step")
    assert told.splitlines()[-1].startswith("drawplate: interrupted; the same command")
    ends(two_machines(source, tmp_path / "out", 0.3), 0, 0)
    equal(tmp_path / "out", two[1])


@pytest.mark.slow
def test_a_third_of_two_machines_is_told_so_in_one_line(source, tmp_path):
    machines = two_machines(source, tmp_path / "out", 1.5)
    wait_for_steps(machines[0], tmp_path / "out")
    further = agent(source, tmp_path / "out", 1.5, 1, 2)
    *_, said = ends([*machines, further], 0, 0, 4)
    (line,) = said.splitlines()
    assert line.startswith(f"drawplate: {tmp_path / 'out'} was being made by 2 machines already")


@pytest.mark.slow
def test_a_machine_that_is_gone_may_come_back(source, two, tmp_path):
    out = tmp_path / "out"
    machines = two_machines(source, out, 0.3)
    wait_for_steps(machines[0], out)
    for pid in (*children(machines[1].pid).values(), machines[1].pid):
        os.kill(pid, signal.SIGKILL)
    machines[1].communicate()
    machines[1] = agent(source, out, 0.3, 1, 2)
    ends(machines, 0, 0)
    equal(out, two[1])
