"""Laws of every pattern, and each against its oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drawplate.compress.pattern import Pattern
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from tests.compress_layers import fields, oracle, others
from tests.laws import law

SHAPES = [(6, 8), (8, 4), (3, 12), (1, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def scores(shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=draw, dtype=torch.float64)


@law(Pattern)
@each_shape
def test_oracle(method, shape):
    score = scores(shape)
    for kept in range(method.members(shape) + 1):
        wanted = oracle(f"compress/pattern/{method.name}")(score.numpy(), kept)
        assert torch.equal(method.keep(score, kept), torch.from_numpy(wanted))


@each_shape
def test_oracle_of_the_whole_layer(shape):
    whole = leaves(Pattern)["unstructured"](within="layer")
    score = scores(shape)
    for kept in (0, 1, 3, score.numel()):
        wanted = oracle("compress/pattern/unstructured")(score.numpy(), kept, "layer")
        assert torch.equal(whole.keep(score, kept), torch.from_numpy(wanted))


@law(Pattern)
@each_shape
def test_exact_counts_in_every_group(method, shape):
    members = method.members(shape)
    for kept in range(members + 1):
        keep = method.keep(scores(shape), kept)
        assert keep.dtype == torch.bool
        assert keep.shape == shape
        assert int(keep.sum()) * members == kept * keep.numel()
        groups = method.groups(keep.double())
        weights = keep.numel() // groups.numel()
        assert (groups.sum(1) == kept * weights).all()
        assert set(groups.unique().tolist()) <= {0.0, float(weights)}


@law(Pattern)
@each_shape
def test_ties_do_not_change_the_counts(method, shape):
    members = method.members(shape)
    for kept in range(members + 1):
        keep = method.keep(torch.zeros(shape), kept)
        assert int(keep.sum()) * members == kept * keep.numel()


@law(Pattern)
@each_shape
def test_zero_sparsity_keeps_all(method, shape):
    assert method.keep(scores(shape), method.members(shape)).all()


@law(Pattern)
@each_shape
def test_masks_are_nested(method, shape):
    masks = [method.keep(scores(shape), kept) for kept in range(method.members(shape) + 1)]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))


@law(Pattern)
@each_shape
def test_order_alone_decides(method, shape):
    """Scaling never matters, whatever a group's score is made of."""
    score = scores(shape)
    kept = method.members(shape) // 2
    assert torch.equal(method.keep(5 * score, kept), method.keep(score, kept))


@law(Pattern)
@each_shape
def test_commutes_with_row_permutation(method, shape):
    score = scores(shape)
    turn = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    kept = method.members(shape) // 2
    assert torch.equal(method.keep(score[turn], kept), method.keep(score, kept)[turn])


@law(Pattern)
@each_shape
def test_nothing_kept_is_worth_less_than_what_goes(method, shape):
    score = scores(shape)
    for kept in range(1, method.members(shape)):
        groups, mask = method.groups(score), method.groups(method.keep(score, kept).double()) > 0
        worst = groups.masked_fill(~mask, torch.inf).amin(1)
        assert (groups.masked_fill(mask, -torch.inf).amax(1) <= worst).all()


@law(Pattern)
@each_shape
def test_curve_is_the_sum_of_what_goes(method, shape):
    score = scores(shape)
    curve = method.curve(score)
    assert curve.dtype == method.curve(score.float()).dtype == torch.float64
    assert len(curve) == method.members(shape) + 1
    for kept, error in enumerate(curve):
        gone = score.where(~method.keep(score, kept), 0)
        torch.testing.assert_close(error, gone.sum(), rtol=1e-12, atol=1e-12)


@law(Pattern)
@each_shape
def test_counts_are_allowed_and_ascending(method, shape):
    counts = method.counts(shape)
    assert counts.dtype == torch.int64
    assert (counts.diff() > 0).all()
    assert (counts >= 1).all()
    assert (counts < method.members(shape)).all()


@each_shape
def test_both_scopes_offer_the_same_shares(shape):
    shares = [
        same.counts(shape) / same.members(shape)
        for same in (leaves(Pattern)["unstructured"](within=w) for w in ("row", "layer"))
    ]
    torch.testing.assert_close(*shares)


@law(Pattern)
@each_shape
def test_counts_of_the_oracle(method, shape):
    wanted = oracle(f"compress/pattern/{method.name}", "counts")(*shape)
    assert method.counts(shape).tolist() == wanted


@law(Pattern)
def test_structured_leaves_a_smaller_dense_matrix(method):
    keep = method.keep(scores((6, 8)), method.members((6, 8)) // 2)
    block = keep.any(1)[:, None] & keep.any(0)
    assert torch.equal(keep, block) == method.structured


@law(Pattern)
def test_every_field_matters(method):
    score = scores((6, 180))
    for field in fields(method):
        now = (method.keep(score, 2).tolist(), method.counts((6, 180)).tolist(), method.promise())
        other = [
            (o.keep(score, 2).tolist(), o.counts((6, 180)).tolist(), o.promise())
            for o in others(method, field)
        ]
        assert any(one != now for one in other), field


@law(Pattern)
def test_promise_is_kept(method):
    promise = method.promise()
    keep = method.keep(scores((6, 180)), int(method.counts((6, 180))[-1]))
    if promise:
        assert set(promise) == {"n", "m"}
        assert (keep.reshape(-1, promise["m"]).sum(1) == promise["n"]).all()
        assert method.counts((6, 180)).tolist() == [promise["n"]]
    else:
        assert method.name != "n_m"


@law(Pattern)
def test_pure(method):
    score = scores((6, 8))
    before = score.clone()
    first = method.keep(score, 2)
    method.curve(score)
    assert torch.equal(method.keep(score, 2), first)
    assert torch.equal(score, before)
    assert type(method).model_validate(method.model_dump()) == method


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5), groups=st.integers(1, 4), m=st.integers(2, 6), seed=st.integers(0, 99)
)
def test_n_of_m_for_any_n_and_m(rows, groups, m, seed):
    score = scores((rows, groups * m), seed)
    for n in range(1, m):
        keep = leaves(Pattern)["n_m"](n=n, m=m).keep(score, n)
        wanted = oracle("compress/pattern/n_m")(score.numpy(), n, m)
        np.testing.assert_array_equal(keep.numpy(), wanted)


def test_n_m_refuses_what_it_cannot_do():
    two_four = leaves(Pattern)["n_m"]()
    with pytest.raises(UserError, match="6 inputs do not fall into groups of 4"):
        two_four.keep(scores((2, 6)), 2)
    with pytest.raises(ValidationError, match="n must be below m, not 4 of 4"):
        leaves(Pattern)["n_m"](n=4, m=4)
