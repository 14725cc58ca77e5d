"""Laws of all learning rate schedules, and their oracles."""

from importlib import import_module
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drawplate.core.method import leaves
from drawplate.train.schedule import Schedule
from tests.laws import law

RUNS = [(1, 0.0), (7, 0.3), (50, 0.02), (100, 0.1), (100, 1.0), (1000, 0.02)]


@law(Schedule)
def test_shares_lie_between_zero_and_one_and_the_first_is_not_zero(method: Schedule) -> None:
    for total, warmup in RUNS:
        leaf = method.model_copy(update={"warmup": warmup})
        shares = [leaf.factor(step, total) for step in range(total)]
        assert all(0 <= share <= 1 for share in shares)
        assert shares[0] > 0
        assert max(shares) == 1


@law(Schedule)
def test_rises_through_the_warm_up_and_never_after_it(method: Schedule) -> None:
    for total, warmup in RUNS:
        leaf = method.model_copy(update={"warmup": warmup})
        climb = round(warmup * total)
        shares = [leaf.factor(step, total) for step in range(total)]
        assert all(a < b for a, b in pairwise(shares[:climb]))
        assert all(a >= b for a, b in pairwise(shares[climb:]))


@law(Schedule)
def test_is_a_function_of_the_share_done(method: Schedule) -> None:
    leaf = method.model_copy(update={"warmup": 0.0})
    for step in range(50):
        assert leaf.factor(step, 50) == pytest.approx(leaf.factor(10 * step, 500), rel=1e-12)


@law(Schedule)
def test_equals_its_oracle(method: Schedule) -> None:
    reference = import_module(f"tests.oracle.train.schedule.{method.name}").reference

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(1, 400), st.data())
    def check(total: int, data: st.DataObject) -> None:
        step = data.draw(st.integers(0, total - 1))
        share = st.floats(0.015625, 1)
        fields = {n: data.draw(share) for n in type(method).model_fields if n != "name"}
        found = type(method)(**fields).factor(step, total)
        assert found == pytest.approx(reference(step, total, **fields), rel=1e-10, abs=1e-12)

    check()


@law(Schedule)
def test_every_field_matters(method: Schedule) -> None:
    for name in set(type(method).model_fields) - {"name"}:
        other = method.model_copy(update={name: (getattr(method, name) + 0.37) / 2})
        assert any(method.factor(s, 100) != other.factor(s, 100) for s in range(100)), name


@law(Schedule)
def test_survives_being_written_down_and_refuses_what_makes_no_sense(method: Schedule) -> None:
    assert type(method).model_validate(method.model_dump()) == method
    for name in set(type(method).model_fields) - {"name"}:
        for wrong in (-0.1, 1.1, float("nan"), "much"):
            with pytest.raises(ValidationError):
                type(method).model_validate({name: wrong})


def test_there_are_four() -> None:
    assert {"constant", "linear", "cosine", "wsd"} <= set(leaves(Schedule))
