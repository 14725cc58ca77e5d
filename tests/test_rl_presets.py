from importlib.resources import files
from pathlib import Path

import pytest
import torch

from drawplate.rl.driver import finetune
from drawplate.rl.params import Finetune
from drawplate.settings import merge, override, preset, presets, validate
from drawplate.settings import read as read_params
from drawplate.train.series import read
from stages.finetune import finetune as finetune_stage
from tests import tiny
from tests.oracle.rl.shaping import overlong_ramp
from tests.rl_cases import rollout
from tests.test_rl_driver import END, PROMPTS, decode, even

NAMES = [name for name in presets() if name.startswith("rl/")]
DEFAULTS = Finetune().model_dump(mode="json")
BATCHES = 3  # an answer that grows by thirds is complete after three
SMALL = {
    "prompts": 3,
    "samples": 11,
    "length": {"name": "constant", "tokens": 6},
    "adapt": {"name": "lora", "rank": 2},
}


def test_the_recipes_of_the_papers_are_there():
    wanted = [
        "cispo",
        "da_dler",
        "dapo",
        "dispo",
        "dler",
        "dler_merge",
        "dot",
        "dr_grpo",
        "grpo",
        "gspo",
        "ppo",
        "reinforce_pp",
        "rloo",
        "siri",
        "slate",
        "stp",
        "t_ppo",
    ]
    assert [name.removeprefix("rl/") for name in NAMES] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_real_steps(name, tmp_path):
    """From the file, through validation, to rollouts of a real decoder that change its weights."""
    tree = merge(DEFAULTS, preset(name)["finetune"])
    steps = BATCHES * tree.get("updates", 1)
    if tree["self_play"]:
        tree["self_play"]["warm"] = 1
    how = validate(Finetune, merge(tree, SMALL | {"steps": steps}), "finetune")
    model = tiny.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = finetune(
        model,
        how,
        prompts=PROMPTS,
        score=even,
        decode=decode,
        end=END,
        about="even tokens",
        step=lambda step: even(step.prompt, step.text),
        encode=lambda text: [3 + ord(letter) % 90 for letter in text],
        work=tmp_path,
    )
    rows = read(outcome.metrics)
    assert len(rows) == steps
    assert all(value is not None for row in rows for value in row.values())
    after = model.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_decoder_of_the_default_run(name):
    tree = merge(read_params(Path(__file__).parents[1] / "params.yaml"), preset(name))
    how = validate(Finetune, tree["finetune"], "finetune")
    limits = [how.length.limit(step, how.steps) for step in range(how.steps)]
    assert max(limits) <= tree["pretrain"]["model"]["context"] // 2  # the rest is for prompts
    change = finetune_stage.example.removeprefix("-S ")
    validate(Finetune, override(tree, [change])["finetune"], "finetune")


@pytest.mark.parametrize("name", NAMES)
def test_names_its_paper_and_differs_from_all_others(name):
    assert presets()[name]["paper"]
    others = [merge(DEFAULTS, preset(other)["finetune"]) for other in NAMES if other != name]
    assert merge(DEFAULTS, preset(name)["finetune"]) not in others


@pytest.mark.parametrize("name", ["rl/dapo", "rl/cispo", "rl/dispo"])
def test_length_costs_as_much_of_a_right_answer_as_with_the_papers_rewards(name):
    """The paper's are -1 and 1 before eq. 13: ours are the same up to a scale and a shift."""
    (ramp,) = validate(Finetune, merge(DEFAULTS, preset(name)["finetune"]), "finetune").shaping
    score = torch.tensor([0.0, 1.0] * 6).double()
    ours = ramp.reward(rollout(limit=20, score=score, reward=score))
    papers = overlong_ramp.reference(rollout(limit=20, reward=2 * score - 1), ramp.share, 1.0)
    assert any(value not in (-1, 1) for value in papers)
    torch.testing.assert_close(2 * ours - 1, torch.tensor(papers).double())


@pytest.mark.parametrize("name", NAMES)
def test_says_where_bounds_act_only_with_more_updates(name):
    how = validate(Finetune, merge(DEFAULTS, preset(name)["finetune"]), "finetune")
    text = (files("drawplate") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(
        line.removeprefix("#").strip() for line in text.split("paper:")[0].split("\n")
    )
    assert how.updates > 1 or how.surrogate.name == "reinforce" or "ounds" in comment


def test_dler_is_the_default():
    assert validate(Finetune, merge(DEFAULTS, preset("rl/dler")["finetune"]), "") == Finetune()
