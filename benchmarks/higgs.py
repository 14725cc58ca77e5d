"""HIGGS: the linearity theorem's prediction against the measured perplexity, and its tables.

    python benchmarks/higgs.py predict --seeds 0 1 2
    python benchmarks/higgs.py points

`predict` trains a small model for each seed, measures every layer's slope on training text, and
compares predicted and measured rises of perplexity on held-out text: all layers at one width, and
widths shared out at equal bytes. Writes `benchmarks/results/higgs.json` and the table beside it.
`points` makes the points for pairs of normal numbers that the grid `gaussian` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from default_run import ROOT
from safetensors.torch import save_file
from torch import Tensor

from drawplate import edits
from drawplate.core import hf
from drawplate.core.corpus import Corpus
from drawplate.quantize.driver import Quantize, profile, quantize
from drawplate.quantize.sensitivity import perplexity
from drawplate.settings import preset, validate
from flows.bench.machine import machine

MODEL = [
    "prepare.sources=[{name: docstrings, packages: [numpy, scipy]}]",
    "prepare.train_problems=500",
    "prepare.heldout_problems=50",
    "prepare.vocabulary=512",
    "pretrain.model={hidden: 96, layers: 4, heads: 4, kv_heads: 4, feed_forward: 256, "
    "context: 256}",
    "pretrain.training.steps=600",
]
HIGGS = preset("quantize/higgs")["quantize"]
NF4 = HIGGS | {"grid": {"name": "nf4"}, "rotate": {"name": "unchanged"}, "group": 64}
WIDTHS = [2, 3, 4]


def trained(seed: int, home: Path) -> tuple[Any, Tensor, Tensor]:
    """A model with calibration rows from its training text and rows of held-out text."""
    for stage, arguments in (
        ("prepare", ["--out", "corpus"]),
        ("pretrain", ["--corpus", "corpus", "--out", "model"]),
    ):
        own = [f"{stage}.seed={seed}"] + [each for each in MODEL if each.startswith(f"{stage}.")]
        own += [f"pretrain.training.seed={seed}"] if stage == "pretrain" else []
        command = [sys.executable, "-m", "stages", stage, *arguments]
        command += ["--params", str(ROOT / "params.yaml")]
        for change in [*own, "execution.tracking=false"]:
            command += ["-S", change]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
        subprocess.run(command, cwd=home, check=True, env=environment)
    corpus = Corpus(home / "corpus")
    rows = [
        torch.from_numpy(corpus.stream(name).tokens[: count * 128].astype("int64")).view(-1, 128)
        for name, count in (("text-train", 32), ("text-heldout", 64))
    ]
    return hf.load(home / "model"), rows[0], rows[1]


def measured(model: Any, rows: Tensor, held: Tensor, how: dict[str, Any]) -> float:
    """Perplexity on held-out rows after quantizing a copy."""
    copy = deepcopy(model)
    quantize(copy, rows, validate(Quantize, how, "quantize"))
    return perplexity(copy, held)


def one_seed(seed: int, home: Path) -> dict[str, float]:
    """Every figure of one trained model."""
    model, rows, held = trained(seed, home)
    base = perplexity(model, held)
    found = {"perplexity": base}
    planned = {"name": "linearity", "widths": WIDTHS}
    params = validate(Quantize, HIGGS | {"allocation": planned}, "quantize")
    choices, _ = profile(model, rows, params, list(edits.linears(model)))
    for place, bits in enumerate(WIDTHS):
        found[f"{bits}.predicted"] = sum(each.slope * each.error[place] for each in choices)
        found[f"{bits}.measured"] = measured(model, rows, held, HIGGS | {"bits": bits}) - base
        found[f"{bits}.nf4"] = measured(model, rows, held, NF4 | {"bits": bits}) - base
    for average in (2.5, 3.0, 3.5):
        low, high = (sum(each.bytes[WIDTHS.index(b)] for each in choices) for b in (2, 4))
        budget = int(low + (high - low) * (average - 2) / 2)
        for name in ("uniform", "linearity"):
            allocation = {"name": name, "widths": WIDTHS}
            how = validate(Quantize, HIGGS | {"allocation": allocation}, "quantize").allocation
            places = how.choose(choices, budget)
            key = f"{average}.{name}"
            found[f"{key}.predicted"] = sum(
                each.slope * each.error[place] for each, place in zip(choices, places, strict=True)
            )
            shared = HIGGS | {"allocation": allocation, "budget": budget}
            found[f"{key}.measured"] = measured(model, rows, held, shared) - base
    return found


def table(runs: list[dict[str, float]]) -> str:
    """Markdown: rises of perplexity, mean (smallest to largest) over seeds."""

    def cell(key: str) -> str:
        values = [run[key] for run in runs]
        return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = [
        f"Held-out perplexity {cell('perplexity')} before quantization; rises over it.",
        "",
        "| bits, all layers | predicted | HIGGS | NF4, group 64 |",
        "|---|---|---|---|",
    ]
    for bits in WIDTHS:
        cells = (cell(f"{bits}.{which}") for which in ("predicted", "measured", "nf4"))
        lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| bytes as for | uniform, predicted | measured | linearity, predicted | measured |",
        "|---|---|---|---|---|",
    ]
    for average in (2.5, 3.0, 3.5):
        keys = [f"{average}.{n}.{w}" for n in ("uniform", "linearity") for w in KINDS]
        lines.append(f"| {average} bits | " + " | ".join(map(cell, keys)) + " |")
    return "\n".join(lines)


KINDS = ("predicted", "measured")


def lattice(step: float) -> tuple[Tensor, Tensor]:
    """Points of the plane and their share of a standard normal distribution."""
    line = torch.arange(-6 + step / 2, 6, step, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    mass = (-points.square().sum(1) / 2).exp()
    kept = mass > 1e-9
    return points[kept], mass[kept] / mass[kept].sum()


def lloyd(
    points: Tensor, mass: Tensor, found: Tensor, rounds: int, least: float
) -> tuple[Tensor, float]:
    """Lloyd's rounds until the error falls by less than the share `least` in twenty of them."""
    last = torch.inf
    for turn in range(rounds + 1):
        half = found.square().sum(1) / 2
        parts = (points[at : at + (1 << 15)] for at in range(0, len(points), 1 << 15))
        cell = torch.cat([(half - some @ found.T).argmin(1) for some in parts])
        error = float((mass * (points - found[cell]).square().sum(1)).sum())
        if turn == rounds or (turn % 20 == 0 and last - error < least * error):
            return found, error
        last = error if turn % 20 == 0 else last
        total = torch.zeros(len(found), dtype=mass.dtype).index_add(0, cell, mass)
        mean = torch.zeros_like(found).index_add(0, cell, points * mass[:, None])
        found = (mean / total[:, None]).where(total[:, None] > 0, found)
    raise AssertionError("the last round returns")


def write_points(out: Path) -> None:
    """The best of several random starts on a coarse lattice, then refined on a fine one."""
    made: dict[str, Tensor] = {}
    for bits, starts in ((2, 20), (3, 10), (4, 4)):
        tried = []
        for seed in range(starts):
            draw = torch.Generator().manual_seed(seed)
            start = torch.randn(4**bits, 2, generator=draw, dtype=torch.float64)
            tried.append(lloyd(*lattice(0.06), start, 300, 1e-6))
        best, _ = min(tried, key=lambda pair: pair[1])
        best, error = lloyd(*lattice(0.02), best, 200, 1e-8)
        print(f"{bits} bits: mean square error {error / 2:.6f} a number", flush=True)
        made[str(bits)] = best.half()
    save_file(made, out)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["predict", "points"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "points":
        write_points(given.out or ROOT / "src/drawplate/quantize/normal_points.safetensors")
        return
    runs = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as home:
            runs.append(one_seed(seed, Path(home)))
        print(f"{table(runs)}\n", flush=True)
    out = given.out or ROOT / "benchmarks/results/higgs.json"
    record = {"seeds": given.seeds, "model": MODEL, **machine(), "runs": runs}
    out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    out.with_suffix(".md").write_text(f"{table(runs)}\n")


if __name__ == "__main__":
    main()
