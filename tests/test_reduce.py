import torch

from drawplate.rl.reduce import Reduce
from drawplate.rl.reduce.answer_mean import AnswerMean
from drawplate.rl.reduce.fixed_length import FixedLength
from drawplate.rl.reduce.token_mean import TokenMean
from tests.laws import law
from tests.rl_cases import oracle, rollout


def case(seed=0):
    r = rollout(seed)
    keep = r.mask.double()
    keep[3] = 0
    return r.logp, keep, r.limit


@law(Reduce)
def test_oracle(method):
    for seed in range(4):
        value, keep, limit = case(seed)
        got = (method.weight(keep, limit) * value).sum().item()
        want = oracle(method)(value.tolist(), keep.tolist(), limit)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@law(Reduce)
def test_only_kept_tokens_weigh(method):
    _, keep, limit = case()
    weight = method.weight(keep, limit)
    assert torch.equal(weight > 0, keep > 0)


@law(Reduce)
def test_padding_changes_nothing(method):
    _, keep, limit = case()
    wider = torch.nn.functional.pad(keep, (0, 3))
    assert torch.equal(method.weight(wider, limit)[:, :-3], method.weight(keep, limit))


@law(Reduce)
def test_nothing_kept_gives_zero_not_nan(method):
    _, keep, limit = case()
    assert not method.weight(torch.zeros_like(keep), limit).any()


def test_weights_sum_to_what_is_promised():
    _, keep, limit = case()
    for mean in (TokenMean(), AnswerMean()):
        torch.testing.assert_close(mean.weight(keep, limit).sum().item(), 1.0)
    share = keep.sum(1).mean() / limit
    torch.testing.assert_close(FixedLength().weight(keep, limit).sum(), share)


def test_long_answers_weigh_most_by_token_mean_and_the_same_by_answer_mean():
    _, keep, limit = case()
    long, short = keep.sum(1).argmax(), (keep.sum(1) + 99 * (keep.sum(1) == 0)).argmin()
    by_token = TokenMean().weight(keep, limit).sum(1)
    by_answer = AnswerMean().weight(keep, limit).sum(1)
    assert by_token[long] > by_token[short]
    torch.testing.assert_close(by_answer[long], by_answer[short])


def test_a_single_token_has_the_whole_weight_of_a_mean():
    keep = torch.zeros(3, 5, dtype=torch.float64)
    keep[1, 2] = 1
    for mean in (TokenMean(), AnswerMean()):
        assert torch.equal(mean.weight(keep, 5), keep)
