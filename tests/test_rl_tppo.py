"""Truncated PPO: answers that grow over several batches, and a critic that is asked about them."""

import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from drawplate import edits
from drawplate.model.sample import sample
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.advantage.egae import Egae
from drawplate.rl.advantage.gae import Gae
from drawplate.rl.critic import Critic, Head
from drawplate.rl.cut.outlier import Outlier
from drawplate.rl.driver import Reinforce, finetune
from drawplate.rl.length.constant import Constant
from drawplate.rl.length.linear import Linear
from drawplate.rl.mask.drop_truncated import DropTruncated
from drawplate.rl.params import Finetune
from drawplate.rl.penalty.k3 import K3
from drawplate.rl.policy import judge
from drawplate.rl.select.every import Every
from drawplate.rl.window import Answer, Window, remembered
from drawplate.train import checkpoint
from drawplate.train.distributed import ALONE, World, join
from drawplate.train.loop import Stopped
from drawplate.train.optimizer import Group
from tests import faults, tiny
from tests.test_adapt import quantize
from tests.test_rl_driver import decode, even, same

PROMPTS = [[5, 6, 7], [3], [4, 5], [6, 3, 4, 7], [7, 7]]
END = 2
LIMIT = 9


def model():
    """Few tokens, so that answers end early, late, or not at all."""
    return tiny.model(vocabulary=8)


def settings(grow=3, hold=0, **given):
    base = {
        "steps": 4,
        "prompts": 6,
        "samples": 1,
        "length": Constant(tokens=LIMIT),
        "adapt": Lora(rank=2, alpha=4),
        "shaping": (),
        "select": Every(),
        "critic": Critic(),
        "advantage": Egae(),
        "window": Window(share=grow / LIMIT, hold=hold),
    }
    return Finetune(**(base | given))


def whole(**given):
    return settings(**({"window": None, "advantage": Gae()} | given))


def task(how, score=even):
    return Reinforce(model(), how, PROMPTS, score, decode, END, "test")


def run(folder, how, world=ALONE, net=None, **given):
    net = net or model()
    arguments = {"prompts": PROMPTS, "score": even, "decode": decode, "end": END, "about": "test"}
    outcome = finetune(net, how, **arguments, work=Path(folder), world=world, **given)
    rows = [json.loads(line) for line in outcome.metrics.read_text().splitlines()]
    return net, rows, outcome


def spied(t):
    """All answers as each batch left them."""
    seen, inner = [], t._answer

    def answer(*given):
        found = inner(*given)
        seen.append((list(given[0]), *found))
        return found

    t._answer = answer
    return seen


@pytest.mark.parametrize(("window", "hold"), [(2, 0), (3, 2), (4, 1), (LIMIT, 0)])
def test_as_long_as_the_policy_stays_windows_do_not_change_answers(window, hold):
    def ended(window, hold):
        t = task(settings(window, hold))
        seen, found = spied(t), {}
        while not found.keys() >= set(range(9)):
            t.batch(len(seen))
            found |= {a.number: (a.tokens, a.finished) for a in seen[-1][1] if not a.going}
        return {number: found[number] for number in range(9)}

    answers = ended(window, hold)
    assert answers == ended(LIMIT, 0)
    lengths = {len(tokens) for tokens, _ in answers.values()}
    assert min(lengths) <= 3 < max(lengths)
    assert {finished for _, finished in answers.values()} == {True, False}


def test_a_batch_is_as_large_as_one_without_windows():
    t = task(settings())
    seen = spied(t)
    for step in range(8):
        before = list(t.going)
        t.batch(step)
        begun, answers, every = seen[-1]
        assert len(begun) == 6
        assert begun[: len(before)] == before
        assert all(not answer.tokens for answer in begun[len(before) :])
        assert [a.number for a in t.going] == [a.number for a in answers if a.going]
        assert every.going.tolist() == [a.going for a in answers]
        for old, new in zip(begun, answers, strict=True):
            assert new.tokens[: len(old.tokens)] == old.tokens
            more = len(new.tokens) - len(old.tokens)
            assert more == 3 or (not new.going and 1 <= more <= 3)
            assert new.going == (len(new.tokens) < LIMIT and new.tokens[-1] != END)
    assert any(0 < int(every.going.sum()) < 6 for _, _, every in seen)


@pytest.mark.parametrize("hold", [0, 2])
def test_every_token_is_learned_from_once_and_prompts_never(hold):
    t = task(settings(hold=hold))
    seen, times, ended = spied(t), {}, {}
    for step in range(8):
        batch = t.batch(step)
        for row in range(len(batch["tokens"])):
            inside = batch["mask"][row].nonzero().flatten().tolist()
            assert inside
            assert inside == list(range(inside[0], inside[-1] + 1))
            place = int(batch["group"][row])
            for column in inside:
                at = place, column - len(PROMPTS[t._prompt(place)])
                times[at] = times.get(at, 0) + 1
            if batch["going"][row]:
                answer = next(a for a in t.going if a.place == place)
                assert inside[-1] == len(PROMPTS[t._prompt(place)]) + len(answer.tokens) - 1 - hold
                assert len(answer.sampled) == len(answer.old) == hold
        for name in ("sampled", "old", "value", "advantage", "share"):
            assert not batch[name][~batch["mask"]].any(), name
        ended |= {a.place: a for a in seen[-1][1] if not a.going}
    assert set(times.values()) == {1}
    assert len(ended) > 8
    for place, answer in ended.items():
        assert sum(at[0] == place for at in times) == len(answer.tokens)


def test_answers_that_go_on_are_learned_from_though_truncated_ones_are_dropped():
    t = task(settings(masks=(DropTruncated(),)))
    seen, met = spied(t), set()
    for step in range(8):
        batch = t.batch(step)
        kind = {a.number: "going" if a.going else a.finished for a in seen[-1][1]}
        for row, number in enumerate(batch["group"].tolist()):
            share = batch["share"][row, batch["mask"][row]]
            met.add(kind[number])
            assert (share == 0).all() if kind[number] is False else (share > 0).all()
    assert met == {"going", True, False}


def test_tokens_held_back_remember_the_policy_that_drew_them():
    t = task(settings(hold=2))
    seen = spied(t)
    t.batch(0)
    every = seen[-1][2]
    first = judge(t.model, every.tokens, every.mask, 1.0)[0].detach()
    kept = {a.place: first[row, every.mask[row]][-2:] for row, a in enumerate(seen[-1][1])}
    with torch.no_grad():
        for parameter in t.moving.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    batch = t.batch(1)
    now = judge(t.model, batch["tokens"], batch["mask"], 1.0)[0].detach()
    goes_on = {a.place for a in seen[-1][0] if a.tokens}
    assert goes_on
    for row, place in enumerate(batch["group"].tolist()):
        inside = batch["mask"][row]
        old, new = batch["old"][row, inside], now[row, inside]
        if place in goes_on:
            torch.testing.assert_close(old[:2], kept[place], rtol=1e-5, atol=1e-5)
            assert (old[:2] - new[:2]).abs().max() > 1e-3
            old, new = old[2:], new[2:]
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["sampled"], batch["old"], rtol=0, atol=1e-5)


def test_remembered_and_kept_are_each_others_inverse():
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    old = torch.arange(12.0).view(2, 6)
    answers = [
        Answer(0, 0, 9, (3, 4, 5, 6), (-1.0, -2.0, -3.0)),
        Answer(1, 1, 4, (3, 4, 5, 6), (-1.0, -2.0)),
    ]
    window = Window(hold=2)
    (left,) = window.kept(answers, old, mask)
    assert left == Answer(0, 0, 9, (3, 4, 5, 6), (-2.0, -3.0), (3.0, 4.0))
    due = window.due(answers, mask)
    assert due.tolist() == torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool().tolist()
    again = remembered([left, answers[1]], torch.zeros(2, 6), mask)
    assert again.tolist() == [[0, 0, 0, 3, 4, 0], [0] * 6]
    assert window.kept([left.grown([END], [-0.5], True)], old[:1], mask[:1]) == []


def test_the_critic_learns_from_whole_answers_that_are_complete():
    t = task(settings())
    seen, told = spied(t), []
    learn = t.critic.learn
    t.critic.learn = lambda *given: told.append(given[:2]) or learn(*given)
    for step in range(5):
        t.batch(step)
        _, answers, every = seen[-1]
        target, counts = told[-1]
        assert len(target) == len(counts) == sum(len(a.tokens) + a.going for a in answers)
        assert int(counts.sum()) == sum(len(a.tokens) for a in answers if not a.going)
        complete = [every.reward[r] for r, a in enumerate(answers) if not a.going for _ in a.tokens]
        assert torch.equal(target[counts], torch.tensor(complete))
    assert any(len(a.tokens) > 3 for a in seen[-1][1] if not a.going)


def test_values_are_those_before_learning_and_advantages_follow_from_them():
    t = task(settings())
    seen = spied(t)
    for step in range(4):
        weight = t.critic.weight.detach().clone()
        batch = t.batch(step)
    assert weight.any()
    assert not torch.equal(weight, t.critic.weight)
    _, answers, every = seen[-1]
    other = Head(t.how.critic, len(weight) - 1, torch.device("cpu"))
    with torch.no_grad():
        other.weight.copy_(weight)
        hidden = t.model(input_ids=every.tokens, output_hidden_states=True).hidden_states[-1]
        value = other.values(hidden.flatten(0, 1)).view(len(answers), -1)
    after = (value * every.last).sum(1) * every.going
    value = torch.nn.functional.pad(value[:, :-1], (1, 0)).masked_fill(~every.mask, 0)
    torch.testing.assert_close(t.rollout.after, after, rtol=1e-4, atol=1e-5)
    assert after.any()
    due = t.rollout.mask
    torch.testing.assert_close(t.rollout.value, value * due, rtol=1e-4, atol=1e-5)
    want = Egae().of(replace(every, value=value, after=after)) * due
    torch.testing.assert_close(t.rollout.advantage, want, rtol=1e-4, atol=1e-5)
    assert batch["advantage"].any()


def test_head_goes_down_the_squared_error():
    """Its gradient is that of half the mean squared error, found by autograd."""
    draw = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(20, 5, generator=draw), torch.rand(20, generator=draw)
    counts = torch.rand(20, generator=draw) < 0.7
    head = Head(Critic(steps=1, group=Group(rate=0.5, transforms=())), 5, torch.device("cpu"))
    assert not head.values(hidden[:12]).any()
    assert not head.values(hidden[12:]).any()
    states = torch.cat([hidden / hidden.norm(dim=1, keepdim=True), torch.ones(20, 1)], 1)
    weight = torch.zeros(6, requires_grad=True)
    error = ((states @ weight - target)[counts] ** 2).mean()
    (error / 2).backward()
    root = float(error.detach()) ** 0.5
    assert head.learn(target, counts, ALONE) == pytest.approx(root, rel=1e-5)
    torch.testing.assert_close(head.weight.detach(), -0.5 * weight.grad, rtol=1e-5, atol=1e-7)
    assert not head.seen
    before = head.weight.detach().clone()
    head.values(hidden)
    assert head.learn(target, torch.zeros(20, dtype=torch.bool), ALONE) == 0
    assert torch.equal(head.weight, before)


def test_head_of_two_processes_is_that_of_one():
    draw = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(20, 5, generator=draw), torch.rand(20, generator=draw)
    counts = torch.rand(20, generator=draw) < 0.7
    meet, posts = threading.Barrier(2), [None, None]

    class Pair(World):
        def _added(self, mine):
            posts[self.rank] = torch.as_tensor(mine, dtype=torch.float64)
            meet.wait()
            total = posts[0] + posts[1]
            meet.wait()
            return total

        def sum(self, values):
            return self._added(values).tolist()

        def sum_gradients(self, parameters):
            for parameter in parameters:
                parameter.grad = self._added(parameter.grad).float()

    def learned(world, rows):
        head = Head(Critic(steps=5), 5, torch.device("cpu"))
        for _ in range(2):
            head.values(hidden[rows])
            errors[world.rank] = head.learn(target[rows], counts[rows], world)
        return head.weight.detach()

    errors, found = [None, None], [None, None]
    want = learned(ALONE, slice(None))
    error = errors[0]
    pairs = [(Pair(0, 2), slice(0, 7)), (Pair(1, 2), slice(7, None))]
    threads = [
        threading.Thread(target=lambda w=w, r=r: found.__setitem__(w.rank, learned(w, r)))
        for w, r in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-6)
    assert errors == pytest.approx([error, error], rel=1e-5)


def test_a_critic_finds_out_which_prompts_are_hard():
    t = task(whole(prompts=12), score=lambda index, text: float(index % 2))
    errors = []
    for step in range(15):
        t.batch(step)
        errors.append(t.figures["value_error"])
    assert errors[0] > 0.6
    assert errors[-1] < 0.35
    spread = t.rollout.value[t.rollout.mask].std()
    assert spread > 0.3


@pytest.mark.parametrize("how", [settings(updates=2), whole(updates=2)], ids=["window", "whole"])
def test_state_carries_on(how):
    """As plain JSON, and into a task that has never sampled."""
    t = task(how)
    for step in range(3):
        t.batch(step)
    state = json.loads(json.dumps(t.state()))
    other = task(how)
    other.restore(state)
    assert json.dumps(other.state()) == json.dumps(t.state())
    for step in range(3, 8):
        assert same(t.batch(step), other.batch(step))
    assert torch.equal(t.critic.weight, other.critic.weight)
    assert t.figures == other.figures


def test_stopped_and_resumed_gives_the_same_bytes(tmp_path):
    how = settings(updates=2, steps=7, save_every=100, hold=2, penalties=(K3(),))
    want, rows, outcome = run(tmp_path / "whole", how)

    def stop(step, total, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run(tmp_path / "cut", how, watch=stop)
    got, again, other = run(tmp_path / "cut", how)
    assert same(dict(want.state_dict()), dict(got.state_dict()))
    clock = {"seconds", "eta", "tokens_per_second"}
    assert [{k: v for k, v in row.items() if k not in clock} for row in rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in again
    ]
    one, two = (checkpoint.load(checkpoint.latest(o.folder).path) for o in (outcome, other))
    assert same(one[0], two[0])
    assert one[1]["task"] == two[1]["task"]
    assert one[1]["task"]["going"]


def test_trains_and_leaves_no_critic_behind(tmp_path):
    before = model()
    after, rows, outcome = run(tmp_path, settings(steps=8))
    assert after.state_dict().keys() == before.state_dict().keys()
    assert not same(dict(before.state_dict()), dict(after.state_dict()))
    tensors = checkpoint.load(checkpoint.latest(outcome.folder).path)[0]
    assert not any("critic" in name for name in tensors)
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["limit"] == LIMIT
        assert row["skipped"] == 0
    written = [0.0, *(row["generated"] for row in rows)]
    assert all(0 < after - before <= 18 for before, after in pairwise(written))
    assert sum(row["ended"] for row in rows) > 6
    assert rows[-1]["value_error"] < max(row["value_error"] for row in rows)


def test_a_quantized_model_keeps_its_codes(tmp_path):
    net = model()
    quantize(net, [path for path, _ in net.named_modules() if path.endswith("_proj")])
    codes = {n: t.clone() for n, t in net.state_dict().items() if n.endswith("codes")}
    after, rows, _ = run(tmp_path, settings(steps=5), net=net)
    state = after.state_dict()
    assert codes
    for name, held in codes.items():
        assert torch.equal(state[name.replace(".codes", ".base.codes")], held)
    assert not any(name.endswith("critic") for name in state)
    assert rows[-1]["value"] > 0
    edits.check(after)


def test_what_is_not_known_yet_is_not_reported_as_news():
    t = task(settings(length=Constant(tokens=12)), score=lambda index, text: 1.0)
    for step in range(6):
        earlier = dict(t.figures)
        t.batch(step)
        if not t.figures["ended"] and earlier:
            assert t.figures["score"] == earlier["score"]
            assert t.figures["length"] == earlier["length"]
        elif t.figures["ended"]:
            assert t.figures["score"] == 1


def test_an_answer_keeps_the_limit_that_it_began_with():
    t = task(settings(length=Linear(start=11, end=4), steps=8))
    seen = spied(t)
    limits = {}
    for step in range(8):
        t.batch(step)
        for answer in seen[-1][1]:
            limit = limits.setdefault(answer.place, t.how.length.limit(step, 8))
            assert answer.limit == limit
            assert len(answer.tokens) <= limit
    assert len(set(limits.values())) > 3


def test_the_sampler_goes_on_where_it_stopped():
    net = model()
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    known = {"end": END, "seed": 3}
    once = sample(net, asked, max_new=LIMIT, first=4, **known)
    short = sample(net, asked, max_new=4, first=4, **known)
    rows = [row for row, done in enumerate(short.finished) if not done]
    assert 0 < len(rows) < len(asked)
    more = sample(
        net,
        [asked[row] + short.tokens[row] for row in rows],
        max_new=[LIMIT - 4 - row % 2 for row in rows],
        first=[4 + row for row in rows],
        begun=[4] * len(rows),
        **known,
    )
    for row, tokens in zip(rows, more.tokens, strict=True):
        assert short.tokens[row] + tokens == once.tokens[row][: LIMIT - row % 2]
    with pytest.raises(Exception, match="context of"):
        sample(net, [[3] * 4, [3] * 60], max_new=[9, 6], **known)
    assert len(sample(net, [[3] * 4, [3] * 60], max_new=[9, 5], **known).tokens[1]) <= 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"critic": None}, "egae asks for a critic's values: set critic"),
        ({"window": None}, "egae is for unfinished answers: set window"),
        ({"advantage": Gae()}, "gae cannot do with window"),
        ({"advantage": {"name": "rloo"}, "samples": 2}, "rloo does not ask for critic"),
        ({"select": {"name": "varied"}}, "set cuts .. and select every"),
        ({"cuts": (Outlier(),), "samples": 12}, "set cuts .. and select every"),
        (
            {"length": Linear(), "reduce": {"name": "fixed_length"}},
            "fixed_length .* length constant",
        ),
        ({"length": Linear(), "shaping": ({"name": "overlong_ramp"},)}, "overlong_ramp measures"),
        ({"window": {"share": 1.5}}, "less than or equal to 1"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        settings(**change)


def test_several_answers_a_prompt_begin_together():
    t = task(settings(prompts=2, samples=4))
    seen = spied(t)
    for step in range(6):
        t.batch(step)
        begun = seen[-1][0]
        assert 4 < len(begun) <= 8
        fresh = [a.place for a in begun if not a.tokens]
        assert all(fresh.count(place) == 4 for place in fresh)
        assert len({a.number for a in begun}) == len(begun)


@pytest.mark.slow
def test_two_processes_follow_the_same_series_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *where, __file__, str(tmp_path / "two")],
        env=faults.environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    net, rows, _ = run(tmp_path / "one", TOGETHER)
    (folder,) = (path for path in (tmp_path / "two").iterdir() if path.is_dir())
    two = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(two) == len(rows) == TOGETHER.steps
    for a, b in zip(rows, two, strict=True):
        for name in ("loss", "grad_norm", "reward", "length", "generated", "ended", "value_error"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), (a["step"], name)
    other = torch.load(tmp_path / "two" / "model.pt", weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


TOGETHER = settings(updates=2, steps=8, hold=2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    with join("data") as world:
        trained, _, _ = run(sys.argv[1], TOGETHER, world)
        if world.first:
            torch.save(trained.state_dict(), Path(sys.argv[1]) / "model.pt")
