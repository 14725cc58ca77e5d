"""The default run over several seeds: what base, compressed, quantized and tuned models reach.

    python benchmarks/default_run.py --seeds 0 1 2

Each seed is a whole pipeline of its own (data order, initial weights, calibration, rollouts and
evaluation draw from it) in a folder of its own; only the text is the same. Writes
`benchmarks/results/default_run.json` and, beside it, the tables that it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows.bench.machine import machine

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "prepare": ["--out", "data/corpus"],
    "pretrain": ["--corpus", "data/corpus", "--out", "models/base"],
    "compress": ["--model", "models/base", "--corpus", "data/corpus", "--out", "models/compressed"],
    "quantize": [
        "--model", "models/compressed", "--corpus", "data/corpus", "--out", "models/quantized",
    ],
    "finetune": ["--model", "models/quantized", "--corpus", "data/corpus", "--out", "models/tuned"],
    "evaluate": [
        *(part for name in ("base", "compressed", "quantized", "tuned")
          for part in ("--model", f"models/{name}")),
        "--corpus", "data/corpus", "--out", "reports",
    ],
}  # fmt: skip
SEEDS = {
    "prepare": ["prepare.seed"],
    "pretrain": ["pretrain.seed", "pretrain.training.seed"],
    "compress": ["compress.calibration.seed", "compress.recover.seed"],
    "quantize": ["quantize.calibration.seed"],
    "finetune": ["finetune.seed"],
    "evaluate": ["evaluate.seed"],
}
SHOWN = {
    "pass_at_1": ("pass@1, drawn", "{:.1%}"),
    "greedy": ("pass@1, greedy", "{:.1%}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "length": ("tokens an answer", "{:.1f}"),
    "truncated": ("truncated", "{:.1%}"),
    "stored_bytes": ("stored bytes", "{:,.0f}"),
    "macs": ("multiply-adds a token", "{:,.0f}"),
    "decode_tokens_per_second": ("tokens/s", "{:,.0f}"),
}
MODELS = ("base", "compressed", "quantized", "tuned")


def one_seed(seed: int, home: Path, changes: list[str]) -> dict[str, float]:
    """All stages with `seed`; returns the evaluation's figures and each stage's seconds."""
    figures: dict[str, float] = {}
    for stage, arguments in STAGES.items():
        command = [sys.executable, "-m", "stages", stage, *arguments]
        command += ["--params", str(ROOT / "params.yaml"), "--metrics", f"metrics/{stage}.json"]
        own = [change for change in changes if change.startswith(f"{stage}.")]
        for change in [
            *(f"{key}={seed}" for key in SEEDS[stage]),
            *own,
            "execution.tracking=false",
        ]:
            command += ["-S", change]
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
        subprocess.run(command, cwd=home, check=True, env=environment)
        figures[f"seconds.{stage}"] = time.monotonic() - started
    figures["seconds.all"] = sum(v for k, v in figures.items() if k.startswith("seconds."))
    # Hardly an answer is longer than the evaluation allows; the limit of training cuts many.
    history = (home / "models/tuned/history-finetune.jsonl").read_text().splitlines()
    for when, line in (("first", history[0]), ("last", history[-1])):
        figures[f"finetune.truncated.{when}"] = json.loads(line)["truncated"]
    return figures | json.loads((home / "metrics" / "evaluate.json").read_text())


def spread(values: list[float], form: str) -> str:
    """Mean and, over several seeds, the smallest and the largest."""
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def table(runs: list[dict[str, float]]) -> str:
    """Markdown: a row a figure, a column a model; mean (smallest to largest) over seeds."""
    lines = ["| | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for key, (title, form) in SHOWN.items():
        cells = []
        for model in MODELS:
            values = [run[f"{model}.{key}"] for run in runs if f"{model}.{key}" in run]
            cells.append(spread(values, form) if values else "-")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals(runs: list[dict[str, float]]) -> str:
    """Each goal with what was reached, over seeds; nothing is left out where it was missed."""

    def each(what: str, values: list[float], form: str, goal: str, met: list[bool]) -> str:
        verdict = "met" if all(met) else f"missed in {met.count(False)} of {len(met)} seeds"
        return f"| {what} | {goal} | {spread(values, form)} | {verdict} |"

    def of(key: str) -> list[float]:
        return [run[key] for run in runs]

    def ratio(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(of(one), of(other), strict=True)]

    smaller = ratio("base.stored_bytes", "quantized.stored_bytes")
    worse = [x - 1 for x in ratio("quantized.bits_per_byte", "base.bits_per_byte")]
    gain = [t - q for t, q in zip(of("tuned.pass_at_1"), of("quantized.pass_at_1"), strict=True)]
    kept = [t - b for t, b in zip(of("tuned.pass_at_1"), of("base.pass_at_1"), strict=True)]
    shorter = [1 - x for x in ratio("tuned.length", "quantized.length")]
    first, last = of("finetune.truncated.first"), of("finetune.truncated.last")
    cut = [b - a for a, b in zip(first, last, strict=True)]
    gzip, bigram = of("baseline.gzip.bits_per_byte"), of("baseline.bigram.bits_per_byte")
    below = [min(g, b) - m for g, b, m in zip(gzip, bigram, of("base.bits_per_byte"), strict=True)]
    base, rl, total = of("base.pass_at_1"), of("seconds.finetune"), of("seconds.all")
    rows = [
        each("base pass@1", base, "{:.1%}", "40 to 85 %", [0.40 <= x <= 0.85 for x in base]),
        each("base bits per byte below gzip and bigram by", below, "{:.3f}", "clearly above 0",
             [x > 0 for x in below]),
        each("base bytes / quantized bytes", smaller, "{:.2f}", "at least 5",
             [x >= 5 for x in smaller]),
        each("bits per byte, quantized against base", worse, "{:+.1%}", "at most +8 %",
             [x <= 0.08 for x in worse]),
        each("pass@1, tuned - quantized", gain, "{:+.1%}", "at least +10 points",
             [x >= 0.1 for x in gain]),
        each("pass@1, tuned - base", kept, "{:+.1%}", "not below 0", [x >= 0 for x in kept]),
        each("tokens an answer, tuned shorter than quantized by", shorter, "{:.1%}",
             "at least 30 %", [x >= 0.3 for x in shorter]),
        each("answers cut at the limit of training, last step - first", cut, "{:+.1%}", "below 0",
             [x < 0 for x in cut]),
        each("seconds of finetune", rl, "{:.0f}", "at most 180", [x <= 180 for x in rl]),
        each("seconds of all stages", total, "{:.0f}", "at most 720", [x <= 720 for x in total]),
    ]  # fmt: skip
    return "\n".join(["| what | goal | reached | |", "|---|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-S", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/default_run.json")
    given = parser.parse_args()
    runs = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as home:
            runs.append(one_seed(seed, Path(home), given.changes))
        shown = f"{table(runs)}\n\n{goals(runs)}\n"
        print(shown, flush=True)
    record = {
        "seeds": given.seeds,
        "changes": given.changes,
        **machine(),
        "runs": runs,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    given.out.with_suffix(".md").write_text(shown)


if __name__ == "__main__":
    main()
