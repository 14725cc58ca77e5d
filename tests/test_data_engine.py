"""Whoever reads the parts, the corpus is the same."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from random import Random
from shutil import which

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.data.engine import Here, Local, Ray, Slurm, elsewhere
from drawplate.data.prepare import Prepare, prepare
from drawplate.data.source import Source
from stages.run import Execution

WORDS = ["sum", "array", "the", "of", "returns", "graph", "node", "value", "12", "number"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Seven files of three kinds with bad records in them."""
    folder = tmp_path_factory.mktemp("raw")
    draw = Random(0)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randrange(8, 40)))

    for number in range(3):
        rows = [json.dumps({"text": text()}) for _ in range(30)]
        (folder / f"[{number}].jsonl").write_text("\n".join([*rows, '{"text": null}', "{"]))
    for number in range(3):
        (folder / f"{number}.txt").write_text("\n\n".join([text(), "a\0b", text()]))
    table = pyarrow.table({"text": [text(), None, text()]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return folder


def params(raw, **more):
    sources = [
        {"name": "jsonl", "files": f"{raw}/*.jsonl"},
        {"name": "text", "files": f"{raw}/*.txt", "document": "block"},
        {"name": "parquet", "files": f"{raw}/*.parquet"},
        {"name": "docstrings", "packages": ["packaging", "pluggy"]},
    ]
    return Prepare.model_validate(
        {
            "sources": sources,
            "heldout_text": 0.2,
            "tasks": [{"name": "chain_sum"}],
            "train_problems": 30,
            "heldout_problems": 5,
            "vocabulary": 320,
            **more,
        }
    )


def made(raw, folder, engine, work=None, **more):
    folder.mkdir()
    report = prepare(params(raw, **more), folder, engine=engine, work=work)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return report, {str(p.relative_to(folder)): sha256(p.read_bytes()).digest() for p in files}


NO_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
NO_SLURM = pytest.mark.skipif(which("sbatch") is None, reason="no sbatch on the PATH")
ENGINES = [
    Here(),
    Local(workers=1),
    pytest.param(Local(workers=3), marks=pytest.mark.slow),
    pytest.param(Ray(memory=0.1), marks=[pytest.mark.slow, NO_RAY]),
    # Of a cluster of one's own, whose default partition is called `debug` as in Slurm's examples.
    pytest.param(Slurm(partition="debug", memory=1), marks=[pytest.mark.slow, NO_SLURM]),
]


@pytest.fixture(scope="module")
def wanted(raw, tmp_path_factory):
    return made(raw, tmp_path_factory.mktemp("wanted") / "out", None)


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_the_same_bytes(raw, wanted, tmp_path, engine):
    assert wanted[0].quarantined == 3 * 2 + 3 + 1
    assert made(raw, tmp_path / "out", engine, tmp_path) == wanted
    assert len(list(tmp_path.glob("part-*.jsonl"))) == 3 + 3 + 1 + 2


def test_parts_are_their_source(raw):
    for source in params(raw).sources:
        parts = source.parts()
        assert len(parts) > 1 or source.name == "parquet"
        assert [r for part in parts for r in part.read(1000)] == list(source.read(1000))
        assert {k: v for part in parts for k, v in part.origin().items()} == source.origin()
    (hub,) = leaves(Source)["hub"]().parts()
    assert hub == leaves(Source)["hub"]()


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_finished_parts_are_not_read_again(raw, wanted, tmp_path, engine):
    with pytest.raises(UserError, match="missing"):
        made(raw, tmp_path / "no", engine, tmp_path, tokenizer=tmp_path / "missing")
    finished = sorted(tmp_path.glob("part-*.jsonl"))
    times = [path.stat().st_mtime_ns for path in finished]
    finished[1].unlink()
    assert made(raw, tmp_path / "out", engine, tmp_path) == wanted
    again = [path.stat().st_mtime_ns for path in finished]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, *[True] * 7]


def test_a_part_is_read_again_where_its_file_changed(raw, tmp_path):
    """Also where another file before it takes its number."""
    copied = shutil.copytree(raw, tmp_path / "raw")
    with pytest.raises(UserError, match="missing"):
        made(copied, tmp_path / "no", None, tmp_path, tokenizer=tmp_path / "missing")
    (copied / "1.txt").write_text("words that were not there before")
    (copied / "0a.txt").write_text("and a new file of many words")
    again = made(copied, tmp_path / "again", None, tmp_path)
    assert again == made(copied, tmp_path / "afresh", None)


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_a_part_that_cannot_be_read_is_a_clear_error(raw, tmp_path, engine):
    sources = [{"name": "parquet", "files": f"{raw}/*.parquet", "column": "words"}]
    with pytest.raises(UserError, match="no column of strings named 'words'; it has text"):
        made(raw, tmp_path / "out", engine, tmp_path, sources=sources)
    assert not list(tmp_path.glob("part-*.jsonl"))


def test_workers_are_processes(tmp_path):
    """Several at a time where several are asked for."""
    for engine in (Local(workers=1), Local(workers=2)):
        folder = tmp_path / str(engine.workers)
        folder.mkdir()
        engine.run(Meeting(str(folder), engine.workers), 2, folder / "log")
        pids = {file.read_text() for file in folder.glob("*.pid")}
        assert len(pids) == engine.workers


class Meeting:
    """Work that waits until as many processes as expected have begun."""

    def __init__(self, folder, many):
        self.folder, self.many = folder, many

    def __call__(self, part):
        import os
        import time
        from pathlib import Path

        folder = Path(self.folder)
        (folder / f"{part}.pid").write_text(str(os.getpid()))
        deadline = time.monotonic() + 30
        while len(list(folder.glob("*.pid"))) < self.many and time.monotonic() < deadline:
            time.sleep(0.02)


def test_it_is_an_execution_setting():
    assert Execution().engine == Here()
    assert Execution.model_validate({"engine": {"name": "local", "workers": 4}}).engine == Local(
        workers=4
    )


@pytest.mark.parametrize(
    ("call", "gone", "needs", "extra"),
    [
        ("Local()", "datatrove.executor.local", "datatrove", "data"),
        ("Ray()", "ray", "ray and datatrove", "ray"),
        ("Slurm(partition='a')", "datatrove.executor.slurm", "datatrove", "data"),
    ],
)
def test_what_is_not_installed_is_said(tmp_path, call, gone, needs, extra):
    code = (
        f"import sys; sys.modules[{gone!r}] = None\n"
        "from pathlib import Path\n"
        "from drawplate.data.engine import *\n"
        f"{call}.run(print, 1, Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    engine = call.partition("(")[0].lower()
    said = f"execution.engine {engine} needs {needs}: pip install 'drawplate[{extra}]'"
    assert done.stderr.splitlines()[-1].endswith(said)


def test_slurm_is_called_where_jobs_are_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^execution\.engine slurm needs sbatch; call it where"):
        Slurm(partition="a").run(print, 1, tmp_path / "log")
    with pytest.raises(ValidationError, match="partition"):
        Slurm()


def test_what_fails_elsewhere_is_said_here(tmp_path):
    """Whatever executor there is: the first part that failed, that ended or that never began."""

    def work(part):
        if part == 2:
            raise UserError("c.txt: no such file")

    def carried_out(parts):
        with elsewhere(work, 4, tmp_path / "log") as (step,):
            for part in parts:
                with suppress(UserError):
                    step(None, rank=part)

    others = [0, 1, 3]
    with pytest.raises(UserError, match=r"^c.txt: no such file$"):
        carried_out([*others, 2])
    with pytest.raises(UserError, match=r"^part 2 was not begun; look below .*log$"):
        carried_out(others)
    with pytest.raises(UserError, match=r"^part 0 was not begun"):
        carried_out([])

    def killed(part):
        raise SystemExit

    with (
        pytest.raises(UserError, match=r"^part 0 ended without a word; look below"),
        elsewhere(killed, 1, tmp_path / "log") as (step,),
        suppress(SystemExit),
    ):
        step(None, rank=0)
    with elsewhere(print, 2, tmp_path / "log") as (step,):
        for part in (0, 1):
            assert not list(step(None, rank=part))
