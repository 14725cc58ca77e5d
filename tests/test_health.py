"""Checkups of answers, and a model against one that another evaluation measured."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.core.errors import UserError
from drawplate.evaluate.compare import Comparison
from drawplate.evaluate.health import Health, examine, loops
from drawplate.evaluate.interval import Interval
from drawplate.evaluate.page import Story
from drawplate.evaluate.report import write
from drawplate.evaluate.rival import against
from drawplate.evaluate.tasks import Answers
from tests.evaluate_cases import SMALL, run

LOOP = "and so on, " * 5


def answers(texts, scores=None, finished=None):
    """One answer to each of the problems."""
    count = len(texts)
    return Answers(
        [[text] for text in texts],
        np.array(scores or [0.0] * count).reshape(-1, 1),
        np.full((count, 1), 5),
        np.array(finished or [True] * count).reshape(-1, 1),
    )


def compared(metric, verdict):
    difference = Interval(value=-0.5, low=-0.6, high=-0.4, how="exact")
    return Comparison(
        metric=metric, parent=0.75, child=0.25, difference=difference, p=0.01, adjusted=0.01,
        verdict=verdict,
    )  # fmt: skip


def test_a_model_without_a_fault_is_healthy():
    found = examine("m", answers(["12", "7"], [1.0, 0.0]), (), Health())
    assert (found.truncated, found.empty, found.looping) == (0, 0, 0)
    assert found.healthy


@pytest.mark.parametrize(
    ("fault", "given_"),
    [
        ("truncated", {"texts": ["a", "b", "c", "d"], "finished": [False, True, True, True]}),
        ("empty", {"texts": [" \n", "b", "c", "d"]}),
        ("looping", {"texts": [LOOP, "b", "c", "d"]}),
    ],
)
def test_each_fault_counts_against_its_own_limit(fault, given_):
    found = examine("m", answers(**given_), (), Health(**{fault: 0.24}))
    assert getattr(found, fault) == 0.25
    assert found.reasons == (f"25.0% of answers are {fault}, at most 24.0% may be",)
    assert examine("m", answers(**given_), (), Health(**{fault: 0.25})).healthy


def test_a_right_answer_may_repeat_itself():
    assert examine("m", answers([LOOP], [1.0]), (), Health()).looping == 0


def test_solving_less_than_the_parent_is_a_reason_and_being_longer_is_not():
    verdicts = [compared("greedy", "worse"), compared("pass_at_4", "within noise")]
    verdicts += [compared("pass_at_1", "worse"), compared("length", "worse")]
    found = examine("m", answers(["a"]), verdicts, Health())
    assert found.reasons == (
        "greedy is worse than its parent's: 25.0% after 75.0%",
        "pass_at_1 is worse than its parent's: 25.0% after 75.0%",
    )


@given(st.text("ab", max_size=40))
def test_loops_is_what_its_formula_says(text):
    n = len(text)
    expected = any(
        (m := max(4 * p, 16)) <= n and all(text[i] == text[i - p] for i in range(n - m + p, n))
        for p in range(1, n // 4 + 1)
    )
    assert loops(text) == expected


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return run(tmp_path_factory.mktemp("health"))


def test_the_report_says_who_is_healthy(evaluation):
    report = evaluation.report
    assert [each.name for each in report.checkups] == ["base", "child"]
    for each in report.checkups:
        assert report.metrics()[f"{each.name}.healthy"] == float(not each.reasons)
        assert report.headlines()[f"{each.name}.looping"] == each.looping
        row = next(row for row in report.rows if row.name == each.name)
        assert each.truncated == pytest.approx(row.tasks.truncated.value)
        told = any("truncated" in reason for reason in each.reasons)
        assert told == (each.truncated > report.params.health.truncated)


def test_headlines_leave_out_ranges_and_kinds_of_problem(evaluation):
    every, some = evaluation.report.metrics(), evaluation.report.headlines()
    assert some.items() <= every.items()
    assert {"child.pass_at_1", "child.stored_bytes", "child.vs_base.greedy.verdict"} <= set(some)
    assert not [name for name in some if ".task." in name or name.endswith(("_low", ".p"))]


def test_two_reports_are_compared_as_one_would(evaluation, tmp_path):
    """The verdicts of a model in another report equal those inside one report."""
    write(evaluation, Story(), tmp_path)
    inside = {one.metric: one for one in evaluation.report.pairs[0].comparisons}
    for one in against(tmp_path, "child", tmp_path, "base"):
        same = inside[one.metric]
        assert (one.verdict, one.flips) == (same.verdict, same.flips)
        for key in ("value", "low", "high"):
            expected = getattr(same.difference, key)
            assert getattr(one.difference, key) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [("problems", 7), ("samples", 2), ("temperature", 0.5), ("max_new", 5), ("seed", 1),
     ("filters", [{"name": "top_k"}])],
)  # fmt: skip
def test_reports_that_asked_otherwise_are_not_compared(evaluation, tmp_path, key, value):
    assert SMALL.model_dump(mode="json")[key] != value
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        write(evaluation, Story(), tmp_path / name)
    file = tmp_path / "old" / "report.json"
    told = json.loads(file.read_text())
    told["params"][key] = value
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"evaluate.{key} is .* evaluate both in one call"):
        against(tmp_path / "new", "child", tmp_path / "old", "base")


def test_reports_of_other_problems_are_not_compared(evaluation, tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        write(evaluation, Story(), tmp_path / name)
    file = tmp_path / "old" / "problems.csv"
    file.write_text(file.read_text().replace(f"{2:016x}", "other"))
    with pytest.raises(UserError, match="child and base were asked other problems"):
        against(tmp_path / "new", "child", tmp_path / "old", "base")
