from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drawplate.core.batches import IGNORE, Batch, Mix, Rows, best_fit
from drawplate.core.corpus import (
    STREAMS,
    Corpus,
    read_lines,
    token_type,
    write_facts,
    write_lines,
    write_stream,
)
from drawplate.core.errors import Damaged, UserError

END, PAD, VOCABULARY = 1, 0, 50_000
ONLY_TEXT, ONLY_PROBLEMS = Mix(late=0), Mix(early=1)


def write(folder, vocabulary=VOCABULARY, texts=60, problems=80):
    """Every token of a text or problem tells which document it is of, and its place in it."""
    draw = np.random.default_rng(0)
    streams = {name: [] for name in STREAMS}
    for name, count in (("text-train", texts), ("problems-train", problems)):
        for document in range(count):
            size = int(draw.integers(2, 40))
            tokens = [100 * document + place + 100 for place in range(size)]
            prompt = size // 3 if name == "problems-train" else 0
            streams[name].append(([*tokens, END], prompt))
    streams["text-heldout"] = streams["problems-heldout"] = [([7, END], 0)]
    folder.mkdir(exist_ok=True)
    for name, documents in streams.items():
        write_stream(folder, name, documents, vocabulary)
    write_facts(folder, {"vocabulary": vocabulary, "end": END, "pad": PAD})
    return streams


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write(folder), Corpus(folder)


def rows_of(corpus, **given):
    settings = {"batch": 4, "length": 48, "steps": 100, "seed": 0, "mix": Mix()}
    return Rows(corpus, **{**settings, **given})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("vocabulary", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_streams_come_back(tmp_path, vocabulary, kind):
    streams = write(tmp_path, vocabulary)
    corpus = Corpus(str(tmp_path))
    assert (corpus.vocabulary, corpus.end, corpus.pad) == (vocabulary, END, PAD)
    for name, documents in streams.items():
        stream = corpus.stream(name)
        assert isinstance(stream.tokens, np.memmap)
        assert stream.tokens.dtype == kind == token_type(vocabulary)
        found = [stream.tokens[a:b].tolist() for a, b in pairwise(stream.offsets)]
        assert list(zip(found, stream.prompts.tolist(), strict=True)) == documents


def test_a_token_that_does_not_fit_is_no_smaller_token(tmp_path):
    with pytest.raises(OverflowError):
        write_stream(tmp_path, "text-train", [([2**16], 0)], 2**16)


def test_what_is_no_corpus(tmp_path, made):
    with pytest.raises(UserError, match="not a corpus"):
        Corpus(tmp_path)
    write(tmp_path)
    write_facts(tmp_path, {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        Corpus(tmp_path)
    _, corpus = made
    with pytest.raises(UserError, match="text-heldout"):
        corpus.stream("text")
    with pytest.raises(UserError, match="text-heldout"):
        corpus.documents("text-train")
    with pytest.raises(UserError, match="heldout"):
        corpus.problems("test")


def test_a_cut_stream_is_damaged(tmp_path):
    write(tmp_path)
    path = tmp_path / "text-train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(Damaged, match="text-train"):
        Corpus(tmp_path).stream("text-train")


def test_offsets_that_are_objects_are_not_unpickled(tmp_path):
    write(tmp_path)
    for name in ("offsets.npy", "prompts.npy"):
        path = tmp_path / "text-train" / name
        raw = path.read_bytes()
        np.save(path, np.asarray([0, {}], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="objects"):
            Corpus(tmp_path).stream("text-train")
        path.write_bytes(raw)


def test_lines_hold_any_string(tmp_path):
    rows = [{"text": "a\nb\u2028c\ud800 é\0"}, {"text": "", "n": 1.5}]
    write_lines(tmp_path / "a", rows)
    assert read_lines(tmp_path / "a") == rows
    with pytest.raises(ValueError, match="JSON"):
        write_lines(tmp_path / "a", [{"x": float("nan")}])


@pytest.mark.parametrize("mix", [ONLY_TEXT, ONLY_PROBLEMS, Mix()], ids=["text", "problems", "mix"])
def test_a_step_is_a_pure_function(made, mix):
    _, corpus = made
    rows = rows_of(corpus, mix=mix)
    forward = [rows(step) for step in range(100)]
    for step in reversed(range(0, 100, 7)):
        assert equal(rows_of(corpus, mix=mix)(step), forward[step])
        assert equal(rows(step), forward[step])
    for batch in forward:
        for part in batch:
            assert part.shape == (4, 48)
            assert part.dtype == torch.int64
    assert not equal(rows_of(corpus, mix=mix, seed=1)(0), forward[0])


@pytest.mark.parametrize("step", [-1, 100])
def test_steps_outside_the_run(made, step):
    with pytest.raises(IndexError, match="of a run of 100"):
        rows_of(made[1])(step)


def test_text_rows_are_windows(made):
    streams, corpus = made
    tokens = [token for document, _ in streams["text-train"] for token in document]
    text = " ".join(map(str, tokens))
    for step in range(30):
        batch = rows_of(corpus, mix=ONLY_TEXT)(step)
        assert torch.equal(batch.labels, batch.input_ids)
        for row, positions in zip(
            batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True
        ):
            assert f" {' '.join(map(str, row))} " in f" {text} "
            assert positions[0] == 0
            for before, (place, was) in zip(row, pairwise(positions), strict=False):
                assert was == (0 if before == END else place + 1)


def test_an_epoch_of_text_covers_it_once_and_the_next_otherwise(made):
    streams, corpus = made
    total = sum(len(document) for document, _ in streams["text-train"])
    count = total // 48 - 1
    rows = rows_of(corpus, batch=1, steps=3 * count, mix=ONLY_TEXT)
    starts = []
    for epoch in range(3):
        seen = [rows(epoch * count + k).input_ids[0].tolist() for k in range(count)]
        flat = [token for row in seen for token in row if token != END]
        assert len(set(flat)) == len(flat)
        assert total - 2 * 48 <= count * 48
        starts.append(sorted(row[0] for row in seen))
    assert starts[0] != starts[1] != starts[2]


def test_the_shortest_text_makes_one_row(tmp_path):
    write(tmp_path, texts=1)
    corpus = Corpus(tmp_path)
    length = len(corpus.stream("text-train").tokens)
    batch = rows_of(corpus, length=length, mix=ONLY_TEXT)(5)
    assert (
        batch.input_ids == torch.from_numpy(corpus.stream("text-train").tokens.astype(int))
    ).all()
    with pytest.raises(UserError, match=f"holds {length} tokens, a row {length + 1}"):
        rows_of(corpus, length=length + 1, mix=ONLY_TEXT)
    rows_of(corpus, length=1000, mix=ONLY_PROBLEMS)(0)


@pytest.mark.parametrize("learn", [False, True])
def test_problem_rows_hold_whole_problems(made, learn):
    streams, corpus = made
    known = {tuple(document): prompt for document, prompt in streams["problems-train"]}
    rows = rows_of(corpus, mix=ONLY_PROBLEMS, learn_prompts=learn)
    for step in range(20):
        for ids, labels, positions in zip(*(part.tolist() for part in rows(step)), strict=True):
            rest = list(zip(ids, labels, positions, strict=True))
            while rest and rest[0][0] != PAD:
                end = [token for token, _, _ in rest].index(END) + 1
                document, rest = rest[:end], rest[end:]
                prompt = 0 if learn else known[tuple(token for token, _, _ in document)]
                for place, (token, label, position) in enumerate(document):
                    assert label == (token if place >= prompt else IGNORE)
                    assert position == place
            assert rest == [(PAD, IGNORE, place) for place in range(len(rest))]


def test_prompts_are_not_learned_unless_told(made):
    default = Rows(made[1], batch=4, length=48, steps=100, seed=0, mix=ONLY_PROBLEMS)
    assert equal(default(0), rows_of(made[1], mix=ONLY_PROBLEMS, learn_prompts=False)(0))
    assert not equal(default(0), rows_of(made[1], mix=ONLY_PROBLEMS, learn_prompts=True)(0))


def test_an_epoch_of_problems_shows_each_once(made):
    streams, corpus = made
    orders = []
    count = 0
    while len(orders) < 3:
        rows = rows_of(corpus, batch=1, steps=1000, mix=ONLY_PROBLEMS, learn_prompts=True)
        seen, order = [], []
        while len(seen) < len(streams["problems-train"]):
            ids = rows(count).input_ids[0].tolist()
            count += 1
            order.append(ids[0])
            seen += [token // 100 - 1 for token, was in pairwise(ids) if was == token + 1]
            seen = list(dict.fromkeys(seen))
        orders.append(order)
    assert len({len(order) for order in orders}) == 1
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1]


def test_a_problem_longer_than_a_row_is_refused(made):
    _, corpus = made
    longest = int(np.diff(corpus.stream("problems-train").offsets).max())
    rows_of(corpus, length=longest, mix=ONLY_PROBLEMS)(0)
    with pytest.raises(UserError, match=f"has {longest} tokens, a row {longest - 1}"):
        rows_of(corpus, length=longest - 1)
    rows_of(corpus, length=longest - 1, mix=ONLY_TEXT)(0)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("mix", [Mix(), Mix(early=0.1, late=0.7, start=0.2, end=0.2), Mix(end=1)])
def test_the_share_of_problems_follows_the_mix(made, batch, mix):
    _, corpus = made
    steps = 200
    rows = rows_of(corpus, batch=batch, steps=steps, mix=mix, learn_prompts=True)
    found, wanted = 0, 0.0
    for step in range(steps):
        masked = (rows(step).input_ids == PAD).any(1)
        found += int(rows._problems_before[step + 1] - rows._problems_before[step])
        wanted += batch * mix.share((step + 0.5) / steps)
        assert abs(found - wanted) <= 0.5 + 1e-9
        # Text rows are never padded.
        assert masked.sum() <= rows._problems_before[step + 1] - rows._problems_before[step]


def test_visits_go_on_where_the_step_before_stopped(made):
    """Whatever the mix, text rows are those of a run of text alone; so are problems."""
    _, corpus = made
    mixed = rows_of(corpus, batch=5, steps=60, mix=Mix(early=0.2, late=0.9, start=0.1))
    text = rows_of(corpus, batch=1, steps=300, mix=ONLY_TEXT)
    problems = rows_of(corpus, batch=1, steps=300, mix=ONLY_PROBLEMS)
    texts = seen = 0
    for step in range(60):
        batch = mixed(step)
        for row in range(5):
            one = Batch(*(part[row : row + 1] for part in batch))
            if equal(one, text(texts)):
                texts += 1
            else:
                assert equal(one, problems(seen))
                seen += 1
    assert texts + seen == 300
    assert min(texts, seen) > 50


def test_mix_by_hand():
    mix = Mix(early=0.2, late=0.8, start=0.25, end=0.75)
    given = [0, 0.25, 0.375, 0.5, 0.75, 1]
    assert [mix.share(p) for p in given] == pytest.approx([0.2, 0.2, 0.35, 0.5, 0.8, 0.8])
    assert [Mix(start=0.5, end=0.5).share(p) for p in (0.49, 0.5)] == [0, 1]
    with pytest.raises(ValidationError, match="after end"):
        Mix(start=0.6, end=0.5)
    for field in Mix.model_fields:
        for wrong in (-0.1, 1.1):
            with pytest.raises(ValidationError):
                Mix(**{field: wrong})


@pytest.mark.parametrize("field", ["early", "late", "start", "end"])
def test_every_field_of_the_mix_matters(field):
    points = [i / 50 for i in range(51)]
    shares = [Mix().share(p) for p in points]
    assert [Mix(**{field: 0.7 if field != "early" else 0.3}).share(p) for p in points] != shares


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.randoms())
def test_best_fit(sizes, draw):
    order = list(range(len(sizes)))
    draw.shuffle(order)
    rows = best_fit(np.asarray(sizes, dtype=np.int64), order, 30)
    assert sorted(item for row in rows for item in row) == sorted(order)
    # The rule, written out: the fullest row with room, else a new one.
    plain = []
    for item in order:
        fitting = [row for row in plain if sum(sizes[i] for i in row) + sizes[item] <= 30]
        best = max((sum(sizes[i] for i in row) for row in fitting), default=None)
        at_best = [row for row in fitting if sum(sizes[i] for i in row) == best]
        if at_best:
            at_best[0].append(item)
        else:
            plain.append([item])
    fill = sorted(sum(sizes[i] for i in row) for row in rows)
    assert fill == sorted(sum(sizes[i] for i in row) for row in plain)


def test_positions_keep_documents_apart_and_their_absence_does_not(made):
    """The promise on position_ids, against a real model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, corpus = made
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10_000, **shape, **heads)).eval()
    batch = rows_of(corpus, mix=ONLY_PROBLEMS)(0)
    ids, positions = batch.input_ids[:1], batch.position_ids[:1]
    cuts = [*torch.nonzero(positions[0] == 0).flatten().tolist(), 48]
    assert len(cuts) > 2
    with torch.no_grad():
        apart = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        crossing = model(input_ids=ids).logits[0]
        for begin, end in pairwise(cuts):
            alone = model(input_ids=ids[:, begin:end]).logits[0]
            torch.testing.assert_close(apart[begin:end], alone, rtol=1e-4, atol=1e-5)
            assert begin == 0 or not torch.allclose(crossing[begin:end], alone, atol=1e-3)
