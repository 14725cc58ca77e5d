"""Lineage: from any folder back to the raw text, by content."""

import errno
import json
import os
from pathlib import Path

import pytest

from drawplate import lineage
from drawplate.core.artifact import publish
from drawplate.core.errors import Damaged, UserError
from drawplate.core.method import Frozen
from drawplate.lineage import Node
from flows.cli import cli
from stages.quiet import guarded
from stages.run import Execution, Stage


def make(folder, node, inputs):
    with publish(folder, "test") as inside:
        (inside / "data").write_text(node.stage)
        lineage.write(lineage.trace(node, inputs), inside)
    return folder


@pytest.fixture
def chain(tmp_path):
    corpus = make(
        tmp_path / "data" / "corpus", Node(stage="prepare", sources={"0 text": "abc"}), {}
    )
    base = make(tmp_path / "models" / "base", Node(stage="pretrain"), {"corpus": corpus})
    inputs = {"model": base, "corpus": corpus}
    return corpus, base, make(tmp_path / "models" / "small", Node(stage="compress"), inputs)


def test_a_walk_visits_every_step_once_and_ends_at_the_sources(chain):
    steps = list(lineage.walk(chain[2]))
    assert [(s.role, s.depth, s.node.stage) for s in steps] == [
        ("output", 0, "compress"),
        ("corpus", 1, "prepare"),
        ("model", 1, "pretrain"),
    ]
    assert {step.state for step in steps} == {"verified"}
    assert steps[1].node.sources == {"0 text": "abc"}
    assert steps[2].hash == lineage.content_hash(chain[1])


def test_a_parent_that_is_gone_is_still_known(chain, tmp_path):
    alone = tmp_path / "elsewhere" / "deep" / "small"
    alone.parent.mkdir(parents=True)
    chain[2].rename(alone)
    steps = list(lineage.walk(alone))
    assert [s.node.stage for s in steps] == ["compress", "prepare", "pretrain"]
    assert [s.state for s in steps] == ["verified", "not found", "not found"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_byte_anywhere_on_the_way_is_found(chain, which):
    file = chain[which] / "data"
    file.write_text(file.read_text().upper())
    steps = list(lineage.walk(chain[2]))
    assert [step.state for step in steps[1:]].count("changed") == 1
    assert f"{file} was altered" in steps[1 + which].problem


def test_a_changed_output_is_not_walked_from(chain):
    (chain[2] / "data").write_text("COMPRESS")
    with pytest.raises(Damaged, match="was altered"):
        list(lineage.walk(chain[2]))


def test_equal_contents_give_equal_hashes_wherever_they_lie(tmp_path):
    one = make(tmp_path / "a", Node(stage="prepare"), {})
    two = make(tmp_path / "b" / "c", Node(stage="prepare"), {})
    other = make(tmp_path / "d", Node(stage="prepare", params={"seed": 1}), {})
    assert lineage.content_hash(one) == lineage.content_hash(two) != lineage.content_hash(other)
    assert (one / lineage.FILE).read_bytes() == (two / lineage.FILE).read_bytes()


@pytest.mark.parametrize("manifest", [None, "{}", '{"name": "app", "version": 1}'])
def test_a_foreign_folder_is_its_own_origin_and_a_change_of_it_is_another(tmp_path, manifest):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    if manifest is not None:  # other programs write one too
        (foreign / "manifest.json").write_text(manifest)
    (foreign / "config.json").write_text("{}")
    first = lineage.content_hash(foreign)
    child = make(tmp_path / "child", Node(stage="compress"), {"model": foreign})
    assert [s.node.stage for s in lineage.walk(child)] == ["compress", "foreign"]
    assert [s.state for s in lineage.walk(foreign)] == ["foreign"]
    (foreign / "config.json").write_text("{ }")
    assert lineage.content_hash(foreign) != first


def test_a_lineage_that_lost_an_ancestor_is_damaged(chain):
    file = chain[2] / lineage.FILE
    tree = json.loads(file.read_text())
    tree["ancestors"] = {}
    file.unlink()
    file.write_text(json.dumps(tree))
    (chain[2] / "manifest.json").unlink()
    with pytest.raises(Damaged, match="not recorded"):
        list(lineage.walk(chain[2]))
    file.write_text("[]")
    with pytest.raises(Damaged, match="not a lineage"):
        lineage.read(chain[2])


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        list(lineage.walk(tmp_path / "nowhere"))


def closed(monkeypatch, folder):
    """Has the system refuse whatever lies in the folder, as it does with other users' folders."""
    plain = Path.stat

    def stat(path, **how):
        if folder in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, **how)

    monkeypatch.setattr(Path, "stat", stat)


def test_folders_of_others_do_not_stop_a_walk(chain, tmp_path, monkeypatch):
    (tmp_path / "a-neighbour").mkdir()
    closed(monkeypatch, tmp_path / "a-neighbour")
    assert [step.state for step in lineage.walk(chain[2])] == ["verified"] * 3


class Toy(Frozen):
    adopt: Path | None = None


class Inputs(Frozen):
    model: Path
    corpus: Path


@pytest.fixture
def made(tmp_path, monkeypatch):
    """What a stage made in `tmp_path/a` of a foreign model and a text of another folder."""
    monkeypatch.chdir(tmp_path)

    def body(params, inputs, run):
        (run.folder / "data").write_text("made")
        text = {"texts/one.txt": lineage.content_hash(Path("texts/one.txt")), "numpy": "2.3"}
        run.sources |= {"0 text": json.dumps(text)}
        run.sources["adopt"] = lineage.content_hash(params.adopt)
        return Toy()

    for file in ("models/their/config.json", "notes.txt", "texts/one.txt", "given/config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    inputs = Inputs(model=Path("models/their"), corpus=Path("notes.txt"))
    how = Execution(tracking=False, threads=1)
    out = tmp_path / "deep" / "er" / "made"
    Stage("toy", Toy, Inputs, body, "model")(Toy(adopt=Path("given")), inputs, out, execution=how)
    monkeypatch.chdir("/")  # it is found from anywhere
    return out


def told(folder, capsys):
    capsys.readouterr()
    code = guarded(lambda: cli.main(["lineage", str(folder)], standalone_mode=False))
    return code, *capsys.readouterr()


def test_plain_inputs_and_raw_sources_are_found_where_they_lay(made, tmp_path, capsys):
    code, out, err = told(made, capsys)
    assert (code, err) == (0, "")
    lines = [[word for word in line.split() if len(word) != 12] for line in out.splitlines()]
    assert sorted(map(" ".join, lines)) == [
        f"corpus: foreign verified {tmp_path / 'notes.txt'}",
        f"model: foreign verified {tmp_path / 'models' / 'their'}",
        f"output: toy verified {made}",
        "source 0 text: numpy 2.3",
        "source 0 text: texts/one.txt verified",
        "source adopt: given verified",
    ]


@pytest.mark.parametrize(
    "file", ["models/their/config.json", "notes.txt", "texts/one.txt", "given/config.json"]
)
def test_a_changed_input_is_told_and_the_exit_code_says_so(made, tmp_path, capsys, file):
    with (tmp_path / file).open("a") as one:
        one.write("more")
    code, out, err = told(made, capsys)
    assert code == 3
    assert out.count("  changed") == 1
    assert err.startswith(f"drawplate: {tmp_path}")
    assert "was changed since it was read" in err
    (tmp_path / file).unlink()
    if file.endswith(".txt"):
        code, out, err = told(made, capsys)
        assert (code, out.count("  not found"), err) == (0, 1, "")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 40)])
def test_where_inputs_lay_is_no_part_of_what_was_made(made, damage):
    assert made.name not in {path.name for path in made.iterdir()}
    assert "deep" not in (made / lineage.FILE).read_text()
    damage(made.parent / ".drawplate" / "made.inputs.json")
    assert [step.state for step in lineage.walk(made)] == ["verified", "not found", "not found"]


def test_inputs_that_others_keep_closed_are_not_found(made, tmp_path, monkeypatch, capsys):
    closed(monkeypatch, tmp_path / "models")
    code, out, err = told(made, capsys)
    assert (code, err) == (0, "")
    assert out.count("  not found") == 1


def test_nothing_else_is_looked_through_where_all_inputs_lie_as_noted(made, monkeypatch):
    monkeypatch.setattr(lineage, "published", None)
    assert {step.state for step in lineage.walk(made)} == {"verified"}
