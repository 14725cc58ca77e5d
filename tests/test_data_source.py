import ast
import json
from pathlib import Path

import pytest

from drawplate import data
from drawplate.core import corpus
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.data.prepare import Prepare
from drawplate.data.source import Bad, Source
from tests.data_cases import PLENTY, TEXTS, build, documents, expected, others, world
from tests.laws import law

__all__ = ["world"]


def plain(text):
    return text.replace("\r\n", "\n")


@law(Source)
def test_oracle(method, world):
    source = build(method.name, world)
    want = [(plain(text), file, line) for text, file, line in expected(source, world)]
    assert want
    assert [tuple(document) for document in documents(source)] == want


@law(Source)
def test_every_field_matters_and_follows_the_oracle(method, world):
    alternatives = others(world)[method.name]
    first = documents(build(method.name, world))
    # What config and revision select exists on the hub only; their use is tested below.
    named = type(method).model_fields.keys() - {"name", "dataset", "config", "revision"}
    assert alternatives.keys() == named - ({"files"} - alternatives.keys())
    for field, value in alternatives.items():
        source = build(method.name, world, **{field: value})
        read = documents(source)
        assert read != first, field
        want = [(plain(text), file, line) for text, file, line in expected(source, world)]
        assert [tuple(document) for document in read] == want, field


@law(Source)
def test_reading_twice_gives_the_same(method, world):
    source = build(method.name, world)
    assert list(source.read(PLENTY)) == list(source.read(PLENTY))
    assert source.origin() == source.origin() != {}


@law(Source)
def test_every_record_is_counted_whatever_the_limit(method, world):
    source = build(method.name, world)
    count = len(documents(source))
    for longest in (1, 5, 12, 30, 200):
        records = list(source.read(longest))
        assert len(records) == count
        kept = documents(source, longest)
        assert all(len(d.text.encode()) <= longest for d in kept)
    assert len(documents(source, 1)) == 0


@law(Source)
def test_absent_source_is_a_user_error_in_one_line(method, world):
    gone = {
        "docstrings": {"packages": ("no-such-package",)},
        "hub": {"dataset": str(world / "gone")},
    }
    fields = gone.get(method.name, {"files": str(world / "gone" / "*")})
    with pytest.raises(UserError) as caught:
        list(build(method.name, world, **fields).read(PLENTY))
    assert "\n" not in str(caught.value)
    assert "gone" in str(caught.value) or "no-such-package" in str(caught.value)


@law(Source)
def test_parameters_survive_json(method, world):
    source = build(method.name, world)
    row = {"sources": [json.loads(source.model_dump_json())], "tasks": [{"name": "gcd"}]}
    assert Prepare.model_validate(row).sources == (source,)


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("parquet", {"column": "body"}, "text, title"),
        ("parquet", {"column": "n"}, "text, title"),
        ("parquet", {"column": "lines"}, "text, title"),
        ("hub", {"column": "body"}, "text, title"),
        ("hub", {"split": "dev"}, "dev"),
        ("hub", {"config": "french"}, "french"),
    ],
)
def test_wrong_part_of_a_source_names_the_choices(world, name, fields, named):
    with pytest.raises(UserError, match=named):
        list(build(name, world, **fields).read(PLENTY))


def test_hub_gives_every_field_to_the_library(world, monkeypatch):
    import datasets

    seen = {}

    def load(*given, **named):
        seen["call"] = (given, named)
        return datasets.Dataset.from_dict({"body": ["a", None, "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = leaves(Source)["hub"](
        dataset="who/what", config="french", split="dev", column="body", revision="abc"
    )
    records = list(source.read(PLENTY))
    assert seen["call"] == (("who/what", "french"), {"split": "dev", "revision": "abc"})
    assert [isinstance(record, Bad) for record in records] == [False, True, False]
    assert source.origin() == {"who/what:french:dev": "abc"}


@pytest.mark.parametrize("backport", [False, True])
def test_a_package_file_that_cannot_be_parsed_is_one_bad_record(
    world, tmp_path, monkeypatch, backport
):
    """Also where the backport of importlib.metadata, once imported, has taken its place."""
    if backport:
        pytest.importorskip("importlib_metadata")
    site = tmp_path / "site"
    bad = {
        "latin.py": b'"""caf\xe9"""\n',
        "syntax.py": b'"""Text."""\n\ndef f(:\n',
        "nul.py": b'"""a"""\0\n',
        "deep.py": b"x = " + b"(" * 5000 + b")" * 5000,
        "minus.py": b"x = " + b"-" * 200_000 + b"1",
    }
    (site / "gamma").mkdir(parents=True)
    info = site / "gamma-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gamma\nVersion: 1\n")
    names = [*bad, "gone.py", "surrogate.py", "escape.py", "long.py"]
    (info / "RECORD").write_text("".join(f"gamma/{name},,\n" for name in names))
    for name, raw in bad.items():
        (site / "gamma" / name).write_bytes(raw)
    (site / "gamma" / "surrogate.py").write_text('"""half \\ud800"""\n')
    (site / "gamma" / "escape.py").write_text('"""odd \\d escape"""\n')
    chain = "if a:\n    pass\n" + "elif a:\n    pass\n" * 2000
    (site / "gamma" / "long.py").write_text(f'"""text"""\n{chain}else:\n    def f(): "text"\n')
    monkeypatch.syspath_prepend(site)
    source = leaves(Source)["docstrings"](packages=("gamma",))
    records = list(source.read(PLENTY))
    assert len(records) == len(names) + 1
    read = ["gamma/escape.py", "gamma/long.py", "gamma/long.py"]
    assert [d.file for d in documents(source)] == read
    wrong = {r.file: r for r in records if isinstance(r, Bad)}
    assert wrong.keys() == {f"gamma/{name}" for name in [*bad, "gone.py"]}
    assert wrong["gamma/syntax.py"].line == 3


def test_an_editable_install_is_explained(world, tmp_path, monkeypatch):
    info = tmp_path / "delta-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: delta\nVersion: 1\n")
    (info / "RECORD").write_text("delta-1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="editable"):
        list(leaves(Source)["docstrings"](packages=("delta",)).read(PLENTY))


def test_heavy_libraries_wait_until_they_are_needed():
    for path in [*Path(data.__path__[0]).rglob("*.py"), Path(corpus.__file__)]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            modules = {*names, getattr(node, "module", None)} if names else set()
            assert not modules & {"datasets", "pyarrow", "transformers", "tokenizers"}, path


def test_texts_of_the_world_are_not_trivial():
    assert len(set(TEXTS)) == len(TEXTS) == 3
