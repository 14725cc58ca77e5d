import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from drawplate.rl.advantage import Advantage
from drawplate.rl.advantage.batch import Batch
from drawplate.rl.advantage.group import Group
from tests.laws import law
from tests.rl_cases import fields, neighbours, oracle, rollout


def rewards(seed=0, prompts=4, samples=5):
    return torch.rand(prompts, samples, generator=torch.Generator().manual_seed(seed)).double()


@law(Advantage)
def test_oracle(method):
    for seed in range(5):
        reward = rewards(seed)
        want = torch.tensor(oracle(method)(reward.tolist(), **fields(method)), dtype=torch.float64)
        torch.testing.assert_close(method.answers(reward), want, rtol=1e-10, atol=1e-12)


@law(Advantage)
def test_group_sums_are_zero(method):
    assert method.answers(rewards()).sum(1).abs().max() < 1e-12


@law(Advantage)
def test_batch_sum_is_zero(method):
    assert abs(method.answers(rewards()).sum()) < 1e-12


@law(Advantage)
def test_constant_changes_nothing(method):
    shifted = method.answers(rewards() + 3)
    torch.testing.assert_close(shifted, method.answers(rewards()), rtol=1e-10, atol=1e-12)


@law(Advantage)
def test_a_better_answer_gets_more(method):
    reward = rewards()
    order = reward.argsort(1)
    assert (method.answers(reward).gather(1, order).diff(dim=1) > 0).all()


@law(Advantage)
def test_equal_rewards_give_exactly_zero(method):
    """In single precision too, where the mean of equal numbers is not always that number."""
    for value in (0.1, 0.7, 1 / 3):
        assert not method.answers(torch.full((3, 7), value)).any()


@law(Advantage)
def test_equal_groups_get_nothing(method):
    reward = rewards()
    reward[1], reward[2] = 0.1, 0.9
    assert not method.answers(reward)[1:3].any()


@law(Advantage)
def test_order_of_answers_and_prompts_is_immaterial(method):
    reward = rewards()
    rows, columns = torch.randperm(4), torch.randperm(5)
    moved = method.answers(reward[rows][:, columns])
    torch.testing.assert_close(
        moved, method.answers(reward)[rows][:, columns], rtol=1e-10, atol=1e-12
    )


@law(Advantage)
def test_input_unchanged_and_dtype_kept(method):
    reward = rewards().float()
    before = reward.clone()
    assert method.answers(reward).dtype == torch.float32
    assert torch.equal(reward, before)


@law(Advantage)
def test_fewest_samples(method):
    reward = rewards(prompts=3, samples=method.least)
    assert method.answers(reward).isfinite().all()
    assert method.answers(reward).any()


@law(Advantage)
def test_every_field_matters(method):
    reward = rewards() / 1e4
    for name, others in neighbours(method):
        assert any(not torch.equal(m.answers(reward), method.answers(reward)) for m in others), name


@law(Advantage)
def test_every_token_carries_its_answers_advantage(method):
    r = rollout()
    spread, answers = method.of(r), method.answers(r.grouped(r.reward)).flatten()
    assert spread.shape == r.mask.shape
    assert not spread[~r.mask].any()
    assert torch.equal(spread[r.mask], answers[:, None].expand_as(spread)[r.mask])


@settings(max_examples=50, deadline=None)
@given(reward=arrays(float, (3, 4), elements=st.floats(0, 1, allow_subnormal=False)))
def test_batch_has_mean_zero_and_deviation_one(reward):
    centred = reward - reward.mean(1, keepdims=True)
    if centred.std() < 1e-3:
        return
    value = Batch().answers(torch.from_numpy(reward))
    assert abs(value.mean()) < 1e-10
    assert value.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_binary_group_is_the_closed_form():
    """With success rate p a success gets sqrt((1 - p) / p), a failure minus its reciprocal."""
    value = Group(floor=1e-12).answers(
        torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    )
    torch.testing.assert_close(value, torch.tensor([[2.0, -0.5, -0.5, -0.5, -0.5]]).double())
