"""How texts grow when a model learns from what it lengthened, and without learning from it.

    python benchmarks/self_lengthen.py [--seeds 0 1 2]

The tests' model of letters: texts are letters in the order of the alphabet, so that a program says
whether one is valid. `learns` is Self-Lengthen; `does not` goes through the same rounds with the
model as the warm steps left it.

Writes `benchmarks/results/self_lengthen.json` and the printed table beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from default_run import ROOT

from flows.bench.machine import machine
from flows.bench.show import gain, mean

sys.path.insert(0, str(ROOT))

from drawplate.data.synthesis import synthesize
from drawplate.train.schedule import Schedule
from tests.test_data_synthetic import LEARNER, LEARNING, documents, method, valid, writer

RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("learns", "does not")
FIGURES = {
    "response_words": "words of a response",
    "kept_words": "words of a kept text",
    "kept": "kept texts",
    "valid": "of them valid",
}


class Warm(Schedule):
    """The peak rate in the first steps, then none."""

    name: Literal["warm"] = "warm"
    warmup: float = 0.0
    share: float
    """Of all steps."""

    def shape(self, done: float) -> float:
        """Share done -> 1 or 0."""
        return float(done < self.share)


def rounds(seed: int, kind: str) -> list[dict[str, float]]:
    """The figures of each round; the first is the same for both kinds."""
    with tempfile.TemporaryDirectory() as home:
        folder = writer(Path(home) / "model", seed=seed, **LEARNER)
        how = method(folder, **LEARNING | {"schedule": {"name": "constant", "warmup": 0.0}})
        if kind == "does not":
            whole = how.warm + (how.rounds - 1) * how.updates
            how = how.model_copy(update={"schedule": Warm(share=how.warm / whole)})
        made = synthesize(how, documents(3000, seed=seed), seed, Path(home) / "work")
    found = []
    for number, each in enumerate(made.rounds):
        right = [valid(text.text) for text in made.texts if text.round == number]
        found.append(
            {
                "response_words": each.response_words,
                "kept_words": each.kept_words,
                "kept": float(each.kept),
                "valid": sum(right) / len(right),
            }
        )
    return found


def table(runs: dict[str, list[list[dict[str, float]]]]) -> str:
    """A line a round for each figure, and how far the last round lies above the first."""
    names = list(runs)
    lines = ["| round | figure | " + " | ".join(names) + " | difference |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for figure, words in FIGURES.items():
        for number in range(len(runs[names[0]][0])):
            values = [[run[number][figure] for run in runs[name]] for name in names]
            cells = [*(str(mean(each)) for each in values), str(gain(*values))]
            lines.append(f"| {number} | {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = {name: [rounds(seed, name) for seed in seeds] for name in KINDS}
    printed = table(runs)
    print(printed, end="")
    record = machine() | {"threads": torch.get_num_threads(), "seeds": seeds, "runs": runs}
    (RESULTS / "self_lengthen.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "self_lengthen.md").write_text(printed)


if __name__ == "__main__":
    main()
