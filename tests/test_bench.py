"""Methods side by side: who takes part, what is equal among them, what the table says."""

import json
import math
import os
import platform
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from scipy import stats

from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.model import build
from drawplate.quantize.grid import Grid
from drawplate.settings import override, presets, read, validate
from flows.bench import machine, plan, run, show
from stages.run import Execution
from tests.test_chain import corpus as corpus
from tests.test_chain import foreign

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=6)
SMALL = [
    "execution.tracking=false",
    "execution.threads=1",
    "quantize.group=16",
    "quantize.calibration={rows: 4, length: 16}",
    "evaluate={documents: 4, problems: 4, samples: 1, passes: [1], max_new: 4, probe: null}",
]


FIGURES = {name: {"bits_per_byte": 1.0, "stored_bytes": 9.0} for name in ("integer", "nf4")}


@given(VALUES)
def test_intervals_are_students(values):
    found = show.mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    if math.isnan(low):  # all values alike
        low = high = float(np.mean(values))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.half == pytest.approx((high - low) / 2, abs=1e-9, rel=1e-9)


def test_one_seed_has_no_interval_and_no_verdict():
    found = show.mean([0.25])
    assert math.isnan(found.half)
    assert str(found) == "0.25"
    assert show.verdict("quantize", found) == ""


def test_a_difference_is_taken_seed_by_seed():
    reference = [1.0, 5.0, 9.0]
    found = show.gain([value - 0.5 for value in reference], reference)
    assert found.mean == -0.5
    assert found.half == 0
    assert show.verdict("quantize", found) == "better"  # fewer bits per byte
    assert show.verdict("finetune", found) == "worse"  # less pass@1
    assert show.verdict("finetune", show.Mean(0.1, 0.2)) == "within noise"


def test_an_axis_offers_all_its_methods_the_present_one_first():
    made = plan.plan("quantize.grid", (), {"quantize": {"grid": {"name": "nf4"}}}, False)
    assert made.stage == "quantize"
    assert next(iter(made.contenders)) == "nf4"
    assert set(made.contenders) == set(leaves(Grid))
    for name, tree in made.contenders.items():
        assert tree["quantize"]["grid"] == {"name": name}


def test_the_present_method_keeps_its_parameters():
    tree = {"quantize": {"grid": {"name": "integer", "range": "symmetric"}}}
    contenders = plan.plan("quantize.grid", (), tree, False).contenders
    assert contenders["integer"]["quantize"]["grid"]["range"] == "symmetric"
    assert "range" not in contenders["nf4"]["quantize"]["grid"]


def test_a_method_inside_the_chosen_method_can_be_compared():
    tree = {"compress": {"method": {"name": "sparse"}}}
    contenders = plan.plan("compress.method.prune", (), tree, False).contenders
    assert {tree["compress"]["method"]["prune"]["name"] for tree in contenders.values()} == {
        "magnitude",
        "obs",
        "wanda",
    }
    assert all(tree["compress"]["method"]["name"] == "sparse" for tree in contenders.values())


def test_a_list_of_methods_is_compared_with_none():
    contenders = plan.plan("evaluate.sampler", (), {}, False).contenders
    assert next(iter(contenders)) == plan.NONE
    assert contenders["none"]["evaluate"]["filters"] == []
    assert contenders["min_p"]["evaluate"]["filters"] == [{"name": "min_p"}]


def test_every_preset_of_a_stage_gets_the_same_budget():
    contenders = plan.plan("quantize", (), {"quantize": {"bits": 3}}, False).contenders
    own = {name for name, tree in presets().items() if set(tree) - {"paper"} == {"quantize"}}
    assert set(contenders) == {plan.USUAL, *(name.partition("/")[2] for name in own)}
    assert {tree["quantize"]["bits"] for tree in contenders.values()} == {3}
    asked = plan.plan("rl", (), {"finetune": {"steps": 7}}, False).contenders
    rollouts = [
        tree["finetune"]["steps"] / tree["finetune"].get("updates", 1) for tree in asked.values()
    ]
    assert set(rollouts) == {7}


def test_a_key_may_begin_with_the_usual_name_of_its_stage():
    made = plan.plan("rl.surrogate", (), {}, False)
    assert (made.key, made.stage) == ("finetune.surrogate", "finetune")
    assert {"cispo", "dispo"} <= set(made.contenders)


def test_a_key_of_another_method_is_told_how_to_reach_it():
    with pytest.raises(UserError, match=r"compress\.method\.grouping") as error:
        plan.plan("compress.grouping", (), {}, False)
    (change,) = re.findall("-S '(.*?)'", str(error.value))
    assert plan.plan("compress.method.grouping", (), {}, False, [change]).contenders


def test_the_last_word_is_the_users():
    for changes in ([], ["evaluate.problems=4"]):
        made = plan.plan("quantize.grid", (), {}, True, changes)
        found = {tree["evaluate"]["problems"] for tree in made.contenders.values()}
        assert found == {4 if changes else 40}


ALONE = {False: {"dot": "at least 11 samples"}, True: {"stp": "begins its rounds after 50 steps"}}
"""Quick or not -> presets that the settings have no place for, and why."""


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stage", plan.SEEDS)
def test_presets_can_take_part_in_the_default_settings(stage, quick):
    tree = read(Path(__file__).parents[1] / "params.yaml")
    for name, contender in plan.plan(stage, (), tree, quick).contenders.items():
        alone = ALONE[quick].get(name)
        with pytest.raises(UserError, match=alone) if alone else nullcontext():
            plan.seeded(stage, contender, 1)


def test_a_quick_look_at_self_play_plays_rounds():
    made = plan.plan("finetune.self_play", (), {}, True).contenders
    for name in ("stp", "expert_iteration"):
        how = validate(plan.params_of("finetune"), made[name]["finetune"], "finetune")
        assert how.steps > how.self_play.warm


def test_a_preset_with_a_budget_gets_the_operations_of_the_others():
    tree = read(Path(__file__).parents[1] / "params.yaml")
    made = plan.plan("pretrain", (), tree, False)
    usual = validate(plan.params_of("pretrain"), made.contenders["usual"]["pretrain"], "pretrain")
    planned = made.contenders["one_epoch"]["pretrain"]
    model = build(usual.model, tree["prepare"]["vocabulary"], 0)
    weights = sum(weight.numel() for weight in model.parameters())
    tokens = usual.training.steps * usual.batch * usual.length
    assert planned["training"]["steps"] is None
    assert planned["budget"]["flops"] == pytest.approx(6 * weights * tokens)


def test_what_all_methods_of_a_key_have_is_the_same_for_all():
    """Of the axis: it stays. Of one method alone: another one has no such field."""
    play = "finetune.self_play={name: stp, warm: 7, checker: {name: lean}, highest: 0.5}"
    made = plan.plan("finetune.self_play", (), {}, False, [play]).contenders
    stp, other = (made[name]["finetune"]["self_play"] for name in ("stp", "expert_iteration"))
    assert stp["highest"] == 0.5
    assert other == {"name": "expert_iteration", "warm": 7, "checker": {"name": "lean"}}


def test_seeds_reach_every_section_that_is_there():
    tree = plan.seeded("compress", {"compress": {"recover": None}}, 5)
    assert tree["compress"]["calibration"]["seed"] == 5
    assert tree["compress"]["recover"] is None
    tree = plan.seeded("compress", {"compress": {"recover": {}}}, 5)
    assert tree["compress"]["recover"]["seed"] == 5


@pytest.mark.parametrize("key", plan.QUICK)
def test_quick_settings_are_settings_of_the_stage(key):
    stage = key.partition(".")[0]
    tree = override({}, [f"{stage}.{each}" for each in plan.QUICK[key]])
    small = validate(plan.params_of(stage), tree[stage], stage)
    assert small != plan.params_of(stage)()


def test_quick_settings_reach_stage_and_evaluation():
    made = plan.plan("quantize.grid", (), {}, True)
    assert {tree["quantize"]["calibration"]["rows"] for tree in made.contenders.values()} == {16}
    assert {tree["evaluate"]["problems"] for tree in made.contenders.values()} == {40}


@pytest.mark.parametrize(
    ("what", "only", "words"),
    [
        ("quantise", (), r"did you mean 'quantize'"),
        ("quantize.gird", (), "chooses no method"),
        ("quantize.bits", (), "chooses no method"),
        ("quantize.grid", ("nf5",), r"did you mean 'nf4'"),
        ("quantize.grid", ("nf4",), "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(what, only, words):
    with pytest.raises(UserError, match=words) as error:
        plan.plan(what, only, {}, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["quantise.bits=3", "compress.ratio=0.9", "quantize.seed=7"])
def test_a_change_without_effect_is_refused(change):
    with pytest.raises(UserError, match=f"^-S {change} has no effect .*; leave it out"):
        plan.plan("quantize.grid", (), {}, False, [change])


@pytest.fixture
def project(corpus, tmp_path):
    (tmp_path / "params.yaml").write_text("quantize: {}\n")
    foreign("llama", corpus, tmp_path / "model")
    return tmp_path


def bench(project, corpus, *only, changes=SMALL, **options):
    options = {"model": project / "model", "corpus": corpus, "seeds": 2} | options
    return run.bench(project, "quantize.grid", only, changes=changes, **options)


def test_a_comparison_from_end_to_end(project, corpus, monkeypatch):
    text = bench(project, corpus, "integer", "nf4")
    out = project / "bench" / "quantize.grid"
    record = json.loads((out / "bench.json").read_text())
    assert set(record["runs"]) == {"0", "1"}
    for figures in record["runs"].values():
        assert figures["nf4"]["bits_per_byte"] != figures["integer"]["bits_per_byte"]
    runs = record["runs"].values()
    difference = np.mean([r["nf4"]["bits_per_byte"] - r["integer"]["bits_per_byte"] for r in runs])
    (row,) = (line for line in text.splitlines() if "| nf4 |" in line)
    assert f"{difference:.4g} ±" in row
    (row,) = (line for line in text.splitlines() if "| parent |" in line)
    before = np.mean([r["parent"]["bits_per_byte"] - r["integer"]["bits_per_byte"] for r in runs])
    assert f"{before:.4g} ±" in row
    report = {figures["nf4"]["quantize.bytes_after"] for figures in runs}
    assert report < {figures["nf4"]["quantize.bytes_before"] for figures in runs} | report
    assert record["machine"]["cores"] == os.cpu_count()
    assert (out / "frontier.svg").read_text().count("<svg") == 1
    assert not (out / "work").exists()
    monkeypatch.setattr(run, "_one", None)  # nothing is left to compute
    assert bench(project, corpus, "integer", "nf4") == text


def test_a_comparison_needs_mlflow_at_its_start_and_outlives_it(tmp_path, monkeypatch, capsys):
    store = MagicMock()
    monkeypatch.setattr("stages.tracking.client", lambda: store)
    with run._logged("quantize", Execution()) as log:
        store.log_metric.side_effect = store.set_terminated.side_effect = MlflowException("gone")
        record = {"runs": {"0": {"integer": {"bits_per_byte": 1.0}}}}
        log(tmp_path, SimpleNamespace(key="quantize"), record)
    assert f"MLflow did not take what {tmp_path} holds: MlflowException: gone" in (
        capsys.readouterr().err
    )
    with pytest.raises(ZeroDivisionError), run._logged("quantize", Execution()):
        raise ZeroDivisionError
    store.search_runs.side_effect = MlflowException("refused")
    with (
        pytest.raises(UserError, match=r"does not answer .*refused.*execution.tracking=false"),
        run._logged("quantize", Execution()),
    ):
        pass


def test_a_machine_that_lists_no_processors_has_one_all_the_same(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: str(self) != "/proc/cpuinfo")
    monkeypatch.setattr(Path, "read_text", None)
    assert machine.processor() == platform.processor()


def test_contenders_are_compared_in_what_their_parent_has_no_figure_of():
    def figures(solved):
        return {"pass_at_1": 0.5, "finetune.solved_heldout": solved, "finetune.generated": 9.0}

    runs = {
        seed: {
            "parent": {"pass_at_1": 0.5},
            "stp": figures(0.25 + seed / 8),
            "expert_iteration": figures(0.5 + seed / 4),
        }
        for seed in (0, 1)
    }
    lines = show.table("finetune.self_play", ["stp", "expert_iteration"], runs, {}).splitlines()
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines[2:]}
    assert lines[0].startswith("|  | contender | finetune.solved_heldout | finetune.generated |")
    assert cells["expert_iteration"][-2].startswith("0.3125 ±")
    assert cells["parent"] == ["parent", "", "", "0.5 ± 0"]


def test_an_interrupted_comparison_goes_on_after_its_last_seed(project, corpus, monkeypatch):
    one = run._one

    def stopped(ground, name, tree, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return one(ground, name, tree, seed)

    monkeypatch.setattr(run, "_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(project, corpus, "integer", "nf4")
    done = []

    def counted(ground, name, tree, seed):
        done.append(seed)
        return one(ground, name, tree, seed)

    monkeypatch.setattr(run, "_one", counted)
    bench(project, corpus, "integer", "nf4")
    assert done == [1, 1]


def test_who_cannot_take_part_is_named_with_the_reason(project, corpus):
    # The table's usual width, 8 bits a weight, is none that points for pairs of weights have.
    odd = [*SMALL, "quantize.grid={name: gaussian, dimension: 2}", "quantize.bits=4"]
    text = bench(project, corpus, "gaussian", "integer", "nf4", changes=odd, seeds=1)
    (row,) = (line for line in text.splitlines() if "| gaussian |" in line)
    assert row.startswith("| ! |")
    assert "pairs have 2, 3 or 4 bits" in row


def test_a_runtime_that_does_not_fit_takes_no_part(project, corpus):
    small = [SMALL[0], SMALL[1], SMALL[-1].replace("probe: null", "probe: {repeats: 1, new: 4}")]
    with pytest.raises(UserError, match=r"nothing to compare; .*(ReLU|relu).*"):
        run.bench(
            project, "evaluate.runtime", ("plain", "powerinfer2"), changes=small, seeds=1,
            model=project / "model", corpus=corpus,
        )  # fmt: skip


def test_another_comparison_is_not_overwritten(project, corpus):
    bench(project, corpus, "integer", "nf4", seeds=1)
    with pytest.raises(UserError, match="another folder"):
        bench(project, corpus, "integer", "nf4", seeds=2)
    (project / "other").mkdir()
    (project / "other" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="something else"):
        bench(project, corpus, "integer", "nf4", out=project / "other")


def test_figures_of_other_code_are_not_shown_as_those_of_this_one(
    project, corpus, tmp_path, monkeypatch
):
    method = tmp_path / "code" / "method.py"
    method.parent.mkdir()
    method.write_text("one = 1")
    monkeypatch.setattr(run, "ROOTS", (method.parent,))
    monkeypatch.setattr(run, "_one_seed", lambda *_: (FIGURES, {}))
    text = bench(project, corpus, "integer", "nf4")
    monkeypatch.setattr(run, "_one_seed", None)
    assert bench(project, corpus, "integer", "nf4") == text
    method.write_text("one = 2")
    with pytest.raises(UserError, match="other code"):
        bench(project, corpus, "integer", "nf4")


def test_what_it_does_not_run_is_no_part_of_a_comparison(project, corpus, monkeypatch):
    monkeypatch.setattr(run, "_one_seed", lambda *_: (FIGURES, {}))
    bench(project, corpus, "integer", "nf4")
    monkeypatch.setattr(run, "_one_seed", None)
    (project / "params.yaml").write_text("quantize: {}\nfinetune: {steps: 7}\n")
    bench(project, corpus, "integer", "nf4", changes=[*SMALL, "execution.nproc=2"])
    for change in ("quantize.bits=3", "evaluate.problems=5"):
        with pytest.raises(UserError, match="other models, data or settings"):
            bench(project, corpus, "integer", "nf4", changes=[*SMALL, change])


def test_results_do_not_lie_in_what_a_stage_replaces(project, corpus):
    stages = read(Path(__file__).parents[1] / "dvc.yaml")["stages"].values()
    made = {Path(out).parts[0] for stage in stages for out in stage["outs"]}
    before = set(project.iterdir())
    bench(project, corpus, "integer", "nf4", seeds=1)
    new = {path.name for path in set(project.iterdir()) - before}
    assert new
    assert not new & made


def test_a_model_for_pretrain_or_an_unknown_section_is_refused(project, corpus):
    shipped = Path(__file__).parents[1] / "params.yaml"
    with pytest.raises(UserError, match="--model has no effect"):
        run.bench(project, "pretrain", file=shipped, model=project / "model", corpus=corpus)
    (project / "params.yaml").write_text("quantise: {bits: 3}\n")
    with pytest.raises(UserError, match="'quantise' is no section"):
        bench(project, corpus)


def test_a_missing_model_is_said_before_any_work(project, corpus):
    with pytest.raises(UserError, match="--model"):
        bench(project, corpus, model=project / "nowhere")
    assert not (project / "bench").exists()
