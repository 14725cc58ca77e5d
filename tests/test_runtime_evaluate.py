"""`evaluate.runtime` and `generate --runtime`: what is measured by it, and what does not change."""

import json

import pytest
import torch
from click.testing import CliRunner

from drawplate.core.artifact import publish
from drawplate.core.errors import UserError
from drawplate.core.hf import load, save
from drawplate.evaluate.cost import Probe, measure
from drawplate.evaluate.driver import Model, evaluate
from drawplate.evaluate.quality import Windows
from drawplate.evaluate.results import Evaluate, Report
from drawplate.model import ModelConfig, build
from drawplate.model.runtime.flash_svd import FlashSvd
from drawplate.model.runtime.plain import Plain
from drawplate.model.runtime.powerinfer2 import PowerInfer2
from drawplate.settings import preset, presets, validate
from tests import tiny
from tests.evaluate_cases import SMALL, VOCABULARY, corpus, judge, store
from tests.runtime_cases import factored, with_activation

FLASH = FlashSvd(tile=4, width=9)
NEURONS = PowerInfer2(cluster=4, memory=12_000)
RUNTIMES = [FLASH, NEURONS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, its factors, and a decoder with ReLU that was made from nothing."""
    folder = tmp_path_factory.mktemp("world")
    opened = corpus(folder / "corpus")
    base = load(store(folder / "base", 0, 0.5))
    for name, model in (
        ("factors", factored(base, "proj", rank=12)),
        ("relu", with_activation(tiny.model("llama", 1, VOCABULARY), "relu")),
    ):
        with publish(folder / name, "model") as inside:
            save(model, inside)
    return folder, opened


def found_by(world, name, **other):
    folder, opened = world
    models = [Model("base", folder / "base"), Model(name, folder / name, "base")]
    return evaluate(models, opened, judge, SMALL.model_copy(update=other))


@pytest.mark.parametrize(
    ("runtime", "name", "unfit"),
    [(FLASH, "factors", "low_rank first"), (NEURONS, "relu", "SiLU")],
    ids=lambda value: getattr(value, "name", None),
)
def test_figures_do_not_depend_on_it_and_the_unfit_are_named(world, runtime, name, unfit):
    plain = found_by(world, name)
    found = found_by(world, name, runtime=runtime)
    assert plain.report.unfit == {}
    assert list(found.report.unfit) == ["base"]
    assert unfit in found.report.unfit["base"]
    assert found.report.rows[0] == plain.report.rows[0]
    one, other = (each.report.rows[1].figures() for each in (found, plain))
    assert one == pytest.approx(other, rel=1e-4)
    assert one["bits_per_byte"] != other["bits_per_byte"]  # sums were rounded otherwise
    assert found.greedy[name].texts == plain.greedy[name].texts
    assert found.drawn[name].texts == plain.drawn[name].texts
    again = Report.model_validate_json(found.report.model_dump_json())
    assert again.params.runtime == runtime
    assert again.unfit == found.report.unfit


def test_a_copy_is_still_within_noise(world):
    folder, opened = world
    models = [Model("one", folder / "factors"), Model("two", folder / "factors", "one")]
    params = SMALL.model_copy(update={"runtime": FLASH})
    assert evaluate(models, opened, judge, params).report.rows[1].divergence == 0


@pytest.mark.parametrize(
    ("runtime", "name"), [(FLASH, "factors"), (NEURONS, "relu")], ids=["flash", "neurons"]
)
def test_half_precision_copies_run_by_it(world, runtime, name):
    """Likelihoods in bf16 come from a copy of the model, which is the one that is attached."""
    windows = Windows(window=24, overlap=8, batch_tokens=64, precision="bf16")
    found = found_by(world, name, windows=windows, runtime=runtime)
    plain = found_by(world, name, windows=windows)
    one, other = (each.report.rows[1].figures()["bits_per_byte"] for each in (found, plain))
    assert one == pytest.approx(other, rel=2e-2)


def test_by_default_nothing_is_said_about_it():
    """Parameters are part of what identifies a result: those of earlier results stay the same."""
    assert "runtime" not in Evaluate().model_dump()
    assert "runtime" not in Evaluate(runtime=Plain()).model_dump()
    assert Evaluate(runtime=FLASH).model_dump()["runtime"]["tile"] == 4
    assert "activation" not in ModelConfig().model_dump()
    assert ModelConfig(activation="relu").model_dump()["activation"] == "relu"


def test_the_activation_is_that_of_the_decoder(tmp_path):
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 8, "context": 8}
    ids, found = torch.tensor([[1, 2, 3]]), {}
    for name in ("silu", "relu", "relu2"):
        model = build(ModelConfig(**sizes, activation=name, init_std=0.5), 11, 0).eval()
        assert model.config.hidden_act == name
        save(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == name
        with torch.no_grad():
            found[name] = model(ids).logits
            assert torch.equal(load(tmp_path)(ids).logits, found[name])
        assert (PowerInfer2().unfit(model) is None) == (name != "silu")
    assert not torch.allclose(found["silu"], found["relu"])
    assert not torch.allclose(found["relu2"], found["relu"])


@pytest.mark.parametrize("name", ["flash_svd", "powerinfer2"])
def test_presets(name):
    given = preset(f"evaluate/{name}")
    assert validate(Evaluate, given["evaluate"], "evaluate").runtime.name == name
    runtime = validate(Evaluate, given["evaluate"], "evaluate").runtime
    assert presets()[f"evaluate/{name}"]["paper"] == runtime.paper
    with pytest.raises(UserError, match=r"evaluate.runtime.name: no method 'flash'.* choose from"):
        validate(Evaluate, {"runtime": {"name": "flash"}}, "evaluate")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "name"), [(FLASH, "factors"), (NEURONS, "relu")], ids=["flash", "neurons"]
)
def test_memory_and_speed_are_those_under_it(world, runtime, name):
    folder, _ = world
    probe = Probe(prompt=8, new=4, repeats=1)
    found = measure(folder / name, probe, "cpu", runtime, (5, 6, 7))
    assert 0 < found.running_bytes <= found.peak_bytes
    keys = {"streamed_attentions", "streamed_feed_forwards"}
    if runtime is NEURONS:
        keys = {"bytes_read", "hit_rate", "resident_bytes", "hot_bytes"}
    assert set(found.runtime) == keys
    assert set(found.figures()) >= keys | {"peak_bytes", "decode_tokens_per_second"}
    plain = measure(folder / "base", probe, "cpu", runtime)
    assert 0 < plain.running_bytes <= plain.peak_bytes
    assert plain.runtime is None
    assert "runtime" not in plain.model_dump()


@pytest.mark.parametrize(
    ("how", "name", "told"),
    [
        ("plain", "factors", ""),
        ("flash_svd", "factors", "flash_svd: streamed_attentions 2"),
        ("powerinfer2", "relu", "powerinfer2: bytes_read"),
    ],
)
def test_generate(world, monkeypatch, how, name, told):
    from flows.cli import cli
    from flows.talk import Talker

    folder, opened = world
    monkeypatch.setattr("drawplate.lineage.read", lambda folder: pytest.fail("not asked"))

    def init(self, where):
        self.folder, self.ours = where, False
        self.model, self.tokenizer = load(where), opened.tokenizer

    monkeypatch.setattr(Talker, "__init__", init)
    arguments = ["generate", "text 3", "--model", str(folder / name), "--max-new", "5"]
    plain = CliRunner().invoke(cli, arguments)
    found = CliRunner().invoke(cli, [*arguments, "--runtime", how])
    assert found.exception is None
    assert found.stdout == plain.stdout
    said = [line for line in found.stderr.splitlines() if line.startswith(f"{how}: ")]
    assert len(said) == bool(told)
    assert told in found.stderr
    assert told == "" or told not in plain.stderr
    refused = CliRunner().invoke(cli, [*arguments, "--runtime", "none"])
    assert str(refused.exception).startswith("generate.runtime.name: no method 'none'")


@pytest.mark.slow
def test_what_lies_in_the_file_takes_no_memory(tmp_path):
    """Up and down matrices of 64 MiB under a cap of 2."""
    sizes = {"hidden": 512, "layers": 1, "heads": 4, "kv_heads": 4, "feed_forward": 1 << 14}
    save(build(ModelConfig(**sizes, activation="relu", context=32), 64, 0), tmp_path)
    runtime = PowerInfer2(cluster=64, memory=2 << 20)
    found = measure(tmp_path, Probe(prompt=8, new=2, repeats=1), "cpu", runtime)
    assert found.runtime["resident_bytes"] <= 2 << 20
    plain = measure(tmp_path, Probe(prompt=8, new=2, repeats=1), "cpu", Plain())
    assert plain.running_bytes > found.running_bytes + (48 << 20)
    assert found.running_bytes < found.peak_bytes - (48 << 20)
