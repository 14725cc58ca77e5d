"""Length control in the driver: limits that breathe, cuts, prediction, merging."""

import json

import pytest
import torch
from pydantic import ValidationError

from drawplate.rl.adapt.full import Full
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.cut.difficulty import Difficulty
from drawplate.rl.cut.outlier import Outlier
from drawplate.rl.length.constant import Constant
from drawplate.rl.length.siri import Siri
from drawplate.rl.merge.largest import Largest
from drawplate.rl.penalty.kl_cov import KlCov
from drawplate.rl.select.every import Every
from drawplate.rl.select.predicted import Predicted
from drawplate.rl.shaping.truncation import Truncation
from drawplate.rl.surrogate.reinforce import Reinforce
from tests import tiny
from tests.test_rl_driver import even, gradients, run, settings, task


def test_rollouts_follow_it():
    """Answers that outgrow a compressed limit are cut, and the next expansion gives room again."""
    t = task(settings(steps=4, length=Siri(longest=9, shortest=3, cycles=1, hold=0)))
    limits = []
    for step in range(4):
        batch = t.batch(step)
        limits.append(int(batch["limit"]))
        assert batch["mask"].sum(1).max() <= limits[-1]
    assert limits == [9, 6, 3, 6]


def test_settings_under_which_nothing_could_be_cut_are_refused():
    assert Outlier().least == 11
    with pytest.raises(ValidationError, match="outlier needs at least 11 samples"):
        settings(samples=10, cuts=(Outlier(),))
    assert settings(samples=11, cuts=(Outlier(),)).cuts == (Outlier(),)


def test_the_driver_scores_what_is_left_and_learns_from_groups_that_were_all_right():
    """Without the cut every reward is 1 and there is nothing to learn."""
    cut = Outlier(deviations=0.1, margin=1)
    how = {"select": Predicted(first=3), "updates": 2}
    with_cut = task(settings(cuts=(cut,), **how), score=lambda index, text: 1.0)
    assert not with_cut.batch(0)["advantage"].any()  # cutting alone costs nothing
    spoiled = task(settings(cuts=(cut,), **how), score=Fading())
    batch = spoiled.batch(0)
    assert batch["advantage"].any()
    assert (batch["advantage"].amin(1)[~batch["finished"] & (batch["score"] == 0)] < 0).all()


class Fading:
    """Every answer is right when it is first seen, and wrong when a part of it comes again."""

    def __init__(self):
        self.seen = []

    def __call__(self, index, text):
        again = any(old != text and old.startswith(text) for old in self.seen)
        self.seen.append(text)
        return float(not again)


def hard(index, text):
    """Two of five prompts have answers that differ; for the others all are right."""
    return even(index, text) if index in (1, 3) else 1.0


def test_one_draw_by_prediction_fills_batches_after_it_has_learned_how_many():
    t = task(settings(steps=12, prompts=4, select=Predicted(first=1, most=6)), score=hard)
    sizes, draws = [], []
    for step in range(12):
        sizes.append(len(t.batch(step)["tokens"]) // 4)
        draws.append(t.figures["draws"])
    assert set(draws) == {1.0}
    assert max(sizes) == 4  # what is left over is left out
    assert sum(sizes[4:]) / 8 > 3
    assert len(t.shares) == 12
    assert 0.2 < sum(t.shares) / 12 < 0.6


def test_what_was_learned_survives_a_restart():
    how = settings(prompts=4, select=Predicted(first=1, most=6))
    t, other = task(how, score=hard), task(how, score=hard)
    for step in range(3):
        t.batch(step)
    other.restore(json.loads(json.dumps(t.state())))
    assert other.shares == t.shares
    assert torch.equal(other.batch(3)["tokens"], t.batch(3)["tokens"])


def test_a_preset_step_adds_up_over_parts():
    """All of DOT at once: the gradient of a batch is that of its parts, whatever is held in it."""
    how = settings(
        samples=11,
        updates=2,
        adapt=Full(),
        select=Predicted(),
        cuts=(Outlier(margin=1),),
        surrogate=Reinforce(),
        penalties=(KlCov(share=0.2),),
    )
    t = task(how)
    batch = t.batch(0)
    assert batch["held"].shape[2] == 1
    batch["old"] = batch["old"] - 0.1 * batch["mask"]  # as if the policy had moved
    whole, figures = gradients(t, batch, 1)
    parts, added = gradients(t, batch, 4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
    assert added == pytest.approx(figures, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_easy_prompts_have_half_the_limit_and_hard_ones_all_of_it(right):
    """What is longer earns nothing, as if the limit had been there while sampling."""
    how = settings(
        prompts=5,
        length=Constant(tokens=24),
        select=Every(),
        cuts=(Difficulty(levels=(0.01,)),),
        shaping=(Truncation(),),
    )
    plain = task(settings(prompts=5, length=Constant(tokens=24), select=Every()))
    t = task(how, score=lambda index, text: float(right))
    t.batch(0)
    plain.batch(0)
    after, before = t.rollout, plain.rollout
    done = before.finished.view(5, 4).any(1, keepdim=True).expand(5, 4).flatten()
    want = torch.where(done & right, before.length.clamp(max=12), before.length)
    assert torch.equal(after.length, want)
    assert not after.reward[~after.finished].any()
    cut = want < before.length
    assert not after.finished[cut].any()
    assert bool(cut.any()) is right


def test_merging_leaves_the_largest_changes_and_scales_them():
    how = settings(steps=2, adapt=Full(), merge=Largest(share=0.1, scale=0.5))
    t = task(how)
    g = torch.Generator().manual_seed(3)
    change = {name: torch.randn(p.shape, generator=g) / 8 for name, p in t.moving.items()}
    for name, parameter in t.moving.items():
        parameter.data += change[name]
    t.merge()
    found = {name: parameter.detach() - t.start[name] for name, parameter in t.moving.items()}
    sizes = torch.cat([value.abs().flatten() for value in change.values()])
    bound = sizes.sort(descending=True).values[round(0.1 * len(sizes)) - 1]
    for name, value in change.items():
        want = torch.where(value.abs() >= bound - 1e-6, value / 2, 0)
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapt", [Full(), Lora(rank=2, alpha=4)])
def test_a_merged_run_lies_between_the_model_and_the_trained_one(adapt, tmp_path):
    """Exactly so for full training; with adapters far fewer numbers than without have moved."""
    before = tiny.model().state_dict()
    trained = run(tmp_path / "whole", settings(adapt=adapt))[0].state_dict()
    merge = Largest(share=0.25, scale=0.7)
    merged = run(tmp_path / "merged", settings(adapt=adapt, merge=merge))[0].state_dict()
    again = run(tmp_path / "merged", settings(adapt=adapt, merge=merge))[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in merged.items())
    moved = [
        sum(int((new[name] != value).sum()) for name, value in before.items())
        for new in (trained, merged)
    ]
    assert 0 < moved[1] < moved[0]
    if adapt == Full():
        for name, value in before.items():
            change, kept = trained[name] - value, merged[name] - value
            torch.testing.assert_close(
                kept, torch.where(kept != 0, 0.7 * change, 0), rtol=1e-3, atol=5e-7
            )
