"""The rehearsal of a small configuration, its refusals, and less of every kind of source."""

import gzip
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from transformers import LlamaConfig

from drawplate.core.errors import Exhausted, UserError
from drawplate.data.source.docstrings import Docstrings
from drawplate.data.source.hub import Hub
from drawplate.data.source.jsonl import Jsonl
from drawplate.data.source.parquet import Parquet
from drawplate.data.source.text import Text
from drawplate.forecast.machine import Limits
from drawplate.pretrain.budget import SIZES
from drawplate.rl.params import Finetune
from drawplate.rl.selfplay.stp import Stp
from drawplate.settings import merge, preset, read, validate
from flows.preflight import FORECAST, Rehearsal, compared, forecast, preflight, save
from flows.rehearse import _left, _some, folder_size
from stages.pretrain import pretrain
from stages.quiet import guarded

ENOUGH = Limits(memory=10**13, disk=10**13)
PARAMS = """
execution: {threads: 1, tracking: false}
prepare:
  sources: [{name: text, files: "texts/*.txt"}]
  heldout_text: 0.2
  tasks: [{name: chain_sum, min_terms: 2, max_terms: 2}]
  train_problems: 60
  heldout_problems: 8
  vocabulary: 320
pretrain:
  model: {hidden: 16, layers: 3, heads: 2, kv_heads: 2, feed_forward: 16, context: 128}
  batch: 4
  length: 64
  training: {steps: 40, save_every: 10}
compress:
  ratio: 0.1
  calibration: {rows: 8, length: 32}
  recover: {rows: 4, length: 64, training: {steps: 20}}
quantize: {calibration: {rows: 8, length: 32}, vocabulary: 8, group: 8}
finetune:
  steps: 4
  prompts: 2
  samples: 2
  length: {name: constant, tokens: 8}
evaluate:
  {problems: 4, samples: 2, passes: [1], max_new: 8, batch_size: 4, probe: null,
   windows: {overlap: 64}}
"""
_COLUMNS = ("told", "found", "off")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "red", "green", "blue", "dark"]


def words(draw, count):
    return " ".join(draw.choice(WORDS) for _ in range(count))


@pytest.fixture
def project(tmp_path):
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = "\n".join(words(draw, 12) for _ in range(8))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


class Pretending:
    """A player that checks parameters as a stage would, and takes a second for each step."""

    def __init__(self):
        self.seen = []

    def ask(self, do, **order):
        if do == "rate":
            return {"rate": 1e12}
        params = validate(pretrain.params, order["params"], "pretrain")
        self.seen.append((params, order["layers"]))
        steps = params.training.steps
        sizes = dict.fromkeys(("memory", "disk", "work", "stored"), 1e6)
        marks = {"pretrain": [float(step) for step in range(steps)]}
        return {"seconds": 10.0 + steps, "device": None, "marks": marks, **sizes}


def rehearsed(project, tree):
    """What is asked of pretrain's player, and the needs that follow."""
    player = Pretending()
    rehearsal = Rehearsal(tree, {"pretrain": player}, project)
    return rehearsal, rehearsal.of_pretrain(), player.seen


def test_a_budget_is_rehearsed_at_the_sizes_that_it_plans(project):
    tree = merge(read(project / "params.yaml"), preset("pretrain/one_epoch"))
    given = validate(pretrain.params, tree["pretrain"], "pretrain")
    plan = given.budget.plan(given.model, 320, 4 * 64, 10**15)
    rehearsal, need, seen = rehearsed(project, tree)
    assert rehearsal.layers == plan.layers > 1
    for params, _ in seen:
        model = given.model.model_copy(update={key: getattr(plan, key) for key in SIZES})
        layers = params.model.layers
        assert params.model == model.model_copy(update={"layers": layers})
        assert params.training.optimizer == given.training.optimizer
    assert [params.model.layers for params, _ in seen] == rehearsal.sizes
    assert need.seconds == pytest.approx(10 + plan.steps)


@pytest.mark.parametrize("position", [None, {"name": "clex"}])
def test_an_adopted_model_is_rehearsed_in_parts_and_few_steps(project, position):
    LlamaConfig(num_hidden_layers=7).save_pretrained(project / "theirs")
    section = {"adopt": str(project / "theirs")}
    if position is not None:
        section |= {"position": position, "training": {"steps": 500}}
    tree = read(project / "params.yaml") | {"pretrain": section}
    _, need, seen = rehearsed(project, tree)
    given = validate(pretrain.params, section, "pretrain")
    assert [layers for _, layers in seen] == [1, 2]
    if position is None:
        assert [params for params, _ in seen] == [given, given]
        return
    few = given.training.model_copy(update={"steps": 2, "save_every": 2})
    assert [params.training for params, _ in seen] == [few, few]
    assert need.seconds == pytest.approx(10 + 500)


@pytest.mark.parametrize("execution", [{}, {"nproc": 4, "nnodes": 2}])
def test_one_process_is_rehearsed_for_all_that_train_together(project, execution):
    tree = merge(read(project / "params.yaml"), {"execution": execution})
    tree["pretrain"]["training"]["accumulate"] = 3
    _, need, seen = rehearsed(project, tree)
    assert need.processes == execution.get("nproc", 1)
    share = 3 * 8 if execution else 3
    assert [params.training.accumulate for params, _ in seen] == [share, share]


@pytest.mark.slow
def test_two_stages_are_rehearsed_and_the_forecast_is_kept(project):
    tree = read(project / "params.yaml")
    needs = forecast(project, tree, ["pretrain"], ENOUGH)
    assert list(needs) == ["pretrain"]
    need = needs["pretrain"]
    # 320 x 16 + 3 (4 x 16^2 + 3 x 16^2 + 2 x 16) + 16 weights, and a few small files beside them.
    weights = 4 * (320 * 16 + 3 * (7 * 16**2 + 32) + 16)
    assert weights < need.disk < weights + 80_000
    assert 100e6 < need.memory < 2e9
    # Weights and Adam's or Muon's numbers in three generations of checkpoints.
    assert need.work > 3 * weights
    assert need.seconds > 0
    kept = json.loads((project / FORECAST).read_text())
    assert kept["pretrain"]["needs"]["disk"] == need.disk
    assert kept["pretrain"]["params"] == tree["pretrain"]
    assert [path.name for path in (project / FORECAST).parent.iterdir()] == [FORECAST.name]
    assert sorted(path.name for path in project.iterdir()) == [".drawplate", "params.yaml", "texts"]


def test_a_model_that_cannot_fit_is_refused_before_the_rehearsal(project):
    tree = read(project / "params.yaml")
    small = Limits(memory=50_000, disk=10**12)
    with pytest.raises(Exhausted, match=r"are free; make pretrain\.model smaller") as caught:
        forecast(project, tree, (), small)
    assert "\n" not in str(caught.value)
    assert guarded(lambda: forecast(project, tree, (), small)) == 4
    assert not (project / FORECAST).exists()


def test_wrong_words_are_refused_at_once(project, monkeypatch):
    monkeypatch.setattr("flows.preflight.players", None)  # before any process is started
    with pytest.raises(UserError, match="no stage 'pretrian'"):
        preflight(project, ["pretrian"])
    with pytest.raises(UserError, match=r"pretrain\.batch"):
        preflight(project, ["pretrain"], ["pretrain.batch=0"])
    for device in ("cdua", "cuda:99"):
        with pytest.raises(UserError, match=f"execution.device '{device}': "):
            preflight(project, ["pretrain"], [f"execution.device={device}"])


def test_a_preflight_that_is_asked_to_end_leaves_nothing(project, monkeypatch):
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("flows.preflight.players", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        assert guarded(lambda: preflight(project, limits=ENOUGH)) == 130
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert not list((project / ".drawplate").iterdir())


def test_the_comparison_reads_records_and_folders(project):
    assert compared(project) is None
    need = {"memory": 2e9, "seconds": 10.0, "disk": 1000.0}
    save(project, read(project / "params.yaml"), {"pretrain": need, "compress": need})
    (project / "lineage").mkdir()
    out = project / "models" / "base" / "inside"
    out.mkdir(parents=True)
    (out / "data").write_bytes(bytes(500))
    record = {"output": "models/base", "peak_memory": 10**9, "seconds": 20.0}
    (project / "lineage" / "pretrain.json").write_text(json.dumps(record))
    head, first, second = compared(project).splitlines()
    columns = [f"{what} {told}" for what in ("memory", "time", "disk") for told in _COLUMNS]
    assert " ".join(head.split()) == " ".join(columns)
    assert [part for part in first.split() if part.endswith("%")] == ["+100%", "-50%", "+100%"]
    assert second.split().count("-") == 6
    # Without the output its size is that of dvc.lock; a stage that did not run is left out.
    shutil.rmtree(project / "models")
    out = {"path": "models/base", "md5": "0.dir", "size": 2000}
    (project / "dvc.lock").write_text(json.dumps({"stages": {"pretrain": {"outs": [out]}}}))
    _, only = compared(project, ["pretrain", "evaluate"]).splitlines()
    assert [part for part in only.split() if part.endswith("%")] == ["+100%", "-50%", "-50%"]
    # A forecast for other parameters says nothing.
    changed = PARAMS.replace("steps: 40", "steps: 41")
    (project / "params.yaml").write_text(changed)
    assert compared(project, ["pretrain"]) is None
    assert len(compared(project, ["pretrain", "compress"]).splitlines()) == 2


def lines(source):
    return [record.text for record in source.read(10_000)]


def test_less_is_read_of_every_kind_of_source(tmp_path):
    draw = random.Random(1)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(20):
        (many / f"{number:02d}.txt").write_text(words(draw, 20))
    source = Text(files=f"{many}/*.txt")
    less = _some(source, 5, tmp_path / "a")
    assert lines(less) == lines(source)[::5]
    assert _some(source, 1, tmp_path / "none") is source

    rows = [json.dumps({"text": words(draw, 20)}) for _ in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    source = Jsonl(files=str(tmp_path / "rows.jsonl"))
    found = lines(_some(source, 4, tmp_path / "b"))
    assert found == lines(source)[: len(found)]
    assert 20 <= len(found) <= 30
    assert _left(source, 4) == (tmp_path / "rows.jsonl").stat().st_size / 4

    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as out:
        out.write("".join(f"{row}\n" for row in rows))
    source = Jsonl(files=str(tmp_path / "rows.jsonl.gz"))
    found = lines(_some(source, 4, tmp_path / "c"))
    assert found == lines(source)[: len(found)]
    assert found

    import pyarrow as arrow
    from pyarrow.parquet import write_table

    write_table(arrow.table({"text": [f"row {n}" for n in range(80)]}), tmp_path / "rows.parquet")
    source = Parquet(files=str(tmp_path / "rows.parquet"))
    assert lines(_some(source, 8, tmp_path / "d")) == [f"row {n}" for n in range(10)]

    source = Docstrings(packages=("click",))
    files = {record.file for record in source.read(10**6)}
    fewer = {record.file for record in _some(source, 4, tmp_path / "e").read(10**6)}
    assert fewer < files
    assert 0 < _left(source, 4) < _left(source, 1)

    assert _some(Hub(split="train"), 10, tmp_path / "f").split == "train[:10%]"
    assert _some(Hub(split="train[:50]"), 10, tmp_path / "g").split == "train[:50]"


@pytest.mark.parametrize("updates", [1, 8])
def test_a_rehearsal_of_self_play_holds_two_rounds(project, monkeypatch, updates):
    small = {"steps": 100, "samples": 8, "updates": updates, "self_play": {"name": "stp"}}
    rehearsed, sampled = [], []

    class Told:
        def ask(self, order, **given):
            sampled.append(given["params"])
            return {"seconds": 1.0}

    tree = merge(read(project / "params.yaml"), {"finetune": small})
    rehearsal = Rehearsal(tree, {"finetune": Told()}, project)
    rehearsal.answers, rehearsal.models["quantize", 1] = [1.0], project

    def trained(stage, training, params, *, model, cycle, adjust):
        rehearsed.append(params(1, 2 * cycle + 1))
        adjust(1)

    monkeypatch.setattr(rehearsal, "_trained", trained)
    rehearsal.of_finetune()
    for tree in (*rehearsed, *sampled):
        how = validate(Finetune, tree, "finetune")
        assert how.self_play == Stp(warm=1)
    assert rehearsed[0]["steps"] == 2 * updates + 1


@pytest.mark.slow
def test_all_stages_are_rehearsed_and_the_disk_is_forecast_closely(project, monkeypatch):
    """The whole chain, refused where the disk is small, then run and compared."""
    from importlib import import_module

    from stages import STAGES
    from stages.run import settings_for

    tree = read(project / "params.yaml")
    monkeypatch.chdir(project)
    needs = forecast(project, tree, (), ENOUGH)
    assert list(needs) == list(STAGES)
    outs = {
        "prepare": ("corpus", {}),
        "pretrain": ("base", {"corpus": "corpus"}),
        "compress": ("small", {"model": "base", "corpus": "corpus"}),
        "quantize": ("packed", {"model": "small", "corpus": "corpus"}),
        "finetune": ("tuned", {"model": "packed", "corpus": "corpus"}),
        "evaluate": ("report", {"model": ["base", "small", "packed", "tuned"], "corpus": "corpus"}),
    }
    for name, (out, inputs) in outs.items():
        stage = getattr(import_module(f"stages.{name}"), name)
        params, execution = settings_for(stage, Path("params.yaml"), (), ())
        record = Path("lineage") / f"{name}.json"
        stage(params, stage.inputs(**inputs), Path(out), record=record, execution=execution)
        assert json.loads(record.read_text())["peak_memory"] > 1e8
        assert needs[name].disk == pytest.approx(folder_size(Path(out)), rel=0.15)
    assert len(compared(project).splitlines()) == 7
