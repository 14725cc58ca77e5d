"""What scheduling and logging cost, and what a pipeline of runs survives.

    python benchmarks/orchestration.py [--only NAME ...] [--rounds 5] [--steps 150] [--queued 200]

Four parts, all of them unless `--only` names some:

- `tracking`: a short pipeline in a clone of its own; then, `--rounds` times, `dvc repro` and
  `drawplate run` on it as it is, and pretraining with and without tracking, taking turns.
- `stages`: what a stage of one second costs besides that second: through DVC alone, through the
  flow in place, through a worker; computed and from the run cache.
- `queue`: `--queued` stages on `--workers` workers with two slots, the server killed and started
  again in the middle: how many are lost, how many doubled.
- `kill`: seconds from SIGKILL of a worker until its stage runs again on another.

Seconds are those of a clock. Writes `benchmarks/results/orchestration.json`, and what it prints to
`orchestration.txt`; parts that were not run keep their earlier figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from default_run import ROOT
from prefect.states import AwaitingRetry

from flows.bench.machine import machine

sys.path.insert(0, str(ROOT / "tests"))

from workers_cases import Farm, until

SHORT = [
    "prepare.train_problems=2000",
    "pretrain.training.steps=20",
    "compress.recover.training.steps=2",
    "finetune.steps=2",
    "evaluate.documents=10",
    "evaluate.problems=30",
]
RESULTS = ROOT / "benchmarks/results"


def seconds(command: list[str], home: Path, **more: str) -> float:
    """How long `command` takes in `home`, which has to succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{home / 'src'}", **more}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=home, capture_output=True, env=environment, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return time.perf_counter() - started


def pretrain(home: Path, steps: int, tracking: bool) -> float:
    """Seconds that the stage itself takes, as it records them."""
    shutil.rmtree(home / "trial", ignore_errors=True)
    changes = [f"pretrain.training.steps={steps}", f"execution.tracking={str(tracking).lower()}"]
    command = [sys.executable, "-m", "stages", "pretrain", "--corpus", "data/corpus"]
    command += ["--out", "trial/model", "--record", "trial/record.json"]
    for change in changes:
        command += ["-S", change]
    seconds(command, home)
    return float(json.loads((home / "trial/record.json").read_text())["seconds"])


def tracking(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    run = [sys.executable, "-m", "flows.cli", "run"]
    found: dict[str, list[float]] = {}
    home = folder / "drawplate"
    subprocess.run(["git", "clone", "--quiet", ROOT, home], check=True)
    first = seconds([*run, *(part for change in SHORT for part in ("-S", change))], home)
    for _ in range(given.rounds):
        for name, once in {
            "dvc repro, nothing to do": lambda: seconds(["dvc", "repro"], home),
            "drawplate run, nothing to do": lambda: seconds(run, home),
            "pretrain, untracked": lambda: pretrain(home, given.steps, False),
            "pretrain, tracked": lambda: pretrain(home, given.steps, True),
        }.items():
            found.setdefault(name, []).append(once())
    pairs = zip(found["pretrain, tracked"], found["pretrain, untracked"], strict=True)
    overhead = [tracked / untracked - 1 for tracked, untracked in pairs]
    return {"first": first, "seconds": found, "overhead": overhead, "steps": given.steps}


def stages(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    with Farm(folder / "farm") as farm:
        server = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
        alone = {key: text for key, text in farm.environment.items() if key not in server}
        dvc = [sys.executable, "-m", "dvc", "repro", "--single-item", "prepare"]
        flow = [sys.executable, "-m", "flows.pipeline", "prepare"]
        farm.server()
        farm.deploy()
        farm.worker("c1", "cpu")
        for turn in range(given.rounds):
            # The first seed of each way comes back from the run cache.
            kinds = [("computed", turn)] + [("from the run cache", 0)] * (turn > 0)
            for kind, number in kinds:
                for way, command, base in (("DVC alone", dvc, 1000), ("in place", flow, 2000)):
                    branch = farm.branch(f"{way[0]}{turn}{kind[0]}", prepare_seed=base + number)
                    params = subprocess.run(
                        ["git", "show", f"{branch}:params.yaml"],
                        cwd=farm.project,
                        check=True,
                        capture_output=True,
                    ).stdout
                    (farm.project / "params.yaml").write_bytes(params)
                    took = seconds(command, farm.project, **alone)
                    found.setdefault(f"{way}, {kind}", []).append(took)
                branch = farm.branch(f"w{turn}{kind[0]}", prepare_seed=3000 + number)
                run = farm.ask(name=branch, targets=["prepare"], revision=branch)
                assert farm.wait(run).is_completed()
                child = farm.children("prepare")[-1]
                whole = (child.end_time - child.expected_start_time).total_seconds()
                found.setdefault(f"on a worker, {kind}", []).append(whole)
                inside = child.total_run_time.total_seconds()
                found.setdefault(f"on a worker, {kind}, within the flow", []).append(inside)
        starts, ends = farm.facts("start"), farm.facts("end")
        work = [end["time"] - start["time"] for start, end in zip(starts, ends, strict=True)]
    return {"seconds": found, "work": work}


def queue(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from flows.handover import begin
    from flows.workspace import workspace

    with Farm(folder / "farm") as farm:
        farm.server()
        farm.deploy(slots=2)
        refs = []
        with workspace(str(farm.project)) as place:
            text = (place.root / "params.yaml").read_text()
            start = text.index("prepare:")
            for number in range(given.queued):
                changed = text[start:].replace("seed: 0", f"seed: {number + 100}", 1)
                (place.root / "params.yaml").write_text(text[:start] + changed)
                refs.append(begin(place, f"queued-{number}"))
        with farm.client() as client:
            deployment = client.read_deployment_by_name("stage/cpu")
            runs = [
                client.create_flow_run_from_deployment(
                    deployment.id, parameters={"request": {"stage": "prepare", "ref": ref}}
                ).id
                for ref in refs
            ]
        started = time.perf_counter()
        for number in range(given.workers):
            farm.worker(f"c{number + 1}", "cpu")
        restarted, again, most = False, 0, 0

        def finished() -> bool:
            return len(farm.facts("end")) >= given.queued and all(
                run.state.is_final() for run in farm.children()
            )

        deadline = time.monotonic() + given.limit
        while not finished() and time.monotonic() < deadline:
            time.sleep(5)
            most = max(most, held(farm))
            again += begun_again(farm)
            if not restarted and 2 * len(farm.facts("end")) >= given.queued:
                server = farm.processes.pop("server")
                server.kill()
                server.wait()
                farm.server()
                restarted = True
        took = time.perf_counter() - started
        states = Counter(str(farm.state(run).type.value) for run in runs)
        counted = Counter(fact["value"] for fact in farm.facts("end"))
        shared = Counter(fact["worker"] for fact in farm.facts("end"))
        locked = (farm.folder / "server.out").read_text().count("database is locked")
    return {
        "queued": given.queued,
        "workers": given.workers,
        "restarts": int(restarted),
        "begun again": again,
        "bytes": most,
        "states": dict(states),
        "lost": given.queued - states["COMPLETED"],
        "doubled": sum(count - 1 for count in counted.values()),
        "by worker": dict(shared),
        "seconds": took,
        "database is locked": locked,
    }


def begun_again(farm: Farm) -> int:
    """Starts runs that crashed as their pipeline would; these here have none."""
    crashed = [run.id for run in farm.children() if run.state.is_crashed()]
    with farm.client() as client:
        for run in crashed:
            client.set_flow_run_state(run, AwaitingRetry(), True)
    return len(crashed)


def held(farm: Farm) -> int:
    """Memory of the server, the workers and what they started."""
    total = 0
    for process in farm.processes.values():
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(process.pid)
            for each in (whole, *whole.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += each.memory_info().rss
    return total


def kill(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    waits, done = [], []
    with Farm(folder / "farm") as farm:
        farm.server()
        farm.deploy()
        farm.worker("c1", "cpu")
        farm.worker("g0", "gpu")
        for turn in range(given.kills):
            farm.worker(f"g{turn + 1}", "gpu")
            branch = farm.branch(f"kill-{turn}", finetune_seed=turn + 1, finetune_steps=100)
            run = farm.ask(name=branch, targets=["finetune"], revision=branch)

            def begun(seed: int = turn + 1) -> list[dict[str, Any]]:
                return [f for f in farm.facts() if (f["stage"], f["value"]) == ("finetune", seed)]

            (fact,) = until(begun, what="finetune begins")
            time.sleep(3)
            killed = time.time()
            farm.kill(fact["worker"])
            again = until(lambda: begun()[1:], what="finetune goes on")[0]
            waits.append(again["time"] - killed)
            done.append(int(again["what"].split()[-1]))
            assert farm.wait(run).is_completed()
    return {"seconds": waits, "steps kept": done}


PARTS = {"tracking": tracking, "stages": stages, "queue": queue, "kill": kill}


def shown(record: dict[str, Any]) -> str:
    def row(name: str, values: list[float]) -> str:
        middle = statistics.median(values)
        return f"| {name} | {middle:.2f} ({min(values):.2f} to {max(values):.2f}; {len(values)}) |"

    lines = ["| what | seconds, median (least to most; rounds) |", "|---|---|"]
    for part in ("tracking", "stages"):
        for name, values in record.get(part, {}).get("seconds", {}).items():
            lines.append(row(name, values))
    if "kill" in record:
        lines.append(
            row("SIGKILL of a worker until its stage runs again", record["kill"]["seconds"])
        )
    if "stages" in record:
        lines.append(
            row("work of the stage itself, within each `computed`", record["stages"]["work"])
        )
    if "tracking" in record:
        share = record["tracking"]["overhead"]
        middle, low, high = statistics.median(share), min(share), max(share)
        lines.append(f"| share of tracking | {middle:+.1%} ({low:+.1%} to {high:+.1%}) |")
    if "queue" in record:
        q = record["queue"]
        lines.append(
            f"| {q['queued']} queued stages, {q['workers']} workers, server killed {q['restarts']} "
            f"times | lost {q['lost']}, doubled {q['doubled']}, begun again {q['begun again']}, "
            f"{q['seconds']:.0f} s, "
            f"{q['bytes'] / 1e6:.0f} MB at most, "
            f"'database is locked' {q['database is locked']} times |"
        )
    lines += [
        "",
        "The machine was shared with other jobs: load at the end of each part "
        + ", ".join(
            f"{k} {v['load']:.1f}" for k, v in record.items() if isinstance(v, dict) and "load" in v
        )
        + ".",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--queued", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="Most seconds for the queue.")
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    out = RESULTS / "orchestration.json"
    out.parent.mkdir(exist_ok=True)
    record = json.loads(out.read_text()) if out.exists() else {}
    for part in given.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](given, Path(folder))
        record |= machine() | {part: found | {"load": os.getloadavg()[0]}}
        out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    text = shown(record)
    print(text)
    out.with_suffix(".txt").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
