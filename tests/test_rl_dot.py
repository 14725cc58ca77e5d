"""DOT: cuts of outlying answers, the divergence where entropy is lost, sampling by prediction."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from drawplate.core.method import leaves
from drawplate.rl.cut import Cut
from drawplate.rl.cut.outlier import Outlier
from drawplate.rl.loss import PolicyLoss
from drawplate.rl.penalty.k3 import K3
from drawplate.rl.penalty.kl_cov import KlCov
from drawplate.rl.ratio.token import Token
from drawplate.rl.reduce.answer_mean import AnswerMean
from drawplate.rl.select import Select
from drawplate.rl.select.predicted import Predicted
from drawplate.rl.surrogate.reinforce import Reinforce
from tests.laws import law
from tests.oracle.rl.penalty import kl_cov as kl_cov_oracle
from tests.oracle.rl.select import predicted as predicted_oracle
from tests.rl_cases import fields, neighbours, oracle, rollout

SMALL = {"deviations": 0.5, "margin": 1}


def answers(lengths):
    """One group of right answers of these lengths, behind prompts of one token."""
    count, width = len(lengths), 1 + max(lengths)
    column = torch.arange(width)
    mask = (column >= 1) & (column <= torch.tensor(lengths)[:, None])
    figure = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).double()
    values = {
        "tokens": torch.arange(width).repeat(count, 1),
        "mask": mask,
        "finished": torch.ones(count).bool(),
        "score": torch.ones(count).double(),
        "reward": torch.ones(count).double(),
    }
    names = ("sampled", "old", "reference", "logp", "advantage")
    values |= dict.fromkeys(names, figure)
    return rollout(prompts=1, samples=count, limit=max(lengths), **values)


def solved(seed):
    """Groups of eight of which about half are all right."""
    score = (torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    every = score.repeat_interleave(8)
    every[3] = 0.0
    return rollout(seed, prompts=6, samples=8, limit=40, score=every, reward=every)


def unseen(row, tokens):
    raise AssertionError("nothing was cut, so nothing is to be scored")


@law(Cut, **SMALL)
def test_cut_oracle(method):
    for seed in range(6):
        r = solved(seed)
        assert method.keep(r).tolist() == oracle(method)(r, **fields(method))


@law(Cut, **SMALL)
def test_an_answer_keeps_a_token_or_more_and_never_grows(method):
    for seed in range(6):
        r = solved(seed)
        keep = method.keep(r)
        assert ((keep >= 1) & (keep <= r.length)).all()
        assert not keep.is_floating_point()


@law(Cut, **SMALL)
def test_a_group_is_judged_by_itself(method):
    r = solved(1)
    alone = [method.keep(r.take(r.group == i)) for i in range(6)]
    assert torch.equal(method.keep(r), torch.cat(alone))


@law(Cut, **SMALL)
def test_what_was_cut_is_scored_again_and_unfinished(method):
    """The rest stays as it is, and columns behind the cut are gone from every figure."""
    r = solved(0)
    keep = method.keep(r)
    less = keep < r.length
    assert less.any()
    assert not less.all()
    seen = {}

    def score(row, tokens):
        seen[row] = tokens
        return 0.25

    before = {name: value.clone() for name, value in r.tensors().items()}
    after = method.applied(r, score)
    assert torch.equal(after.length, keep)
    assert sorted(seen) == less.nonzero().flatten().tolist()
    for row, tokens in seen.items():
        assert tokens == r.tokens[row, r.mask[row]].tolist()[: int(keep[row])]
    assert (after.score[less] == 0.25).all()
    assert torch.equal(after.score, after.reward)
    assert not after.finished[less].any()
    for name in ("score", "finished", "mask", "old", "sampled"):
        assert torch.equal(getattr(after, name)[~less], before[name][~less])
    assert not after.old[~after.mask].any()
    assert all(torch.equal(value, before[name]) for name, value in r.tensors().items())


@law(Cut, **SMALL)
def test_every_field_of_a_cut_matters(method):
    for name, others in neighbours(method):
        changed = (
            m.keep(solved(s)).tolist() != method.keep(solved(s)).tolist()
            for m in others
            for s in range(4)
        )
        assert any(changed), name


def test_mixed_groups_are_never_cut():
    lengths = [10] * 15 + [400]
    assert Outlier().keep(answers(lengths)).tolist()[-1] < 400
    for i in (0, 15):
        score = torch.ones(16).double()
        score[i] = 0.99
        r = answers(lengths)
        mixed = replace(r, score=score)
        assert Outlier().keep(mixed).tolist() == lengths
        assert Outlier().applied(mixed, unseen).score.tolist() == score.tolist()


def test_only_the_tail_is_cut_at_the_bound_of_the_paper():
    """Fifteen answers of 10 tokens and one of 400: mean 34.375, deviation 97.5, bound 326."""
    assert Outlier().keep(answers([10] * 15 + [400])).tolist() == [10] * 15 + [326]
    assert Outlier(deviations=0.5, margin=1).keep(answers([1, 100])).tolist() == [1, 85]
    spread = list(range(100, 900, 50))  # none is three deviations out
    assert Outlier().keep(answers(spread)).tolist() == spread


def test_margin_is_the_fewest_tokens_that_are_cut():
    lengths = [10] * 15 + [400]
    assert Outlier(margin=74).keep(answers(lengths)).tolist()[-1] == 326
    assert Outlier(margin=75).keep(answers(lengths)).tolist()[-1] == 400


@pytest.mark.parametrize("deviations", [0.5, 1.0, 2.0, 3.0, 4.2])
def test_fewer_samples_than_the_least_can_never_be_cut(deviations):
    """One outlier among equals is the furthest that a value can be out."""
    method = Outlier(deviations=deviations, margin=1)
    enough = [1] * (method.least - 1) + [10**6]
    assert method.keep(Lengths(enough)).tolist() != enough
    few = [1] * (method.least - 2) + [10**6]
    assert method.keep(Lengths(few)).tolist() == few


class Lengths:
    """Lengths and scores of one group, without the tokens."""

    def __init__(self, lengths):
        self.length = torch.tensor(lengths)
        self.score = torch.ones(len(lengths))

    def grouped(self, figure):
        return figure.view(1, -1)


def test_the_tokens_of_the_largest_covariance_are_held():
    for seed in range(4):
        r = rollout(seed, prompts=8)
        for share in (1e-9, 0.02, 0.3, 1.0):
            want = torch.tensor(kl_cov_oracle.held(r, share)).double()
            assert torch.equal(KlCov(share=share).where(r), want)


def test_kl_cov_is_felt_by_the_held_tokens_alone():
    r = rollout(prompts=8)
    plain = PolicyLoss(ratio=Token(), surrogate=Reinforce(), reduce=AnswerMean())
    loss = plain.model_copy(update={"penalties": (KlCov(weight=0.7, share=0.1),)})
    logp = r.logp.clone().requires_grad_()
    moved = rollout(prompts=8, logp=logp)
    apart = torch.autograd.grad(loss(moved) - plain(moved), logp)[0]
    held = KlCov(share=0.1).where(r).bool()
    assert 0 < held.sum() < r.mask.sum()
    assert not apart[~held].any()
    want = 0.7 * plain.weight(r) * (r.logp - r.old).sign()
    torch.testing.assert_close(apart[held], want[held], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"share": 0.5}])
def test_every_field_of_kl_cov_matters(change):
    r = rollout(prompts=8)
    parts = {"ratio": Token(), "surrogate": Reinforce(), "reduce": AnswerMean()}
    one, other = (PolicyLoss(**parts, penalties=(KlCov(**each),)) for each in ({}, change))
    assert one(r) != other(r)


def test_parts_add_up_when_tokens_are_chosen_in_the_whole():
    r = rollout(prompts=8)
    loss = PolicyLoss(
        ratio=Token(),
        surrogate=Reinforce(),
        reduce=AnswerMean(),
        penalties=(KlCov(share=0.1), K3()),
    )
    weight, held = loss.weight(r), loss.held(r)
    assert held.shape == (*r.mask.shape, 2)
    assert torch.equal(held[..., 1], 0.04 * r.mask.double())
    total = torch.zeros(()).double()
    for rows in torch.arange(32).chunk(5):
        part = r.take(rows)
        columns = part.mask.shape[1]
        share = weight[rows][:, :columns]
        total -= (share * loss.objective(part, held[rows][:, :columns])).sum()
    torch.testing.assert_close(total, loss(r))


PAST = [[], [0.0], [1.0], [0.5], [0.3, 0.7], [0.0] * 30 + [0.8] * 5, [0.9] * 30, [0.01] * 3]


@pytest.mark.parametrize("shares", PAST)
@pytest.mark.parametrize(
    "given", [{}, {"window": 2}, {"first": 4.0}, {"least": 3.0}, {"most": 1.3}]
)
def test_prediction_oracle(shares, given):
    method = Predicted(**given)
    for missing in (1, 7, 128):
        assert method.ask(missing, shares) == predicted_oracle.asked(
            missing, shares, **fields(method)
        )


def test_a_steady_share_asks_for_just_enough_and_a_shaky_one_for_more():
    method = Predicted(least=1.0)
    assert method.ask(30, [0.5] * 9) == 60
    assert method.ask(30, [0.25, 0.75]) == 75
    assert method.ask(30, [1.0]) == 30
    assert method.ask(30, [0.0]) == 150
    assert Predicted().ask(30, []) == 45


@pytest.mark.parametrize("method", leaves(Select).values())
def test_no_choice_of_groups_asks_for_fewer_than_are_missing(method):
    for shares in PAST:
        assert method().ask(9, shares) >= 9


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ValidationError, match="at most most"):
        Predicted(least=3, most=2)
