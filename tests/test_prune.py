"""Laws of every pruning score, and each against its oracle."""

import pytest
import torch

from drawplate.compress.prune import Prune
from drawplate.core.linalg import output_error
from drawplate.core.method import leaves
from drawplate.core.stats import Stats
from tests.compress_layers import LAYERS, fields, layer, oracle, others
from tests.laws import law

each_layer = pytest.mark.parametrize(("weight", "stats"), LAYERS, ids=lambda x: "")


def order(score):
    return score.flatten().argsort()


@law(Prune)
@each_layer
def test_oracle(method, weight, stats):
    wanted = oracle(f"compress/prune/{method.name}")(weight.numpy(), stats.gram.numpy())
    found = method.score(weight, stats)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-10, atol=0)


@law(Prune)
@each_layer
def test_a_score_for_every_weight_and_zero_for_zeros(method, weight, stats):
    weight = weight.clone()
    weight[1, 2] = 0
    score = method.score(weight, stats)
    assert score.shape == weight.shape
    assert (score >= 0).all()
    assert ((score == 0) == (weight == 0)).all()


@law(Prune)
@each_layer
def test_sign_does_not_matter_and_scale_keeps_the_order(method, weight, stats):
    score = method.score(weight, stats)
    torch.testing.assert_close(method.score(-weight, stats), score)
    torch.testing.assert_close(method.score(3 * weight, stats), 9 * score)
    louder = Stats(count=stats.count, gram=7 * stats.gram)
    assert torch.equal(order(method.score(weight, louder)), order(score))


@law(Prune)
@each_layer
def test_commutes_with_permutations(method, weight, stats):
    rows = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2))
    turned = Stats(count=stats.count, gram=stats.gram[columns][:, columns])
    found = method.score(weight[rows][:, columns], turned)
    torch.testing.assert_close(found, method.score(weight, stats)[rows][:, columns])


@law(Prune)
def test_grows_with_the_weight(method):
    weight, stats = layer()
    bigger = weight.clone()
    bigger[2, 3] *= 1.5
    before, after = method.score(weight, stats), method.score(bigger, stats)
    assert after[2, 3] > before[2, 3]
    before[2, 3] = after[2, 3]
    torch.testing.assert_close(after, before)


@law(Prune)
def test_rows_are_scored_on_their_own(method):
    weight, stats = layer()
    rows = torch.cat([method.score(row[None], stats) for row in weight])
    torch.testing.assert_close(method.score(weight, stats), rows)


@law(Prune)
def test_every_field_matters(method):
    weight, stats = layer()
    now = method.score(weight, stats)
    for field in fields(method):
        changed = [other.score(weight, stats) for other in others(method, field)]
        assert any(not torch.equal(score, now) for score in changed), field


@law(Prune)
def test_reads_only_what_it_needs(method):
    weight, stats = layer()
    less = Stats(count=stats.count, **{part: getattr(stats, part) for part in method.needs})
    assert torch.equal(method.score(weight, less), method.score(weight, stats))


@law(Prune)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure(method, dtype):
    weight, stats = layer()
    weight = weight.to(dtype)
    before = weight.clone(), stats.gram.clone()
    score = method.score(weight, stats)
    assert score.dtype == dtype
    assert torch.equal(method.score(weight, stats), score)
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.gram, before[1])
    assert type(method).model_validate(method.model_dump()) == method


@law(Prune)
def test_float32_is_close_to_float64(method):
    weight, stats = layer()
    low = method.score(weight.float(), Stats(count=40, gram=stats.gram.float()))
    torch.testing.assert_close(low.double(), method.score(weight, stats), rtol=1e-5, atol=1e-7)


@each_layer
def test_wanda_is_exact_for_uncorrelated_inputs(weight, stats):
    diagonal = Stats(count=stats.count, gram=stats.gram.diagonal().diag())
    score = leaves(Prune)["wanda"]().score(weight, diagonal)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            gone = torch.zeros_like(weight)
            gone[i, j] = weight[i, j]
            torch.testing.assert_close(score[i, j], output_error(gone, diagonal.gram))


@each_layer
def test_obs_never_exceeds_wanda_up_to_damping(weight, stats):
    """Refitting the others can only help: w^2 / [G^-1]_jj <= w^2 G_jj."""
    obs = leaves(Prune)["obs"](damping=1e-9).score(weight, stats)
    assert (obs <= leaves(Prune)["wanda"]().score(weight, stats) * (1 + 1e-6)).all()
