"""The guard's rule on series of numbers, without a model."""

import json
import math
import random

import pytest

from drawplate.train.guard import Guard, History


def judge(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[str]:
    history = History()
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [guard.judge(history, loss, norm) for loss, norm in pairs]


def noisy(n: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2 + draw.gauss(0, 0.1) for _ in range(n)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 63, 64, 200])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_one_bad_number_costs_one_step_wherever_it_is(bad: float, place: int, what: str) -> None:
    losses, norms = noisy(400), noisy(400, 1)
    (losses if what == "loss" else norms)[place] = bad
    verdicts = judge(Guard(), losses, norms)
    assert verdicts[place] == "not finite"
    assert verdicts.count("good") == 399


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_spike_costs_one_step_once_half_the_window_is_known(what: str) -> None:
    for place, expected in ((40, "good"), (64, "spike"), (300, "spike")):
        losses, norms = noisy(400), noisy(400, 1)
        (losses if what == "loss" else norms)[place] = 1e4
        verdicts = judge(Guard(), losses, norms)
        assert verdicts[place] == expected
        assert sum(v != "good" for v in verdicts) == (expected == "spike")


def test_ordinary_noise_and_falling_losses_are_good() -> None:
    assert set(judge(Guard(), noisy(2000))) == {"good"}
    assert set(judge(Guard(), [10 * 0.99**i for i in range(1000)])) == {"good"}
    assert set(judge(Guard(), [0.0] * 200 + [0.5] + [0.0] * 100)) == {"good"}


def test_a_new_level_is_accepted_once_going_back_is_used_up() -> None:
    history = History(rollbacks=2)
    guard = Guard(patience=3, rollbacks=2)
    for loss in noisy(128):
        guard.judge(history, loss, 1.0)
    verdicts = [guard.judge(history, 1e3 + loss, 1.0) for loss in noisy(50)]
    assert verdicts[:2] == ["spike", "spike"]
    assert verdicts[2] == "good"
    assert set(verdicts[6:]) == {"good"}


def test_spikes_can_be_let_through() -> None:
    losses = [*noisy(200), 1e9, *noisy(10)]
    assert set(judge(Guard(spike=0), losses)) == {"good"}


def test_history_counts_and_is_plain_finite_json() -> None:
    history, guard = History(), Guard(window=4)
    for loss in (1.0, math.nan, math.inf, 2.0, 3.0, 4.0, 5.0, math.nan):
        guard.judge(history, loss, 1.0)
    assert history.losses == [2.0, 3.0, 4.0, 5.0]
    assert (history.streak, history.skipped) == (1, 3)
    text = json.dumps(history.model_dump(), allow_nan=False)
    assert History.model_validate_json(text) == history


def test_histories_do_not_share_their_lists() -> None:
    Guard().judge(History(), 1.0, 1.0)
    assert History().losses == []
