"""Lineage: from any folder back to the raw text, by content."""

import json

import pytest

from drawplate import lineage
from drawplate.core.artifact import publish
from drawplate.core.errors import Damaged, UserError
from drawplate.lineage import Node


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
    assert [s.state for s in steps] == ["verified", "elsewhere", "elsewhere"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_changed_byte_anywhere_on_the_way_is_found(chain, which):
    file = chain[which] / "data"
    file.write_text(file.read_text().upper())
    with pytest.raises(Damaged):
        list(lineage.walk(chain[2]))


def test_equal_contents_give_equal_hashes_wherever_they_lie(tmp_path):
    one = make(tmp_path / "a", Node(stage="prepare"), {})
    two = make(tmp_path / "b" / "c", Node(stage="prepare"), {})
    other = make(tmp_path / "d", Node(stage="prepare", params={"seed": 1}), {})
    assert lineage.content_hash(one) == lineage.content_hash(two) != lineage.content_hash(other)
    assert (one / lineage.FILE).read_bytes() == (two / lineage.FILE).read_bytes()


def test_a_foreign_folder_is_its_own_origin_and_a_change_of_it_is_another(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    first = lineage.content_hash(foreign)
    child = make(tmp_path / "child", Node(stage="compress"), {"model": foreign})
    assert [s.node.stage for s in lineage.walk(child)] == ["compress", "foreign"]
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
