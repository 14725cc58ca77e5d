"""Ours side by side with what one would use instead, in processor seconds for the same work.

    python benchmarks/peers.py train|grpo|calibrate|evaluate [--rounds 5] [--threads 1] [--only ...]

Every contender is a process of its own that stays alive, a peer in an environment of its own (made
on demand in `benchmarks/.environments`, from the pins in `peers/contenders.py`). All start from the
same weights and read the same random tokens. They take turns within each round, hence share
whatever else the machine does; a ratio is the median over rounds of the ratio within a round, after
a round that warms up and compiles. Lines called "products" are the matrix products alone, the bound
on what can be reached here. Processor seconds are summed over threads. Writes
`benchmarks/results/peers_<what>.json` and the table that it prints beside it.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from contenders import SETTINGS, contenders  # noqa: E402
from process import Worker  # noqa: E402
from shared import layer_errors, linear_layers, save_start  # noqa: E402
from table import check, ratios, shown  # noqa: E402

from flows.bench.machine import machine  # noqa: E402


def compete(workers: list[Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Answers of all rounds but the first; a contender that fails is named and left out."""
    answers: dict[str, list[dict[str, Any]]] = {w.contender.name: [] for w in workers}
    for turn in range(rounds + 1):
        for worker in list(workers):
            name = worker.contender.name
            try:
                answer = worker.round()
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                workers.remove(worker)
                del answers[name]
                continue
            print(f"round {turn}: {name} {answer}", file=sys.stderr, flush=True)
            if turn:
                answers[name].append(answer)
    return answers


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("what", choices=sorted(SETTINGS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", nargs="+", metavar="NAME", help="parts of contenders' names")
    options.add_argument("--steps", type=int, help="steps of a round, where training is timed")
    options.add_argument("--out", type=Path, help="where the figures go")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go too

    settings = {**SETTINGS[given.what], "threads": given.threads}
    if given.steps:
        settings["steps"] = given.steps
    chosen = [
        each
        for each in contenders(given.what)
        if not given.only or any(part in each.name for part in given.only)
    ]
    with tempfile.TemporaryDirectory() as home:
        model = save_start(Path(home) / "model", settings["vocabulary"])
        places = {"model": str(Path(home) / "model"), "folder": home}
        places["layers"] = linear_layers(model)
        workers = [Worker(each, {**settings, **places}, Path(home)) for each in chosen]
        found = {w.contender.name: w.versions for w in workers}
        all_workers = list(workers)
        try:
            answers = compete(workers, given.rounds)
            errors = {}
            if given.what == "calibrate":
                files = {w.contender.name: w.weights for w in workers if w.weights.exists()}
                errors = layer_errors(model, settings, files)
        finally:
            for worker in all_workers:
                worker.close()
    check(settings, answers)
    kept = [each for each in chosen if each.name in answers]
    record = {
        "what": given.what,
        "settings": settings,
        "machine": machine()["machine"],
        "versions": found,
        "rounds": answers,
        "ratios": ratios(answers, kept),
        "layer_errors": errors,
        "missing": [each.name for each in chosen if each.name not in answers],
    }
    table = shown(record, kept)
    print(table)
    out = given.out or HERE / "results" / f"peers_{given.what}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    out.with_suffix(".txt").write_text(table)


if __name__ == "__main__":
    main()
