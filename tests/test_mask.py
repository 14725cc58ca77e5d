import torch

from drawplate.rl.mask import Mask
from tests.laws import law
from tests.rl_cases import fields, neighbours, oracle, rollout


@law(Mask)
def test_oracle(method):
    for seed in range(4):
        r = rollout(seed)
        want = torch.tensor(oracle(method)(r, **fields(method)), dtype=torch.float64)
        torch.testing.assert_close(method.weight(r), want, rtol=1e-10, atol=0)


@law(Mask)
def test_factors_without_gradient(method):
    r = rollout(logp=rollout().logp.requires_grad_())
    weight = method.weight(r)
    assert not weight.requires_grad
    assert ((weight >= 0) & (weight <= 1)).all()
    assert weight.dtype == r.logp.dtype


@law(Mask)
def test_something_is_dropped_and_something_kept(method):
    r = rollout()
    inside = method.weight(r)[r.mask]
    assert (inside < 1).any()
    assert (inside > 0).any()


@law(Mask)
def test_every_field_matters(method):
    r = rollout()
    for name, others in neighbours(method):
        assert any(not torch.equal(m.weight(r), method.weight(r)) for m in others), name
