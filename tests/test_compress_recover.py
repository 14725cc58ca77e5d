"""Recovery: its loss against the formula, what it trains, what it leaves, and that it helps."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drawplate import edits
from drawplate.compress.driver import Compress, compress
from drawplate.compress.recover import (
    Recover,
    Recovery,
    chosen,
    cross_entropy,
    divergence,
    recover,
)
from drawplate.core.batches import IGNORE, Batch
from drawplate.core.corpus import Corpus, write_facts, write_stream
from drawplate.core.errors import UserError
from drawplate.core.hf import stored_bytes
from drawplate.train.language import named
from tests import tiny

LOW_RANK = {"name": "low_rank"}
SPARSE = {"name": "sparse", "pattern": {"name": "n_m"}}
MADE = {}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text in which each token follows from the last one, and problems with prompts."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [[3 + (start + 7 * k) % 90 for k in range(40)] for start in range(60)]
    for name in ("text-train", "text-heldout"):
        write_stream(folder, name, [([*text, 2], 0) for text in texts], tiny.VOCABULARY)
    problems = [([5, 6 + k, 7, 8 + k, 2], 2) for k in range(40)]
    for name in ("problems-train", "problems-heldout"):
        write_stream(folder, name, problems, tiny.VOCABULARY)
    write_facts(folder, {"vocabulary": tiny.VOCABULARY, "end": 2, "pad": 0})
    return Corpus(folder)


def settings(steps=2, **fields):
    training = {"steps": steps, "precision": "float32", **fields.pop("training", {})}
    base = Recover().training.model_dump()
    return Recover.model_validate(
        {"rows": 4, "length": 16, **fields, "training": {**base, **training}}
    )


def pair(spec=None, ratio=0.3, kind="llama"):
    """A compressed model and its parent."""
    key = json.dumps([spec, ratio, kind])
    if key not in MADE:
        parent = tiny.model(kind)
        model = copy.deepcopy(parent)
        params = Compress.model_validate({"ratio": ratio, "method": spec or LOW_RANK})
        compress(model, tiny.tokens(), params)
        MADE[key] = model, parent
    return copy.deepcopy(MADE[key])


def part(rows=3, length=6, seed=0):
    tokens = tiny.tokens(rows, length, seed)
    labels = tokens.clone()
    labels[0, :4] = IGNORE
    positions = torch.arange(length).repeat(rows, 1)
    positions[1, 3:] -= 3  # another document begins
    return named(Batch(tokens, labels, positions))


def task(parent, **fields):
    return Recovery(None, parent, settings(**fields), {})


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_loss_is_the_formula(alpha, temperature):
    model, parent = tiny.model(seed=1).double(), tiny.model(seed=2).double()
    given = part()
    loss, metrics = task(parent, alpha=alpha, temperature=temperature).loss(model, given)
    with torch.no_grad():
        where = {"position_ids": given["positions"], "use_cache": False}
        mine = model(given["tokens"], **where).logits.numpy()
        theirs = parent(given["tokens"], **where).logits.numpy()
    text, apart, count = 0.0, 0.0, 0
    for row in range(3):
        for place in range(6):
            target = int(given["targets"][row, place])
            if target == IGNORE:
                continue
            count += 1
            p = np.exp(mine[row, place]) / np.exp(mine[row, place]).sum()
            text -= math.log(p[target])
            hot = np.exp(theirs[row, place] / temperature)
            there = hot / hot.sum()
            soft = np.exp(mine[row, place] / temperature)
            here = soft / soft.sum()
            apart += sum(q * (math.log(q) - math.log(h)) for q, h in zip(there, here, strict=True))
    wanted = (1 - alpha) * text / count + alpha * temperature**2 * apart / count
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-10)
    assert float(metrics["text"]) == pytest.approx(text / count, rel=1e-10)
    assert int(metrics["tokens"]) == 18
    if alpha:
        assert float(metrics["divergence"]) == pytest.approx(apart / count, rel=1e-10)
    else:
        assert "divergence" not in metrics


def test_pieces_in_plain_numbers():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    other = torch.log(torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64))
    assert float(cross_entropy(logits, torch.tensor([0]))) == pytest.approx(math.log(2))
    assert float(divergence(logits, other, 1.0)) == pytest.approx(0.25 * math.log(2))
    assert float(divergence(logits, logits + 3, 2.0)) == pytest.approx(0, abs=1e-15)
    assert cross_entropy(logits.bfloat16(), torch.tensor([0])).dtype == torch.float32
    assert divergence(logits.bfloat16(), other.bfloat16(), 1.0).dtype == torch.float32


def test_parts_add_up():
    model, parent = tiny.model(seed=1).double(), tiny.model(seed=2).double()
    given, one = part(4), task(parent)
    whole, metrics = one.loss(model, given)
    cuts = [{k: (v[a:b] if v.ndim else v) for k, v in given.items()} for a, b in ((0, 1), (1, 4))]
    found = [one.loss(model, cut) for cut in cuts]
    total = sum(loss.detach() for loss, _ in found)
    assert float(total) == pytest.approx(float(whole.detach()), rel=1e-12)
    for name, value in metrics.items():
        assert float(sum(m[name] for _, m in found)) == pytest.approx(float(value), rel=1e-12)


def test_a_part_without_learned_tokens_adds_nothing():
    model = tiny.model(seed=1)
    given = part()
    given["targets"] = torch.full_like(given["targets"], IGNORE)
    loss, _ = task(tiny.model()).loss(model, given)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_ignored_tokens_do_not_count():
    model, parent = tiny.model(seed=1), tiny.model(seed=2)
    given = part()
    loss, _ = task(parent).loss(model, given)
    more = {"tokens": 9, "targets": IGNORE, "positions": 0}
    longer = given | {
        name: torch.cat([given[name], torch.full((3, 2), value)], 1) for name, value in more.items()
    }
    torch.testing.assert_close(task(parent).loss(model, longer)[0], loss)


def test_the_parent_itself_is_already_there():
    parent = tiny.model().double()
    model = copy.deepcopy(parent)
    loss, _ = task(parent, alpha=1.0).loss(model, part())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    assert all(p.grad is None or p.grad.abs().max() < 1e-10 for p in model.parameters())
    assert all(p.grad is None for p in parent.parameters())


def test_without_distillation_the_parent_is_not_asked():
    silent = SimpleNamespace(get_output_embeddings=lambda: None)
    loss, _ = task(silent, alpha=0.0).loss(tiny.model(), part())
    assert loss.isfinite()


def test_the_head_meets_few_numbers_of_tokens():
    """Each number of rows costs kernels that stay in memory."""
    model, parent = tiny.model(seed=1), tiny.model(seed=2)
    met = set()
    for one in (model, parent):
        one.lm_head.register_forward_pre_hook(lambda _, given: met.add(len(given[0])))
    for rows in (2, 5, 11, 14):
        task(parent).loss(model, part(rows))[0].backward()
    assert met == {64, 128}


def test_many_tokens_go_in_pieces(monkeypatch):
    model, parent = tiny.model(seed=1), tiny.model(seed=2)
    whole, _ = task(parent).loss(model, part())
    whole.backward()
    gradient = model.model.norm.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("drawplate.compress.recover.CHUNK", 4)
    cut, _ = task(parent).loss(model, part())
    cut.backward()
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(model.model.norm.weight.grad, gradient)


@pytest.mark.parametrize("spec", [LOW_RANK, SPARSE], ids=["low_rank", "sparse"])
def test_chosen(spec):
    model, _ = pair(spec)
    names = [name for name, _ in model.named_parameters()]
    changed = chosen(model, "changed")
    places = {edit.module for edit in edits.of(model)}
    assert {".".join(n.split(".")[:5]) for n in changed} == places
    ends = ("first.weight", "second.weight", "values")
    assert all(name.endswith(ends) for name in changed)
    vectors = chosen(model, "changed_and_vectors")
    assert vectors > changed
    assert all("norm" in name for name in vectors - changed)
    assert chosen(model, "everything") == set(names)
    biases = pair(spec, kind="gpt2")[0]
    assert "transformer.h.0.attn.c_attn.bias" in chosen(biases, "changed_and_vectors") or any(
        name.endswith("bias") for name in chosen(biases, "changed_and_vectors")
    )


@pytest.mark.parametrize("trains", ["changed", "changed_and_vectors", "everything"])
@pytest.mark.parametrize("spec", [LOW_RANK, SPARSE], ids=["low_rank", "sparse"])
def test_trains_what_it_says_and_keeps_the_edits(tmp_path, corpus, spec, trains):
    model, parent = pair(spec)
    before = copy.deepcopy(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    size, specs = stored_bytes(model), edits.of(model)
    outcome = recover(model, parent, corpus, settings(trains=trains), tmp_path)
    assert outcome.steps == 2
    old = dict(before.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved == chosen(model, trains)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert (stored_bytes(model), edits.of(model)) == (size, specs)
    edits.check(model)
    masks = {k: v for k, v in model.state_dict().items() if k.endswith("mask")}
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in masks.items())
    if spec is SPARSE:
        path = specs[0].module
        zero = edits.matrix(before.get_submodule(path)) == 0
        assert (edits.matrix(model.get_submodule(path))[zero] == 0).all()


def test_parent_stays_as_it_is(tmp_path, corpus):
    model, parent = pair()
    before = copy.deepcopy(parent.state_dict())
    recover(model, parent, corpus, settings(), tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in parent.state_dict().items())


def test_dtypes_come_back(tmp_path, corpus):
    model, parent = pair()
    model.bfloat16()
    recover(model, parent, corpus, settings(), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("spec", [LOW_RANK, SPARSE], ids=["low_rank", "sparse"])
def test_helps(tmp_path, corpus, spec):
    """On rows it has not seen: nearer to the parent, or better at the text."""
    text = torch.tensor([[3 + (s + 7 * k) % 90 for k in range(16)] for s in range(60, 76)])
    given = named(Batch(text, text, torch.arange(16).repeat(16, 1)))

    def judged(folder, **fields):
        model, parent = pair(spec, 0.35)
        if fields:
            fast = {"optimizer": {"matrices": {"rate": 0.01}, "rest": {"rate": 0.01}}}
            params = settings(25, problems=0.0, training=fast, **fields)
            recover(model, parent, corpus, params, tmp_path / folder)
        with torch.no_grad():
            return task(parent).loss(model, given)[1]

    before = judged("none")
    assert judged("taught", alpha=1.0)["divergence"] < 0.8 * before["divergence"]
    assert judged("alone", alpha=0.0)["text"] < 0.92 * before["text"]


def test_every_field_matters(tmp_path, corpus):
    def trained(number, **fields):
        model, parent = pair()
        recover(model, parent, corpus, settings(**fields), tmp_path / str(number))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    others = [
        {},
        {"rows": 3},
        {"length": 15},
        {"problems": 0.0},
        {"learn_prompts": True},
        {"trains": "changed"},
        {"alpha": 0.4},
        {"temperature": 2.0},
        {"seed": 1},
        {"training": {"steps": 3}},
    ]
    found = [trained(i, **fields) for i, fields in enumerate(others)]
    for other, fields in zip(found[1:], others[1:], strict=True):
        assert not torch.equal(found[0], other), fields
    assert torch.equal(found[0], trained("again"))
    assert set().union(*others) == set(Recover.model_fields)


def test_the_same_call_again_finds_its_work_done(tmp_path, corpus):
    model, parent = pair()
    recover(model, parent, corpus, settings(), tmp_path)
    again, _ = pair()
    seen = []
    outcome = recover(
        again, parent, corpus, settings(), tmp_path, lambda step, total, metrics: seen.append(step)
    )
    assert seen == []
    assert outcome.steps == 2
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert "divergence" in outcome.last


def test_rows_longer_than_the_model_reads_are_refused(tmp_path, corpus):
    model, parent = pair()
    with pytest.raises(UserError, match=r"compress\.recover\.length: rows of 65 .* at most 64"):
        recover(model, parent, corpus, settings(length=65), tmp_path)


def test_params_are_checked():
    for bad in ({"alpha": 1.5}, {"temperature": 0}, {"trains": "norms"}, {"length": 1}):
        with pytest.raises(ValueError, match="validation error"):
            Recover.model_validate(bad)
    assert Recover.model_validate_json(Recover().model_dump_json()) == Recover()
