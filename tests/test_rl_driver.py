import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig

from drawplate.core.errors import UserError
from drawplate.core.seeds import generator
from drawplate.pretrain.position.clex import Clex
from drawplate.rl.adapt.full import Full
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.advantage.reinforce_pp import ReinforcePp
from drawplate.rl.driver import Reinforce, finetune
from drawplate.rl.length.constant import Constant
from drawplate.rl.length.linear import Linear
from drawplate.rl.merge import Merge
from drawplate.rl.params import Finetune
from drawplate.rl.penalty.k3 import K3
from drawplate.rl.select.every import Every
from drawplate.rl.select.mixed import Mixed
from drawplate.rl.select.predicted import Predicted
from drawplate.rl.select.varied import Varied
from drawplate.rl.shaping.overlong_ramp import OverlongRamp
from drawplate.rl.surrogate.cispo import Cispo
from drawplate.rl.surrogate.ppo_clip import PpoClip
from drawplate.train.distributed import World
from drawplate.train.loop import Stopped, _cut
from drawplate.train.rounding import Simulate
from tests import tiny
from tests.laws import law

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
END = 2


def decode(tokens):
    return " ".join(map(str, tokens))


def even(index, text):
    """The share of even tokens: graded, so that groups nearly always differ."""
    tokens = [int(word) for word in text.split()]
    return sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1)


def settings(**given):
    base = {
        "steps": 4,
        "prompts": 3,
        "samples": 4,
        "length": Constant(tokens=7),
        "adapt": Lora(rank=2, alpha=4),
        "shaping": (),
    }
    return Finetune(**(base | given))


def task(how=None, model=None, score=even, prompts=PROMPTS):
    return Reinforce(model or tiny.model(), how or settings(), prompts, score, decode, END, "test")


def run(folder, how, model=None, score=even, **given):
    model = model or tiny.model()
    arguments = {"prompts": PROMPTS, "score": score, "decode": decode, "end": END, "about": "test"}
    outcome = finetune(model, how, **arguments, work=folder, **given)
    rows = [json.loads(line) for line in outcome.metrics.read_text().splitlines()]
    return model, rows


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_is_what_was_sampled():
    """Prompts in front, answers behind them to their end token or the limit, padding after that."""
    how = settings(penalties=(K3(),))
    t = task(how)
    batch = t.batch(0)
    assert batch["tokens"].shape[0] == 12
    heads = {tuple(prompt) for prompt in PROMPTS}
    for i, inside in enumerate(batch["mask"]):
        columns = inside.nonzero().flatten().tolist()
        assert columns == list(range(columns[0], columns[-1] + 1))
        assert tuple(batch["tokens"][i, : columns[0]].tolist()) in heads
        answer = batch["tokens"][i][inside].tolist()
        assert END not in answer[:-1]
        assert bool(batch["finished"][i]) == (answer[-1] == END)
        assert len(answer) == 7 or batch["finished"][i]
        text = decode(answer[:-1] if answer[-1] == END else answer)
        assert float(batch["score"][i]) == pytest.approx(even(0, text))
    assert not batch["logp"].any()
    for name in ("sampled", "old", "reference", "advantage", "share"):
        assert not batch[name][~batch["mask"]].any(), name
    torch.testing.assert_close(batch["sampled"], batch["old"], rtol=0, atol=2e-5)
    assert torch.equal(batch["old"], batch["reference"])
    sums = torch.zeros(99).index_add(
        0, batch["group"], batch["advantage"].amax(1) + batch["advantage"].amin(1)
    )
    assert sums.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampler_and_training_agree_on_the_policy(temperature):
    for penalties in ((), (K3(),)):
        t = task(settings(temperature=temperature, penalties=penalties))
        _, metrics = gradients(t, t.batch(0), 1)
        assert 0 < metrics["ratio_drift"] < 1e-5
        assert metrics["entropy"] > 0


@pytest.mark.parametrize("surrogate", [PpoClip(), Cispo()])
def test_the_training_pass_stands_in_for_a_look_before_it(surrogate):
    """Where a policy learns from its own answers once, ratios start at one either way."""
    once = task(settings(surrogate=surrogate))
    twice = task(settings(surrogate=surrogate, penalties=(K3(weight=0.0),)))
    assert once.how.once
    assert not twice.how.once
    one, other = once.batch(0), twice.batch(0)
    assert not one["old"].any()
    assert other["old"].any()
    found, wanted = gradients(once, one, 2), gradients(twice, other, 2)
    for name, gradient in wanted[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-8)
    for name in ("loss", "entropy", "clip_fraction"):
        assert found[1][name] == pytest.approx(wanted[1][name], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("given", [{}, {"penalties": (K3(),)}, {"updates": 3}])
def test_bounds_act_only_with_several_updates(given):
    """The policy moves between steps as training would move it."""
    found = []
    for surrogate in (PpoClip(), PpoClip(low=1e-4, high=1e-4)):
        t = task(settings(surrogate=surrogate, **given))
        for step in range(3):
            grads, metrics = gradients(t, t.batch(step), 1)
            for name, parameter in t.moving.items():
                parameter.data.sub_(grads[name], alpha=0.5)
            found.append((metrics["clip_fraction"], *grads.values()))
    alike = [all(map(torch.equal, a[1:], b[1:])) for a, b in zip(found[:3], found[3:], strict=True)]
    if "updates" in given:
        assert alike == [True, False, False]
    else:
        assert all(alike)
        assert not any(fraction for fraction, *_ in found)


def test_a_function_of_seed_and_step():
    first, again, other = task(), task(), task(settings(seed=1))
    assert same(first.batch(0), again.batch(0))
    assert same(first.batch(1), again.batch(1))
    assert not torch.equal(first.batch(2)["tokens"], again.batch(3)["tokens"])
    assert other.batch(0)["tokens"].tolist() != task().batch(0)["tokens"].tolist()


def test_every_prompt_once_an_epoch():
    t = task()
    for epoch in range(3):
        seen = [t._prompt(epoch * 5 + place) for place in range(5)]
        assert sorted(seen) == list(range(5))


def test_prompts_are_shuffled_once_an_epoch(monkeypatch):
    drawn, inner = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(1) or inner(*a, **k))
    t = task(settings(seed=4321))
    places = [t._prompt(place) for place in range(15)]
    assert len(drawn) == 3
    assert places == [
        int(inner(5, generator=generator(4321, "prompts", place // 5))[place % 5])
        for place in range(15)
    ]


@pytest.mark.parametrize("updates", [1, 3])
def test_state_carries_on_in_the_middle_of_a_batch(updates):
    """As plain JSON, and into a task that has never sampled."""
    how = settings(updates=updates)
    t = task(how)
    t.batch(0)
    state = json.loads(json.dumps(t.state()))
    other = task(how)
    other.restore(state)
    for step in (1, 2, 3):
        assert same(t.batch(step), other.batch(step))


def test_updates_divide_the_answers():
    t = task(settings(updates=5))
    parts = [t.batch(step) for step in range(5)]
    assert sorted(len(part["tokens"]) for part in parts) == [2, 2, 2, 3, 3]
    assert sum(int(part["count"]) for part in parts) == int(t.rollout.mask.sum())
    whole = sorted(map(tuple, t.rollout.tokens.masked_fill(~t.rollout.mask, -1).tolist()))
    seen = []
    for part in parts:
        tokens = part["tokens"].masked_fill(~part["mask"], -1)
        wide = torch.nn.functional.pad(tokens, (0, len(whole[0]) - tokens.shape[1]), value=-1)
        seen += map(tuple, wide.tolist())
    assert sorted(seen) == whole


def gradients(t, batch, parts):
    t.model.zero_grad()
    metrics = {}
    rows = torch.arange(len(batch["tokens"])).tensor_split(parts)
    for mine in rows:
        piece = {name: v[mine] if v.ndim else v for name, v in batch.items()}
        loss, found = t.loss(t.model, piece)
        loss.backward()
        for name, value in {**found, "loss": loss.detach()}.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return {name: p.grad.clone() for name, p in t.moving.items()}, metrics


def test_parts_add_up():
    t = task(settings(adapt=Full()))
    batch = t.batch(0)
    whole, figures = gradients(t, batch, 1)
    parts, added = gradients(t, batch, 5)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
    assert added == pytest.approx(figures, rel=1e-4, abs=1e-6)
    assert figures["score"] == pytest.approx(t.figures["score"])
    assert figures["tokens"] == int(t.rollout.mask.sum())


def test_tokens_are_counted_beyond_2_to_the_24():
    t = task()
    t.drawing.generated = 2**25
    batch = t.batch(0)
    assert t.drawing.generated > 2**25
    for parts in (1, 5):
        _, metrics = gradients(t, batch, parts)
        assert metrics["generated"] == pytest.approx(t.drawing.generated, abs=1e-6)


def test_first_gradient_is_the_policy_gradient():
    """From the model's own logits: minus the mean over tokens of advantage x grad logp."""
    t = task(settings(adapt=Full(), temperature=0.7))
    batch = t.batch(0)
    got, _ = gradients(t, batch, 1)
    t.model.zero_grad()
    log = (t.model(input_ids=batch["tokens"]).logits / 0.7).log_softmax(-1)
    logp = log[:, :-1].gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)
    mask = batch["mask"][:, 1:]
    (-(logp * batch["advantage"][:, 1:])[mask].sum() / mask.sum()).backward()
    for name, parameter in t.moving.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_looking_at_the_start_leaves_the_model_as_it_is():
    how = settings(penalties=(K3(),))
    t = task(how)
    for parameter in t.moving.values():
        parameter.data.normal_()
    before = {name: v.clone() for name, v in t.model.state_dict().items()}
    batch = t.batch(0)
    assert same(before, dict(t.model.state_dict()))
    assert not torch.equal(batch["old"], batch["reference"])
    start = task(how).model
    for name, value in start.state_dict().items():
        t.model.state_dict()[name].copy_(value)
    again = t._judged(t.rollout)
    torch.testing.assert_close(again.old, t.rollout.reference, rtol=0, atol=0)


def known(answers):
    """Prompts whose groups are all alike, but for those in `answers`, which are graded."""
    return lambda index, text: even(index, text) if index in answers else 1.0


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    t = task(settings(prompts=4, select=Varied(attempts=20)), score=known({1, 3}))
    for step in range(3):
        batch = t.batch(step)
        assert len(batch["tokens"]) == 16
        rewards = batch["reward"].view(4, 4)
        heads = batch["group"].view(4, 4)
        assert sorted(set(batch["group"].tolist())) == sorted(batch["group"].unique().tolist())
        by_group = {int(g): batch["reward"][batch["group"] == g] for g in heads.unique()}
        assert len(by_group) == 4
        assert all((r != r[0]).any() for r in by_group.values())
        assert rewards.numel() == 16
        assert t.figures["draws"] > 1
        assert 0 < t.figures["dropped"] < 1


def test_dynamic_sampling_gives_up_at_its_bound():
    t = task(settings(prompts=4, select=Varied(attempts=2)), score=known({1}))
    batch = t.batch(0)
    assert t.figures["draws"] == 2
    assert len(batch["tokens"]) in (4, 8)
    assert (batch["reward"] != 1).any()


@pytest.mark.parametrize(
    "given",
    [
        {"select": Varied(attempts=2)},
        {"select": Mixed(attempts=2), "shaping": (OverlongRamp(share=1.0),)},
        {"select": Predicted(first=3.0)},
        {"select": Predicted(), "advantage": ReinforcePp()},
    ],
)
def test_nothing_to_learn_moves_nothing(given):
    t = task(settings(**given), score=known(set()))
    batch = t.batch(0)
    got, metrics = gradients(t, batch, 1)
    assert not any(g.any() for g in got.values())
    assert len(batch["tokens"]) == 12
    assert t.figures["dropped"] == 1
    assert metrics["loss"] == 0


@pytest.mark.parametrize("processes", [3, 20])
def test_processes_for_which_no_answer_is_left_add_nothing(processes):
    t = task(settings(penalties=(K3(),), updates=8), score=known({1}))
    whole, figures = gradients(t, t.batch(0), 1)
    t.world = World(size=processes)
    added = {}
    for rank in range(processes):
        (part,) = _cut(t.batch(0), 1, World(rank=rank, size=processes))
        assert len(part["tokens"])
        found, metrics = gradients(t, part, 1)
        for name, value in {**found, **metrics}.items():
            added[name] = added.get(name, 0.0) + value
    for name, gradient in whole.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-4, atol=1e-6)
    assert {name: added[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_groups_that_were_not_kept_teach_nothing_though_prompts_differ():
    """Each prompt has its own score, so the batch's mean is not that of any group."""
    how = settings(select=Varied(attempts=2), advantage=ReinforcePp())
    t = task(how, score=lambda index, text: index / 4)
    batch = t.batch(0)
    assert len(batch["reward"].unique()) > 1
    assert not batch["advantage"].any()


def test_a_shrunken_batch_serves_all_its_updates():
    how = settings(prompts=2, samples=2, updates=4, select=Varied(attempts=1))
    t = task(how, score=known({1}))
    for step in range(8):
        assert len(t.batch(step)["tokens"]) >= 1


@pytest.mark.parametrize("seed", range(3))
def test_several_updates_go_on_where_no_group_was_kept(seed):
    how = settings(seed=seed, updates=4, select=Predicted(), length=Constant(tokens=30))
    t = task(how, score=lambda index, text: 0.0)
    batch = t.batch(0)
    assert t.figures["dropped"] == 1
    other = task(how)
    other.restore(json.loads(json.dumps(t.state())))
    assert same(batch, other.batch(0))


def test_trains_and_reports(tmp_path):
    before = tiny.model()
    after, rows = run(tmp_path, settings(length=Linear(start=8, end=5), penalties=(K3(),)))
    assert len(rows) == 4
    assert [row["limit"] for row in rows] == [8, 7, 6, 5]
    assert rows[0]["kl_start"] == rows[0]["kl_step"] == rows[0]["clip_fraction"] == 0
    assert rows[-1]["kl_start"] > 0
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert 1 <= row["length"] <= row["limit"]
        assert 0 <= row["truncated"] <= 1
        assert row["entropy"] > 0
        assert row["ratio_drift"] < 1e-5
        assert row["skipped"] == 0
    changed = [
        name
        for name, v in before.state_dict().items()
        if not torch.equal(after.state_dict()[name], v)
    ]
    assert changed
    assert all("_proj" in name for name in changed)
    assert after.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("updates", [1, 2])
def test_frequencies_that_follow_the_length_are_those_that_answers_were_drawn_with(
    updates, tmp_path
):
    model = tiny.model(context=8)
    Clex().install(model, 0)
    how = settings(length=Linear(start=6, end=20), updates=updates)
    _, rows = run(tmp_path, how, model)
    assert all(row["ratio_drift"] < 1e-5 for row in rows)


def test_stopped_and_resumed_gives_the_same_bytes(tmp_path):
    how = settings(updates=2, steps=5, save_every=100)
    want, rows = run(tmp_path / "whole", how)

    def stop(step, total, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run(tmp_path / "cut", how, watch=stop)
    got, again = run(tmp_path / "cut", how)
    assert same(dict(want.state_dict()), dict(got.state_dict()))
    clock = {"seconds", "eta", "tokens_per_second"}
    assert [{k: v for k, v in row.items() if k not in clock} for row in rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in again
    ]


@law(Merge)
@pytest.mark.parametrize("adapt", [Lora(rank=2, targets=("*q_proj",)), Full()])
def test_the_stored_type_is_kept(method, adapt, tmp_path):
    how = settings(steps=1, adapt=adapt, merge=method)
    model, _ = run(tmp_path, how, tiny.model().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("play", [None, {"name": "stp", "warm": 1}])
def test_models_whose_probabilities_training_would_not_see_are_refused(play, tmp_path):
    """Logits that change after the head, and attention that mixes the rows of a line."""
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    scaled = GraniteConfig(**small, **heads, intermediate_size=32, logits_scaling=8.0)
    mixed = BloomConfig(**small, n_head=2)
    for config, said in ((scaled, "changes its logits"), (mixed, "share a row apart")):
        made = AutoModelForCausalLM.from_config(config)
        with pytest.raises(UserError, match=said):
            run(tmp_path, settings(self_play=play), made, encode=lambda text: [3] * len(text))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="score of an answer to prompt"):
        task(score=lambda index, text: 1.5).batch(0)
    with pytest.raises(UserError, match="score of an answer to prompt"):
        task(score=lambda index, text: float("nan")).batch(0)
    with pytest.raises(UserError, match="at least one prompt"):
        task(prompts=[])
    with pytest.raises(UserError, match="max_new=84 need a context of 87, the model has 64"):
        task(settings(length=Linear(start=4, end=84)))
    with pytest.raises(UserError, match="would round the weights"):
        run(tmp_path, settings(precision="bf16"))
    with pytest.raises(ValueError, match="samples has to be at least 2"):
        settings(samples=1)
    alone = {"samples": 1, "advantage": ReinforcePp()}
    assert settings(**alone, select=Every()).samples == 1
    for select in (Varied(), Mixed(), Predicted()):
        with pytest.raises(ValueError, match=r"compares answers .* select every"):
            settings(**alone, select=select)
    with pytest.raises(ValueError, match=r"compiled anew: set compile: false"):
        settings(compile=True)
    with pytest.raises(ValueError, match="remove simulate"):
        settings(simulate=Simulate())
    with pytest.raises(ValueError, match="updates cannot exceed"):
        settings(updates=13)
