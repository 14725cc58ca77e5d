"""What scheduling and logging cost: a pipeline with nothing to do, and a stage with MLflow.

    python benchmarks/orchestration.py [--rounds 5] [--steps 150]

Runs a short pipeline once in a clone of its own; then, `--rounds` times, `dvc repro` and
`drawplate run` on it as it is, and pretraining with and without tracking, taking turns. Seconds are
those of a clock. Writes `benchmarks/results/orchestration.json`.
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
from pathlib import Path

from default_run import ROOT, machine

SHORT = [
    "prepare.train_problems=2000",
    "pretrain.training.steps=20",
    "compress.recover.training.steps=2",
    "finetune.steps=2",
    "evaluate.documents=10",
    "evaluate.problems=30",
]


def seconds(command: list[str], home: Path) -> float:
    """How long `command` takes in `home`, which has to succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{home / 'src'}"}
    started = time.perf_counter()
    subprocess.run(command, cwd=home, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def pretrain(home: Path, steps: int, tracking: bool) -> float:
    """Seconds that the stage itself takes, as it records them."""
    shutil.rmtree(home / "trial", ignore_errors=True)
    changes = [f"pretrain.training.steps={steps}", f"execution.tracking={str(tracking).lower()}"]
    command = [sys.executable, "-m", "stages.pretrain", "--corpus", "data/corpus"]
    command += ["--out", "trial/model", "--record", "trial/record.json"]
    for change in changes:
        command += ["-S", change]
    seconds(command, home)
    return float(json.loads((home / "trial/record.json").read_text())["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    run = [sys.executable, "-m", "flows.cli", "run"]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "drawplate"
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
    print("| what | seconds, median (least to most) |", "|---|---|", sep="\n")
    for name, values in found.items():
        print(
            f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |"
        )
    middle, low, high = statistics.median(overhead), min(overhead), max(overhead)
    print(f"| share of tracking | {middle:+.1%} ({low:+.1%} to {high:+.1%}) |")
    record = {
        **machine(),
        "rounds": given.rounds,
        "steps": given.steps,
        "first": first,
        "seconds": found,
        "overhead": overhead,
    }
    out = ROOT / "benchmarks/results/orchestration.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
