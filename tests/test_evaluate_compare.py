"""Intervals and verdicts against their definitions, and what any honest comparison must satisfy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from drawplate.core.errors import UserError
from drawplate.core.seeds import seed_of
from drawplate.evaluate.compare import (
    Flips,
    compare_flips,
    compare_ratios,
    flip_interval,
    holm,
    mcnemar,
)
from drawplate.evaluate.interval import Chance, bootstrap, resampled, share, wilson
from tests.oracle.evaluate import compare as oracle

CHANCE = Chance(resamples=2000, seed=3)
P = st.floats(1e-6, 1)


def flips(lost, gained, both=3, neither=4):
    return Flips(both=both, lost=lost, gained=gained, neither=neither)


@pytest.mark.parametrize("trials", [1, 7, 200])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_wilson_equals_scipy(trials, level):
    for successes in range(0, trials + 1, max(1, trials // 7)):
        ours = wilson(successes / trials, trials, level)
        theirs = binomtest(successes, trials).proportion_ci(level, method="wilson")
        np.testing.assert_allclose([ours.low, ours.high], list(theirs), rtol=1e-10, atol=1e-15)


def test_a_share_of_yes_and_no_is_the_ordinary_interval():
    values = np.array([1, 0, 0, 1, 1, 0, 0])
    ours, theirs = share(values, 1, CHANCE), wilson(3 / 7, 7, 0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_answers_that_agree_within_a_problem_are_worth_no_more_than_one():
    """Eight equal answers to a problem say as much as one; eight independent ones say more."""
    draw = np.random.default_rng(0)
    yes = draw.random(60) < 0.4
    agreeing = share(yes.astype(float), 8, CHANCE)
    mixed = share(draw.binomial(8, 0.4, 60) / 8, 8, CHANCE)
    one = share(yes, 1, CHANCE)
    assert (agreeing.low, agreeing.high) == pytest.approx((one.low, one.high))
    assert mixed.high - mixed.low < 0.5 * (agreeing.high - agreeing.low)


def test_a_share_without_spread_is_not_certain():
    nothing, all_half = share(np.zeros(20), 8, CHANCE), share(np.full(20, 0.5), 8, CHANCE)
    assert (nothing.low, nothing.high) == (0.0, wilson(0, 20, 0.95).high)
    assert all_half.high - all_half.low == pytest.approx(
        wilson(0.5, 20, 0.95).high - wilson(0.5, 20, 0.95).low
    )


def test_a_share_counts_as_no_more_trials_than_there_were_answers():
    """Spread may be small by luck; it must not make forty answers count as a thousand."""
    values = np.array([0.5] * 19 + [0.5 + 1e-6])
    lucky, most = share(values, 2, CHANCE), wilson(float(values.mean()), 40, 0.95)
    assert (lucky.low, lucky.high) == (most.low, most.high)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_ninety_five_of_a_hundred_share_intervals_hold_the_truth(rate):
    draw, held = np.random.default_rng(1), 0
    for _ in range(1000):
        solved = draw.beta(2 * rate, 2 * (1 - rate), 150)
        interval = share(draw.binomial(8, solved) / 8, 8, CHANCE)
        held += interval.low <= rate <= interval.high
    assert 0.915 <= held / 1000 <= 0.985


def test_resampling_equals_a_loop_over_the_same_draws():
    draw = np.random.default_rng(0)
    top, below = draw.normal(size=9), draw.random(9) + 1
    picks = np.random.default_rng(seed_of(3, "bootstrap", "x", 2)).integers(0, 9, (2000, 9))
    wanted = oracle.resamples(top.tolist(), below.tolist(), picks.tolist())
    np.testing.assert_allclose(resampled(top, below, CHANCE, "x", 2), wanted, rtol=1e-10)
    assert resampled(top, below, CHANCE, "y").tolist() != wanted


def test_bootstrap_finds_the_quantiles_of_all_possible_resamples():
    values = np.array([1.0, 2.0, 10.0])
    every = sorted(np.mean(pick) for pick in itertools.product(values, repeat=3))
    interval = bootstrap(values, np.ones(3), Chance(level=0.8, resamples=50_000), "x")
    assert interval.low == pytest.approx(np.quantile(every, 0.1, method="inverted_cdf"))
    assert interval.high == pytest.approx(np.quantile(every, 0.9, method="inverted_cdf"))
    assert interval.value == pytest.approx(13 / 3)


def test_chunks_of_resamples_are_one_stream(monkeypatch):
    values, ones = np.random.default_rng(0).normal(size=50), np.ones(50)
    whole = resampled(values, ones, CHANCE, "x")
    monkeypatch.setattr("drawplate.evaluate.interval._CELLS", 777)
    assert resampled(values, ones, CHANCE, "x").tolist() == whole.tolist()


@pytest.mark.parametrize(("lost", "gained"), itertools.product(range(9), repeat=2))
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    p = mcnemar(flips(lost, gained))
    assert p == pytest.approx(oracle.mcnemar(lost, gained), rel=1e-12)
    if lost + gained:
        assert p == pytest.approx(binomtest(lost, lost + gained).pvalue, rel=1e-12)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_flip_interval_excludes_zero_just_where_the_test_rejects(level):
    for lost, gained in itertools.product(range(15), repeat=2):
        interval = flip_interval(flips(lost, gained), level)
        assert interval.low <= interval.value <= interval.high
        assert (interval.low > 0 or interval.high < 0) == (mcnemar(flips(lost, gained)) < 1 - level)
        back = flip_interval(flips(gained, lost), level)
        assert (back.low, back.high) == pytest.approx((-interval.high, -interval.low), abs=1e-14)


def test_no_flips_leave_room_for_those_that_were_not_seen():
    interval = flip_interval(flips(0, 0, both=50, neither=50), 0.95)
    assert (1 - interval.high) ** 100 == pytest.approx(0.05)
    assert interval.low == -interval.high


def test_flips_are_counted():
    old, new = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 1], bool)
    assert Flips.of(old, new) == Flips(both=2, lost=1, gained=1, neither=1)
    one = compare_flips("greedy", old, new, CHANCE)
    assert (one.parent, one.child, one.verdict) == (0.6, 0.6, "within noise")


@given(st.lists(P, min_size=1, max_size=8), st.floats(0.001, 0.999))
@settings(max_examples=200, deadline=None)
def test_holm_rejects_what_the_procedure_rejects(ps, alpha):
    if any(abs(p * n - alpha) < 1e-9 for p in ps for n in range(1, len(ps) + 1)):
        return  # equality is a matter of rounding
    assert [p <= alpha for p in holm(ps)] == oracle.rejected(ps, alpha)
    assert all(adjusted >= p for adjusted, p in zip(holm(ps), ps, strict=True))


def compare(parent, child, higher=True, chance=CHANCE):
    return compare_ratios("x", parent, child, np.ones(len(child)), chance, "x", higher=higher)


def test_verdicts_follow_the_direction_and_turn_around_with_the_pair():
    draw = np.random.default_rng(0)
    parent = draw.normal(size=80)
    child = parent + 1 + draw.normal(size=80)
    for higher, there, back in ((True, "better", "worse"), (False, "worse", "better")):
        forward, backward = compare(parent, child, higher), compare(child, parent, higher)
        assert (forward.verdict, backward.verdict) == (there, back)
        assert forward.difference.value == pytest.approx(-backward.difference.value)
        assert forward.difference.low == pytest.approx(-backward.difference.high)
        assert forward.p == backward.p < 0.01
    assert forward.parent == pytest.approx(parent.mean())
    assert forward.child == pytest.approx(child.mean())


def test_a_model_is_not_better_than_itself():
    values = np.random.default_rng(0).normal(size=50)
    same = compare(values, values)
    assert (same.verdict, same.p, same.difference.low, same.difference.high) == (
        "within noise", 1.0, 0.0, 0.0,
    )  # fmt: skip


@pytest.mark.parametrize(("items", "verdict"), [(5, "within noise"), (6, "better")])
def test_a_handful_of_items_cannot_speak_against_chance(items, verdict):
    """Six differences of one sign have a chance of 1 in 32, five of 1 in 16."""
    one = compare(np.zeros(items), np.ones(items))
    assert (one.verdict, one.p) == (verdict, pytest.approx(max(2 ** (1 - items), 2 / 2001)))


def test_ratios_are_weighted_and_pairing_cancels_what_is_hard():
    draw = np.random.default_rng(0)
    hard, weight = draw.normal(0, 50, 100), draw.integers(1, 9, 100).astype(float)
    one = compare_ratios("x", hard, hard + 0.1 * weight, weight, CHANCE, "x", higher=False)
    assert one.difference.value == pytest.approx(0.1)
    assert one.difference.high - one.difference.low < 1e-9
    assert one.verdict == "worse"


def test_one_in_twenty_verdicts_is_wrong_where_nothing_changed():
    draw, chance, wrong = np.random.default_rng(4), Chance(resamples=300), 0
    for _ in range(400):
        parent, child = draw.normal(size=(2, 40))
        wrong += compare(parent, child, chance=chance).verdict != "within noise"
    assert 0.025 <= wrong / 400 <= 0.095


@pytest.mark.parametrize("other", [{"level": 0.5}, {"resamples": 1000}, {"seed": 4}])
def test_every_setting_matters(other):
    values, ones = np.random.default_rng(0).normal(size=30), np.ones(30)
    changed = CHANCE.model_copy(update=other)
    assert bootstrap(values, ones, CHANCE, "x") != bootstrap(values, ones, changed, "x")


def test_only_the_same_items_can_be_compared():
    with pytest.raises(UserError, match="parent measured on 3 items, child on 4"):
        compare(np.ones(3), np.ones(4))
    with pytest.raises(UserError, match="problems: parent measured on 0 items"):
        Flips.of(np.zeros(0), np.zeros(0))
