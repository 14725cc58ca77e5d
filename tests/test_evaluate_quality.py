"""Held-out loss: every token once, from the context it should have, and nothing from others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma2Config

from drawplate.core.errors import NotFinite, UserError
from drawplate.edits import materialized
from drawplate.evaluate import quality
from drawplate.evaluate.quality import Windows, fit, loss, loss_and_divergence, plan
from drawplate.pretrain.position.clex import Clex
from drawplate.quantize.driver import Quantize, quantize
from tests import tiny
from tests.oracle.evaluate.quality import contexts, reference

EXACT = Windows(window=12, overlap=5, batch_tokens=40, precision="float32")
END = 2


def documents(seed=0, lengths=(1, 3, 12, 13, 19, 40, 0, 7)):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tiny.VOCABULARY, n) for n in lengths]


def sizes(texts):
    return [3 * len(text) for text in texts]


@given(
    lengths=st.lists(st.integers(0, 70), max_size=12),
    window=st.integers(1, 20),
    overlap=st.integers(0, 19),
    batch=st.integers(1, 60),
    steps=st.sets(st.integers(1, 9), max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_plan_predicts_each_token_once_from_as_much_as_agreed(
    lengths, window, overlap, batch, steps
):
    windows = Windows(window=window, overlap=min(overlap, window - 1), batch_tokens=batch)
    batches = plan(lengths, windows, steps)
    seen = {
        (d, t): start for b in batches for d, start, fresh, stop in b for t in range(fresh, stop)
    }
    assert sum(stop - fresh for b in batches for _, _, fresh, stop in b) == sum(lengths)
    wanted = {
        (d, t): first
        for d, length in enumerate(lengths)
        for t, first in enumerate(contexts(length, window, windows.overlap))
    }
    assert seen == wanted
    for rows in batches:
        longest = max(w.stop - w.start for w in rows)
        assert longest <= window
        assert len(rows) == 1 or len(rows) * longest <= batch
        for each in steps:
            assert len({-(-(w.stop - w.start) // each) for w in rows}) == 1


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_loss_and_divergence_equal_the_definition(kind):
    model, parent = tiny.model(kind, 1).double(), tiny.model(kind, 2).double()
    texts = documents(lengths=(1, 13, 26, 0, 5))
    found, apart = loss_and_divergence(model, parent, texts, sizes(texts), END, EXACT)
    for d, text in enumerate(texts):
        nats, divergence = reference(model, parent, text.tolist(), END, 12, 5)
        np.testing.assert_allclose(found.nats[d], nats, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(apart.nats[d], divergence, rtol=1e-10, atol=1e-12)
    assert found.tokens.tolist() == apart.tokens.tolist() == [1, 13, 26, 0, 5]
    assert found.bits_per_byte == pytest.approx(found.nats.sum() / np.log(2) / (3 * 45))
    assert found.perplexity == pytest.approx(np.exp(found.nats.sum() / 45))
    assert apart.per_token == pytest.approx(apart.nats.sum() / 45)


def test_logits_that_are_changed_behind_the_head_are_respected():
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    texts = [np.arange(3, 20), np.array([7, 8])]
    found, apart = loss_and_divergence(model, model, texts, sizes(texts), END, EXACT)
    for d, text in enumerate(texts):
        nats, _ = reference(model, model, text.tolist(), END, 12, 5)
        np.testing.assert_allclose(found.nats[d], nats, rtol=1e-10)
    assert not apart.nats.any()


def test_a_document_counts_the_same_alone_and_in_company():
    model, texts = tiny.model().double(), documents()
    together = loss(model, texts, sizes(texts), END, EXACT)
    for d, text in enumerate(texts):
        if len(text):
            alone = loss(model, [text], [1], END, EXACT.model_copy(update={"batch_tokens": 1}))
            np.testing.assert_allclose(together.nats[d], alone.nats[0], rtol=1e-10)


def test_a_document_counts_the_same_in_company_where_frequencies_follow_the_length():
    model, texts = tiny.model(context=16), documents(lengths=(1, 15, 16, 17, 33, 40, 60, 7))
    Clex(factor=4).install(model, 0)
    windows = EXACT.model_copy(update={"window": 64, "batch_tokens": 4096})
    together = loss(model.double(), texts, sizes(texts), END, windows)
    for d, text in enumerate(texts):
        alone = loss(model, [text], [1], END, windows)
        np.testing.assert_allclose(together.nats[d], alone.nats[0], rtol=1e-10)


def test_loss_is_the_same_with_and_without_a_parent_and_every_time():
    model, parent, texts = tiny.model("llama", 1), tiny.model("llama", 2), documents()
    alone = loss(model, texts, sizes(texts), END, EXACT)
    paired, _ = loss_and_divergence(model, parent, texts, sizes(texts), END, EXACT)
    again = loss(model, texts, sizes(texts), END, EXACT)
    assert alone.nats.tolist() == paired.nats.tolist() == again.nats.tolist()


def test_divergence_is_zero_from_itself_and_positive_from_others():
    model, parent, texts = tiny.model("llama", 1), tiny.model("llama", 2), documents()
    _, none = loss_and_divergence(model, model, texts, sizes(texts), END, EXACT)
    _, some = loss_and_divergence(model, parent, texts, sizes(texts), END, EXACT)
    assert not none.nats.any()
    assert (some.nats[some.tokens > 0] > 0).all()


@pytest.mark.parametrize("other", [{"window": 20}, {"overlap": 1}, {"precision": "bf16"}])
def test_every_setting_matters(other):
    model, texts = tiny.model(), documents()
    one = loss(model, texts, sizes(texts), END, EXACT)
    two = loss(model, texts, sizes(texts), END, EXACT.model_copy(update=other))
    assert one.nats.tolist() != two.nats.tolist()


def test_batch_tokens_bounds_what_a_model_sees_at_once():
    model, texts = tiny.model(), documents()
    widths = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    loss(model, texts, sizes(texts), END, EXACT)
    assert max(widths) <= 40
    assert max(widths) > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_that_of_a_model_stored_in_16_bits_too(dtype):
    model, texts = tiny.model().to(dtype), documents()
    low = loss(model, texts, sizes(texts), END, EXACT.model_copy(update={"precision": "bf16"}))
    high = loss(model, texts, sizes(texts), END, EXACT)
    wide = loss(model.float(), texts, sizes(texts), END, EXACT)
    assert high.nats.tolist() == wide.nats.tolist() != low.nats.tolist()


def test_bf16_is_close():
    model, texts = tiny.model(), documents(lengths=(60,) * 6)
    low = EXACT.model_copy(update={"precision": "bf16"})
    one, two = (loss(model, texts, sizes(texts), END, w).bits_per_byte for w in (EXACT, low))
    assert two == pytest.approx(one, rel=0.02)


def test_bf16_is_close_where_float32_codes_are_kept_decoded():
    model, texts = tiny.model(), documents(lengths=(60,) * 6)
    quantize(model, tiny.tokens(), Quantize(group=16), batch=4)
    low = EXACT.model_copy(update={"precision": "bf16"})
    with materialized(model):
        one, two = (loss(model, texts, sizes(texts), END, w).bits_per_byte for w in (EXACT, low))
    assert two == pytest.approx(one, rel=0.02)
    assert two != one


@pytest.mark.parametrize(("positions", "least", "most"), [(5, 1, 5), (3, 7, 7)])
def test_the_logits_of_a_batch_never_exist_together(monkeypatch, positions, least, most):
    monkeypatch.setattr(quality, "_LOGITS", positions * tiny.VOCABULARY)
    monkeypatch.setattr(quality, "_ROWS", least)
    model, texts = tiny.model("llama_untied").double(), documents()
    rows = []
    model.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    chunked = loss(model, texts, sizes(texts), END, EXACT)
    assert max(rows) == most
    monkeypatch.undo()
    np.testing.assert_allclose(
        chunked.nats, loss(model, texts, sizes(texts), END, EXACT).nats, rtol=1e-12
    )


def test_wide_vocabularies_meet_the_head_in_pieces_that_fill_a_product():
    for width in (96, 4096, 32768, 151_936, 262_144):
        piece = next(quality._pieces(10_000, width))
        assert piece.stop >= 64
        assert piece.stop * width <= max(1 << 21, 64 * width)


def test_the_window_is_cut_to_the_model():
    long = Windows(window=512, overlap=16)
    assert fit(long, tiny.model(), tiny.model("llama", context=40)).window == 40
    assert fit(EXACT, tiny.model()) == EXACT
    with pytest.raises(UserError, match="overlap is 16 but a model reads 10"):
        fit(long, tiny.model("llama", context=10))


def test_what_cannot_be_measured_is_said():
    model, texts = tiny.model(), documents()
    with pytest.raises(UserError, match="nothing to predict"):
        loss(model, [np.array([], dtype=np.int64)], [4], END, EXACT)
    with pytest.raises(UserError, match=r"8 documents .* 1 sizes"):
        loss(model, texts, [4], END, EXACT)
    other = tiny.model("llama", vocabulary=80)
    with pytest.raises(UserError, match="predict 80 and 96 tokens"):
        loss_and_divergence(model, other, texts, sizes(texts), END, EXACT)
    with pytest.raises(ValidationError, match="overlap 8 must be smaller than window 8"):
        Windows(window=8, overlap=8)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NotFinite, match="loss of document 0 is nan, as in 7 in all"):
        loss(model, texts, sizes(texts), END, EXACT)
