import math
from itertools import product

import pytest
import torch

from drawplate.core.method import leaves
from drawplate.rl.loss import PolicyLoss
from drawplate.rl.mask.drop_truncated import DropTruncated
from drawplate.rl.penalty.k3 import K3
from drawplate.rl.ratio import Ratio
from drawplate.rl.ratio.token import Token
from drawplate.rl.reduce import Reduce
from drawplate.rl.reduce.answer_mean import AnswerMean
from drawplate.rl.reduce.token_mean import TokenMean
from drawplate.rl.rollout import join
from drawplate.rl.surrogate import Surrogate
from drawplate.rl.surrogate.ppo_clip import PpoClip
from tests.rl_cases import rollout

EVERY = [
    PolicyLoss(ratio=a(), surrogate=b(), reduce=c())
    for a, b, c in product(*(leaves(axis).values() for axis in (Ratio, Surrogate, Reduce)))
]
every = pytest.mark.parametrize(
    "loss", EVERY, ids=lambda m: f"{m.ratio.name}-{m.surrogate.name}-{m.reduce.name}"
)


def gradient(loss, logp, **given):
    logp = logp.detach().requires_grad_()
    return torch.autograd.grad(loss(rollout(logp=logp, **given)), logp)[0]


@every
def test_gradient_is_reinforce_at_old_equals_new(loss):
    r = rollout()
    weight = loss.reduce.weight(r.mask.double(), r.limit)
    want = -weight * r.mask * r.advantage
    torch.testing.assert_close(gradient(loss, r.old), want, rtol=1e-12, atol=1e-12)


@every
def test_zero_advantage_gives_zero_gradient(loss):
    r = rollout()
    assert not gradient(loss, r.logp, advantage=torch.zeros_like(r.logp)).any()


@every
def test_padding_gets_exactly_none(loss):
    r = rollout()
    junk = torch.where(r.mask, r.logp, 1e9)
    junk_advantage = torch.where(r.mask, r.advantage, float("nan"))
    got = gradient(loss, junk, advantage=junk_advantage)
    assert not got[~r.mask].any()
    assert torch.equal(got, gradient(loss, r.logp))


@every
def test_extra_padding_changes_nothing(loss):
    r = rollout()
    narrow = r.take(torch.arange(12))
    assert narrow.tokens.shape[1] < r.tokens.shape[1]
    torch.testing.assert_close(loss(narrow), loss(r), rtol=1e-13, atol=1e-13)


@every
def test_order_of_answers_is_immaterial(loss):
    r = rollout()
    torch.testing.assert_close(loss(r.take(torch.randperm(12))), loss(r), rtol=1e-12, atol=1e-12)


@every
def test_finite_however_far_the_policy_has_moved(loss):
    r = rollout()
    for far in (-800.0, 800.0):
        assert gradient(loss, r.old + far).isfinite().all()
        assert not gradient(loss, r.old + far, advantage=torch.zeros_like(r.old)).any()


def test_dropped_answers_neither_push_nor_count():
    """Masking answers out is the same as never having sampled them."""
    r = rollout()
    assert 0 < r.finished.sum() < 12
    for reduce in (TokenMean(), AnswerMean()):
        loss = PolicyLoss(
            ratio=Token(), surrogate=PpoClip(), reduce=reduce, masks=(DropTruncated(),)
        )
        kept = loss.model_copy(update={"masks": ()})(r.take(r.finished))
        torch.testing.assert_close(loss(r), kept, rtol=1e-12, atol=1e-12)


def test_penalty_is_subtracted_with_its_weight():
    r = rollout()
    base = EVERY[0]
    value = (base.reduce.weight(r.mask.double(), r.limit) * K3().value(r)).sum()
    for weight in (0.0, 0.5):
        loss = base.model_copy(update={"penalties": (K3(weight=weight),)})
        torch.testing.assert_close(loss(r), base(r) + weight * value)


def test_metrics():
    """Nothing at the start; otherwise what a loop over tokens finds, and sums of parts."""
    r = rollout()
    parts = {"ratio": Token(), "surrogate": PpoClip(), "reduce": TokenMean()}
    assert "kl_start" not in PolicyLoss(**parts).metrics(r)
    loss = PolicyLoss(**parts, penalties=(K3(),))
    still = loss.metrics(rollout(logp=r.old, reference=r.old, sampled=r.old))
    assert {name: float(value) for name, value in still.items()} == {
        "clip_fraction": 0,
        "ratio_drift": 0,
        "kl_step": 0,
        "kl_start": 0,
    }
    clipped, step = 0, 0.0
    for i, t in r.mask.nonzero().tolist():
        move = float(r.logp[i, t] - r.old[i, t])
        sign = float(r.advantage[i, t])
        clipped += move > math.log(1.28) if sign > 0 else move < math.log(0.8)
        step += math.exp(-move) + move - 1
    moved = loss.metrics(r)
    assert int(moved["clip_fraction"]) == clipped > 0
    torch.testing.assert_close(float(moved["kl_step"]), step)
    parts = [loss.metrics(r.take(rows)) for rows in torch.arange(12).chunk(3)]
    for name, value in moved.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


@every
def test_parts_add_up_under_the_weights_of_the_whole(loss):
    r = rollout()
    weight, objective = loss.weight(r), loss.objective(r)
    parts = [-(weight[rows] * objective[rows]).sum() for rows in torch.arange(12).chunk(5)]
    torch.testing.assert_close(sum(parts), loss(r))


def test_join_and_take_are_inverse():
    r = rollout()
    parts = [r.take(rows) for rows in torch.arange(12).chunk(4)]
    again = join(parts)
    width = again.tokens.shape[1]
    for name, value in again.tensors().items():
        whole = r.tensors()[name]
        whole = whole[:, :width] if whole.dim() > 1 else whole
        if name == "tokens":
            value, whole = value * r.mask[:, :width], whole * r.mask[:, :width]
        assert torch.equal(value, whole), name


def test_groups_of_rows():
    r = rollout(prompts=3, samples=4)
    assert r.grouped(r.reward).shape == (3, 4)
    assert torch.equal(r.grouped(r.reward)[1], r.reward[4:8])
    assert torch.equal(r.length, r.mask.sum(1))
