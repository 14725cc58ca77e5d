"""Reproduction cards: their verdicts, and that those in the repository are what is recorded."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from drawplate.settings import read
from flows.bench.show import Mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import cards  # noqa: E402

TEST = {"bench": "quantize", "ours": "a", "against": "b", "figure": "length", "way": "less"}


def record(ours, against, stored=100.0):
    runs = {
        str(seed): {
            "a": {"length": mine, "stored_bytes": stored},
            "b": {"length": theirs, "stored_bytes": 100.0},
        }
        for seed, (mine, theirs) in enumerate(zip(ours, against, strict=True))
    }
    return {"runs": runs, "refused": {}}


def page(found, **more):
    said = {"title": "T", "paper": "1", "claim": "C.", "test": TEST | more}
    return cards.card("000-000", said, found)


@pytest.mark.parametrize(
    ("difference", "way", "said"),
    [
        (Mean(-2.0, 1.0), "less", "reproduced in direction"),
        (Mean(2.0, 1.0), "more", "reproduced in direction"),
        (Mean(2.0, 1.0), "less", "the other way"),
        (Mean(0.5, 1.0), "more", "within noise"),
        (Mean(-0.5, 1.0), "less", "within noise"),
    ],
)
def test_a_verdict_is_the_difference_against_its_interval(difference, way, said):
    assert cards.verdict(difference, way).endswith(said)


def test_one_seed_reproduces_nothing():
    assert "within noise" in cards.verdict(Mean(-5.0, math.nan), "less")


def test_a_card_shows_both_sides_and_their_difference():
    text = page(record([1.0, 1.5, 1.0], [5.0, 5.5, 6.0]))
    assert "| b | 5.5 ±" in text
    assert "| difference | -4.333 ±" in text
    assert text.endswith("**Verdict.** Reproduced in direction.\n")


def test_bytes_that_differ_are_said():
    found = record([1.0, 1.5], [5.0, 5.5], stored=135.0)
    assert text_after(page(found), "direction. ") == "It stores 35 % more bytes.\n"
    assert "stores" not in page(record([1.0, 1.5], [5.0, 5.5], stored=101.0))


def text_after(text, words):
    return text.partition(words)[2]


def test_who_took_no_part_is_named():
    found = record([1.0, 1.5], [5.0, 5.5])
    assert "c took no part" in page(found, ours="c")
    assert "Not run yet" in page(None)


def test_every_system_names_its_paper_and_what_became_of_its_claim():
    for number, said in read(ROOT / "benchmarks" / "cards.yaml").items():
        assert {"title", "paper", "claim"} < set(said), number
        assert len({"test", "measured", "untestable"} & set(said)) == 1, number


def test_cards_and_tables_are_as_they_would_be_written():
    done = subprocess.run(
        [sys.executable, "benchmarks/cards.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_picture_is_drawn_anew_with_its_table(tmp_path):
    table, picture = tmp_path / "one.md", tmp_path / "one.svg"
    wanted = {table: b"new", picture: b"drawn here"}
    assert all(cards.stale(file, wanted) for file in wanted)
    table.write_bytes(b"old")
    picture.write_bytes(b"drawn elsewhere")
    assert all(cards.stale(file, wanted) for file in wanted)
    table.write_bytes(b"new")
    assert not any(cards.stale(file, wanted) for file in wanted)
