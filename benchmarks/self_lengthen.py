"""How texts grow over the rounds in which a model learns from what it lengthened.

    python benchmarks/self_lengthen.py [--seeds 0 1 2]

The tests' model of letters: texts are letters in the order of the alphabet, so that a program says
whether one is valid. Round 0 is the model before it learned from any text of its own.

Writes `benchmarks/results/self_lengthen.json` and the printed table beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from default_run import ROOT

from flows.bench.machine import machine
from flows.bench.show import gain, mean

sys.path.insert(0, str(ROOT))

from drawplate.data.synthesis import synthesize
from tests.test_data_synthetic import LEARNER, LEARNING, documents, method, valid, writer

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = {
    "response_words": "words of a response",
    "kept_words": "words of a kept text",
    "kept": "kept texts",
    "valid": "share of them that is valid",
}


def rounds(seed: int) -> list[dict[str, float]]:
    """The figures of each round."""
    with tempfile.TemporaryDirectory() as home:
        folder = writer(Path(home) / "model", seed=seed, **LEARNER)
        how = method(folder, **LEARNING)
        made = synthesize(how, documents(3000, seed=seed), seed, Path(home) / "work")
    found = []
    for number, each in enumerate(made.rounds):
        right = [valid(text.text) for text in made.texts if text.round == number]
        figures = {"kept": float(each.kept), "valid": sum(right) / len(right)}
        words = {"response_words": each.response_words, "kept_words": each.kept_words}
        found.append(words | figures)
    return found


def table(runs: list[list[dict[str, float]]]) -> str:
    """A line for each figure, and how far the last round lies above the first."""
    many = len(runs[0])
    head = " | ".join(f"round {number}" for number in range(many))
    lines = [f"| | {head} | last against first |", "|---" * (many + 2) + "|"]
    for figure, words in FIGURES.items():
        values = [[run[number][figure] for run in runs] for number in range(many)]
        cells = [*(str(mean(each)) for each in values), str(gain(values[-1], values[0]))]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = [rounds(seed) for seed in seeds]
    printed = table(runs)
    print(printed, end="")
    record = machine() | {"threads": torch.get_num_threads(), "seeds": seeds, "runs": runs}
    (RESULTS / "self_lengthen.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "self_lengthen.md").write_text(printed)


if __name__ == "__main__":
    main()
