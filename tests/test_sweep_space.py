"""What a sweep varies and looks for: its grammar, its grids, its front, its search."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.core.errors import UserError
from drawplate.settings import override, parse
from flows.sweep import goals, plan, show, space
from flows.sweep.plan import Outcome, Step
from flows.sweep.search import Grid, Study, apart
from flows.sweep.show import Row

VALUES = st.one_of(
    st.integers(-99, 99).map(str),
    st.floats(-9, 9).map(repr),
    st.sampled_from(
        ["true", "null", "low_rank", "sparse", "'a, b'", "[1, 2]", "{name: x, k: [3]}"]
    ),
)


def known_by(value):
    return repr(parse(value, "test"))


@given(st.lists(VALUES, min_size=1, max_size=5, unique_by=known_by))
def test_a_list_is_read_back_as_it_was_written(values):
    assert space.axis(f"a.b={', '.join(values)}") == ("a.b", tuple(values))


@given(st.integers(-20, 20), st.integers(1, 40), st.integers(1, 7))
def test_a_range_of_whole_numbers_holds_what_python_says(low, width, step):
    high = low + width
    assert space.points(space.axis(f"k={low}..{high}")) == tuple(
        str(i) for i in range(low, high + 1)
    )
    if step <= width:
        assert space.points(space.axis(f"k={low}..{high}:{step}")) == tuple(
            str(i) for i in range(low, high + 1, step)
        )


def test_steps_of_fractions_do_not_drift():
    assert space.points(space.axis("k=0.1..0.5:0.1")) == ("0.1", "0.2", "0.3", "0.4", "0.5")
    assert space.points(space.axis("k=0..1:0.3")) == ("0.0", "0.3", "0.6", "0.9")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("compress.ratio", "expected dotted.key=values"),
        ("=1,2", "expected dotted.key=values"),
        ("a..b=1,2", "expected dotted.key=values"),
        ("k=", "a value is empty"),
        ("k=1,,2", "a value is empty"),
        ("k=1,2,", "a value is empty"),
        ("k=0.2,0.20", "0.20 stands twice"),
        ("k=[1,2", "expected ',' or ']'"),
        ("k=1..", "a number at both ends"),
        ("k=..5", "a number at both ends"),
        ("k=1..b", "a number at both ends"),
        ("k=5..1", "from the smaller to the larger"),
        ("k=1..1", "from the smaller to the larger"),
        ("k=0..1:log", "begins above 0"),
        ("k=1..5:lin", "log, or a step from 0 to 4"),
        ("k=1..5:9", "log, or a step from 0 to 4"),
        ("k=1..5:0", "log, or a step from 0 to 4"),
        ("k=1..nan", "a number at both ends"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_key(text, says):
    with pytest.raises(UserError) as caught:
        space.axis(text)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(max_size=20))
def test_any_text_is_an_axis_or_a_user_error(text):
    try:
        found = space.axis(text)
    except UserError:
        return
    assert found.key
    assert space.ends(found)


def test_keys_stand_once_and_a_grid_needs_points():
    with pytest.raises(UserError, match="k stands twice"):
        space.axes(["k=1", "k=2"])
    with pytest.raises(UserError, match="nothing to vary"):
        space.axes([])
    with pytest.raises(UserError, match="a grid needs a step"):
        space.points(space.axis("k=0.1..0.5"))
    with pytest.raises(UserError, match="a grid needs a step"):
        space.points(space.axis("k=1..100:log"))


STEPS = [
    Step("first", frozenset({"a"}), (), (), ()),
    Step("second", frozenset({"a", "b.x"}), (), (), ()),
    Step("third", frozenset({"a", "b.x", "c"}), (), (), ()),
]


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_a_grid_is_every_combination_once(sizes):
    keys = ["c", "b.x.y", "a.z"]
    axes = [
        space.axis(f"{k}={','.join(map(str, range(n)))}") for k, n in zip(keys, sizes, strict=True)
    ]
    found = Grid(axes, plan.early_first(STEPS, keys))
    assert found.total == math.prod(sizes)
    trials = [found.ask() for _ in range(found.total)]
    assert not found.ready(found.total, 0)
    assert all(list(trial) == keys for trial in trials)
    oracle = set(itertools.product(*(map(str, range(n)) for n in sizes)))
    assert {tuple(trial.values()) for trial in trials} == oracle
    assert len({tuple(trial.values()) for trial in trials}) == len(trials)
    # The first trials differ in what the first stage reads, so none waits for another.
    assert len({trial["a.z"] for trial in trials[: sizes[2]]}) == sizes[2]


def test_stages_that_trials_agree_on_share_a_lock_and_run_after_what_they_need():
    def of(a, b, c, apart=frozenset()):
        return plan.turns(STEPS, {"a.z": a, "b.x": b, "c": c}, apart, "base")

    one, other, third = of("1", "1", "1"), of("1", "1", "2"), of("1", "2", "1")
    assert [turn.stages for turn in one] == [("first",), ("second",)]
    assert one == other
    assert one[0] == third[0]
    assert one[1].lock != third[1].lock
    assert of("2", "1", "1")[0].lock != one[0].lock
    assert [turn.stages for turn in of("1", "1", "1", frozenset({"b.x"}))] == [("first",)]
    (all_three,) = plan.turns(STEPS, {"d": "1", "e": "2"}, frozenset(), "base")
    assert all_three.stages == ("first", "second", "third")
    assert plan.turns(STEPS, {"a": "1"}, frozenset(), "base") == ()


def test_a_trial_is_named_by_what_changed_and_told_apart_by_all_settings():
    tree = {"compress": {"method": {"name": "low_rank", "rank": 3}, "ratio": 0.3}}
    changes = {"compress.ratio": "0.4", "compress.method.name": "sparse"}
    changed = plan.settings_of(tree, changes)
    assert changed == {"compress": {"method": {"name": "sparse"}, "ratio": 0.4}}
    name = plan.name_of(changed, changes, ())
    assert name.startswith("ratio-0_4-method-sparse-")
    # The same settings by another way are the same trial; other settings or stages are not.
    again = override(tree, ["compress.method={name: sparse}", "compress.ratio=0.40"])
    assert plan.name_of(again, changes, ()) == name
    assert plan.name_of(tree, changes, ()) != name
    assert plan.name_of(changed, changes, ("compress",)) != name


@given(st.text(max_size=80), st.text(max_size=80))
def test_names_are_what_prefect_dvc_and_git_all_take(key, value):
    import re

    name = plan.name_of({}, {key: value}, ())
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name)


METRICS = {"evaluate": {"tuned.pass": 0.5, "tuned.bytes": 100.0}, "compress": {"tuned.bytes": 7.0}}


def test_goals_and_bounds_are_read_and_measured():
    assert goals.goal("evaluate:tuned.pass:max") == ("evaluate", "tuned.pass", "max")
    assert goals.goal("tuned.pass:min") == (None, "tuned.pass", "min")
    assert goals.goal("tuned.pass:max").loss(METRICS) == -0.5
    assert goals.goal("tuned.pass:min").loss(METRICS) == 0.5
    at_most = goals.bound("evaluate:tuned.bytes<=2e1")
    assert at_most == ("evaluate", "tuned.bytes", "<=", 20.0)
    assert at_most.excess(METRICS) == 80
    assert goals.bound("compress:tuned.bytes >= 10").excess(METRICS) == 3
    assert goals.bound("compress:tuned.bytes>=7").excess(METRICS) == 0


@pytest.mark.parametrize("text", ["a", "a:up", ":max", "a b:max", "a:b:c:max", ""])
def test_a_goal_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        goals.goal(text)


@pytest.mark.parametrize("text", ["a", "a<1", "a<=x", "a<=nan", "a==1", "<=1", "a<=1<=2"])
def test_a_bound_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        goals.bound(text)


@pytest.mark.parametrize(
    ("file", "key", "says"),
    [
        ("evalute", "tuned.pass", "did you mean 'evaluate'"),
        (None, "tuned.pas", "did you mean 'tuned.pass'"),
        (None, "tuned.bytes", "name one: evaluate:tuned.bytes, compress:tuned.bytes"),
        ("compress", "tuned.pass", "did you mean 'tuned.bytes'?) in compress"),
    ],
)
def test_a_metric_that_is_not_there_is_named(file, key, says):
    with pytest.raises(UserError) as caught:
        goals.look_up(METRICS, file, key)
    assert says in str(caught.value)


def brute_force(rows):
    """The definition: on the front is what no other row is as good as in all and better in one."""
    found = []
    for a in rows:
        beaten = False
        for b in rows:
            as_good = all(b[i] <= a[i] for i in range(len(a)))
            better = any(b[i] < a[i] for i in range(len(a)))
            beaten = beaten or (as_good and better)
        found.append(not beaten)
    return found


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), max_size=25)
    )
)
def test_the_front_is_what_the_definition_says(rows):
    assert goals.front(rows) == brute_force(rows)


def rows_of(points):
    return [
        Row(f"t{i}", {"k": str(i)}, Outcome(metrics={"m": {"up": up, "down": down}}))
        for i, (up, down) in enumerate(points)
    ]


GOALS = [goals.goal("up:max"), goals.goal("down:min")]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15), st.integers(0, 5))
def test_beyond_a_bound_nothing_is_on_the_front_and_nothing_beats_it_from_there(points, limit):
    rows = rows_of(points)
    keep = [goals.bound(f"down<={limit}")]
    found = show.facts(rows, GOALS, keep)
    fine = [i for i, (_, down) in enumerate(points) if down <= limit]
    best = brute_force([(-points[i][0], points[i][1]) for i in fine])
    assert set(found["front"]) == {f"t{i}" for i, chosen in zip(fine, best, strict=True) if chosen}
    assert {t["name"] for t in found["trials"] if t["kept"]} == {f"t{i}" for i in fine}
    assert {t["name"] for t in found["trials"]} == {row.name for row in rows}


def test_table_and_picture_show_every_trial(tmp_path):
    rows = rows_of([(1, 1), (2, 2), (0, 3), (3, 9)])
    rows += [Row("bad", {"k": "0.123456789"}, Outcome(error="it broke")), Row("cut", {"k": "7"})]
    keep = [goals.bound("down<=5")]
    lines = show.table(rows, GOALS, keep).splitlines()
    marks = {line[3:].split()[0]: line[0] for line in lines[1:]}
    assert marks == {"t0": "*", "t1": "*", "t2": " ", "t3": "-", "bad": "!", "cut": "!"}
    assert any("0.1235" in line and line.endswith("it broke") for line in lines)
    assert lines[-1].endswith("stopped")
    for number, goal in enumerate(([GOALS[0]], GOALS, [*GOALS, goals.goal("up:min")])):
        files = [tmp_path / f"{number}{copy}.svg" for copy in "ab"]
        for file in files:
            show.plot(rows, goal, keep, file)
        assert files[0].read_bytes() == files[1].read_bytes()
        assert {"front", "t1"} <= set(files[0].read_text().replace("<", ">").split(">"))


AXES = [
    space.axis("a.x=0.1..0.9"),
    space.axis("b=1e-4..1e-2:log"),
    space.axis("c=2..16:2"),
    space.axis("d=u,v"),
    space.axis("e=0..1:0.25"),
]


def metrics_of(changes):
    """A trade-off: `up` wants a large a.x, `down` a small one; c should be 8."""
    x, c = float(changes["a.x"]), int(changes["c"])
    return {"m": {"up": x - abs(c - 8) / 16, "down": x * x}}


def studied(jobs, seed=0, total=24, keep=(), shuffled=None):
    study = Study(AXES, GOALS, keep, total, seed, jobs)
    asked, told, done = [], 0, set()
    while told < total:
        while study.ready(len(asked), told):
            asked.append(study.ask())
        open_ones = [i for i in range(told, len(asked)) if i not in done]
        if open_ones:
            done.add(shuffled.choice(open_ones) if shuffled else open_ones[0])
        while told in done:
            study.tell(told, metrics_of(asked[told]))
            told += 1
    return asked


def test_a_search_stays_within_its_space():
    for changes in studied(jobs=1):
        assert list(changes) == ["a.x", "b", "c", "d", "e"]
        assert 0.1 <= float(changes["a.x"]) <= 0.9
        assert 1e-4 <= float(changes["b"]) <= 1e-2
        assert changes["c"] in map(str, range(2, 17, 2))
        assert changes["d"] in "uv"
        assert changes["e"] in {"0.0", "0.25", "0.5", "0.75", "1.0"}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_search_asks_the_same_again_in_whatever_order_trials_end(jobs):
    assert studied(jobs) == studied(jobs, shuffled=random.Random(1))
    assert studied(jobs) != studied(jobs, seed=1)


def test_a_search_respects_a_bound():
    keep = [goals.bound("m:down<=0.09")]  # a.x <= 0.3, a quarter of its range
    free, bound = studied(1, total=50), studied(1, total=50, keep=keep)
    late = [[float(c["a.x"]) <= 0.3 for c in asked[20:]] for asked in (free, bound)]
    assert sum(late[1]) > sum(late[0]) + 5
    assert sum(late[1]) > 15


def test_a_failed_trial_does_not_end_a_search():
    study = Study(AXES, GOALS, (), 3, 0, 1)
    for number in range(3):
        assert study.ready(number, number)
        study.ask()
        study.tell(number, None if number == 1 else metrics_of({"a.x": "0.5", "c": "8"}))
    assert not study.ready(3, 3)


def test_only_ranges_of_fractions_keep_trials_of_a_search_apart():
    assert apart(AXES, Study(AXES, GOALS, (), 3, 0, 1)) == {"a.x", "b"}
    grid = [space.axis("a=0..1:0.5")]
    assert apart(grid, Grid(grid, ["a"])) == frozenset()
