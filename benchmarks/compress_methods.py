"""Families of compression at equal stored bytes, and samples of calibration rows at equal rows.

    python benchmarks/compress_methods.py --model models/base --corpus data/corpus

Held-out loss in nats per token, without recovery training, over calibration seeds. `methods` go at
each of `--ratios` with `--rows` calibration rows; `samples` choose `--few` rows for the default
method at the last ratio. Writes `benchmarks/results/compress_methods.json` and the table beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from default_run import ROOT
from torch import Tensor, nn

from drawplate.compress.driver import Compress, compress
from drawplate.core import hf
from drawplate.core.calibration import Calibration
from drawplate.core.corpus import Corpus
from drawplate.core.errors import UserError
from flows.bench.machine import machine

LENGTH = 128
METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"name": "low_rank"},
    "low_rank_sparse": {"name": "low_rank_sparse"},
    "low_rank_sparse, filled": {"name": "low_rank_sparse", "completion": {"name": "filled"}},
    "low_rank, svd": {"name": "low_rank", "factor": {"name": "svd"}},
    "sparse, refit": {"name": "sparse"},
    "sparse, greedy_blocks": {"name": "sparse", "update": {"name": "greedy_blocks"}},
    "sparse, unchanged": {"name": "sparse", "update": {"name": "unchanged"}},
    "slice, pca": {"name": "slice", "multiple": 1},
    "slice, random": {"name": "slice", "multiple": 1, "basis": {"name": "random"}},
    "slice, coordinates": {"name": "slice", "multiple": 1, "basis": {"name": "coordinates"}},
}
SAMPLES: dict[str, dict[str, Any]] = {
    "uniform": {"name": "uniform"},
    **{name: {"name": name, "features": 4} for name in ("leverage", "dpp", "volume")},
}


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean nats of every token but the first of each row."""
    total = 0.0
    for part in rows.split(16):
        logits = model(part).logits[:, :-1].flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
    return total / (rows.numel() - len(rows))


def one(folder: Path, held: Tensor, tokens: Tensor, ratio: float, method: Any) -> dict[str, Any]:
    """Compresses a fresh copy; what it lost, or why it cannot be done."""
    model = hf.load(folder, dtype=torch.float32)
    try:
        ledger = compress(
            model, tokens, Compress.model_validate({"ratio": ratio, "method": method})
        )
    except UserError as error:
        return {"refused": str(error)}
    return {"loss": loss(model, held), "ratio": ledger.ratio}


def table(runs: list[dict[str, Any]], dense: float) -> str:
    """Mean and half range over seeds."""
    lines = [f"uncompressed: {dense:.3f} nats", f"{'':28} {'ratio':>6} {'removed':>8}  loss"]
    for name, ratio in dict.fromkeys((run["name"], run["asked"]) for run in runs):
        same = [run for run in runs if (run["name"], run["asked"]) == (name, ratio)]
        if any("refused" in run for run in same):
            lines.append(f"{name:28} {ratio:6.2f}  not possible: {same[0]['refused']}")
            continue
        losses = [run["loss"] for run in same]
        half = (max(losses) - min(losses)) / 2
        removed = statistics.mean(run["ratio"] for run in same)
        mean = statistics.mean(losses)
        lines.append(f"{name:28} {ratio:6.2f} {removed:8.3f}  {mean:.3f} +- {half:.3f}")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--corpus", type=Path, required=True)
    options.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--few", type=int, default=8)
    given = options.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus(given.corpus)
    tokens = corpus.stream("text-heldout").tokens[: 64 * LENGTH].astype("int64")
    held = torch.from_numpy(tokens).view(-1, LENGTH)
    dense = loss(hf.load(given.model, dtype=torch.float32), held)
    runs = []
    for seed in given.seeds:
        rows = Calibration(rows=given.rows, length=LENGTH, seed=seed).tokens(corpus)
        for ratio in given.ratios:
            for name, method in METHODS.items():
                found = one(given.model, held, rows, ratio, method)
                runs.append({"name": name, "asked": ratio, "seed": seed, **found})
                print(runs[-1], flush=True)
        for name, sample in SAMPLES.items():
            chosen = Calibration.model_validate(
                {"rows": given.few, "length": LENGTH, "seed": seed, "sample": sample}
            )
            ratio = given.ratios[-1]
            found = one(given.model, held, chosen.tokens(corpus), ratio, METHODS["low_rank"])
            label = f"low_rank, {given.few} rows {name}"
            runs.append({"name": label, "asked": ratio, "seed": seed, **found})
            print(runs[-1], flush=True)
    results = ROOT / "benchmarks" / "results"
    settings = {key: value for key, value in vars(given).items() if key not in ("model", "corpus")}
    record = {"machine": machine(), "settings": settings, "uncompressed": dense, "runs": runs}
    (results / "compress_methods.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(runs, dense)
    (results / "compress_methods.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
