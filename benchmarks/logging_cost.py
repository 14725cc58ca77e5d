"""How much slower training is with logging to MLflow than without.

    python benchmarks/logging_cost.py --steps 400 --rounds 4 --store server

A small decoder trains on random tokens; every step reports the six figures of a pretraining step.
Each round runs the same steps with and without a tracker, in turns, the order swapped from round to
round, so that what else the machine does falls on both. Printed are the median seconds of a loop,
the slowdown as the median over rounds, what the tracker costs the training process itself (its own
processor time for a step's figures), and the seconds from the last step until everything is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402

from stages.journal import Tracker  # noqa: E402
from tests import tiny  # noqa: E402
from tests.tracking_cases import Server, facts  # noqa: E402

FIGURES = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "eta")


def loop(steps: int, rows: int, tracker: Tracker | None) -> tuple[float, float]:
    """Seconds of the steps, and processor seconds spent on reporting."""
    model = tiny.model("llama", context=128).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = tiny.tokens(rows, 96)
    spent = 0.0
    began = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        figures = dict.fromkeys(FIGURES, loss.item())
        if tracker is not None:
            before = time.thread_time()
            tracker.point(step, figures)
            spent += time.thread_time() - before
    return time.perf_counter() - began, spent


def tracked(folder: Path, number: int, steps: int, rows: int) -> tuple[float, float, float]:
    """Seconds of the steps, processor seconds of reporting, seconds until all is sent."""
    tracker = Tracker(facts(f"round-{number}"), folder / f"work-{number}")
    tracker.start()
    seconds, spent = loop(steps, rows, tracker)
    began = time.perf_counter()
    tracker.finish("FINISHED", metrics={}, tags={}, artifacts=[])
    if tracker.problem:
        raise SystemExit(f"not everything was sent: {tracker.problem}")
    return seconds, spent, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32, help="Rows of 96 tokens in a step.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--store", choices=("file", "server"), default="server")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/logging_cost.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        if given.store == "server":
            server.start()
            os.environ["MLFLOW_TRACKING_URI"] = server.uri
        try:
            tracked(folder, -1, 5, given.rows)  # the store makes its tables
            rounds = []
            for number in range(given.rounds):
                plain = loop(given.steps, given.rows, None)[0] if number % 2 else None
                seconds, spent, drained = tracked(folder, number, given.steps, given.rows)
                plain = loop(given.steps, given.rows, None)[0] if plain is None else plain
                rounds.append(
                    {"plain": plain, "tracked": seconds, "reporting": spent, "sent": drained}
                )
                print(json.dumps(rounds[-1]), flush=True)
        finally:
            server.kill()
    middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    slower = statistics.median(each["tracked"] / each["plain"] - 1 for each in rounds)
    own = statistics.median(each["reporting"] / each["plain"] for each in rounds)
    found = {
        "steps": given.steps,
        "store": given.store,
        "points": given.steps * len(FIGURES),
        "cores": os.cpu_count(),
        "seconds": middle,
        "slowdown": slower,
        "reporting_share": own,
        "rounds": rounds,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(
        f"{given.steps} steps of {1000 * middle['plain'] / given.steps:.1f} ms, {len(FIGURES)} "
        f"figures each: slower by {slower:+.1%}, of which reporting itself {own:.2%}; sent "
        f"{middle['sent']:.1f} s after the last step"
    )


if __name__ == "__main__":
    main()
