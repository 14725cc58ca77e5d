import torch

from drawplate.rl.select import Select
from drawplate.rl.select.every import Every
from drawplate.rl.select.mixed import Mixed
from drawplate.rl.select.varied import Varied
from tests.laws import law
from tests.rl_cases import neighbours, oracle, rollout


def effort(method):
    """How much is sampled: rounds, and the size of one after batches of all sorts."""
    past = ([], [0.0], [1.0], [0.1] * 2, [0.1] * 30 + [0.5] * 20)
    return method.draws(), [method.ask(50, shares) for shares in past]


@law(Select)
def test_oracle(method):
    for seed in range(6):
        r = rollout(seed, prompts=6, samples=2)
        assert method.keep(r).tolist() == oracle(method)(r)


@law(Select)
def test_a_group_is_judged_by_itself(method):
    r = rollout(prompts=6, samples=2)
    alone = [bool(method.keep(r.take(r.group == i))) for i in range(6)]
    assert method.keep(r).tolist() == alone


@law(Select)
def test_every_field_matters(method):
    for name, others in neighbours(method):
        assert any(effort(m) != effort(method) for m in others), name


def test_every_keeps_groups_of_one_and_draws_once():
    assert Every().keep(rollout(prompts=3, samples=1)).tolist() == [True] * 3
    assert Every().draws() == 1


def test_equal_groups_are_dropped():
    score = torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.float64)
    r = rollout(prompts=3, samples=2, score=score, reward=score)
    assert Mixed().keep(r).tolist() == Varied().keep(r).tolist() == [False, False, True]
    assert Every().keep(r).all()


def test_mixed_looks_at_scores_and_varied_at_rewards():
    """A group that is all right, one answer cut short: only the shaped reward tells them apart."""
    score, reward = torch.ones(2).double(), torch.tensor([1, 0], dtype=torch.float64)
    r = rollout(prompts=1, samples=2, score=score, reward=reward)
    assert not Mixed().keep(r).any()
    assert Varied().keep(r).all()
