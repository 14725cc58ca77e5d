import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from drawplate.core.batches import IGNORE, Mix, Rows
from drawplate.core.corpus import Corpus, read_lines
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.core.seeds import seed_of
from drawplate.data.contamination import Contaminated, question
from drawplate.data.prepare import Prepare, prepare
from drawplate.data.task import Problem, Task

WORDS = ["sum", "array", "the", "of", "returns", "graph", "node", "x", "value", "naïve", "12"]


def sentences(draw, count):
    return [" ".join(draw.choices(WORDS, k=draw.randrange(8, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    draw = Random(0)
    texts = sentences(draw, 80)
    rows = [{"text": text} for text in texts]
    rows += [{"text": texts[0]}, {"text": texts[1] + "\r\n<|end|>"}, {"text": texts[2].upper()}]
    lines = [json.dumps(row) for row in rows]
    lines += ['{"text": null}', '{"text": "\\ud800"}', "", '{"text": "' + "a" * 3000 + '"}']
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text("\n\n".join([*sentences(draw, 60), "a\0b", texts[3]]))
    return folder


def spec(folder, **given):
    tasks = [
        {"name": "chain_sum", "min_digits": 2},
        {"name": "gcd", "max_value": 300, "share": 0.5},
    ]
    return {
        "sources": [
            {"name": "jsonl", "files": f"{folder}/*.jsonl"},
            {"name": "text", "files": f"{folder}/*.txt", "document": "block"},
        ],
        "longest": 2000,
        "heldout_text": 0.2,
        "tasks": tasks,
        "train_problems": 90,
        "heldout_problems": 30,
        "vocabulary": 320,
        **given,
    }


def run(folder, out, work=None, **given):
    out.mkdir()
    return prepare(Prepare.model_validate(spec(folder, **given)), out, work=work)


def digest(folder):
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "corpus"
    return run(folder, out), Corpus(out)


def test_every_record_is_accounted_for(made):
    report, corpus = made
    assert report.read == 87 + 62
    quarantined = read_lines(corpus.folder / "quarantine.jsonl")
    assert report.quarantined == len(quarantined) == 5
    assert all(row.keys() == {"file", "line", "reason"} for row in quarantined)
    assert [row["line"] for row in quarantined[:4]] == [84, 85, 86, 87]
    assert (report.exact_duplicates, report.near_duplicates) == (2, 1)
    assert len(read_lines(corpus.folder / "duplicates.jsonl")) == 3
    assert report.kept == report.train_texts + report.heldout_texts
    assert report.read == (
        report.kept
        + report.quarantined
        + report.exact_duplicates
        + report.near_duplicates
        + report.contaminated
    )
    assert json.loads((corpus.folder / "report.json").read_text()) == report.model_dump()


def test_streams_spell_the_texts(made, folder):
    report, corpus = made
    heldout = corpus.documents("text-heldout")
    texts = {}
    for split in ("train", "heldout"):
        stream = corpus.stream(f"text-{split}")
        assert (stream.tokens[stream.offsets[1:] - 1] == corpus.end).all()
        assert (stream.tokens == corpus.end).sum() == len(stream.offsets) - 1
        assert not stream.prompts.any()
        parts = zip(stream.offsets[:-1], stream.offsets[1:] - 1, strict=True)
        texts[split] = [corpus.tokenizer.decode(stream.tokens[a:b].tolist()) for a, b in parts]
    assert texts["heldout"] == heldout
    assert not set(heldout) & set(texts["train"])
    assert 10 <= len(heldout) <= 50
    assert report.heldout_bytes == sum(len(text.encode()) for text in heldout)
    assert report.train_bytes == sum(len(text.encode()) for text in texts["train"])
    assert report.heldout_tokens == len(corpus.stream("text-heldout").tokens)
    assert report.bytes_per_token == report.heldout_bytes / report.heldout_tokens
    special = [text for part in texts.values() for text in part if text.endswith("\n<|end|>")]
    assert len(special) == 1


def test_problems_are_disjoint_and_solved(made):
    report, corpus = made
    splits = {split: corpus.problems(split) for split in ("train", "heldout")}
    assert [len(splits[s]) for s in splits] == [report.train_problems, report.heldout_problems]
    prompts = {s: {" ".join(question(row["prompt"])) for row in splits[s]} for s in splits}
    assert len(prompts["train"]) == 90
    assert not prompts["train"] & prompts["heldout"]
    tasks = {row["name"]: leaves(Task)[row["name"]](**row) for row in corpus.facts["tasks"]}
    for split, rows in splits.items():
        stream = corpus.stream(f"problems-{split}")
        counts = [sum(row["task"] == name for row in rows) for name in ("chain_sum", "gcd")]
        assert counts == ([60, 30] if split == "train" else [20, 10])
        for index, row in enumerate(rows):
            problem = Problem(**{name: row[name] for name in Problem.model_fields})
            task = tasks[row["task"]]
            assert row["solution"] == task.solution(problem, row["style"])
            assert task.score(problem, row["solution"]) == 1
            begin, end = stream.offsets[index : index + 2]
            middle = begin + stream.prompts[index]
            decode = corpus.tokenizer.decode
            assert decode(stream.tokens[begin:middle].tolist()) == row["prompt"]
            assert decode(stream.tokens[middle : end - 1].tolist()) == row["solution"]
            assert stream.tokens[end - 1] == corpus.end
    assert report.verbose_problems == sum(r["style"] == "verbose" for r in splits["train"])
    assert 25 <= report.verbose_problems <= 65


def test_rows_can_be_drawn(made):
    report, corpus = made
    rows = Rows(
        corpus, batch=2, length=report.longest_problem, steps=10, seed=0, mix=Mix(early=0.5)
    )
    batch = rows(0)
    assert batch.input_ids.shape == (2, report.longest_problem)
    assert (batch.labels[0] != IGNORE).all()
    assert (batch.labels[1] == IGNORE).any()


def test_baselines_are_bounds_to_beat(made):
    report, _ = made
    assert 1 < report.gzip_bits_per_byte < 8
    assert 1 < report.bigram_bits_per_byte < 8


def test_the_same_bytes_again(made, folder, tmp_path):
    run(folder, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(made[1].folder)


def test_the_same_bytes_in_another_process(made, folder, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from drawplate.data.prepare import Prepare, prepare\n"
        "prepare(Prepare.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
        "TZ": "Asia/Tokyo",
    }
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec(folder)), str(tmp_path)],
        check=True,
        env=environment,
    )
    assert digest(tmp_path) == digest(made[1].folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("sources", [{"name": "jsonl", "files": "{folder}/*.jsonl"}]),
        ("longest", 100),
        ("duplicates", {"threshold": 0.3}),
        ("heldout_text", 0.4),
        ("tasks", [{"name": "gcd", "max_value": 300}]),
        ("train_problems", 80),
        ("heldout_problems", 20),
        ("verbose", 1.0),
        ("tokenizer", "{corpus}/tokenizer"),
        ("vocabulary", 300),
    ],
)
def test_every_field_matters(made, folder, tmp_path, field, value):
    text = json.dumps(value).replace("{folder}", str(folder))
    text = text.replace("{corpus}", str(made[1].folder))
    # An adopted tokenizer that was trained on other data than it would be here.
    seed = {"seed": 2} if field == "tokenizer" else {}
    run(folder, tmp_path / "out", **{field: json.loads(text), **seed})
    if seed:
        run(folder, tmp_path / "trained", **seed)
        tokenizers = [tmp_path / n / "tokenizer/tokenizer.json" for n in ("out", "trained")]
        assert tokenizers[0].read_bytes() != tokenizers[1].read_bytes()
        assert (
            tokenizers[0].read_bytes() == (made[1].folder / "tokenizer/tokenizer.json").read_bytes()
        )
    assert digest(tmp_path / "out") != digest(made[1].folder)


def test_progress_is_told(folder, tmp_path):
    told = []
    prepare(
        Prepare.model_validate(spec(folder)),
        tmp_path,
        lambda step, total, figures: told.append((step, total, dict(figures))),
    )
    assert [(step, total) for step, total, _ in told] == [(k, 6) for k in range(1, 7)]
    assert told[0][2] == {"read": 149, "quarantined": 5}
    assert told[1][2] == {"exact_duplicates": 2, "near_duplicates": 1}
    assert told[2][2] == {"train": 90, "heldout": 30}
    assert told[3][2] == {"contaminated": 0}


def trained(corpus):
    stream = corpus.stream("text-train")
    cuts = zip(stream.offsets[:-1], stream.offsets[1:] - 1, strict=True)
    return [corpus.tokenizer.decode(stream.tokens[a:b].tolist()) for a, b in cuts]


def plant(made, folder, place, form):
    """Raw texts in `place`, among which a training text asks a held-out problem in some `form`."""
    prompt = made[1].problems("heldout")[0]["prompt"].strip()
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    text = form.format(prompt, prompt.removesuffix("=?"))
    # Which split a text falls into is decided by its hash.
    while seed_of("heldout", text) / 2**63 < 0.2:
        text += " so"
    (place / "c.jsonl").write_text(json.dumps({"text": text}))
    return prompt


@pytest.mark.parametrize("form", ["{0}", "is it true that {1}= 5 ?", "a\n{1}\nb"])
def test_a_planted_problem_stops_the_preparation(made, folder, tmp_path, form):
    prompt = plant(made, folder, tmp_path / "raw", form)
    with pytest.raises(Contaminated) as caught:
        run(tmp_path / "raw", tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("1 of 30 held-out problems are in the training data")
    assert repr(prompt) in message
    assert f"{tmp_path}/raw/c.jsonl:1" in message
    assert "\n" not in message


def test_a_refusal_leaves_the_whole_account(made, folder, tmp_path):
    plant(made, folder, tmp_path / "raw", "{1}")
    (tmp_path / "work").mkdir()
    with pytest.raises(Contaminated, match=r"work/contamination\.json lists all"):
        run(tmp_path / "raw", tmp_path / "out", work=tmp_path / "work")
    account = json.loads((tmp_path / "work" / "contamination.json").read_text())
    assert [row["place"] for row in account["found"]] == [f"{tmp_path}/raw/c.jsonl:1"]


def test_the_same_text_without_the_problem_passes(made, folder, tmp_path):
    plant(made, folder, tmp_path / "raw", "See: gcd of them")
    run(tmp_path / "raw", tmp_path / "out")
    assert any("See:" in text for text in trained(Corpus(tmp_path / "out")))


def test_a_contaminated_text_can_be_dropped(made, folder, tmp_path):
    plant(made, folder, tmp_path / "raw", "See: {1}")
    report = run(tmp_path / "raw", tmp_path / "out", contaminated_text="drop")
    assert report.contaminated == 1
    assert report.read == report.kept + report.quarantined + 3 + 1
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())["found"]
    assert [row["place"] for row in found] == [f"{tmp_path}/raw/c.jsonl:1"]
    assert not any("See:" in text for text in trained(Corpus(tmp_path / "out")))


def test_a_training_problem_that_is_held_out_stops_it(folder, tmp_path, monkeypatch):
    """Two tasks that ask the same in other words: their ids differ, their questions do not."""
    original = Task.problems

    def careless(task, size, seed, skip=frozenset()):
        return original(task, size, seed)

    monkeypatch.setattr(Task, "problems", careless)
    with pytest.raises(Contaminated, match="of 30 held-out problems"):
        run(folder, tmp_path / "out")
    with pytest.raises(Contaminated, match="training problem"):
        run(folder, tmp_path / "drop", contaminated_text="drop")


def test_the_window_reaches_the_gate(made, folder, tmp_path):
    """With windows of one word a number is enough."""
    with pytest.raises(Contaminated):
        run(folder, tmp_path / "out", window=1)


def test_nothing_left_is_a_user_error(folder, tmp_path):
    (tmp_path / "one.txt").write_text("only one text")
    only = [{"name": "text", "files": str(tmp_path / "one.txt")}]
    with pytest.raises(UserError, match=r"no (train|heldout) text is left of 1 records"):
        run(folder, tmp_path / "out", sources=only)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sources": []},
        {"tasks": []},
        {"longest": 0},
        {"heldout_text": 0},
        {"verbose": 1.5},
        {"vocabulary": 257},
        {"contaminated_text": "keep"},
        {"sources": [{"name": "web"}]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_parameters_are_checked(folder, wrong):
    with pytest.raises(ValidationError):
        Prepare.model_validate(spec(folder, **wrong))


def test_parameters_survive_json(folder):
    params = Prepare.model_validate(spec(folder, vocabulary=258))
    assert Prepare.model_validate_json(params.model_dump_json()) == params
    assert hash(params)


@pytest.mark.slow
def test_the_real_docstrings(tmp_path):
    given = spec(Path(), sources=[{"name": "docstrings"}], vocabulary=4096, train_problems=2000)
    del given["longest"]
    params = Prepare.model_validate(given)
    report = prepare(params, tmp_path)
    assert report.train_bytes > 5e6
    assert report.quarantined < 0.01 * report.read
    assert report.gzip_bits_per_byte < report.bigram_bits_per_byte
