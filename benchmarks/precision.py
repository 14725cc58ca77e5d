"""How stable training is with fewer bits: formats, rates, widths and seeds against one another.

    python benchmarks/precision.py
    python benchmarks/precision.py --quick

After Lee et al. 2024, arXiv:2405.18710: small decoders are pretrained with the products of their
linear layers in narrower and narrower formats, mantissas cut off and exponents clipped, over a grid
of learning rates, widths and seeds. A run has diverged if its loss is not finite, or in the last
tenth of its steps lies on average more than half a nat above its best tenth; a spike is a step more
than half a nat above the best mean of ten steps before it. Nothing is skipped or rolled back.

Writes `benchmarks/results/precision.json` and the printed table beside it; `--quick` only prints,
of fewer, shorter runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch
from default_run import ROOT

from drawplate.core.corpus import Corpus
from drawplate.core.errors import NotFinite
from drawplate.pretrain import Pretrain
from drawplate.pretrain.driver import pretrain
from drawplate.train.series import read
from flows.bench.machine import machine

FORMATS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "E8M7": {"exponent": 8, "mantissa": 7},
    "E8M5": {"exponent": 8, "mantissa": 5},
    "E8M4": {"exponent": 8, "mantissa": 4},
    "E8M3": {"exponent": 8, "mantissa": 3},
    "E8M2": {"exponent": 8, "mantissa": 2},
    "E8M1": {"exponent": 8, "mantissa": 1},
    "E5M7": {"exponent": 5, "mantissa": 7},
    "E4M7": {"exponent": 4, "mantissa": 7},
}
MASK = {"rounding": "truncate", "overflow": "saturate"}
FULL = {"rates": [0.003, 0.01, 0.03, 0.1], "widths": [64, 128], "seeds": [0, 1, 2], "steps": 300}
QUICK = {"rates": [0.003, 0.03], "widths": [64], "seeds": [0], "steps": 60}
COLUMNS = ("runs", "diverged", "spikes", "loss", "spread", "sharp", "sharpest")


def prepared(home: Path) -> Corpus:
    """The docstrings of one package, and sums."""
    command = [sys.executable, "-m", "stages", "prepare", "--out", "corpus"]
    command += ["--params", str(ROOT / "params.yaml")]
    for change in (
        "prepare.sources=[{name: docstrings, packages: [numpy]}]",
        "prepare.train_problems=300",
        "prepare.heldout_problems=20",
        "prepare.vocabulary=512",
        "execution.tracking=false",
    ):
        command += ["-S", change]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    subprocess.run(command, cwd=home, check=True, env=environment)
    return Corpus(home / "corpus")


def settings(form: dict[str, Any] | None, rate: float, width: int, seed: int, steps: int) -> Any:
    """A decoder of 2 layers and the step sizes of Adam, without a guard."""
    group = {"rate": rate, "transforms": [{"name": "adam"}]}
    return Pretrain.model_validate(
        {
            "seed": seed,
            "model": {
                "hidden": width,
                "layers": 2,
                "heads": width // 32,
                "kv_heads": width // 32,
                "feed_forward": 3 * width,
                "context": 64,
            },
            "batch": 8,
            "length": 64,
            "mix": {"late": 0.0},  # text alone
            "sharpness": 1e-3,
            "training": {
                "steps": steps,
                "seed": seed,
                "precision": "float32",
                "simulate": None if form is None else form | MASK,
                "schedule": {"name": "constant"},
                "optimizer": {"matrices": group, "rest": group},
                "guard": {"patience": 1, "rollbacks": 0, "spike": 0},
                "save_every": steps,
            },
        }
    )


def series(params: Pretrain, corpus: Corpus) -> list[dict[str, Any]]:
    """The metrics of one run, up to where its numbers went bad."""
    with tempfile.TemporaryDirectory() as work:
        with suppress(NotFinite):  # a divergence, which the shorter series tells
            pretrain(params, corpus, Path(work))
        (file,) = Path(work).glob("*/metrics.jsonl")
        return read(file)


def figures(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Whether a run diverged, how often it spiked, where it ended, how sharp its loss was."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    sharp = [row["sharpness"] for row in rows if row.get("sharpness") is not None]
    tenth = max(1, steps // 10)
    means = [
        statistics.fmean(losses[i : i + tenth]) for i in range(max(0, len(losses) - tenth + 1))
    ]
    ended = means[-1] if means and len(losses) == steps else math.inf
    spikes, best = 0, math.inf
    for place in range(10, len(losses)):
        best = min(best, statistics.fmean(losses[place - 10 : place]))
        spikes += losses[place] > best + 0.5
    return {
        "diverged": bool(ended > min(means, default=0) + 0.5),
        "spikes": spikes,
        "loss": ended if math.isfinite(ended) else None,
        "sharp": statistics.median(sharp[-tenth:]) if sharp else None,
        "sharpest": max(sharp, default=None),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """A line for each format and rate, over widths and seeds."""
    lines = [f"{'format':8} {'rate':>6} " + " ".join(f"{name:>9}" for name in COLUMNS)]
    for form, rate in dict.fromkeys((run["format"], run["rate"]) for run in runs):
        group = [run for run in runs if (run["format"], run["rate"]) == (form, rate)]
        losses = [run["loss"] for run in group if run["loss"] is not None]
        sharp = [run["sharp"] for run in group if run["sharp"] is not None]
        sharpest = [run["sharpest"] for run in group if run["sharpest"] is not None]
        cells = (
            f"{len(group)}",
            f"{sum(run['diverged'] for run in group) / len(group):.0%}",
            f"{statistics.fmean(run['spikes'] for run in group):.1f}",
            f"{statistics.fmean(losses):.3f}" if losses else "-",
            f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else "-",
            f"{statistics.fmean(sharp):.3f}" if sharp else "-",
            f"{max(sharpest):.3f}" if sharpest else "-",
        )
        lines.append(f"{form:8} {rate:>6g} " + " ".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer, shorter runs; prints only")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), help="default: all")
    chosen = parser.parse_args()
    grid = QUICK if chosen.quick else FULL
    names = chosen.formats or (["float32", "E8M3", "E8M1", "E4M7"] if chosen.quick else FORMATS)
    runs = []
    with tempfile.TemporaryDirectory() as home:
        corpus = prepared(Path(home))
        for name, rate, width, seed in product(names, grid["rates"], grid["widths"], grid["seeds"]):
            params = settings(FORMATS[name], rate, width, seed, grid["steps"])
            found = figures(series(params, corpus), grid["steps"])
            cell = {"format": name, "rate": rate, "width": width, "seed": seed}
            runs.append(cell | found)
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    printed = table(runs)
    print(printed, end="")
    if not chosen.quick:
        results = ROOT / "benchmarks" / "results"
        record = machine() | {"threads": torch.get_num_threads(), "grid": grid, "runs": runs}
        (results / "precision.json").write_text(json.dumps(record, indent=1) + "\n")
        (results / "precision.txt").write_text(printed)


if __name__ == "__main__":
    main()
