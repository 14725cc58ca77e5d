"""Reproduction cards: what a paper claims, what was run here, what came out.

    python benchmarks/cards.py          writes docs/cards/ and results/bench/*.md, *.svg anew
    python benchmarks/cards.py --check  says which of them are not as they would be written

Reads `cards.yaml` and the records that `drawplate bench` left in `results/bench/`. The verdict on a
comparison is computed: the mean difference over seeds against the half width of its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawplate.settings import read
from flows.bench import plan, show
from flows.bench.show import Figures, Mean, gain, mean

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RECORDS = RESULTS / "bench"
CARDS = HERE.parent / "docs" / "cards"
ALIKE = 0.02
"""Part of the stored bytes by which two contenders may differ unmentioned."""


def verdict(difference: Mean, way: str) -> str:
    """What a difference says of a claim that there is `more` or `less` of something."""
    toward = difference.mean if way == "more" else -difference.mean
    if toward > difference.half:
        return "reproduced in direction"
    if -toward > difference.half:
        return "not reproduced at this scale: the difference goes the other way"
    return "not reproduced at this scale: within noise"


def card(number: str, said: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """One system's card, in Markdown."""
    lines = [
        f"# {said['title']}",
        "",
        f"System {number} (arXiv:{said['paper']})",
        "",
        f"**Claim.** {said['claim']}",
        "",
    ]
    if "measured" in said:
        return _page([*lines, *_measured(said["measured"])])
    test = said.get("test")
    if test is None:
        return _page([*lines, f"**Verdict.** Not testable at this scale. {said['untestable']}"])
    lines += ["**Run.**", "", f"    {command(test)}", ""]
    if record is None:
        return _page([*lines, "**Verdict.** Not run yet."])
    return _page([*lines, *_compared(test, record)])


def _measured(said: Mapping[str, str]) -> list[str]:
    """What a script of its own printed, and what that says."""
    table = (RESULTS / said["table"]).read_text(encoding="utf-8").strip("\n")
    shown = table.split("\n") if said["table"].endswith(".md") else ["```", table, "```"]
    run = ["**Run.**", "", f"    {said['command']}", ""]
    return [*run, "**Result.**", "", *shown, "", f"**Verdict.** {said['verdict']}"]


def _compared(test: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Two contenders of a comparison, over seeds."""
    seeds: list[Mapping[str, Figures]] = list(record["runs"].values())
    ours, against = test["ours"], test["against"]
    missing = [name for name in (ours, against) if name not in seeds[0]]
    if missing:
        why = "; ".join(record["refused"].get(name, f"{name} took no part") for name in missing)
        return [f"**Verdict.** Not run: {why}"]
    figures = dict.fromkeys([test["figure"], *test.get("beside", []), "stored_bytes"])
    values = {
        name: {figure: [float(run[name][figure]) for run in seeds] for figure in figures}
        for name in (against, ours)
    }
    differences = {
        figure: gain(values[ours][figure], values[against][figure]) for figure in figures
    }
    head = " | ".join(figure.replace("_", " ") for figure in figures)
    lines = [f"**Result.** Over {len(seeds)} seeds, with 95 % intervals:", ""]
    lines += [f"| | {head} |", "|---" * (len(figures) + 1) + "|"]
    for name, own in values.items():
        lines.append(f"| {name} | {' | '.join(str(mean(own[figure])) for figure in figures)} |")
    lines += [f"| difference | {' | '.join(map(str, differences.values()))} |", ""]
    more = differences["stored_bytes"].mean / mean(values[against]["stored_bytes"]).mean
    said = [verdict(differences[test["figure"]], test["way"]).capitalize()]
    if abs(more) > ALIKE:
        said.append(f"It stores {abs(100 * more):.0f} % {'more' if more > 0 else 'fewer'} bytes")
    return [*lines, f"**Verdict.** {'. '.join([*said, *test.get('note', [])])}."]


def command(test: Mapping[str, Any]) -> str:
    """The call whose record a card reads."""
    options = f" {test['options']}" if test.get("options") else ""
    return f"drawplate bench {test['bench']}{options}"


def record_of(test: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the comparison left, where it was run."""
    file = RECORDS / f"{test.get('record', test['bench'])}.json" if test else None
    if file is None or not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def cards() -> dict[str, str]:
    """Every page by file name, the list of them among them."""
    specs = read(HERE / "cards.yaml")
    pages = {f"{n}.md": card(n, said, record_of(said.get("test"))) for n, said in specs.items()}
    rows = []
    for number, said in specs.items():
        told = pages[f"{number}.md"].partition("**Verdict.** ")[2].strip()
        first = told.split(". ")[0].rstrip(".")
        rows.append(f"| [{number}]({number}.md) | {said['title']} | {first} |")
    head = ["# Reproduction cards", "", "Made by `python benchmarks/cards.py`.", ""]
    pages["README.md"] = _page([*head, "| system | | verdict |", "|---|---|---|", *rows])
    return pages


def tables(folder: Path) -> dict[str, bytes]:
    """The table and the frontier of every record, by the names of their files."""
    found: dict[str, bytes] = {}
    for file in sorted(RECORDS.glob("*.json")):
        record = json.loads(file.read_bytes())
        request, refused = record["request"], record["refused"]
        key = plan.key_of(request["what"])
        names = list(request["contenders"])
        seeds = {int(seed): figures for seed, figures in record["runs"].items()}
        found[f"{file.stem}.md"] = (show.table(key, names, seeds, refused) + "\n").encode()
        drawing = folder / f"{file.stem}.svg"
        show.plot(key, [name for name in names if name not in refused], seeds, drawing)
        found[drawing.name] = drawing.read_bytes()
    return found


def _page(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def stale(file: Path, wanted: Mapping[Path, bytes]) -> bool:
    """Pictures go by the table beside them: processors draw their last digits otherwise."""
    told = file.with_suffix(".md") if file.suffix == ".svg" else file
    return not (file.exists() and told.exists()) or told.read_bytes() != wanted[told]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawn = {RECORDS / name: data for name, data in tables(Path(folder)).items()}
    wanted = drawn | {CARDS / name: text.encode() for name, text in cards().items()}
    outdated = [file for file in wanted if stale(file, wanted)]
    old = [*CARDS.glob("*.md"), *RECORDS.glob("*.md"), *RECORDS.glob("*.svg")]
    left = [file for file in old if file not in wanted]
    if given.check:
        names = [file.relative_to(HERE.parent).as_posix() for file in (*outdated, *left)]
        print("\n".join(names) or "all cards and tables are as they would be written")
        return bool(names)
    CARDS.mkdir(parents=True, exist_ok=True)
    for file in outdated:
        file.write_bytes(wanted[file])
    for file in left:
        file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
