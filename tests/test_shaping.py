from dataclasses import replace

import torch

from drawplate.rl.shaping import Shaping
from drawplate.rl.shaping.overlong_ramp import OverlongRamp
from tests.laws import law
from tests.rl_cases import fields, neighbours, oracle, rollout


@law(Shaping)
def test_oracle(method):
    for seed in range(4):
        for limit in (5, 6, 20):
            r = rollout(seed, limit=limit)
            if limit == 20:  # some answers are longer than what is allowed now
                r = replace(r, limit=12)
            want = torch.tensor(oracle(method)(r, **fields(method)), dtype=torch.float64)
            torch.testing.assert_close(method.reward(r), want, rtol=1e-10, atol=1e-12)


@law(Shaping)
def test_never_raises_a_reward_and_sometimes_lowers_one(method):
    r = rollout(reward=torch.ones(12).double())
    assert (method.reward(r) <= r.reward).all()
    assert (method.reward(r) < r.reward).any()


@law(Shaping)
def test_short_finished_answers_are_left_alone(method):
    r = rollout(limit=30, finished=torch.ones(12).bool())
    short = r.length <= 10
    assert short.any()
    assert torch.equal(method.reward(r)[short], r.reward[short])


@law(Shaping)
def test_input_unchanged(method):
    r = rollout()
    before = r.reward.clone()
    method.reward(r)
    assert torch.equal(r.reward, before)


@law(Shaping)
def test_every_field_matters(method):
    r = rollout(limit=12)
    for name, others in neighbours(method):
        assert any(not torch.equal(m.reward(r), method.reward(r)) for m in others), name


def test_ramp_takes_its_weight_at_the_limit():
    r = rollout(limit=4, samples=40)
    full = r.length == 4
    torch.testing.assert_close(OverlongRamp(weight=0.5).reward(r)[full], r.reward[full] - 0.5)
