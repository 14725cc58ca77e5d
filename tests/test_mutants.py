"""Mutants of two small methods: the tests notice every one of them."""

import subprocess
import sys

import pytest

from tests.faults import ROOT, environment

LEAVES = {
    "train/schedule/wsd": ("tests/test_schedule.py", 11),
    "rl/reduce/answer_mean": ("tests/test_reduce.py", 12),
}
"""Method -> its tests, and how many mutants it has; none of them is equivalent."""


def judged(leaf: str, *tests: str) -> list[str]:
    """Lines of the tool on a method: the mutants that survived, then the rate."""
    source = f"src/drawplate/{leaf}.py"
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", source, *tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert done.returncode == len(lines) - 1
    return lines


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_mutant_is_killed(leaf: str) -> None:
    tests, count = LEAVES[leaf]
    assert judged(leaf, tests) == [f"src/drawplate/{leaf}.py: {count} of {count} mutants killed"]


def test_a_weak_test_lets_mutants_live() -> None:
    """The control: shares between zero and one say nothing of the shape of the curve."""
    *survivors, rate = judged("train/schedule/wsd", "tests/test_schedule.py", "-k", "shares_lie")
    assert rate.endswith(f"{11 - len(survivors)} of 11 mutants killed")
    assert any("self.cooldown" in line for line in survivors)
