"""DLER's extensions: truncation by difficulty, and merging of the largest changes."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from drawplate.rl.cut.difficulty import Difficulty
from drawplate.rl.merge import Merge
from drawplate.rl.merge.largest import Largest
from drawplate.rl.merge.whole import Whole
from tests.laws import law
from tests.oracle.rl.cut.difficulty import reference
from tests.rl_cases import fields, neighbours, oracle, rollout


def numbers(seed=0, count=301):
    start, change = torch.randn(
        2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return start, start + change / 8


@pytest.mark.parametrize("levels", [(), (0.5,), (0.25, 0.5, 1.0)])
def test_tiers_oracle(levels):
    shares = (1.0, 0.7, 0.4, 0.2)[: len(levels) + 1]
    method = Difficulty(levels=levels, shares=shares)
    for seed in range(8):
        r = rollout(seed, prompts=6, samples=4, limit=20)
        assert method.keep(r).tolist() == reference(r, levels, shares)


@pytest.mark.parametrize(("right", "limit"), [(0, 20), (1, 20), (2, 10), (3, 10), (4, 10)])
def test_a_prompt_is_easy_from_the_level_on(right, limit):
    score = torch.tensor([1.0] * right + [0.0] * (4 - right)).double()
    for seed in range(5):
        r = rollout(seed, prompts=1, limit=20, score=score, finished=torch.ones(4).bool())
        assert Difficulty().keep(r).tolist() == r.length.clamp(max=limit).tolist()


def test_right_answers_that_were_cut_do_not_make_a_prompt_easy():
    r = rollout(prompts=1, limit=20, score=torch.ones(4).double(), finished=torch.zeros(4).bool())
    assert torch.equal(Difficulty().keep(r), r.length)


def test_graded_scores_count_as_far_as_they_go():
    r = rollout(3, prompts=1, limit=20, finished=torch.ones(4).bool())
    assert r.length.max() > 10
    for score, longest in ((0.49, 20), (0.51, 10)):
        graded = replace(r, score=torch.full((4,), score).double())
        assert torch.equal(Difficulty().keep(graded), r.length.clamp(max=longest))


def test_one_tier_of_the_whole_limit_cuts_nothing():
    r = rollout(limit=9)
    assert torch.equal(Difficulty(levels=(), shares=(1.0,)).keep(r), r.length)


def test_tiers_that_do_not_fit_are_refused():
    for levels, shares, said in (
        ((0.5,), (1.0,), "1 levels take 2 shares"),
        ((0.5, 0.5), (1.0, 0.5, 0.2), "levels have to rise"),
        ((0.5,), (0.5, 1.0), "shares have to fall"),
        ((0.5,), (1.0, 0.0), "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=said):
            Difficulty(levels=levels, shares=shares)


@law(Merge)
def test_merge_oracle(method):
    for seed in range(3):
        start, trained = numbers(seed)
        want = oracle(method)(start.tolist(), trained.tolist(), **fields(method))
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(method.merged(start, trained), want, rtol=1e-10, atol=1e-14)


@law(Merge)
def test_each_number_ends_between_start_and_training(method):
    start, trained = numbers()
    merged = method.merged(start, trained)
    low, high = torch.minimum(start, trained), torch.maximum(start, trained)
    assert ((merged >= low) & (merged <= high)).all()
    assert not torch.equal(merged, start)


@law(Merge)
def test_nothing_changed_is_nothing_merged(method):
    start, _ = numbers()
    assert torch.equal(method.merged(start, start.clone()), start)


@law(Merge)
def test_merging_leaves_its_inputs_alone_and_keeps_the_order(method):
    start, trained = numbers()
    before = start.clone(), trained.clone()
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(1))
    merged = method.merged(start, trained)
    assert torch.equal(start, before[0])
    assert torch.equal(trained, before[1])
    assert torch.equal(method.merged(start[order], trained[order]), merged[order])


@law(Merge)
def test_every_field_of_a_merge_matters(method):
    args = numbers()
    for name, others in neighbours(method):
        assert any(not torch.equal(m.merged(*args), method.merged(*args)) for m in others), name


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_exactly_the_share_moves_and_no_change_left_out_is_larger(share):
    start, trained = numbers()
    merged = Largest(share=share, scale=1.0).merged(start, trained)
    moved = merged != start
    assert moved.sum() == round(share * len(start))
    torch.testing.assert_close(merged[moved], trained[moved], rtol=1e-12, atol=1e-12)
    change = (trained - start).abs()
    assert not (~moved).any() or change[moved].min() >= change[~moved].max()


def test_whole_is_what_was_trained_bit_for_bit():
    start, trained = numbers()
    assert torch.equal(Whole().merged(start.float(), trained.float()), trained.float())
