"""Parts of a decoder in training: stopped runs go on exactly, folders load by themselves."""

import signal
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import stages.pretrain
from drawplate import edits
from drawplate.core import hf
from drawplate.core.errors import UserError
from drawplate.pretrain import Pretrain
from drawplate.pretrain.driver import Held, Kept, pretrain
from drawplate.pretrain.norm._running import PowerNorm
from drawplate.settings import merge, preset, presets, validate
from drawplate.train.distributed import World
from drawplate.train.loop import Stopped
from drawplate.train.optimizer import Optimizer
from stages import compress, quantize
from stages.run import Execution
from tests import faults
from tests import pretrain_cases as cases

NAMES = [  # a budget plans its own steps: test_pretrain_budget
    name
    for name, tree in presets().items()
    if name.startswith("pretrain/") and "budget" not in tree["pretrain"]
]
POWER = {"norm": {"name": "power"}}
BARE = {"norm": {"name": "power", "layer_scale": False}}
SST = {"parametrisation": {"name": "sst", "rank": 4, "interval": 2, "iterations": 1}}
FACTORS = {"parametrisation": {"name": "sst", "rank": 4, "interval": 2, "energy": 0.3}}
UNTIED = {"model": cases.SHAPE | {"tie": False}}
BOTH = BARE | SST
MUON = {"optimizer": cases.MUON}
QUIET = Execution(threads=1, tracking=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def run(corpus, work, steps=4, **given):
    return pretrain(cases.params(steps, **given), corpus, work).model


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("where", ["batch", "loss", "state"])
def test_a_run_that_is_stopped_goes_on_exactly(corpus, tmp_path, monkeypatch, where):
    """A signal comes with the batch drawn, with half of the gradients made, with columns drawn."""
    parts = BOTH | MUON | {"training": {"accumulate": 2, "precision": "bf16"}}
    whole = run(corpus, tmp_path / "whole", 5, **parts)
    own, calls = getattr(Kept, where), []

    def stopping(self, *given):
        calls.append(where)
        made = own(self, *given)
        if len(calls) == {"batch": 4, "loss": 8, "state": 4}[where]:
            signal.raise_signal(signal.SIGTERM)
        return made

    monkeypatch.setattr(Kept, where, stopping)
    with pytest.raises(Stopped, match="after step"):
        run(corpus, tmp_path / "stopped", 5, **parts)
    assert same(run(corpus, tmp_path / "stopped", 5, **parts), whole)


def test_how_a_batch_is_cut_changes_nothing(corpus, tmp_path):
    one, four = (run(corpus, tmp_path, training={"accumulate": parts}, **BOTH) for parts in (1, 4))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_that_is_skipped_counts_and_leaves_no_trace(
    corpus, tmp_path, monkeypatch, accumulate
):
    """Running means take nothing from a batch whose loss leapt."""
    loss, state, found = Kept.loss, Kept.state, []

    def leaping(self, model, part):
        value, metrics = loss(self, model, part)
        return value * (1e4 if self.steps == 6 else 1), metrics

    def watched(self):
        told = state(self)
        norms = [module for module in self.model.modules() if isinstance(module, PowerNorm)]
        found.append((told, [[x.clone() for x in (n.square, n.nu, n.steps)] for n in norms]))
        return told

    monkeypatch.setattr(Kept, "loss", leaping)
    monkeypatch.setattr(Kept, "state", watched)
    training = {"accumulate": accumulate, "guard": {"window": 4}}
    params = cases.params(8, training=training, **POWER)
    outcome = pretrain(params, corpus, tmp_path).outcome
    assert outcome.skipped == 1
    assert [told for told, _ in found] == [{"steps": step} for step in range(9)]
    for step in range(1, 9):
        before, after = ([x for n in norms for x in n] for _, norms in found[step - 1 : step + 1])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (step == 7)


def test_running_means_see_each_token_once_where_rows_are_weighed(corpus, tmp_path, monkeypatch):
    """Not also in the passes that the rows' weights come from, as often as there are spans."""
    settle, counts = PowerNorm.settle, []

    def counted(self, seen, *given):
        counts.append(seen[0])
        settle(self, seen, *given)

    monkeypatch.setattr(PowerNorm, "settle", counted)
    monkeypatch.setattr("drawplate.train.rowwise.gram.__defaults__", (4 * 4000,))
    run(corpus, tmp_path, 2, training={"direction": {"name": "sven"}}, **POWER)
    assert set(counts) == {4 * 16}


def test_without_parts_a_run_is_named_and_saved_as_ever(corpus):
    params = cases.params()
    task = Kept(params, nn.Linear(1, 1), Held(), World(), None, {})
    assert task.state() == {}
    dumped = params.model_dump(mode="json", exclude={"training", "adopt"}, exclude_none=True)
    assert dumped.keys() == {"seed", "model", "batch", "length", "mix", "learn_prompts"}


def test_an_optimizer_takes_what_was_written_and_forgets_what_led_there():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).bfloat16()
    held = Held.of(Optimizer.model_validate(cases.MUON))
    chain = held.build(model)

    def step():
        model(torch.ones(4, 3, dtype=torch.bfloat16)).square().sum().backward()
        chain.step()
        chain.zero_grad()

    step()
    before = {key: value.clone() for key, value in chain.tensors().items()}
    with torch.no_grad():
        model[0].weight[0] = 0.5
    held.renew(model, ["0.weight"])
    after = chain.tensors()
    assert (after["weight/0.weight"][0] == 0.5).all()
    untouched = before["weight/0.weight"][1]
    assert torch.equal(after["weight/0.weight"][1], untouched)
    assert (untouched != untouched.bfloat16()).any()  # it was not read back from 16 bits
    assert after["weight/0.weight"].dtype is torch.float32
    assert not after["memory/0.weight/0/sum"].any()
    kept = [key for key in before if key.split("/")[1] == "1.weight"]
    assert kept
    assert all(torch.equal(after[key], before[key]) for key in kept)
    step()
    assert float((model[0].weight[0] - 0.5).detach().abs().max()) < 0.1


@pytest.mark.parametrize("parts", [POWER, SST])
def test_weights_that_are_split_are_refused_where_they_cannot_be(corpus, tmp_path, parts):
    with pytest.raises(UserError, match="cannot be trained with weights split over processes"):
        pretrain(cases.params(**parts), corpus, tmp_path, world=World(0, 2, "sharded"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parts", [POWER, SST])
def test_an_adopted_decoder_has_no_parts_to_train(parts):
    with pytest.raises(ValidationError, match=f"remove {next(iter(parts))}"):
        Pretrain.model_validate({"adopt": "somewhere"} | parts)


@pytest.mark.parametrize("parts", [{}, SST, {"feed_forward": {"name": "trukan"}}])
def test_what_is_trained_lies_on_the_device_it_was_sent_to(corpus, tmp_path, monkeypatch, parts):
    seen = {}

    def train(model, task, *_):
        seen.update(list(model.named_parameters()) + list(model.named_buffers()))
        raise UserError("far enough")

    monkeypatch.setattr("drawplate.pretrain.driver.check_head", lambda model: None)
    monkeypatch.setattr("drawplate.pretrain.driver.train", train)
    with pytest.raises(UserError, match="far enough"):
        pretrain(cases.params(**parts), corpus, tmp_path, device="meta")
    assert {str(tensor.device) for tensor in seen.values()} == {"meta"}


LOADS = """
import sys, torch, drawplate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(12)[None]).logits, folder + "/again.pt")
"""


def test_a_fresh_process_loads_what_was_trained(corpus, tmp_path):
    cut = {"plain": POWER, "gains": BARE, "untied": BARE | UNTIED, "factors": POWER | FACTORS}
    wanted = {}
    for name, parts in cut.items():
        model = run(corpus, tmp_path / "work", 3, **parts)
        hf.save(model, tmp_path / name)
        with torch.no_grad():
            wanted[name] = model(torch.arange(12)[None]).logits
        kinds = {type(module).__module__ for module in model.modules()}
        assert not any(kind.startswith("drawplate.pretrain") for kind in kinds)
    assert "edits" not in (tmp_path / "plain" / "config.json").read_text()
    assert '"gain": true' not in (tmp_path / "untied" / "config.json").read_text()
    assert "low_rank" in (tmp_path / "factors" / "config.json").read_text()
    folders = [str(tmp_path / name) for name in cut]
    subprocess.run([sys.executable, "-c", LOADS, *folders], check=True)
    for name in cut:
        assert torch.equal(torch.load(tmp_path / name / "again.pt"), wanted[name])


@pytest.mark.parametrize("name", NAMES)
def test_presets_name_their_paper_and_train(name, corpus, tmp_path):
    assert presets()[name]["paper"]
    made = preset(name)["pretrain"]
    usual = cases.params(2).model_dump(mode="json", exclude={"adopt"})
    how = validate(Pretrain, merge(usual, made), "pretrain")
    assert how != cases.params(2)
    assert pretrain(how, corpus, tmp_path).outcome.steps == 2


def test_it_learns_with_each_part(corpus, tmp_path):
    """The loss falls by a third of a nat, with the optimizers of the default pipeline."""
    for parts in (POWER, BARE, SST):
        losses = []
        pretrain(
            cases.params(12, **parts, **MUON),
            corpus,
            tmp_path,
            lambda step, steps, row, seen=losses: seen.append(row["loss"]),
        )
        assert min(losses[-3:]) < losses[0] - 0.3, parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "method", "kept"),
    [
        (POWER | SST, "low_rank", set()),
        (BARE | SST, "low_rank", {"unnormed"}),
        (BARE | FACTORS, "sparse", {"unnormed", "low_rank"}),
        (BARE | FACTORS, "low_rank", {"unnormed", "low_rank"}),
    ],
)
def test_later_stages_take_what_was_trained(corpus, tmp_path, parts, method, kept):
    """Factors stay factors: the compress stage prunes or cuts them, quantize codes them."""
    base, small, coded = (tmp_path / name for name in ("base", "small", "coded"))
    few = {"rows": 4, "length": 16}
    settings = {
        compress: {"ratio": 0.15, "method": {"name": method}, "calibration": few, "recover": None},
        quantize: {"group": 8, "calibration": few},
    }
    stage = stages.pretrain.pretrain
    inputs = stages.pretrain.Inputs(corpus=corpus.folder)
    stage(cases.params(3, **parts), inputs, base, execution=QUIET)
    assert {edit.name for edit in edits.of(hf.load(base))} == kept
    for module, came, goes in ((compress, base, small), (quantize, small, coded)):
        stage = getattr(module, module.__name__.rpartition(".")[2])
        made = validate(stage.params, settings[module], stage.name)
        inputs = module.Inputs(model=came, corpus=corpus.folder)
        stage(made, inputs, goes, execution=QUIET)
    found = edits.of(hf.load(coded))
    assert found[: len(kept)] == edits.of(hf.load(base))[: len(kept)]
    assert {edit.name for edit in found} >= kept | {"quantized", method}


@pytest.mark.slow
def test_two_processes_train_what_one_does(corpus, tmp_path, monkeypatch):
    """Running means, draws and decompositions are those of the whole batch in both of them."""
    for key, value in faults.environment().items():
        monkeypatch.setenv(key, value)
    inputs, found = stages.pretrain.Inputs(corpus=corpus.folder), []
    for nproc in (1, 2):
        folder = tmp_path / str(nproc)
        execution = Execution(nproc=nproc, threads=1, tracking=False)
        stages.pretrain.pretrain(cases.params(4, **BOTH), inputs, folder, execution=execution)
        found.append(hf.load(folder).state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4)
