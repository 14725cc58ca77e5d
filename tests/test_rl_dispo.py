"""DISPO's four regimes, and CISPO as the case of equal bounds."""

from itertools import product

import pytest
import torch

from drawplate.core.method import leaves
from drawplate.rl.loss import PolicyLoss
from drawplate.rl.ratio import Ratio
from drawplate.rl.reduce import Reduce
from drawplate.rl.surrogate.cispo import Cispo
from drawplate.rl.surrogate.dispo import Dispo
from drawplate.rl.surrogate.reinforce import Reinforce
from tests.rl_cases import rollout

BOUNDS = {"right_down": 0.3, "right_up": 0.5, "wrong_down": 0.6, "wrong_up": 2.0}


def gradient(method, log_ratio, advantage, logp=-1.5):
    """How the objective of one token changes with its log-probability."""
    move = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    value = method.value(move + log_ratio, move + logp, torch.full_like(move, advantage))
    return float(torch.autograd.grad(value.sum(), move)[0])


@pytest.mark.parametrize(
    ("advantage", "weight", "used"),
    [
        (2.0, 9.0, 1.5),  # right, above one
        (2.0, 0.1, 0.7),  # right, below one
        (-2.0, 9.0, 3.0),  # wrong, above one
        (-2.0, 0.1, 0.4),  # wrong, below one
        (2.0, 1.4, 1.4),
        (2.0, 0.8, 0.8),
        (-2.0, 2.9, 2.9),
        (-2.0, 0.5, 0.5),
    ],
)
def test_the_gradient_is_the_clipped_weight_times_the_advantage(advantage, weight, used):
    log_ratio = torch.tensor(weight, dtype=torch.float64).log()
    got = gradient(Dispo(**BOUNDS), log_ratio, advantage)
    assert got == pytest.approx(used * advantage, rel=1e-12)
    clipped = Dispo(**BOUNDS).clipped(log_ratio.view(1, 1), torch.full((1, 1), advantage))
    assert clipped.item() is (used != weight)


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_bound_rules_its_own_regime_alone(bound):
    """Of the four regimes, changing one bound changes exactly one."""
    regimes = {
        "right_down": (-3.0, 1.0),
        "right_up": (3.0, 1.0),
        "wrong_down": (-3.0, -1.0),
        "wrong_up": (3.0, -1.0),
    }
    wider = Dispo(**(BOUNDS | {bound: BOUNDS[bound] * 1.1}))
    changed = {
        name
        for name, regime in regimes.items()
        if gradient(wider, *regime) != gradient(Dispo(**BOUNDS), *regime)
    }
    assert changed == {bound}


LOSSES = list(product(leaves(Ratio).values(), leaves(Reduce).values()))


@pytest.mark.parametrize(("ratio", "reduce"), LOSSES)
@pytest.mark.parametrize("high", [0.28, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_bounds_are_cispo_bit_for_bit(ratio, reduce, high, dtype):
    """Loss, gradient and metrics; CISPO bounds weights from above alone, so `down` is 1."""
    equal = Dispo(right_down=1, wrong_down=1, right_up=high, wrong_up=high)
    r = rollout(prompts=20)
    figures = {name: getattr(r, name).to(dtype) for name in ("old", "advantage")}
    results = []
    for surrogate in (Cispo(high=high), equal):
        logp = r.logp.to(dtype).requires_grad_()
        loss = PolicyLoss(ratio=ratio(), surrogate=surrogate, reduce=reduce())
        moved = rollout(prompts=20, logp=logp, **figures)
        value = loss(moved)
        results.append(
            (value, torch.autograd.grad(value, logp)[0], loss.metrics(moved)["clip_fraction"])
        )
    for cispo, dispo in zip(*results, strict=True):
        assert torch.equal(cispo, dispo)
    assert results[0][2] > 0


def test_wide_bounds_are_reinforce():
    log_ratio, logp = torch.randn(2, 1, 50, dtype=torch.float64)
    advantage = torch.randn(1, 50, dtype=torch.float64)
    wide = Dispo(right_down=1, wrong_down=1, right_up=1e9, wrong_up=1e9)
    for i in range(50):
        args = log_ratio[0, i], float(advantage[0, i]), logp[0, i]
        assert gradient(wide, *args) == pytest.approx(gradient(Reinforce(), *args), rel=1e-12)
    assert not wide.clipped(log_ratio, advantage).any()
