"""SIRI's schedule: periodic, within bounds, and each of the paper's three schedulers."""

import math

import pytest
from pydantic import ValidationError

from drawplate.rl.length.siri import Siri
from tests.oracle.rl.length.siri import reference
from tests.rl_cases import fields

HOLDS = [0.0, 0.25, 0.5, 0.9, 1.0]


def series(method, steps):
    return [method.limit(step, steps) for step in range(steps)]


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("steps", "cycles"), [(60, 3), (64, 4), (7, 7), (1920, 3), (50, 2.5)])
def test_exactly_periodic_and_within_bounds(hold, steps, cycles):
    found = series(Siri(cycles=cycles, hold=hold), steps)
    period = round(steps / cycles)
    assert found == [found[step % period] for step in range(steps)]
    assert found[0] == max(found) == 1024
    assert min(found) >= 512


@pytest.mark.parametrize("hold", HOLDS)
def test_falls_for_half_a_cycle_and_rises_for_the_other(hold):
    found = series(Siri(cycles=1, hold=hold), 80)
    assert found[40] == 512
    assert found[:41] == sorted(found[:41], reverse=True)
    assert found[40:] == sorted(found[40:])
    assert hold == 1 or found[1:] == found[:0:-1]  # the way up mirrors the way down


@pytest.mark.parametrize("hold", HOLDS[:-1])
def test_oracle_for_every_hold(hold):
    for cycles in (1.0, 2.0, 2.5):
        method = Siri(longest=1000, shortest=300, cycles=cycles, hold=hold)
        for step in range(101):
            assert method.limit(step, 101) == reference(step, 101, **fields(method))


@pytest.mark.parametrize("hold", HOLDS)
def test_hold_is_the_share_of_steps_at_the_ends(hold):
    steps = 4000
    found = series(Siri(longest=2**40, shortest=1, cycles=1, hold=hold), steps)
    ends = sum(limit in (1, 2**40) for limit in found)
    assert ends / steps == pytest.approx(max(hold, 2 / steps), abs=3 / steps)


def test_the_papers_numbers():
    """Cosine of cycle length 640 between 8192 and 16384, and the corners of stair-cosine."""
    cosine = Siri(longest=16384, shortest=8192)
    for step in range(1920):
        want = 12288 + 4096 * math.cos(2 * math.pi * step / 640)
        assert abs(cosine.limit(step, 1920) - want) <= 0.5 + 1e-6
    mixed = series(Siri(longest=16384, shortest=8192, hold=0.5), 1920)[:640]
    assert set(mixed[:80]) == set(mixed[560:]) == {16384}
    assert set(mixed[240:400]) == {8192}
    assert mixed[160] == mixed[480] == 12288
    stair = series(Siri(longest=16384, shortest=8192, hold=1), 1920)[:640]
    assert set(stair) == {8192, 16384}
    assert stair == [16384] * 160 + [8192] * 321 + [16384] * 159


def test_a_run_that_ends_in_a_half_ends_compressed():
    found = series(Siri(cycles=2.5), 1001)
    assert found[-1] == 512
    assert abs(series(Siri(cycles=3), 1001)[-1] - 1024) <= 1


def test_limits_the_wrong_way_round_are_refused():
    with pytest.raises(ValidationError, match="at most longest"):
        Siri(longest=5, shortest=6)
    assert series(Siri(longest=5, shortest=5), 9) == [5] * 9
