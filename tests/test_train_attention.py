import math

import pytest
import torch
from torch import nn

from drawplate.train.attention import LONGEST, NAME, attention_for, short_rows
from tests import tiny


def reference(query, key, value, allowed, scale):
    """Loops over batch, head and position."""
    B, H, T, K = query.shape
    group = H // key.shape[1]
    out = torch.zeros(B, T, H, K, dtype=query.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(T) if allowed[b][t][s]]
                scores = [scale * float(query[b, h, t] @ key[b, h // group, s]) for s in seen]
                most = max(scores)
                weights = [math.exp(score - most) for score in scores]
                for s, weight in zip(seen, weights, strict=True):
                    out[b, t, h] += weight / sum(weights) * value[b, h // group, s]
    return out


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_is_the_sum_over_what_a_token_sees(packed, scaling):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)]
    query, key, value = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    allowed = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    mask = None
    if packed:
        allowed[1, 3:, :3] = False  # a document that begins at the fourth token
        lowest = torch.finfo(torch.float64).min
        mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
        mask.masked_fill_(~allowed[:, None], lowest)
    got, _ = short_rows(nn.Module().eval(), query, key, value, mask, scaling=scaling)
    want = reference(query, key, value, allowed, scaling or 8**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi"])
def test_models_say_the_same_with_it(kind):
    model = tiny.model(kind).bfloat16()
    tokens = tiny.tokens(3, 12)
    plain = model(input_ids=tokens).logits
    with attention_for(model, 12):
        assert model.config._attn_implementation == NAME
        short = model(input_ids=tokens).logits
    assert model.config._attn_implementation == "sdpa"
    assert not torch.equal(plain, short)
    exact = tiny.model(kind)(input_ids=tokens).logits
    assert float((short - exact).norm()) < 1.2 * float((plain - exact).norm())


def test_only_where_it_is_the_faster_one():
    with attention_for(half := tiny.model().bfloat16(), LONGEST + 1):
        assert half.config._attn_implementation == "sdpa"
    with attention_for(whole := tiny.model(), 12):
        assert whole.config._attn_implementation == "sdpa"
    with attention_for(whole, 12, torch.bfloat16):
        assert whole.config._attn_implementation == NAME
    half.set_attn_implementation("eager")
    with attention_for(half, 12):
        assert half.config._attn_implementation == "eager"
