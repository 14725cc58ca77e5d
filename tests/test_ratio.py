import torch

from drawplate.rl.ratio import Ratio
from tests.laws import law
from tests.rl_cases import oracle, rollout


@law(Ratio)
def test_oracle(method):
    for seed in range(4):
        r = rollout(seed)
        logp = r.logp.requires_grad_()
        value = method.log(logp, r.old, r.mask)
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        want, slope = oracle(method)(logp.tolist(), r.old.tolist(), r.mask.tolist())
        torch.testing.assert_close(
            value, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            gradient, torch.tensor(slope, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )


@law(Ratio)
def test_zero_at_old_equals_new(method):
    r = rollout()
    assert not method.log(r.old, r.old, r.mask).any()


@law(Ratio)
def test_padding_is_zero_and_immaterial(method):
    r = rollout()
    value = method.log(r.logp, r.old, r.mask)
    assert not value[~r.mask].any()
    junk = torch.where(r.mask, r.logp, 99.0)
    assert torch.equal(method.log(junk, r.old, r.mask), value)


@law(Ratio)
def test_answers_do_not_mix(method):
    r = rollout()
    whole = method.log(r.logp, r.old, r.mask)
    rows = [
        method.log(r.logp[i : i + 1], r.old[i : i + 1], r.mask[i : i + 1])
        for i in range(len(whole))
    ]
    assert torch.equal(torch.cat(rows), whole)


@law(Ratio)
def test_an_answer_without_tokens_is_zero_not_nan(method):
    r = rollout()
    mask = r.mask.clone()
    mask[4] = False
    assert not method.log(r.logp, r.old, mask)[4].any()
