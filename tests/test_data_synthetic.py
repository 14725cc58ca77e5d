"""The gate and the halves of Self-Lengthen, the rounds, their texts on the way into a corpus."""

import json
import os
import signal
from random import Random
from string import ascii_lowercase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drawplate import lineage
from drawplate.core import hf
from drawplate.core.artifact import publish
from drawplate.core.batches import IGNORE
from drawplate.core.corpus import Corpus, read_lines
from drawplate.core.errors import UserError
from drawplate.data import synthesis
from drawplate.data.duplicates import Duplicates
from drawplate.data.grams import in_order, repeated, words
from drawplate.data.prepare import Prepare, prepare
from drawplate.data.source import Document
from drawplate.data.synthesis import Lengthen, Made, Text, synthesize
from drawplate.data.synthetic import Synthetic, filled, pieces, sentences, without
from drawplate.data.synthetic.self_lengthen import SelfLengthen, split
from drawplate.data.tokenizer import SMALLEST
from drawplate.data.tokenizer import train as learn
from drawplate.model import ModelConfig, build
from drawplate.model.sample import Samples
from drawplate.train.loop import Stopped
from flows.preflight import _fewer_texts
from stages.prepare import Inputs
from stages.prepare import prepare as stage
from stages.run import Execution
from tests.laws import law
from tests.oracle.data.synthetic import self_lengthen as oracle

QUIET = Execution(tracking=False)
KNOWN = frozenset(map(chr, range(32, 127))) | {"\n"}
PIECES = ["a", "the", "3.5", "e.g.", ".", "! ", "?\n", '."', ".) ", "\n\n", " ", "。", "」"]
PROSE = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
CHANCES = st.lists(st.floats(0, 1, exclude_max=True), min_size=60, max_size=60)


# --- sentences ---


@given(PROSE | st.text(max_size=60))
def test_sentences_lose_nothing_and_are_the_oracles(text):
    found = sentences(text)
    assert "".join(found) == text
    assert all(found)
    assert found == oracle.sentences(text)


@given(PROSE | st.text(max_size=60))
def test_the_halves_are_the_text_in_order(text):
    first, second = split(text)
    assert first + second == text
    assert (first, second) == oracle.split(text)
    counts = len(sentences(first)), len(sentences(second))
    assert sum(counts) >= len(sentences(text)) - 1
    assert bool(first) == bool(text)


@given(PROSE, st.floats(0, 1), CHANCES)
def test_what_is_left_of_a_text_is_its_sentences_in_order(text, share, chance):
    parts = sentences(text)
    left = without(text, share, chance[: len(parts)])
    assert left == oracle.without(text, share, chance[: len(parts)])
    assert in_order(words(left), words(text)) == len(words(left))
    assert bool(left) == bool(text.strip()) or not parts[0].strip()


def test_slots_of_a_template():
    template = "Do {instruction} {{}} and {response}{response}\n"
    assert "".join(pieces(template)) == template
    put = filled(template, instruction="{response}", response="R")
    assert "".join(piece for piece, _ in put) == "Do {response} {{}} and RR\n"
    assert [piece for piece, own in put if not own] == ["{response}", "R", "R"]


# --- laws ---


@law(Synthetic)
@settings(deadline=None)
@given(text=PROSE)
def test_an_extender_that_adds_nothing_gives_the_response_back(method, text):
    response = text.strip()
    said: list[str] = []
    while (ask := method.ask(response, said)) is not None:
        assert in_order(words(ask.response), words(response)) == len(words(ask.response))
        assert ask.response.startswith(ask.begun)
        said.append(ask.response[len(ask.begun) :])
        assert len(said) < 10
    before = list(said)
    assert method.join(said) == response
    assert said == before


@law(Synthetic)
@settings(deadline=None)
@given(response=PROSE, longer=PROSE, ended=st.booleans())
def test_a_flaw_is_always_a_refusal(method, response, longer, ended):
    flaw = method.flaw(longer, ended, KNOWN)
    found = method.refusal(response, longer, ended, KNOWN)
    assert flaw is None or found == flaw
    assert method.refusal(response, response, ended, KNOWN) is not None or not words(response)


@law(Synthetic)
@settings(deadline=None)
@given(text=PROSE, chance=CHANCES)
def test_a_shortened_response_is_some_of_its_sentences(method, text, chance):
    response = text.strip()
    parts = sentences(response)
    short = method.shortened(response, chance[: len(parts)])
    assert in_order(words(short), words(response)) == len(words(short))
    assert bool(short) == bool(response)
    assert method.shortened(response, [1.0] * len(parts)) == response


@law(Synthetic)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), chance=CHANCES)
def test_longer_texts_are_learned_from_more_often(method, lengths, chance):
    chosen = method.learned(lengths, chance[: len(lengths)])
    assert len(chosen) == len(lengths)
    longest = max(lengths)
    assert all(taken for taken, size in zip(chosen, lengths, strict=True) if size == longest)
    for number in (0.0, 0.3, 0.9):
        level = method.learned(lengths, [number] * len(lengths))
        least = min((size for taken, size in zip(level, lengths, strict=True) if taken), default=0)
        assert level == [size >= least for size in lengths]


@law(Synthetic)
def test_templates_hold_what_a_role_needs(method):
    kind = type(method)
    for wrong in (
        {"generator": "no slot"},
        {"generator": "{instruction} {response}"},
        {"extender": "{instruction}"},
        {"extender": "{response} {other}"},
    ):
        with pytest.raises(ValidationError, match=f"{next(iter(wrong))} has to hold"):
            kind(**wrong)
    assert kind(extender="{response}").extender == "{response}"
    assert kind.model_validate_json(method.model_dump_json()) == method


# --- the gate ---

GOOD = "One bird sat. It sang well. Then it flew off."
LONG = (
    "One bird sat on a wall. It sang very well. All the others heard it. Then, at dusk, it flew "
    "off to the sea."
)


@pytest.mark.parametrize(
    ("reason", "longer", "ended"),
    [
        (None, LONG, True),
        ("cut", LONG, False),
        ("ending", LONG[:-1], True),
        ("ending", "", True),
        ("characters", LONG.replace("wall", "wa\ufffdll"), True),
        ("characters", LONG.replace("sea", "žea"), True),
        ("duplicated", f"{LONG} {LONG}", True),
        ("repetitive", GOOD + " It sang on and on" + " and on" * 9 + ".", True),
        ("lost", "No cat was here today. Nobody ever slept there. We all walked home again.", True),
        ("lost", "Then it flew off. It sang well. One bird sat. So it was, they say.", True),
        ("short", GOOD, True),
        ("short", "One bird sat there. It sang well. Then it flew off.", True),
    ],
)
def test_the_gate_names_each_kind_of_bad_text(reason, longer, ended):
    method = SelfLengthen(window=13 if reason != "repetitive" else 30)
    assert method.refusal(GOOD, longer, ended, KNOWN) == reason
    fields = method.model_dump(include={"factor", "endings", "window", "most_repeated", "kept"})
    assert oracle.refusal(GOOD, longer, ended, KNOWN, **fields) == reason
    if reason not in ("lost", "short", None):
        assert method.flaw(longer, ended, KNOWN) == reason


SMALL = st.lists(st.sampled_from(["a ", "b ", "c ", "d. ", "e.\n", "."]), max_size=25).map("".join)


@settings(max_examples=300)
@given(
    SMALL,
    SMALL,
    st.booleans(),
    st.fixed_dictionaries(
        {
            "factor": st.sampled_from([1.0, 1.5, 2.0]),
            "endings": st.sampled_from([".", "ad", "abcd."]),
            "window": st.integers(1, 6),
            "most_repeated": st.sampled_from([0.0, 0.3, 0.9]),
            "kept": st.sampled_from([0.0, 0.5, 1.0]),
        }
    ),
    st.sampled_from([KNOWN, frozenset("ab. ")]),
)
def test_the_gate_is_the_oracles(response, longer, ended, fields, alphabet):
    longer = longer.strip()
    found = SelfLengthen(**fields).refusal(response, longer, ended, alphabet)
    assert found == oracle.refusal(response, longer, ended, alphabet, **fields)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_words_in_order_and_repeated_windows_are_the_oracles(one, other):
    assert in_order(one, other) == in_order(other, one) == oracle.in_order(one, other)
    for window in (1, 2, 5):
        assert repeated(one, window) == pytest.approx(oracle.repeated(one, window), abs=1e-12)


@given(st.text(max_size=40))
def test_words_are_the_oracles(text):
    assert words(text) == oracle.words(text)


@given(PROSE, st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=20), CHANCES)
def test_head_and_choice_are_the_oracles(text, part, lengths, chance):
    assert SelfLengthen(lead=part / 4).head(text) == oracle.head(text, part, 4)
    for bias in (0.0, 0.5, 2.0):
        chosen = SelfLengthen(bias=bias).learned(lengths, chance[: len(lengths)])
        assert chosen == oracle.learned(lengths, chance[: len(lengths)], bias)
    assert SelfLengthen().head("A. B. C. D.") == "A. B."


def test_fields_of_the_method_matter():
    half = "A b c d. E f g h. I j k l."
    assert SelfLengthen(lead=1.0).head(half) == half != SelfLengthen().head(half)
    chance = [0.1, 0.9, 0.1]
    assert SelfLengthen(left_out=0.5).shortened(half, chance) == "E f g h."
    assert SelfLengthen(left_out=0.0).shortened(half, chance) == half
    assert SelfLengthen(endings="f").flaw("off", True, KNOWN) is None


# --- the rounds, with a model of letters ---

OTHER = {
    "generator": "{instruction} so",
    "extender": "{response} so",
    "opening": 2,
    "rounds": 3,
    "documents": 13,
    "samples": 3,
    "passes": 1,
    "temperature": 0.5,
    "longest": 20,
    "warm": 0,
    "thinned": 0.1,
    "updates": 6,
    "rows": 2,
    "optimizer": {"matrices": {"rate": 0.2}, "rest": {"rate": 0.2}},
    "schedule": {"name": "linear"},
    "precision": "bf16",
    "lead": 1.0,
    "factor": 2.0,
    "endings": "!",
    "window": 4,
    "most_repeated": 0.1,
    "kept": 1.0,
    "left_out": 0.9,
    "bias": 0.0,
}
SIGNS = ["<end>", "<unk>", "write", "extend", "so", *(f"{letter}." for letter in ascii_lowercase)]
LOOSE = {"kept": 0.0, "factor": 1.0, "window": 60, "most_repeated": 0.99}
ROLES = {"generator": "write {instruction} so", "extender": "extend {instruction} {response} so"}


NOTHING_LEFT = {"endings"}
"""Fields whose other value lets no text pass."""


def letters(count, seed=0, most=16):
    """Texts of letters in the order of the alphabet, each a sentence."""
    draw = Random(seed)
    chosen = (draw.sample(ascii_lowercase, draw.randint(4, most)) for _ in range(count))
    return [" ".join(f"{letter}." for letter in sorted(some)) for some in chosen]


def valid(text):
    """Whether letters follow the alphabet and none comes twice."""
    found = text.replace(".", "").split()
    return found == sorted(set(found)) and all(each in ascii_lowercase for each in found)


def documents(count=40, **given):
    return [Document(text, "a.txt", line) for line, text in enumerate(letters(count, **given), 1)]


def writer(folder, seed=0, context=128, **shape):
    """A model that reads and writes letters, not trained yet: all tokens are about as likely."""
    ids = {sign: number for number, sign in enumerate(SIGNS)}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "feed_forward": 16} | shape
    model = build(ModelConfig(context=context, **sizes), len(SIGNS), seed)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = 0
    folder.mkdir(parents=True)
    hf.save(model, folder, tokenizer)
    return folder


def method(folder, **given):
    fast = {"matrices": {"rate": 0.01}, "rest": {"rate": 0.01}}
    small = {"rounds": 2, "documents": 12, "passes": 2, "warm": 3, "updates": 3, "rows": 6}
    fields = ROLES | LOOSE | small | {"longest": 100, "optimizer": fast}
    return SelfLengthen.model_validate({**fields, "model": folder, **given})


def made(how, work, seed=0, **given):
    return synthesize(how, documents(**given), seed, work)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = tmp_path_factory.mktemp("base")
    how = method(writer(home / "model"))
    return how, made(how, home / "work")


def test_rounds_account_for_every_text(base):
    how, (digest, texts, rounds) = base
    assert digest == lineage.content_hash(how.model)
    assert len(rounds) == how.rounds
    for number, each in enumerate(rounds):
        mine = [text for text in texts if text.round == number]
        assert each.asked == how.documents * how.samples
        assert each.asked == each.written + sum(each.unwritten.values())
        assert each.written == each.kept + sum(each.refused.values())
        assert each.kept == len(mine) > 0
        assert each.accepted == each.kept / each.asked
        assert each.kept_words == sum(len(words(t.longer)) for t in mine) / len(mine)
        assert each.kept_words > 0 < each.response_words
    sources = documents()
    alphabet = frozenset("".join(text for text, _, _ in sources))
    for text in texts:
        assert how.refusal(text.response, text.longer, True, alphabet) is None
        assert how.flaw(text.response, True, alphabet) is None
        assert sources[text.line - 1].text.startswith(f"{text.instruction}{text.gap}")
        assert text.text == f"{text.instruction} {text.longer}"
    assert {reason for each in rounds for reason in (*each.unwritten, *each.refused)}


def test_the_same_seed_gives_the_same_texts(base, tmp_path):
    how, found = base
    assert made(how, tmp_path) == found
    assert made(how, tmp_path / "other", seed=1) != found


def test_how_it_is_carried_out_changes_no_text(base, tmp_path):
    how, found = base
    other = how.model_copy(update={"parallel": 5, "save_every": 1})
    assert made(other, tmp_path) == found
    assert how.model_copy(update={"accumulate": 3}).training.accumulate == 3


@pytest.mark.parametrize(("field", "value"), OTHER.items(), ids=OTHER)
def test_every_field_matters(base, tmp_path, field, value):
    how, found = base
    changed = SelfLengthen.model_validate(how.model_dump() | {field: value})
    if field in NOTHING_LEFT:
        with pytest.raises(UserError, match="was kept"):
            made(changed, tmp_path)
        return
    other = made(changed, tmp_path)
    assert (other.texts, other.rounds) != (found.texts, found.rounds)


def test_every_field_is_looked_at():
    elsewhere = {"name", "model", "parallel", "save_every", "accumulate"}
    assert OTHER.keys() == SelfLengthen.model_fields.keys() - elsewhere


def test_another_model_writes_other_texts(base, tmp_path):
    how, found = base
    other = made(how.model_copy(update={"model": writer(tmp_path / "model", seed=1)}), tmp_path)
    assert other.model != found.model
    assert other.texts != found.texts


def test_stopped_in_a_round_and_resumed_gives_the_same(base, tmp_path, monkeypatch):
    how, found = base
    calls = []

    def once(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*given, **named)

    sample = synthesis.sample
    monkeypatch.setattr(synthesis, "sample", once)
    with pytest.raises(Stopped):
        made(how, tmp_path)
    assert len(calls) == 3
    assert made(how, tmp_path) == found


def task(folder, texts=None, **given):
    how = method(folder, **given)
    found = documents() if texts is None else [Document(x, "a.txt", 1) for x in texts]
    return Lengthen(hf.load(folder), hf.load_tokenizer(folder), how, found, 0)


def told(tokens, labels):
    """A row as (prompt, what is learned), and whether it ends where learning ends."""
    learned = [place for place, label in enumerate(labels) if label != IGNORE]
    assert learned == list(range(learned[0], learned[-1] + 1))
    assert [tokens[place] for place in learned] == [labels[place] for place in learned]
    assert tokens.index(0) == learned[-1]
    name = " ".join(SIGNS[token] for token in tokens[: learned[-1]])
    prompt = " ".join(SIGNS[token] for token in tokens[: learned[0]])
    return prompt, name.removeprefix(prompt).strip(), learned[-1] + 1


def test_first_rows_are_documents_and_their_short_forms(base):
    mine = task(base[0].model, rows=40, warm=2)
    batch = mine.batch(0)
    assert {name: value.shape for name, value in batch.items()}["tokens"][0] == 40
    rows = mine.rows(0)
    sources = [text for text, _, _ in documents()]
    roles = {"write": 0, "extend": 0}
    for tokens, labels, places in zip(*(part.tolist() for part in rows), strict=True):
        prompt, rest, size = told(tokens, labels)
        assert places == [*range(size), *range(len(tokens) - size)]
        role, first, *short = prompt.removesuffix(" so").split()
        roles[role] += 1
        if role == "extend":
            assert f"{first} {rest}" in sources
            assert in_order(short, rest.split()) == len(short) < len(sources[0])
        else:
            assert any(
                text.startswith(f"{first} ")
                and in_order(rest.split(), text.split()[1:]) == len(rest.split())
                for text in sources
            )
    assert roles == {"write": 20, "extend": 20}
    again, other = mine.rows(0), mine.rows(1)
    assert torch.equal(again.input_ids, rows.input_ids)
    assert not torch.equal(other.input_ids, rows.input_ids)


def test_later_rows_are_what_the_last_round_kept(base):
    how, found = base
    mine = task(how.model, warm=1, rows=500)
    mine.texts, mine.rounds = found.texts, found.rounds
    kept = {text.longer: text for text in found.texts if text.round == 0}
    rows = mine.rows(1)
    roles = {"write": set(), "extend": set()}
    for tokens, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        prompt, rest, _ = told(tokens, labels)
        role, first, *short = prompt.removesuffix(" so").split()
        text = next(kept[each] for each in kept if each.split() == rest.split())
        assert text.instruction == first
        assert in_order(short, text.response.split()) == len(short)
        roles[role].add(rest)
    assert roles["write"] == roles["extend"]
    lengths = [len(words(text.longer)) for text in kept.values()]
    chosen = how.learned(lengths, mine._chances(len(lengths), "learned", 0))
    assert len(roles["write"]) == sum(chosen) < len(kept)


def test_json_carries_the_rounds_on(base):
    how, found = base
    one, other = task(how.model), task(how.model)
    one.texts, one.rounds = found.texts, found.rounds
    other.restore(json.loads(json.dumps(one.state())))
    assert (other.texts, other.rounds) == (found.texts, found.rounds)
    assert one.identity == other.identity != task(how.model, warm=4).identity
    assert one.identity != task(how.model, texts=letters(39)).identity


def test_special_tokens_stand_in_templates_only(base):
    mine = task(base[0].model)
    mine.tokenizer = learn(["one text", "another"], SMALLEST + 9)
    end = mine.tokenizer.eos_token_id
    found = mine._prompt("<|end|>{instruction}<|end|>", instruction="a<|end|>")
    assert (found[0], found[-1], found.count(end)) == (end, end, 2)
    assert mine._text(found[1:-1]) == "a<|end|>"


def test_documents_are_cut_at_a_sentence_where_there_is_no_room(tmp_path):
    texts = [" ".join(f"{letter}." for letter in ascii_lowercase)]
    mine = task(writer(tmp_path / "m", context=32), texts=texts, rows=2)
    rows = mine.rows(0)
    assert rows.input_ids.shape[1] <= 32
    _, rest, _ = told(rows.input_ids[0].tolist(), rows.labels[0].tolist())
    assert 2 <= len(rest.split()) < 25
    assert texts[0].startswith(f"a. {rest}")
    narrow = task(writer(tmp_path / "n", context=6), texts=texts)
    with pytest.raises(UserError, match="take a model of longer context"):
        narrow.rows(0)


def test_what_cannot_be_made_is_one_line(base, tmp_path):
    how, _ = base
    with pytest.raises(UserError, match="none of 2 training texts has more than opening=1"):
        task(how.model, texts=["one", "two."])
    with pytest.raises(UserError, match=r"none of 24 texts of round 0 was kept.*'ending': 2"):
        made(method(how.model, endings="!"), tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        made(method(tmp_path / "gone"), tmp_path)
    mute = writer(tmp_path / "mute")
    (mute / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="names no eos_token"):
        made(method(mute), tmp_path)


# --- a writer that follows a script ---


class Script:
    """Stands in for the sampler: the Generator says `first`, the Extender doubles every letter."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked = tokenizer, answer, []

    def __call__(self, model, prompts, *, max_new, end, **_):
        texts = [" ".join(SIGNS[token] for token in prompt) for prompt in prompts]
        self.asked.append(texts)
        said = [self.answer(text) for text in texts]
        ids = [[SIGNS.index(word) for word in text.split()] for text in said]
        drawn = [[*each, end][:most] for each, most in zip(ids, max_new, strict=True)]
        ended = [each[-1] == end for each in drawn]
        return Samples(drawn, [[]] * len(drawn), [[]] * len(drawn), ended)


def scripted(monkeypatch, folder, answer):
    script = Script(hf.load_tokenizer(folder), answer)
    monkeypatch.setattr(synthesis, "sample", script)
    return script


def test_the_extender_is_asked_half_by_half(base, monkeypatch, tmp_path):
    """Stage one sees the first half; stage two the whole, begun with two thirds of its answer."""

    def answer(text):
        if text.startswith("write"):
            return "c. g. k. o."
        asked, begun = text.split(" so")
        if not begun:
            return "c. d. g. h. k. l." if asked.endswith("c. g.") else "lost"
        return "k. l. o. p."

    script = scripted(monkeypatch, base[0].model, answer)
    how = method(base[0].model, rounds=1, warm=0, documents=1, samples=1, passes=1, kept=1.0)
    texts, rounds = made(how, tmp_path)[1:]
    assert script.asked[1][0].split(maxsplit=2)[2] == "c. g. so"
    assert script.asked[2][0].split(maxsplit=2)[2] == "c. g. k. o. so c. d. g. h."
    assert [text.longer for text in texts] == ["c. d. g. h. k. l. o. p."]
    assert (rounds[0].response_words, rounds[0].kept_words) == (8, 16)


def test_a_pass_goes_on_from_the_longest_so_far(base, monkeypatch, tmp_path):
    turns = iter(["c. d. e.", "c. d.", "c. d. d. d.", "c. d. e. f."])

    def answer(text):
        if text.startswith("write"):
            return "c. d."
        if text.split(" so")[1]:
            return ""
        return next(turns)

    script = scripted(monkeypatch, base[0].model, answer)
    how = method(
        base[0].model, rounds=1, warm=0, documents=1, samples=1, passes=4, lead=1.0, window=4
    )
    (text,), rounds = made(how, tmp_path)[1:]
    assert text.longer == "c. d. e. f."
    assert [texts[0].split(maxsplit=2)[2] for texts in script.asked[2::2]] == [
        "c. d. so c. d. e.", "c. d. e. so c. d.", "c. d. e. so c. d. d. d.",
        "c. d. e. so c. d. e. f.",
    ]  # fmt: skip
    assert rounds[0].refused == {}


def test_reasons_are_counted(base, monkeypatch, tmp_path):
    def answer(text):
        if text.startswith("write b."):
            return "<unk>"
        return "c. d." if text.startswith("write") else "c."

    scripted(monkeypatch, base[0].model, answer)
    how = method(base[0].model, rounds=1, warm=0, documents=40, samples=1, passes=1, kept=0.9)
    (told,) = made(how, tmp_path)[2]
    refused = sum(text.startswith("b.") for text in letters(40))
    assert told.unwritten == {"ending": refused}
    assert told.written == 40 - refused
    assert told.refused == {"lost": told.written}
    # The Extender's second prompt fills the context.
    tight = writer(tmp_path / "tight", context=5)
    scripted(monkeypatch, tight, lambda text: "c.")
    how = method(tight, rounds=1, warm=0, documents=5, samples=1, passes=1)
    (told,) = made(how, tmp_path)[2]
    assert told.refused == {"room": 5}


# --- on the way into a corpus ---


def spec(home, how, count=60, **given):
    (home / "texts.txt").write_text("\n\n".join(letters(count)))
    return {
        "sources": [{"name": "text", "files": f"{home}/texts.txt", "document": "block"}],
        "heldout_text": 0.2,
        "tasks": [{"name": "chain_sum", "min_digits": 2}],
        "train_problems": 20,
        "heldout_problems": 5,
        "duplicates": {"window": 2},
        "vocabulary": 300,
        "synthetic": None if how is None else how.model_dump(mode="json"),
        **given,
    }


def prepared(home, out, how, **given):
    out.mkdir()
    return prepare(Prepare.model_validate(spec(home, how, **given)), out)


def texts_of(folder):
    corpus = Corpus(folder)
    stream = corpus.stream("text-train")
    bounds = zip(stream.offsets[:-1], stream.offsets[1:] - 1, strict=True)
    return [corpus.tokenizer.decode(stream.tokens[a:b].tolist()) for a, b in bounds]


def given_texts(monkeypatch, texts):
    """A model that would make these texts."""
    rows = [Text(0, "a.txt", 1, text[:2], text[2:3], "-", text[3:]) for text in texts]
    monkeypatch.setattr(synthesis, "synthesize", lambda *_: Made("hash", rows, []))


def test_texts_made_go_the_way_of_all_records(base, monkeypatch, tmp_path):
    how = base[0]
    plain = prepared(tmp_path, tmp_path / "plain", None)
    heldout = Corpus(tmp_path / "plain").documents("text-heldout")
    before = texts_of(tmp_path / "plain")
    sums = Corpus(tmp_path / "plain").problems("heldout")
    asks = f"A. so {sums[0]['prompt']}"
    near = f"{heldout[0]} {heldout[0][-2:]}"
    new = "Nothing like it. Was there before. It is new."
    given_texts(monkeypatch, [heldout[1], before[0], near, new, "A. \0.", asks, new])
    report = prepared(tmp_path, tmp_path / "out", how)
    after = texts_of(tmp_path / "out")
    assert Corpus(tmp_path / "out").documents("text-heldout") == heldout
    assert after == [*before, new]
    assert (report.synthetic, report.read, report.kept) == (1, plain.read + 7, plain.kept + 1)
    assert (report.quarantined, report.contaminated) == (1, 1)
    assert report.exact_duplicates == plain.exact_duplicates + 3
    assert report.near_duplicates == plain.near_duplicates + 1
    assert report.read == (
        report.kept
        + report.quarantined
        + report.exact_duplicates
        + report.near_duplicates
        + report.contaminated
    )
    bad = read_lines(tmp_path / "out" / "quarantine.jsonl")
    assert [(row["file"], row["line"]) for row in bad] == [("synthetic.jsonl", 5)]
    told = read_lines(tmp_path / "out" / "duplicates.jsonl")[-4:]
    assert [row["line"] for row in told if row["file"] == "synthetic.jsonl"] == [1, 2, 3, 7]
    assert [row["kept_file"] == "synthetic.jsonl" for row in told] == [False] * 3 + [True]
    account = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert [row["place"] for row in account["found"]] == ["synthetic.jsonl:6"]
    assert account["training_texts"] == len(before) + 2
    rows = read_lines(tmp_path / "out" / "synthetic.jsonl")
    assert [row["text"] for row in rows][3] == new
    assert {row["model"] for row in rows} == {"hash"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=12), st.integers(0, 12))
def test_standing_texts_stay(texts, many):
    near = Duplicates(window=1)
    dropped = near.find(texts[:many])
    standing = [text for place, text in enumerate(texts[:many]) if place not in dropped]
    together = near.find([*standing, *texts[many:]], len(standing))
    assert all(place >= len(standing) for place in together)
    kept = [*standing, *texts[many:]]
    left = [text for place, text in enumerate(kept) if place not in together]
    assert near.find(left) == {}


def test_the_stage_makes_texts_and_says_by_what(base, tmp_path):
    how, _ = base
    folder = writer(tmp_path / "models" / "writer")
    with publish(tmp_path / "published", "model") as inside:
        for file in folder.iterdir():
            (inside / file.name).write_bytes(file.read_bytes())
        lineage.write(lineage.trace(lineage.Node(stage="pretrain"), {}), inside)
    how = how.model_copy(update={"model": tmp_path / "published"})
    params = Prepare.model_validate(spec(tmp_path, how))
    report = stage(params, Inputs(), tmp_path / "corpus", execution=QUIET)
    assert report.synthetic > 0
    digest = lineage.content_hash(how.model)
    rows = read_lines(tmp_path / "corpus" / "synthetic.jsonl")
    assert {row["model"] for row in rows} == {digest}
    told = json.loads((tmp_path / "corpus" / "synthetic.json").read_text())
    assert told["model"] == digest
    assert [each["kept"] for each in told["rounds"]] == [
        sum(row["round"] == number for row in rows) for number in range(2)
    ]
    train_texts = set(texts_of(tmp_path / "corpus"))
    blocks = (tmp_path / "texts.txt").read_text().split("\n\n")
    heldout = set(Corpus(tmp_path / "corpus").documents("text-heldout"))
    assert not {f"{row['instruction']} {row['longer']}" for row in rows} & heldout
    assert sum(row["text"] in train_texts for row in rows) >= report.synthetic
    assert not {row["line"] for row in rows} & {
        number for number, block in enumerate(blocks, 1) if block in heldout
    }
    node = lineage.read(tmp_path / "corpus").node
    assert node.parents == {"model": digest}
    assert [step.node.stage for step in lineage.walk(tmp_path / "corpus")] == [
        "prepare",
        "pretrain",
    ]
    stage(params, Inputs(), tmp_path / "again", execution=QUIET)
    first = lineage.content_hash(tmp_path / "corpus")
    assert lineage.content_hash(tmp_path / "again") == first


def test_another_model_in_the_same_folder_is_another_stage(base, monkeypatch, tmp_path):
    folder = writer(tmp_path / "writer")
    params = Prepare.model_validate(spec(tmp_path, method(folder)))
    works = []

    def stop(params, folder, watch, work, *rest):
        works.append(work)
        raise UserError("seen")

    monkeypatch.setattr("stages.prepare.make", stop)
    for seed in (0, 0, 1):
        writer(tmp_path / f"{len(works)}", seed=seed)
        (folder / "model.safetensors").write_bytes(
            (tmp_path / f"{len(works)}" / "model.safetensors").read_bytes()
        )
        with pytest.raises(UserError, match="seen"):
            stage(params, Inputs(), tmp_path / "corpus", execution=QUIET)
    assert works[0] == works[1] != works[2]
    gone = Prepare.model_validate(spec(tmp_path, method(tmp_path / "gone")))
    with pytest.raises(
        UserError, match=r"^prepare.synthetic.model: .*/gone does not exist"
    ) as info:
        stage(gone, Inputs(), tmp_path / "corpus", execution=QUIET)
    assert info.value.code == 2
    assert "\n" not in str(info.value)


def test_a_rehearsal_makes_a_share_of_the_texts_and_learns_a_share_of_the_steps(base):
    how = base[0].model_copy(update={"rounds": 3, "documents": 10, "warm": 80, "updates": 10})
    section = spec(base[0].model.parent, how) | _fewer_texts(how, 0.25)
    less = Prepare.model_validate(section).synthetic
    assert (less.rounds, less.documents, less.training.steps) == (1, 8, 25)
    assert less.model_copy(update={"rounds": 3, "documents": 10, "warm": 80}) == how
    assert _fewer_texts(None, 0.25) == {}


MUON = [{"name": "nesterov"}, {"name": "orthogonalize"}, {"name": "scale_by_shape"}]
LEARNER = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 4, "feed_forward": 128}
LEARNING = {
    "rounds": 3,
    "documents": 48,
    "samples": 2,
    "passes": 1,
    "warm": 500,
    "updates": 40,
    "rows": 32,
    "temperature": 0.7,
    "window": 2,
    "most_repeated": 0.9,
    "kept": 0.9,
    "factor": 1.1,
    "schedule": {"name": "linear"},
    "optimizer": {"matrices": {"rate": 0.03, "transforms": MUON}, "rest": {"rate": 0.004}},
}
"""A model of letters, and settings under which it learns from what it lengthened."""


@pytest.mark.slow
def test_lengths_grow_over_the_rounds_and_texts_stay_valid(tmp_path):
    """A model that learned from documents what follows what, in nothing but these texts."""
    how = method(writer(tmp_path / "model", **LEARNER), **LEARNING)
    out = tmp_path / "corpus"
    report = prepared(tmp_path, out, how, count=3000)
    rows = read_lines(out / "synthetic.jsonl")
    rounds = json.loads((out / "synthetic.json").read_text())["rounds"]
    lengths = [each["kept_words"] for each in rounds]
    starts = [each["response_words"] for each in rounds]
    assert lengths == sorted(set(lengths))
    assert starts == sorted(set(starts))
    assert lengths[-1] > 1.3 * lengths[0]
    assert starts[-1] > 2 * starts[0]
    for number in range(3):
        mine = [valid(row["text"]) for row in rows if row["round"] == number]
        assert len(mine) >= 20
        assert sum(mine) >= 0.95 * len(mine)
    assert report.synthetic >= 0.5 * len(rows)
    assert report.read == len(rows) + 3000
