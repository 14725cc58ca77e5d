import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drawplate.core.errors import UserError
from drawplate.data.tokenizer import END, PAD, SMALLEST, adopt, encode, train

TEXTS = [
    "Compute the sum of 123 and 45, then the sum of all.",
    "The sum\n    of squares:\n\n\treturn 3.14 * x_1  # 😀",
    "naïve Σ café 中文 العربية \r\n",
] * 3
SPACED = "a , b . c ! d ? it 's do n't  ( e )"
SPELLED = [END, PAD, f"a{END}b{PAD}", f"{END}{END}", "<|end|", "<s></s>[PAD]<|im_end|>"]

anything = st.text(st.characters(exclude_categories=["Cs"]))
tricky = st.lists(
    st.one_of(
        anything, st.sampled_from([*SPELLED, SPACED, "  ", "\n\n", "é", "\u202e", "\0", "ﬁ", "١٢"])
    )
).map("".join)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TEXTS, 400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[AutoTokenizer, PreTrainedTokenizerFast])
def loaded(request, saved):
    return request.param.from_pretrained(saved)


def comes_back_without_special_tokens(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(text=tricky)
def test_any_text_comes_back_and_holds_no_special_token(loaded, text):
    comes_back_without_special_tokens(loaded, text)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(text=tricky)
def test_very_many_texts_come_back(loaded, text):
    comes_back_without_special_tokens(loaded, text)


@pytest.mark.parametrize("text", SPELLED)
def test_spelled_special_tokens_stay_text(loaded, text):
    for ids in (loaded(text)["input_ids"], loaded.encode(text), *encode(loaded, [text])):
        assert not {0, 1} & set(ids)
        assert loaded.decode(ids) == text


def test_the_control_fails(saved):
    """Without the setting the same text is turned into special tokens."""
    careless = PreTrainedTokenizerFast.from_pretrained(saved, split_special_tokens=False)
    assert {0, 1} & set(careless(SPELLED[2])["input_ids"])


def test_no_space_is_tidied_away(loaded):
    assert loaded.decode(loaded(SPACED)["input_ids"]) == SPACED


def test_digits_stand_alone(loaded):
    ids = loaded("x=12345 67, ١٢")["input_ids"]
    parts = [loaded.decode([i]) for i in ids]
    assert [p for p in parts if any(c.isascii() and c.isdigit() for c in p)] == list("1234567")
    assert loaded("0123456789")["input_ids"] == [loaded(str(i))["input_ids"][0] for i in range(10)]


def test_words_are_learned_and_the_size_is_kept(loaded):
    assert len(loaded) <= 400
    assert len(loaded("Compute the sum of")["input_ids"]) < 10
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    assert len(train(["aaaa"], 5000)) < 300
    assert len(train(TEXTS, SMALLEST)) == SMALLEST


def test_batch_equals_single_and_nothing_is_cut(loaded):
    texts = ["", *TEXTS, *SPELLED, "long " * 5000]
    assert list(encode(loaded, texts)) == [next(encode(loaded, [text])) for text in texts]
    assert list(encode(loaded, ["a"] * 2500)) == [next(encode(loaded, ["a"]))] * 2500


def test_the_same_texts_give_the_same_bytes(saved, tmp_path):
    train(iter(TEXTS), 400).save_pretrained(tmp_path)
    for path in saved.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_adopting(saved, tmp_path):
    ours = adopt(saved)
    assert list(encode(ours, SPELLED)) == list(
        encode(AutoTokenizer.from_pretrained(saved), SPELLED)
    )
    foreign = PreTrainedTokenizerFast.from_pretrained(saved)
    foreign.split_special_tokens = False
    foreign.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    # As Llama does: every text begins with a token of its own.
    foreign.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PAD} $A", special_tokens=[(PAD, 1)]
    )
    foreign.backend_tokenizer.enable_truncation(3)
    foreign.backend_tokenizer.enable_padding(length=50)
    foreign.save_pretrained(tmp_path)
    adopted = adopt(tmp_path)
    tool = adopted.convert_tokens_to_ids("<tool>")
    text = f"a <tool> b {END}" * 3
    (ids,) = encode(adopted, [text])
    assert tool not in ids
    assert adopted.decode(ids) == text
    adopted.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(text, add_special_tokens=False)["input_ids"] == ids
    assert again(text)["input_ids"] == [1, *ids]


def test_adopting_pads_with_the_end_if_it_must(saved, tmp_path):
    foreign = PreTrainedTokenizerFast.from_pretrained(saved)
    foreign.pad_token = None
    foreign.save_pretrained(tmp_path)
    adopted = adopt(tmp_path)
    assert adopted.pad_token_id == adopted.eos_token_id == 0


def test_what_cannot_be_adopted(saved, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        adopt(tmp_path)
    foreign = PreTrainedTokenizerFast.from_pretrained(saved)
    foreign.eos_token = None
    foreign.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no eos_token"):
        adopt(tmp_path)


@pytest.mark.slow
def test_a_line_of_ten_megabytes(loaded):
    text = " ".join(random.Random(0).choices(["sum", "12", "naïve", "\n"], k=10**7 // 4))
    (ids,) = encode(loaded, [text])
    assert loaded.decode(ids) == text
