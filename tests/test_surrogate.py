import torch

from drawplate.rl.surrogate import Surrogate
from tests.laws import law
from tests.rl_cases import fields, neighbours, oracle


def case(seed=0, count=200):
    g = torch.Generator().manual_seed(seed)
    log_ratio, logp, advantage = torch.randn(3, 1, count, generator=g, dtype=torch.float64)
    return log_ratio, logp - 2, advantage


@law(Surrogate)
def test_oracle(method):
    """Value, gradient through the log ratio and logp together, and which tokens are bounded."""
    log_ratio, logp, advantage = case()
    move = torch.zeros_like(logp, requires_grad=True)
    value = method.value(log_ratio + move, logp + move, advantage)
    (gradient,) = torch.autograd.grad(value.sum(), move)
    clipped = method.clipped(log_ratio, advantage)
    for i in range(logp.shape[1]):
        want = oracle(method)(
            log_ratio[0, i].item(), logp[0, i].item(), advantage[0, i].item(), **fields(method)
        )
        got = value[0, i].item(), gradient[0, i].item()
        torch.testing.assert_close(got, want[:2], rtol=1e-10, atol=1e-12)
        assert clipped[0, i].item() is want[2]


@law(Surrogate)
def test_gradient_is_reinforce_at_old_equals_new(method):
    _, logp, advantage = case()
    move = torch.zeros_like(logp, requires_grad=True)
    (gradient,) = torch.autograd.grad(method.value(move, logp + move, advantage).sum(), move)
    torch.testing.assert_close(gradient, advantage, rtol=1e-12, atol=1e-12)


@law(Surrogate)
def test_nothing_is_clipped_at_old_equals_new(method):
    _, logp, advantage = case()
    assert not method.clipped(torch.zeros_like(logp), advantage).any()


@law(Surrogate)
def test_zero_advantage_gives_zero_gradient(method):
    log_ratio, logp, advantage = case()
    move = torch.zeros_like(logp, requires_grad=True)
    value = method.value(log_ratio + move, logp + move, torch.zeros_like(advantage))
    assert not torch.autograd.grad(value.sum(), move)[0].any()


@law(Surrogate)
def test_gradient_never_points_away_from_the_advantage(method):
    log_ratio, logp, advantage = case()
    move = torch.zeros_like(logp, requires_grad=True)
    value = method.value(log_ratio + move, logp + move, advantage)
    assert (torch.autograd.grad(value.sum(), move)[0] * advantage >= 0).all()


@law(Surrogate)
def test_every_field_matters(method):
    log_ratio, logp, advantage = case()
    args = 2 * log_ratio, logp, advantage
    for name, others in neighbours(method):
        assert any(not torch.equal(m.value(*args), method.value(*args)) for m in others), name


@law(Surrogate)
def test_a_token_without_advantage_does_not_count_as_clipped(method):
    log_ratio, _, advantage = case()
    assert not method.clipped(5 * log_ratio, torch.zeros_like(advantage)).any()
