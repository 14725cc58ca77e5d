"""What the sampler is made of: numbers by coordinates, the draw, products, and slots."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import drawplate.core.products as products
from drawplate.core.products import plain, swift
from drawplate.model.filter.top_k import TopK
from drawplate.model.philox import philox, uniforms
from drawplate.model.sample import draw
from drawplate.model.slots import Slots


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers that come with the paper's own library, Random123."""
    import numpy as np

    given = tuple(np.array([word], np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox(key[0] | key[1] << 32, given)) == words


def test_uniforms_are_functions_of_their_coordinates():
    rows, positions = [0, 1, 0, 2**40, 2**40 + 1], [0, 0, 1, 5, 2**31]
    drawn = uniforms(99, rows, positions)
    alone = [uniforms(99, [r], [p])[0] for r, p in zip(rows, positions, strict=True)]
    assert drawn.tolist() == alone
    assert len(set(drawn.tolist())) == 5
    assert uniforms(98, rows, positions).tolist() != alone
    assert uniforms(99 | 1 << 40, rows, positions).tolist() != alone


def test_uniforms_are_uniform():
    rows = torch.arange(20_000)
    drawn = torch.from_numpy(uniforms(1, rows, rows % 7))
    assert drawn.min() >= 0
    assert drawn.max() <= 1 - 2**-48
    counts = torch.histc(drawn, 50, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 85  # chi-square, 49 degrees: p = 0.001
    assert torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1].abs() < 0.03


def by_hand(row, chance):
    """Inverse of the distribution function, in plain numbers."""
    weights = [torch.tensor(value).exp().item() for value in row]
    reached = 0.0
    for token, weight in enumerate(weights):
        reached += weight / sum(weights)
        if reached > chance:
            return token
    raise AssertionError


def test_draw_inverts_the_distribution_function():
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=stream, dtype=torch.float64) * 2
    chance = torch.rand(200, generator=stream, dtype=torch.float64)
    token, own, behaviour = draw(logits, chance, 1.0, ())
    assert token.tolist() == [
        by_hand(*pair) for pair in zip(logits.tolist(), chance.tolist(), strict=True)
    ]
    want = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(own, want)
    torch.testing.assert_close(behaviour, want)


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-48])
def test_tokens_without_probability_are_never_drawn(chance):
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 3:6] = torch.tensor([0.0, -300.0, 1.0])  # the middle one underflows to zero
    token, _, _ = draw(logits, torch.tensor([chance], dtype=torch.float64), 1.0, ())
    assert token.item() == (3 if chance == 0 else 5)


def test_filters_act_after_the_temperature_and_in_turn():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(2, 1)
    chance = torch.tensor([0.0, 1 - 2**-48], dtype=torch.float64)
    token, own, behaviour = draw(logits, chance, 2.0, (TopK(k=2),))
    assert token.tolist() == [0, 1]
    torch.testing.assert_close(own, logits[0].log_softmax(-1)[:2])
    torch.testing.assert_close(behaviour, torch.tensor([1.0, 0.5]).log_softmax(-1))


@pytest.mark.parametrize("rows", [1, 7, 8, 30])
@pytest.mark.parametrize("bias", [True, False])
def test_swift_products_are_the_products(rows, bias):
    """Whichever side of the change between two kernels, and whatever the shape of the input."""
    torch.manual_seed(0)
    layer, other = nn.Linear(12, 20, bias=bias), Conv1D(20, 12)
    x = torch.randn(rows, 12)
    want = layer(x), other(x), layer(x.view(rows, 1, 12))
    with torch.no_grad(), swift(nn.ModuleList([layer, other])):
        assert "forward" in vars(layer)
        assert plain(layer) is None  # already changed: nobody changes it twice
        got = layer(x), other(x), layer(x.view(rows, 1, 12))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("bias", [True, False])
def test_swift_products_in_half_precision_are_those_of_the_rounded_numbers(rows, bias):
    """With weights laid out for oneDNN or, where gradients may be wanted, as they are."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 12, requires_grad=True)
    rounded = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    rounded.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()})
    want = rounded(x.bfloat16().float())
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), swift(layer, torch.bfloat16):
            got = layer(x)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)
    (grad,) = torch.autograd.grad(got.sum(), x)
    expected = rounded.weight.sum(0).expand(rows, -1)
    torch.testing.assert_close(grad, expected, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("shape", [(30, 12), (5, 6, 12)])
def test_swift_gradients_reach_inputs_and_layers_that_are_trained_stay_as_they_are(shape):
    torch.manual_seed(0)
    frozen, learned = nn.Linear(12, 20).requires_grad_(False), nn.Linear(20, 3)
    model = nn.Sequential(frozen, nn.SiLU(), learned)
    x, out = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 3)
    given = [x, *learned.parameters()]
    want = torch.autograd.grad((model(x) * out).sum(), given)
    with swift(model):
        assert "forward" in vars(frozen)
        assert "forward" not in vars(learned)
        value = (model(x) * out).sum()
    got = torch.autograd.grad(value, given)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_swift_uses_another_kernel_for_many_rows(monkeypatch):
    calls = []
    monkeypatch.setattr(
        products, "_product", lambda *given: calls.append(len(given[0])) or given[0]
    )
    layer = nn.Linear(4, 4)
    with torch.no_grad(), swift(layer):
        layer(torch.ones(7, 4))
        layer(torch.ones(8, 4))
    assert calls == [8]


def test_swift_leaves_alone_what_is_not_plain():
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    changed = nn.Linear(3, 3)
    changed.forward = lambda x: x
    model = nn.ModuleList([Half(3, 3), changed, nn.LayerNorm(3)])
    before = [dict(vars(module)) for module in model]
    with swift(model):
        assert [plain(module) for module in model] == [None] * 3
        assert [list(vars(module)) for module in model] == [list(each) for each in before]
    assert changed(1) == 1


def test_swift_keeps_hooks_and_gives_back_the_dtype_in_lower_precision():
    heard = []
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda *_: heard.append(1))
    x = torch.randn(9, 16)
    with torch.no_grad(), swift(layer, torch.bfloat16):
        rough = layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert len(heard) == 2
    assert rough.dtype == torch.float32
    want = (x.bfloat16() @ layer.weight.bfloat16().T + layer.bias.bfloat16()).float()
    torch.testing.assert_close(rough, want, rtol=0.02, atol=0.02)
    assert not torch.equal(rough, layer(x))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_remember_every_row(data):
    """Rows come, grow and leave at random; each always finds exactly its own columns."""
    places, longest, more = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9)), 40
    dtype = data.draw(st.sampled_from([None, torch.float64]))
    slots = Slots(places, longest, more, data.draw(st.booleans()), dtype)
    rows, fresh = [], 0

    def pair(ids):  # keys [P, 2, T, 3] and values [P, 2, T, 4] that say whose they are
        ids = torch.tensor(ids, dtype=torch.float32)[:, None, :, None]
        return ids.expand(-1, 2, -1, 3) + 0.25, -ids.expand(-1, 2, -1, 4)

    for _ in range(data.draw(st.integers(1, 60))):
        free = places - len(rows)
        come = data.draw(st.integers(0 if rows else 1, free)) if free else 0
        if come:
            texts = []
            for _ in range(data.draw(st.integers(1, come))):
                size = data.draw(st.integers(0, longest))
                texts.append([fresh + i for i in range(size)])
                fresh += size
            texts.sort(key=len)
            width = max(map(len, texts))
            pick = sorted(data.draw(st.integers(0, len(texts) - 1)) for _ in range(come))
            padded = [text + [99_999] * (width - len(text)) for text in texts]
            layers = {0: pair(padded), 3: pair(padded)} if width else {}
            slots.admit(layers, pick, [len(texts[index]) for index in pick])
            rows += [list(texts[index]) for index in pick]
        slots.provide()
        new = list(range(fresh, fresh + len(rows)))
        fresh += len(rows)
        assert slots.lengths().tolist() == [len(row) for row in rows]
        for layer in (0, 3):
            keys, values = slots.append(layer, *pair([[token] for token in new]))
            assert keys.shape == (len(rows), 2, slots.room, 3)
            assert values.shape == (len(rows), 2, slots.room, 4)
            assert keys.isfinite().all()
            assert values.isfinite().all()
            owned = slots.owned()
            for row, mine, key, value, token in zip(rows, owned, keys, values, new, strict=True):
                want = torch.tensor([*row, token], dtype=key.dtype)
                assert torch.equal(key[:, mine], want[None, :, None].expand(2, -1, 3) + 0.25)
                assert torch.equal(value[:, mine], -want[None, :, None].expand(2, -1, 4))
        slots.advance()
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        stays = [len(r) < longest + more and data.draw(st.integers(0, 9)) > 0 for r in rows]
        left = sum(stays)
        order, tail = list(range(left)), [i for i in range(left, len(rows)) if stays[i]]
        for gap in [i for i in range(left) if not stays[i]]:
            order[gap] = tail.pop()
        slots.keep(torch.tensor(order, dtype=torch.long))
        rows = [rows[i] for i in order]


def test_slots_hold_hardly_more_columns_than_rows_use_and_no_new_memory():
    slots = Slots(2, 4, 200, False, None)
    slots.admit({0: (torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))}, [0, 0], [4, 4])
    seen = set()
    for step in range(200):
        slots.provide()
        keys, values = slots.append(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
        assert slots.room - (5 + step) < max(16, (5 + step) // 8 + 1)
        seen |= {keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()}
        slots.advance()
    assert slots.room == 204
    assert len(seen) == 3  # the two blocks and the spare one take turns


def test_a_decoder_of_another_kind_is_refused():
    from drawplate.core.errors import UserError
    from drawplate.model.decoder import decoder

    made = tiny.model("phi")
    made.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="linear_attention keep more than keys and values"):
        decoder(made, 8)


@pytest.mark.parametrize("length", [1, 7])
def test_a_decoder_whose_state_no_cache_holds_is_refused(length):
    from transformers import AutoModelForCausalLM, RwkvConfig

    from drawplate.core.errors import UserError
    from drawplate.model.sample import sample

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    model = AutoModelForCausalLM.from_config(RwkvConfig(**sizes)).eval()
    with pytest.raises(UserError, match="RwkvForCausalLM is not possible"):
        sample(model, [[5] * length], max_new=4, end=-1)


def test_layers_may_share_keys_and_values():
    from transformers import AutoModelForCausalLM, Gemma3nTextConfig

    from drawplate.model.sample import sample

    config = Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [[5], [5, 6, 7, 8, 9, 10, 11]]
    drawn = sample(model, prompts, max_new=4, end=-1)
    for prompt, tokens, logprobs in zip(prompts, drawn.tokens, drawn.logprobs, strict=True):
        with torch.no_grad():
            full = model(torch.tensor([prompt + tokens]), use_cache=False).logits.log_softmax(-1)
        wanted = full[0, len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), wanted, atol=1e-5, rtol=1e-5)
