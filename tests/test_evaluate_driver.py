"""The evaluation of tiny models, end to end: what it asks, what it reports, that it repeats."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from drawplate import edits
from drawplate.core.artifact import publish, tree_hash
from drawplate.core.errors import UserError
from drawplate.core.hf import load, save
from drawplate.evaluate.cost import Probe, macs, stored_bytes
from drawplate.evaluate.driver import Model, evaluate
from drawplate.evaluate.interval import Chance
from drawplate.evaluate.quality import Windows, loss, loss_and_divergence
from drawplate.evaluate.results import Evaluate, Report
from drawplate.evaluate.study import Study
from drawplate.model.filter.top_k import TopK
from drawplate.quantize.driver import Quantize, quantize
from tests import tiny
from tests.evaluate_cases import SMALL, TASKS, as_json, corpus, judge, run, store


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, run(folder)


def again(folder, params=SMALL, **given):
    models = [Model("base", folder / "base"), Model("child", folder / "child", "base")]
    return evaluate(models, corpus_of(folder), judge, params, **given)


def corpus_of(folder):
    from drawplate.core.corpus import Corpus

    return Corpus(folder / "corpus")


def test_figures_are_those_of_the_parts(world):
    folder, found = world
    opened = corpus_of(folder)
    stream, texts = opened.stream("text-heldout"), opened.documents("text-heldout")
    documents = [
        stream.tokens[a:b] for a, b in zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
    ]
    assert all(document[-1] == opened.end for document in documents)
    sizes = [len(text.encode()) for text in texts]
    base, child = load(folder / "base"), load(folder / "child")
    text = documents, sizes, opened.end, SMALL.windows
    alone, (paired, apart) = loss(base, *text), loss_and_divergence(child, base, *text)
    first, second = found.report.rows
    assert first.quality.bits_per_byte.value == pytest.approx(alone.bits_per_byte, rel=1e-12)
    assert second.quality.bits_per_byte.value == pytest.approx(paired.bits_per_byte, rel=1e-12)
    assert first.quality.bits_per_byte.low < first.quality.bits_per_byte.value
    assert (first.divergence, second.divergence) == (None, apart.per_token)
    assert (first.quality.documents, first.quality.bytes) == (7, sum(sizes))
    assert first.quality.tokens == len(stream.tokens)
    assert (second.hash, second.parent) == (tree_hash(folder / "child"), "base")
    assert (first.cost.stored_bytes, first.cost.macs) == (stored_bytes(folder / "base"), macs(base))
    assert list(first.families) == sorted(TASKS)
    assert sum(scores.problems for scores in first.families.values()) == 8


def test_a_model_is_read_in_its_own_window_whatever_its_parent(world, tmp_path):
    folder, _ = world
    for name, seed, context in (("long", 1, 64), ("short", 0, 32), ("other", 0, 64)):
        store(tmp_path / name, seed, 1.0, context)
    params = SMALL.model_copy(
        update={"windows": SMALL.windows.model_copy(update={"window": 512}), "problems": 2}
    )

    def row(parent):
        models = [Model("parent", tmp_path / parent), Model("long", tmp_path / "long", "parent")]
        found = evaluate(models, corpus_of(folder), judge, params)
        (pair,) = found.report.pairs
        assert [pair.comparisons[0].parent, pair.comparisons[0].child] == [
            pytest.approx(one.quality.bits_per_byte.value) for one in found.report.rows
        ]
        return [one.quality.window for one in found.report.rows], found.losses["long"].nats

    (windows, under), (same, beside) = row("short"), row("other")
    assert (windows, same) == ([32, 64], [64, 64])
    assert under.tolist() == beside.tolist()


def test_problems_are_spread_evenly_and_scored_by_their_number_in_the_corpus(world):
    folder, _ = world
    asked = []

    def score(number, text):
        asked.append(number)
        return judge(number, text)

    opened = corpus_of(folder)
    found = evaluate([Model("only", folder / "base")], opened, score, SMALL)
    numbers = [0, 1, 2, 3, 5, 6, 7, 8]
    assert asked == [n for n in numbers for _ in range(3)] + numbers
    assert found.problems == [opened.problems("heldout")[n] for n in numbers]
    assert found.greedy["only"].scores[4, 0] == judge(5, found.greedy["only"].texts[4][0])
    assert found.report.pairs == ()


def test_pairs_compare_what_the_rows_say(world):
    _, found = world
    (pair,) = found.report.pairs
    assert (pair.parent, pair.child) == ("base", "child")
    by_name = {one.metric: one for one in pair.comparisons}
    assert by_name["length"].child < by_name["length"].parent
    solved = ["greedy", "pass_at_1", "pass_at_3"]
    assert list(by_name) == ["bits_per_byte", *solved, "length", "truncated"]
    assert by_name["truncated"].child < by_name["truncated"].parent
    base, child = (row.figures() for row in found.report.rows)
    for name, one in by_name.items():
        assert one.parent == pytest.approx(base[name])
        assert one.child == pytest.approx(child[name])
        assert one.difference.value == pytest.approx(child[name] - base[name])
        assert one.adjusted >= one.p
    change = by_name["bits_per_byte"]
    low, high = change.difference.low, change.difference.high
    verdict = "better" if high < 0 else "worse" if low > 0 else "within noise"
    assert change.verdict == verdict
    assert by_name["greedy"].flips is not None


def test_packed_weights_are_decoded_once_not_for_every_pass(world, tmp_path, monkeypatch):
    folder, _ = world
    for name in ("base", "child"):
        model = load(folder / name)
        quantize(model, tiny.tokens(), Quantize(group=16), batch=4)
        with publish(tmp_path / name, "model") as inside:
            save(model, inside)
    calls = []
    monkeypatch.setattr(edits.Packed, "compute", lambda *call: calls.append(call))
    ways = Study(filters=(TopK(k=4),), temperatures=(1.0,), samples=2)
    models = [Model("base", tmp_path / "base"), Model("child", tmp_path / "child", "base")]
    params = SMALL.model_copy(update={"study": ways})
    assert len(evaluate(models, corpus_of(folder), judge, params).report.study) == 2
    assert not calls


def test_a_copy_is_within_noise_in_everything(world):
    folder, _ = world
    models = [Model("one", folder / "base"), Model("two", folder / "base", "one")]
    found = evaluate(models, corpus_of(folder), judge, SMALL)
    assert {one.verdict for one in found.report.pairs[0].comparisons} == {"within noise"}
    assert {one.difference.value for one in found.report.pairs[0].comparisons} == {0.0}
    assert found.report.rows[1].divergence == 0.0


def test_equal_inputs_give_equal_bytes(world):
    folder, found = world
    repeated = again(folder)
    assert as_json(repeated) == as_json(found)
    assert repeated.drawn["child"].texts == found.drawn["child"].texts


def test_a_report_survives_json(world):
    report = world[1].report
    assert Report.model_validate_json(report.model_dump_json()) == report
    metrics = report.metrics()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (
        metrics["child.vs_base.greedy.difference"]
        == report.pairs[0].comparisons[1].difference.value
    )
    assert {"base.bits_per_byte_low", "child.divergence", "child.macs"} <= set(metrics)
    assert f"child.task.{TASKS[0]}.greedy" in metrics
    assert metrics["child.vs_base.bits_per_byte.verdict"] in (1.0, -1.0)
    assert report.machine_metrics() == {}


@pytest.mark.parametrize(
    "other",
    [
        {"documents": 3},
        {"windows": Windows(window=12, overlap=4, precision="float32")},
        {"problems": 4},
        {"samples": 4},
        {"passes": (1,)},
        {"temperature": 0.2},
        {"filters": (TopK(k=2),)},
        {"max_new": 3},
        {"seed": 1},
        {"chance": Chance(resamples=300)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_setting_matters(world, other):
    folder, found = world
    changed = again(folder, SMALL.model_copy(update=other)).report
    assert changed.rows != found.report.rows


def test_batch_size_does_not_matter(world):
    folder, found = world
    changed = again(folder, SMALL.model_copy(update={"batch_size": 2}))
    assert changed.drawn["child"].texts == found.drawn["child"].texts


def test_only_parents_that_are_still_needed_stay_in_memory(world, monkeypatch):
    folder, _ = world
    import gc
    import weakref

    alive = []

    def watched(path):
        model = load(path)
        alive.append(weakref.ref(model))
        return model

    counts = []

    def watch(step, total, metrics):
        gc.collect()
        counts.append(sum(one() is not None for one in alive))
        assert total == 4
        assert f"{'abcd'[step - 1]}.bits_per_byte" in metrics

    monkeypatch.setattr("drawplate.evaluate.driver.load", watched)
    chain = [(name, parent) for name, parent in zip("abcd", (None, "a", "b", "c"), strict=True)]
    models = [Model(name, folder / "base", parent) for name, parent in chain]
    evaluate(models, corpus_of(folder), judge, SMALL, watch=watch)
    assert len(alive) == 4
    assert max(counts) <= 2


def test_baselines_are_of_the_texts_that_models_read(world):
    folder, _ = world
    for documents, numbers in ((None, [*range(7)]), (3, [0, 2, 4])):
        params = SMALL.model_copy(update={"documents": documents})
        report = again(
            folder, params, baselines=lambda n: {"sum": float(sum(n)), "n": len(n)}
        ).report
        told = report.metrics()
        assert told["baseline.n.bits_per_byte"] == len(numbers) == report.rows[0].quality.documents
        assert told["baseline.sum.bits_per_byte"] == sum(numbers)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([("a", None), ("a", None)], "'a' must be unique"),
        ([("a", "b"), ("b", None)], "parent 'b' of 'a' must be listed before it"),
        ([("<a>", None)], "'<a>' must be unique and made of letters"),
        ([("a", "a")], "parent 'a' of 'a' must be listed before it"),
    ],
)
def test_models_come_in_order_under_names_of_their_own(world, names, message):
    folder, _ = world
    models = [Model(name, folder / "base", parent) for name, parent in names]
    with pytest.raises(UserError, match=message):
        evaluate(models, corpus_of(folder), judge, SMALL)


def test_no_more_is_asked_than_there_is(world):
    folder, _ = world
    for other, message in (
        ({"problems": 11}, "evaluate.problems: 11 wanted, the corpus holds 10"),
        ({"documents": 8}, "evaluate.documents: 8 wanted, the corpus holds 7"),
    ):
        with pytest.raises(UserError, match=message):
            again(folder, SMALL.model_copy(update=other))
    with pytest.raises(ValidationError, match="pass@9 needs more than 8 samples"):
        Evaluate(passes=(1, 9))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"probe": Probe()}, r"probe\.prompt=128 and evaluate\.probe\.new=64 .* 191, base has 64"),
        ({"max_new": 80}, "max_new=80 need a context of .*, the model has 64"),
    ],
)
def test_a_context_that_is_too_short_is_told_before_anything_is_read(
    world, monkeypatch, other, message
):
    folder, _ = world
    monkeypatch.setattr("drawplate.evaluate.driver.loss", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=message):
        again(folder, SMALL.model_copy(update=other))


def test_compressed_models_are_read_as_they_are_stored(world, tmp_path):
    """Factors of full rank predict the same; what they cost is what is stored and computed."""
    import torch

    from drawplate import edits
    from drawplate.core.artifact import publish
    from drawplate.core.hf import save
    from drawplate.edits.low_rank import LowRank

    folder, _ = world
    model = load(folder / "base")
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        weight = model.get_submodule(path).weight.detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        rank = {"first.weight": values[:, None] * right, "second.weight": left}
        edits.apply(model, LowRank(module=path, rank=len(values)), rank)
    with publish(tmp_path / "factors", "model") as inside:
        save(model, inside)
    models = [Model("base", folder / "base"), Model("factors", tmp_path / "factors", "base")]
    base, factors = evaluate(models, corpus_of(folder), judge, SMALL).report.rows
    assert factors.divergence == pytest.approx(0, abs=1e-6)
    same = base.quality.bits_per_byte.value
    assert factors.quality.bits_per_byte.value == pytest.approx(same, rel=1e-5)
    assert factors.cost.macs - base.cost.macs == 32 * (64 + 32) - 64 * 32 + 32 * 64 - 32 * 32
    assert factors.cost.stored_bytes > base.cost.stored_bytes


def test_losses_are_kept_by_document(world):
    found = world[1]
    kept = found.losses["base"]
    assert len(kept.nats) == 7
    assert np.isclose(kept.bits_per_byte, found.report.rows[0].quality.bits_per_byte.value)


@pytest.mark.slow
def test_memory_and_speed_are_reported_apart(tmp_path):
    params = SMALL.model_copy(update={"probe": Probe(prompt=8, new=4, repeats=1)})
    store(tmp_path / "base", 0, 1.0)
    opened = corpus(tmp_path / "corpus")
    found = evaluate([Model("base", tmp_path / "base")], opened, judge, params).report
    metrics = found.machine_metrics()
    assert metrics["base.peak_bytes"] > found.rows[0].cost.stored_bytes / 2
    assert set(metrics).isdisjoint(found.metrics())
