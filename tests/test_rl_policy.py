from contextlib import nullcontext

import pytest
import torch

from drawplate.edits.quantized_embedding import TiedHead
from drawplate.rl import policy
from drawplate.rl.policy import judge
from drawplate.train import loss
from tests import tiny
from tests.test_edits import quantize_table


def case():
    tokens = tiny.tokens(4, 10)
    column = torch.arange(10)
    start, end = torch.tensor([2, 1, 5, 3]), torch.tensor([7, 10, 6, 9])
    return tokens, (column >= start[:, None]) & (column < end[:, None])


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_is_the_softmax_of_the_models_logits(kind, temperature):
    """Token by token, one row at a time without its padding."""
    model = tiny.model(kind).double().requires_grad_(False)
    tokens, mask = case()
    logp, entropy = judge(model, tokens, mask, temperature)
    assert not entropy.requires_grad
    for i, inside in enumerate(mask):
        last = int(inside.nonzero().max()) + 1
        p = (model(input_ids=tokens[i : i + 1, :last]).logits[0] / temperature).softmax(-1)
        for t in range(10):
            want, spread = 0.0, 0.0
            if inside[t]:
                before = p[t - 1]
                want = float(before[tokens[i, t]].log())
                spread = float(-(before * before.log()).sum())
            assert float(logp[i, t].detach()) == pytest.approx(want, rel=1e-9, abs=1e-9)
            assert float(entropy[i, t]) == pytest.approx(spread, rel=1e-9, abs=1e-9)


def test_gradient_is_the_models():
    model = tiny.model().double()
    tokens, mask = case()
    weight = model.model.layers[0].mlp.up_proj.weight
    (got,) = torch.autograd.grad(judge(model, tokens, mask, 0.7)[0].sum(), weight)
    log = (model(input_ids=tokens).logits / 0.7).log_softmax(-1)[:, :-1]
    value = log.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    (want,) = torch.autograd.grad(value[mask[:, 1:]].sum(), weight)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_padding_is_immaterial():
    model = tiny.model()
    tokens, mask = case()
    after = mask.flip(1).cumsum(1).flip(1) == 0
    other = tokens.masked_fill(after, 5)
    assert not torch.equal(other, tokens)
    for a, b in zip(judge(model, tokens, mask, 1.0), judge(model, other, mask, 1.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("line", [1, 16, 40])
def test_rows_share_lines_without_overlap(monkeypatch, line):
    monkeypatch.setattr(policy, "LINE", line)
    _, mask = case()
    lines, columns = policy._packed(mask)
    lengths = [int(row.nonzero().max()) + 1 for row in mask]
    taken = set()
    for i, length in enumerate(lengths):
        begin = int(columns[i, 0])
        assert columns[i, :length].tolist() == list(range(begin, begin + length))
        assert (columns[i, length:] == -1).all()
        places = {(int(lines[i]), begin + j) for j in range(length)}
        assert not places & taken
        taken |= places
    width = max(line, *lengths)
    assert max(column for _, column in taken) < width
    assert int(lines.max()) + 1 == {1: 4, 16: 2, 40: 1}[line]


def test_lines_do_not_change_what_is_said(monkeypatch):
    model = tiny.model().double()
    tokens, mask = case()
    said = []
    for line in (1, 16, 40):
        monkeypatch.setattr(policy, "LINE", line)
        said.append(judge(model, tokens, mask, 0.8))
    for logp, entropy in said[1:]:
        torch.testing.assert_close(logp, said[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(entropy, said[0][1], rtol=1e-10, atol=1e-12)


def test_few_logits_are_held_at_a_time(monkeypatch):
    """As many tokens at a time as the vocabulary leaves room for."""
    model, seen = tiny.model(), []
    model.lm_head.register_forward_hook(lambda head, given, logits: seen.append(len(given[0])))
    tokens = tiny.tokens(40, 20)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    judge(model, tokens, mask, 1.0)
    assert seen == [760, 760]  # losses, entropies
    seen.clear()
    monkeypatch.setattr(loss, "LOGITS", 96 * 300)
    judge(model, tokens, mask, 1.0)
    assert seen == [300, 300, 160] * 2


def test_a_packed_head_is_decoded_once(monkeypatch):
    model = tiny.model()
    quantize_table(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    decoded, inner = [], TiedHead.matrix
    monkeypatch.setattr(TiedHead, "matrix", lambda head: decoded.append(1) or inner(head))
    monkeypatch.setattr(policy, "ROWS", 5)

    def said():
        logp, entropy = judge(model, *case(), 0.7)
        return logp, entropy, *torch.autograd.grad(logp.sum(), weight)

    found = said()
    assert len(decoded) == 1
    monkeypatch.setattr(policy, "materialized", lambda model: nullcontext())
    assert all(map(torch.equal, found, said()))
    assert len(decoded) > 4
