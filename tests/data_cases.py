"""A small world of sources for the laws: files, a data set folder and an installed package."""

import csv
import gzip
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from drawplate.core.method import leaves
from drawplate.data.source import Document, Source, vet

PLENTY = 10**6
TEXTS = ["One text.\nWith two lines.", "Zwei, äöü €", "three\n\nblocks  here\n \t\nlast 😀"]

MODULE = '''# a comment first
"""Module text."""
def one(a, b=(1,
              2)):
    """One.

        indented
    """
    def inner():
        r"""Inner \\d."""
    if a:
        class Deep:
            "Deep" " joined"
            async def late(self):
                # comment before
                """Late äöü."""
    try:
        x = 1
    except ValueError:
        def handler():
            """Handler."""
    return """not one"""
def none():
    x = 1
    """not one either"""
def raw():
    b"""bytes"""
def formatted():
    f"""no {none}"""
'''


def write_world(folder: Path) -> None:
    """Everything that `spec` refers to."""
    text = folder / "text"
    (text / "deep").mkdir(parents=True)
    (text / "b.txt").write_bytes("\n\n".join(TEXTS).encode())
    (text / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\n\r\nsecond\r\n")
    (text / "deep" / "c.txt").write_bytes(b"deep\n\n\n\ndeeper")
    lines = folder / "jsonl"
    lines.mkdir()
    rows = [{"text": t, "title": t[:5], "n": [1, {"x": None}]} for t in TEXTS]
    (lines / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (lines / "b.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False))
    tables = folder / "parquet"
    tables.mkdir()
    for name, kind in (("a", pyarrow.string()), ("b", pyarrow.large_string())):
        columns = {
            "text": pyarrow.array(TEXTS, kind),
            "title": pyarrow.array([t[:5] for t in TEXTS]).dictionary_encode(),
            "n": pyarrow.array([1, 2, 3]),
            "lines": pyarrow.array([[t] for t in TEXTS]),
        }
        parquet.write_table(pyarrow.table(columns), tables / f"{name}.parquet")
    hub = folder / "hub"
    hub.mkdir()
    for split in ("train", "test"):
        with (hub / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "title"), *((f"{split} {t}", t[:5]) for t in TEXTS)])
    for package in ("alpha", "beta"):
        site = folder / "site"
        (site / package / "tests").mkdir(parents=True)
        files = [f"{package}/__init__.py", f"{package}/tests/test_x.py", f"{package}/zeta.py"]
        for name in files:
            (site / name).write_text(MODULE.replace("Module text", f"Module {name}"))
        info = site / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


def spec(folder: Path) -> dict[str, dict[str, Any]]:
    """Fields of each leaf for the world in `folder`."""
    return {
        "docstrings": {"packages": ("alpha", "beta")},
        "text": {"files": f"{folder}/text/**/*.txt"},
        "jsonl": {"files": f"{folder}/jsonl/*.jsonl"},
        "parquet": {"files": f"{folder}/parquet/*.parquet"},
        "hub": {"dataset": f"{folder}/hub"},
    }


def others(folder: Path) -> dict[str, dict[str, Any]]:
    """Another legal value for each field of each leaf."""
    return {
        "docstrings": {"packages": ("beta", "alpha"), "omit": ()},
        "text": {"files": f"{folder}/text/*.txt", "document": "block"},
        "jsonl": {"files": f"{folder}/jsonl/a*", "field": "title"},
        "parquet": {"files": f"{folder}/parquet/a*", "column": "title"},
        "hub": {"split": "test", "column": "title"},
    }


def expected(source: Source, folder: Path) -> list[tuple[str, str, int]]:
    """What the oracle of a leaf reads in the world."""
    oracle = import_module(f"tests.oracle.data.source.{source.name}").reference
    fields = source.model_dump(exclude={"name"})
    if source.name == "hub":
        return oracle(fields["dataset"], fields["split"], fields["column"])
    if source.name == "docstrings":
        site = folder / "site"
        names = [
            path.relative_to(site).as_posix()
            for package in fields["packages"]
            for path in sorted((site / package).rglob("*.py"))
            if not {"tests"} & set(path.parts) & set(fields["omit"])
        ]
        read = oracle([str(site / name) for name in names])
        return [(text, Path(path).relative_to(site).as_posix(), line) for text, path, line in read]
    paths = sorted(map(str, folder.glob(fields.pop("files").removeprefix(f"{folder}/"))))
    return oracle([path for path in paths if Path(path).is_file()], *fields.values())


def documents(source: Source, longest: int = PLENTY) -> list[Document]:
    """The good records of a source."""
    vetted = (vet(record, longest) for record in source.read(longest))
    return [record for record in vetted if isinstance(record, Document)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder; its package is installed and the hub's cache lies beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def build(name: str, folder: Path, **given: Any) -> Source:
    """Leaf `name` for the world, with other fields if given."""
    return leaves(Source)[name](**{**spec(folder)[name], **given})


def packed(raw: bytes) -> bytes:
    """The bytes after gzip, always the same."""
    return gzip.compress(raw, mtime=0)
