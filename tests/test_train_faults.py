"""Killed at random and at every system call, a training run loses nothing; a naive one does."""

import signal
from pathlib import Path

import pytest

from tests import faults, stage_cases
from tests.train_cases import digest, run

CASES = "tests.train_cases:"


@pytest.mark.parametrize(
    ("seed", "seconds"),
    [
        pytest.param(1, 60, id="short"),
        *(pytest.param(s, 500, id=f"long-{s}", marks=pytest.mark.slow) for s in (2, 3, 4)),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, seed: int, seconds: int, request: pytest.FixtureRequest
) -> None:
    long = "long" in request.node.callspec.id
    kills = 0
    for round_ in range(40 if long else 1):
        work = tmp_path / str(round_)
        found = faults.kill_loop(
            CASES + "long_run",
            CASES + "readable",
            work,
            seed=100 * seed + round_,
            warm=CASES + "warm",
            seconds=seconds,
        )
        print(found)
        assert found["finished"]
        assert found["unreadable"] == 0
        kills += found["kills"]
        again = digest(run(work, steps=60, save_every=3))
        if not round_:
            undisturbed = digest(run(tmp_path / "undisturbed", steps=60, save_every=3))
        assert again == undisturbed
        if kills >= 200:
            break
    assert kills >= (200 if long else 2)


@pytest.mark.parametrize("run", ["pretrained", "recovered", "reinforced"])
def test_stages_that_are_killed_again_and_again_leave_the_same_bytes(
    tmp_path: Path, run: str
) -> None:
    work, cases = tmp_path / "killed", "tests.stage_cases:"
    warm = f"{cases}warm_{run}"
    found = faults.kill_loop(cases + run, CASES + "readable", work, seed=1, warm=warm, seconds=60)
    print(found)
    assert found["finished"]
    assert found["unreadable"] == 0
    assert found["kills"] >= 2
    again, undisturbed = (
        stage_cases.left(*getattr(stage_cases, run)(folder))
        for folder in (work, tmp_path / "whole")
    )
    assert again == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("run", ["pretrained", "recovered", "reinforced"])
def test_stages_that_are_told_to_end_at_twenty_moments_save_and_leave_the_same_bytes(
    tmp_path: Path, run: str
) -> None:
    cases, told, round_ = "tests.stage_cases:", 0, 0
    undisturbed = stage_cases.left(*getattr(stage_cases, run)(tmp_path / "whole"))
    while told < 20:
        work = tmp_path / str(round_)
        found = faults.kill_loop(
            cases + run,
            CASES + "readable",
            work,
            seed=round_,
            warm=f"{cases}warm_{run}",
            seconds=120,
            sign=signal.SIGTERM,
        )
        print(found)
        assert found["finished"]
        assert found["unreadable"] == 0
        assert found["slowest"] < 10
        assert found["kills"] > 0
        assert stage_cases.left(*getattr(stage_cases, run)(work)) == undisturbed
        told, round_ = told + found["kills"], round_ + 1


def test_the_usual_way_to_save_becomes_unreadable(tmp_path: Path) -> None:
    """The control: the same kills hit a file that is written in place."""
    found = faults.kill_loop(
        CASES + "naive_run",
        CASES + "naive_readable",
        tmp_path,
        seed=1,
        warm=CASES + "warm_naive",
        seconds=60,
    )
    print(found)
    assert found["unreadable"] > 0


@faults.needs_strace()
@pytest.mark.parametrize(
    ("calls", "kinds"),
    [
        pytest.param(["rename", "fsync"], ["signal=SIGKILL"], id="few"),
        pytest.param(
            ["rename", "fsync", "write", "mkdir", "openat", "unlinkat", "rmdir", "unlink"],
            ["signal=SIGKILL", "error=EIO", "error=ENOSPC"],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_that_dies_at_any_system_call_is_whole_or_absent(
    tmp_path: Path, calls: list[str], kinds: list[str]
) -> None:
    found = faults.crash_points(
        CASES + "one_save",
        CASES + "first_save",
        CASES + "found",
        {"work": str(tmp_path)},
        calls=calls,
        kinds=kinds,
        seconds=500,
    )
    print(found)
    assert found["tried"] >= 6 * len(kinds)
    words = {word for kind in kinds for word in found["words"][kind]}
    assert words <= {"1, failed", "2, failed", "2, done"}
    assert "1, failed" in words
