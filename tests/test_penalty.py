import torch

from drawplate.rl.penalty import Penalty
from tests.laws import law
from tests.rl_cases import oracle, rollout


@law(Penalty)
def test_oracle(method):
    for seed in range(4):
        r = rollout(seed)
        want = torch.tensor(oracle(method)(r), dtype=torch.float64)
        torch.testing.assert_close(method.value(r), want, rtol=1e-10, atol=1e-12)


@law(Penalty)
def test_gradient_reaches_answers_alone(method):
    logp = rollout().logp.requires_grad_()
    r = rollout(logp=logp)
    (gradient,) = torch.autograd.grad(method.value(r).sum(), logp)
    assert gradient[r.mask].all()
    assert not gradient[~r.mask].any()


@law(Penalty)
def test_finite_however_far_the_policy_has_moved(method):
    r = rollout(reference=torch.full_like(rollout().logp, 900.0))
    assert method.value(r).isfinite().all()


@law(Penalty)
def test_a_batch_without_tokens_is_held_nowhere(method):
    r = rollout(mask=torch.zeros_like(rollout().mask))
    assert not method.where(r).any()


@law(Penalty)
def test_pulls_back_to_the_start(method):
    """Descending on the penalty alone ends at the reference."""
    r = rollout()
    logp = r.logp.clone().requires_grad_()
    for _ in range(2000):
        value = method.value(rollout(logp=logp)).sum()
        logp.data -= 0.02 * torch.autograd.grad(value, logp)[0].clamp(-5, 5)
    torch.testing.assert_close(logp[r.mask], r.reference[r.mask], rtol=0, atol=1e-3)
