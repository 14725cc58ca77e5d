"""The report page and the files beside it."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from drawplate.core.errors import UserError
from drawplate.evaluate import plots, words
from drawplate.evaluate.cost import Machine
from drawplate.evaluate.page import Story, page
from drawplate.evaluate.report import write
from tests.evaluate_cases import HOSTILE, SMALL, TASKS, run

VOID = {"meta", "br", "img", "input", "link", "hr"}
SERIES = [
    {"step": i + 1, "loss": 3.0 - i / 200, "odd <i>key</i> $x$": None if i % 2 else float(i),
     "still": 7.0, "gone": None, "seconds": 0.1 * i}
    for i in range(500)
]  # fmt: skip
LEDGER = [
    {"path": "model.layers.0.q_proj", "bits": 4, "weight_error": 0.25, "seconds": 1.0},
    {"path": "<b>evil</b>", "bits": None, "weight_error": 0.5, "kept": ["=1+1"]},
]


class Page(HTMLParser):
    """A page as a reader sees it: elements in order, texts by element, what stayed open."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(((self.open or [""])[-1], data))

    def text(self, tag):
        return [data for place, data in self.texts if place == tag]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Two models whose answers are as hostile as text can be."""
    found = run(tmp_path_factory.mktemp("world"), baselines=lambda _: {"gzip": 2.5, "bigram": 3.5})
    texts = [[HOSTILE + text for text in row] for row in found.greedy["child"].texts]
    greedy = found.greedy | {"child": replace(found.greedy["child"], texts=texts)}
    return replace(found, greedy=greedy)


@pytest.fixture(scope="module")
def story():
    node = {
        "stage": "pretrain <script>", "params": {"text": HOSTILE.replace("\ud800", "")},
        "parents": {"corpus": "c" * 64}, "sources": {}, "environment": {"torch": "2"},
    }  # fmt: skip
    corpus = node | {"stage": "prepare", "parents": {}, "sources": {"<iframe>": "d" * 64}}
    lineage = {"node": node, "ancestors": {"c" * 64: corpus}}
    return Story(
        title="A <report>",
        series={"pretrain": SERIES, "recover": []},
        ledgers={"quantize": LEDGER},
        lineage={"base": lineage, "child": lineage},
    )


@pytest.fixture(scope="module")
def html(evaluation, story):
    return page(evaluation, story)


def with_machine(evaluation, speed):
    machine = Machine(
        device="cpu", threads=2, prefill_tokens_per_second=speed, peak_bytes=int(1e6 * speed),
        decode_tokens_per_second=speed, unpacked_decode_tokens_per_second=2 * speed,
    )  # fmt: skip
    both = dict.fromkeys(("base", "child"), machine)
    return replace(evaluation, report=evaluation.report.model_copy(update={"machine": both}))


def test_the_page_is_well_formed_and_hostile_text_stays_text(html):
    found = Page(html)
    assert found.open == []
    tags = {tag for tag, _ in found.elements}
    assert tags.isdisjoint({"script", "img", "iframe", "object", "embed", "link"})
    assert not any(name.startswith("on") for _, given in found.elements for name in given)
    shown = [text for text in found.text("pre") if "alert(1)" in text]
    assert shown
    readable = HOSTILE.replace("\x00", "⟨0⟩").replace("\x1b", "⟨1B⟩").replace("\u202e", "⟨202E⟩")
    assert any(readable.replace("\ud800", "⟨D800⟩") in text for text in shown)
    assert TASKS[1] in "".join(found.text("th"))
    assert found.text("title") == ["A <report>"]
    assert "<b>evil</b>" in found.text("code")
    assert any("odd <i>key</i> $x$" in text for text in found.text("text"))


def test_nothing_invisible_is_written(html):
    assert [c for c in set(html) if not c.isprintable() and c not in "\n\t"] == []
    html.encode("utf-8")


def test_the_windows_named_are_those_that_were_used(tmp_path):
    windows = SMALL.windows.model_copy(update={"window": 512})
    found = run(tmp_path, SMALL.model_copy(update={"windows": windows, "problems": 2}))
    shown = page(found, Story())
    assert "(base: 64, child: 64 tokens)" in shown
    assert "512 tokens" not in shown
    rows = found.report.model_dump(mode="json")["rows"]
    assert [row["quality"]["window"] for row in rows] == [64, 64]


def test_of_one_document_no_range_is_shown(tmp_path):
    found = run(tmp_path, SMALL.model_copy(update={"documents": 1}))
    figures = found.report.metrics()
    assert not {"base.bits_per_byte_low", "child.bits_per_byte_high"} & set(figures)
    assert {"base.bits_per_byte", "base.length_low"} <= set(figures)
    assert found.report.pairs[0].comparisons[0].verdict == "within noise"
    (tmp_path / "report").mkdir()
    write(found, Story(), tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/comparisons.csv").open()))
    assert [row["metric"] for row in rows if not row["low"] and not row["high"]] == [
        "bits_per_byte"
    ]
    ranges = Page(page(found, Story())).text("span")
    value = words.fixed(figures["base.bits_per_byte"])
    assert "–" in ranges
    assert words.span(words.fixed, *[figures["base.bits_per_byte"]] * 2) not in ranges
    assert value in ranges


def test_the_page_asks_for_nothing_from_outside(html):
    for tag, given in Page(html).elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert given.get(name, "#").startswith("#"), (tag, given)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_every_link_leads_somewhere_and_ids_are_unique(html):
    elements = Page(html).elements
    ids = [given["id"] for _, given in elements if "id" in given]
    assert len(ids) == len(set(ids))
    links = {given[k][1:] for _, given in elements for k in ("href", "xlink:href") if k in given}
    clips = set(re.findall(r"url\(#([^)]*)\)", html))
    assert links | clips <= set(ids)
    assert {"summary", "verdicts", "training", "ledgers", "lineage", "node-cccccccccccc"} <= set(
        ids
    )


def test_pictures_are_whole_and_take_the_colours_of_the_page(html):
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 1 + 3 + 1 + 2 + 2
    for picture in pictures:
        parsed = ElementTree.fromstring(picture.replace("xlink:href", "href"))
        assert parsed.get("aria-label")
        assert not re.search(r"(fill|stroke): #", picture)
        assert "<style" not in picture
    declared = set(re.findall(r"(--\w+):", html))
    assert {f"--{name}" for name in re.findall(r"var\(--(\w+)\)", html)} <= declared


def test_the_figures_of_the_report_stand_on_the_page(html, evaluation):
    shown = "".join(data for _, data in Page(html).texts)
    for row in evaluation.report.rows:
        assert words.fixed(row.quality.bits_per_byte.value) in shown
        assert words.percent(row.tasks.greedy.low).removesuffix("%") in shown
        assert words.size(row.cost.stored_bytes) in shown
    for one in evaluation.report.pairs[0].comparisons:
        assert words.p_value(one.adjusted) in shown
        assert one.verdict in shown
    assert "never finite" in shown
    assert "still 7" in shown
    assert "No steps were taken." in shown
    assert "2.500" in shown
    for text in evaluation.problems[0]["answer"], evaluation.problems[0]["prompt"]:
        assert text in shown


@pytest.fixture(scope="module")
def written(tmp_path_factory, evaluation, story):
    folder = tmp_path_factory.mktemp("report")
    write(with_machine(evaluation, 10.0), story, folder)
    return folder


def test_the_same_report_has_the_same_bytes(evaluation, story, html):
    assert page(evaluation, story) == html


def test_only_marked_elements_depend_on_the_machine(evaluation, story, written):
    one = (written / "index.html").read_text(encoding="utf-8")
    two = page(with_machine(evaluation, 33.0), story)
    assert "decoding from an empty context" in two
    assert one != two
    marked = r"<(td|span) data-machine>.*?</\1>"
    assert re.sub(marked, "", one) == re.sub(marked, "", two)


def test_files_beside_the_page(written, evaluation):
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert names == {
        "index.html", "metrics.json", "machine.json", "report.json", "frontier.csv", "tasks.csv",
        "comparisons.csv", "lengths.csv", "problems.csv", "documents.csv", "responses.jsonl",
        "curves/pretrain.csv", "curves/recover.csv",
    }  # fmt: skip
    report = evaluation.report
    assert json.loads((written / "metrics.json").read_text()) == report.metrics()
    assert json.loads((written / "machine.json").read_text())["child.threads"] == 2
    assert "machine" not in json.loads((written / "report.json").read_text())

    def table(name):
        with (written / name).open(newline="") as file:
            return list(csv.DictReader(file))

    frontier = table("frontier.csv")
    assert [row["model"] for row in frontier] == ["base", "child"]
    assert float(frontier[1]["greedy"]) == report.rows[1].tasks.greedy.value
    assert len(table("tasks.csv")) == 4
    assert [row["verdict"] for row in table("comparisons.csv")] == [
        one.verdict for one in report.pairs[0].comparisons
    ]
    assert sum(float(row["correct"]) + float(row["wrong"]) for row in table("lengths.csv")) == (
        pytest.approx(2)
    )
    documents = table("documents.csv")
    assert sum(float(row["bits_base"]) for row in documents) / sum(
        int(row["bytes"]) for row in documents
    ) == pytest.approx(report.rows[0].quality.bits_per_byte.value)
    curve = table("curves/pretrain.csv")
    assert list(curve[0]) == ["step", "loss", "odd <i>key</i> $x$", "still", "gone"]
    lines = [json.loads(line) for line in (written / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 8 * (1 + SMALL.samples)
    assert sum(HOSTILE in line["text"] for line in lines) == 8


def test_the_other_files_have_the_same_bytes_too(tmp_path, evaluation, story, written, monkeypatch):
    monkeypatch.setattr("drawplate.evaluate.report.page", lambda *_: "")
    write(with_machine(evaluation, 33.0), story, tmp_path)
    for path in written.rglob("*.*"):
        same = path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes()
        assert same == (path.name not in ("index.html", "machine.json")), path.name


def test_formulas_do_not_reach_a_spreadsheet(tmp_path, evaluation, monkeypatch):
    monkeypatch.setattr("drawplate.evaluate.report.page", lambda *_: "")
    rows = tuple(
        row.model_copy(update={"families": {"=cmd()": row.tasks}}) for row in evaluation.report.rows
    )
    write(
        replace(evaluation, report=evaluation.report.model_copy(update={"rows": rows})),
        Story(),
        tmp_path,
    )
    with (tmp_path / "tasks.csv").open(newline="") as file:
        assert {row["task"] for row in csv.DictReader(file)} == {"'=cmd()"}


def test_a_single_model_without_a_story_makes_a_page(evaluation):
    report = evaluation.report.model_copy(
        update={
            "rows": evaluation.report.rows[:1],
            "checkups": evaluation.report.checkups[:1],
            "pairs": (),
            "baselines": {},
        }
    )
    only = {"base": evaluation.drawn["base"]}
    html = page(replace(evaluation, report=report, drawn=only), Story())
    found = Page(html)
    assert found.open == []
    ids = {given["id"] for _, given in found.elements if "id" in given}
    assert ids.isdisjoint({"verdicts", "training", "ledgers", "lineage"})


def test_a_model_that_ran_plain_is_named_with_the_reason(evaluation, html):
    unfit = {evaluation.report.rows[0].name: "no <factors>"}
    told = replace(evaluation, report=evaluation.report.model_copy(update={"unfit": unfit}))
    assert "ran plain" not in html
    assert "ran plain, without plain: no &lt;factors&gt;" in page(told, Story())


def test_a_series_needs_steps(evaluation):
    with pytest.raises(UserError, match="series of finetune has a row without a step"):
        page(evaluation, Story(series={"finetune": [{"loss": 1.0}]}))


def test_long_curves_are_drawn_as_means_between_least_and_most():
    rows = [{"step": i, "x": float(i % 2)} for i in range(4800)]
    picture = plots.curve("s", "x", rows)
    assert "fill-opacity" in picture or "opacity: 0.18" in picture
    assert len(picture) < 30_000
    assert plots.curve("s", "x", rows) == picture


def test_histogram_counts_every_answer_once():
    draw = np.random.default_rng(0)
    tokens, correct = draw.integers(1, 65, (30, 4)), draw.random((30, 4)) < 0.3
    right, wrong = plots.histogram(tokens, correct, 64)
    assert right.sum() == pytest.approx(correct.mean())
    assert right.sum() + wrong.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("style", "value", "text"),
    [
        (words.percent, -0.123, "−12.3"),
        (words.percent, 0.0004, "0.0"),
        (words.fixed, 0.5, "+0.5000"),
        (words.tenth, -7.25, "−7.2"),
    ],
)
def test_differences_are_written_with_their_sign(style, value, text):
    assert words.signed(style, value) == text
