"""What the stage makes of its inputs before anything is measured."""

import pytest

from drawplate import lineage
from drawplate.core.errors import UserError
from drawplate.data.tokenizer import train
from stages.evaluate import Inputs, baselines, evaluate, related
from stages.run import Execution
from tests.evaluate_cases import SMALL, corpus, store


def made(folder, *parents):
    """A folder whose lineage names this one as its model."""
    folder.mkdir()
    (folder / "weights").write_text(folder.name)
    inputs = dict(zip(["model"], parents, strict=False))
    lineage.write(lineage.trace(lineage.Node(stage=folder.name), inputs), folder)
    return folder


def test_the_parent_is_the_nearest_listed_ancestor(tmp_path):
    base = made(tmp_path / "base")
    small = made(tmp_path / "small", base)
    one = made(tmp_path / "one", small)
    other = made(tmp_path / "other", made(tmp_path / "left_out", small))
    alien = made(tmp_path / "alien", made(tmp_path / "unknown"))
    found = related([base, small, one, other, alien, made(tmp_path / "origin")])
    assert [model.parent for model in found] == [None, "base", "small", "small", None, "alien"]
    found = related([base, one, other])
    assert [model.parent for model in found] == [None, "base", "base"]


def test_a_corpus_of_other_tokens_is_refused(tmp_path):
    corpus(tmp_path / "corpus")
    model = store(tmp_path / "model", 0, 1.0)
    train(["other words than those"], 260).save_pretrained(model)
    inputs = Inputs(model=(model,), corpus=tmp_path / "corpus")
    with pytest.raises(UserError, match=r"cut with another tokenizer than that of .*model; run"):
        evaluate(SMALL, inputs, tmp_path / "out", execution=Execution(tracking=False))
    assert not (tmp_path / "out").exists()


def test_baselines_are_means_over_the_texts_that_are_read(tmp_path):
    opened = corpus(tmp_path / "corpus")
    texts = opened.documents("text-heldout")
    sizes = [len(text.encode()) for text in texts]
    one, all_ = baselines(opened, [2]), baselines(opened, range(len(texts)))
    assert one["bigram"] == pytest.approx(3 * 2 / sizes[2])
    assert all_["bigram"] == pytest.approx(sum(3 * i for i in range(7)) / sum(sizes))
    assert one["gzip"] > all_["gzip"]
