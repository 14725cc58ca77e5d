"""How answers are drawn: whole, or a step at a time from shared prefixes."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.core.seeds import generator
from drawplate.data.task import Task
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.advantage.centred import Centred
from drawplate.rl.driver import Reinforce, finetune
from drawplate.rl.length.constant import Constant
from drawplate.rl.params import Finetune
from drawplate.rl.penalty.k3 import K3
from drawplate.rl.sampling import Answer, Group, Sampling, Start
from drawplate.rl.sampling.step_level import StepLevel
from drawplate.rl.sampling.whole import Whole
from drawplate.rl.select.every import Every
from drawplate.rl.select.varied import Varied
from drawplate.train.loop import Stopped
from stages.problems import Problems
from tests import tiny
from tests.laws import law
from tests.rl_cases import fields, oracle, rollout
from tests.test_rl_driver import END, PROMPTS, even

STARTS = [Start(5, 1), Start(6, 0), Start(7, 1)]


def invented(number, prompt, before, most):
    """Three answers of 1 to `most` tokens, a function of the arguments; some are the last ones."""
    g = generator("invented", number, prompt, str(before), most)
    answers = []
    for _ in range(3):
        length = int(torch.randint(1, most + 1, (), generator=g))
        tokens = torch.randint(3, 90, (length,), generator=g).tolist()
        chance = float(torch.rand((), generator=g))
        answers.append((tokens, chance > 0.2, 0.2 < chance < 0.4))
    return answers


class Drawn:
    """`Draw` of invented answers; remembers what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, starts, most, judge):
        self.asked.append((list(starts), most, judge))
        return [
            Group(
                start,
                [
                    Answer(tokens, [-1.0] * len(tokens), finished, ended, 0.5)
                    for tokens, finished, ended in invented(
                        start.number, start.prompt, start.before, most
                    )
                ],
            )
            for start in starts
        ]


def groups(method, limit=40, seed=0, starts=STARTS):
    drawn = Drawn()
    return method.groups(starts, limit, drawn, generator("groups", seed)), drawn.asked


@law(Sampling, tokens=6, steps=5)
def test_oracle(method):
    given = {name: v for name, v in fields(method).items() if name in ("steps", "tokens")}
    for seed in range(20):
        g = generator("groups", seed)
        picks = [int(torch.randint(3, (), generator=g)) for _ in range(50)]
        for limit in (5, 6, 17, 40):
            found, _ = groups(method, limit, seed)
            flat = [
                (
                    group.start.number,
                    group.start.prompt,
                    group.start.before,
                    [(a.tokens, a.finished, a.ended) for a in group.answers],
                )
                for group in found
            ]
            starts = [(start.number, start.prompt) for start in STARTS]
            assert flat == oracle(method)(starts, limit, invented, picks, **given)


@law(Sampling, tokens=6, steps=5)
def test_every_prompt_gets_groups_side_by_side_with_numbers_of_their_own(method):
    for seed in range(10):
        found, _ = groups(method, seed=seed)
        prompts = [group.start.prompt for group in found]
        runs = [p for i, p in enumerate(prompts) if not i or prompts[i - 1] != p]
        assert runs == [1, 0, 1]
        numbers = [group.start.number for group in found]
        assert numbers == sorted(set(numbers))
    parts = [groups(method, starts=part)[0] for part in (STARTS[:2], STARTS[2:])]
    both = [group.start.number for part in parts for group in part]
    assert len(set(both)) == len(both)


@law(Sampling, tokens=6, steps=5)
def test_no_answer_exceeds_the_limit(method):
    for limit in (1, 3, 6, 13, 40):
        for seed in range(10):
            found, asked = groups(method, limit, seed)
            assert {most for _, most, _ in asked} == {method.most(limit)}
            for group in found:
                longest = max(len(answer.tokens) for answer in group.answers)
                assert len(group.start.before) + longest <= limit


@law(Sampling, tokens=6, steps=5)
def test_a_function_of_its_generator(method):
    one, other = (groups(method, seed=3)[0] for _ in range(2))
    assert one == other


@law(Sampling)
def test_prompts_for_groups(method):
    for count in (1, 2, 7, 8, 9, 64):
        asked = method.prompts(count)
        assert 1 <= asked <= count
        assert asked * getattr(method, "steps", 1) >= count


def test_whole_answers_are_one_draw_without_a_judge():
    found, asked = groups(Whole())
    assert [start for starts, _, _ in asked for start in starts] == STARTS
    assert asked[0][1:] == (40, None)
    assert [group.start for group in found] == STARTS


def test_prefixes_grow_by_one_answer_of_the_group_before():
    method = StepLevel(tokens=6, steps=5)
    chosen = Counter()
    for seed in range(30):
        found, asked = groups(method, seed=seed)
        assert all(judge is method.judge for _, _, judge in asked)
        for group, after in pairwise(found):
            if after.start.number == group.start.number + 1 and after.start.before:
                step = after.start.before[len(group.start.before) :]
                (place,) = (i for i, a in enumerate(group.answers) if tuple(a.tokens) == step)
                assert group.answers[place].finished
                assert not group.answers[place].ended
                chosen[place] += 1
    assert set(chosen) == {0, 1, 2}


@pytest.mark.parametrize("field", ["steps", "tokens", "judge"])
def test_every_field_of_step_level_matters(field):
    other = {"steps": 2, "tokens": 3, "judge": {"name": "endpoint"}}[field]
    found = []
    for method in (StepLevel(), StepLevel.model_validate({field: other})):
        drawn, asked = groups(method, limit=200)
        found.append((drawn, [judge for _, _, judge in asked]))
    assert found[0] != found[1]


# --- the paper's claim: variance over T, mean unbiased ---


class Walk:
    """T steps: each takes an action with chance 1/A and is worth table[step, action] + noise."""

    def __init__(self, steps, actions, seed):
        self.steps, self.actions = steps, actions
        self.random = torch.Generator().manual_seed(seed)
        table = torch.randn(steps, actions, generator=self.random, dtype=torch.float64)
        self.table = table / table.std(1, correction=0, keepdim=True)

    def __call__(self, starts, most, judge):
        """Token = action; a whole answer is worth the sum of its steps."""
        found = []
        for start in starts:
            answers = []
            for _ in range(4):
                first = len(start.before)
                last = first + 1 if judge else self.steps
                tokens = torch.randint(self.actions, (last - first,), generator=self.random)
                noise = torch.randn(last - first, generator=self.random, dtype=torch.float64)
                worth = self.table[torch.arange(first, last), tokens] + noise
                end = last == self.steps
                listed = tokens.tolist()
                answers.append(Answer(listed, [0.0] * len(listed), True, end, float(worth.sum())))
            found.append(Group(start, answers))
        return found


def advantages(found):
    """Each group's advantages under the axis' own formula, [groups, 4]."""
    scores = torch.tensor([[a.score for a in group.answers] for group in found]).double()
    record = rollout(prompts=len(found), samples=4, reward=scores.flatten())
    return Centred().of(record).sum(1).div(record.length).view_as(scores)


@pytest.mark.parametrize("steps", [4, 8])
def test_advantages_of_steps_have_variance_over_t_and_the_same_mean(steps):
    """Of step 0, by its action: both are unbiased but for the group's (1 - 1/k), one is calmer."""
    walk = Walk(steps, 3, seed=steps)
    starts = [Start(number, 0) for number in range(800)]
    want = (walk.table[0] - walk.table[0].mean()) * (1 - 1 / 4)
    spread = {}
    for method in (Whole(), StepLevel(steps=steps, tokens=1)):
        found = method.groups(starts, steps, walk, generator("walk"))
        if isinstance(method, StepLevel):
            assert len(found) == steps * len(starts)
        first = [group for group in found if not group.start.before]
        assert len(first) == len(starts)
        actions = torch.tensor([[a.tokens[0] for a in group.answers] for group in first])
        gain = advantages(first)
        residual = gain - want[actions]
        for action in range(3):
            mine = residual[actions == action]
            assert abs(mine.mean()) < 5 * mine.std() / len(mine) ** 0.5
        spread[method.name] = float(gain.var())
    # All steps have the same variance of rewards, so that the claim's "up to" is reached.
    assert spread["step_level"] / spread["whole"] == pytest.approx(1 / steps, rel=0.15)


# --- with a model ---

BREAKS = range(3, 30)
"""Tokens that end a line, many enough to occur."""


def decode(tokens):
    return "".join("\n" if token in BREAKS else chr(token + 32) for token in tokens)


def worth(step):
    """The share of characters with even codes: graded, so that groups nearly always differ."""
    return sum(ord(letter) % 2 == 0 for letter in step.text) / max(len(step.text), 1)


def settings(**given):
    base = {
        "steps": 3,
        "prompts": 5,
        "samples": 4,
        "length": Constant(tokens=20),
        "adapt": Lora(rank=2, alpha=4),
        "shaping": (),
        "select": Every(),
        "sampling": StepLevel(steps=3, tokens=6),
    }
    return Finetune(**(base | given))


def task(how=None, step=worth, model=None):
    return Reinforce(
        model or tiny.model(), how or settings(), PROMPTS, even, decode, END, "test", step=step
    )


def test_rows_of_a_group_share_all_but_the_step():
    heads = {tuple(prompt) for prompt in PROMPTS}
    t = task(settings(penalties=(K3(),)))
    batch = t.batch(0)
    order = batch["group"].argsort(stable=True)
    tokens, mask = batch["tokens"][order], batch["mask"][order]
    longer = 0
    for rows, insides in zip(
        tokens.view(-1, 4, tokens.shape[1]), mask.view(-1, 4, tokens.shape[1]), strict=True
    ):
        first = {int(inside.nonzero()[0]) for inside in insides}
        (first,) = first
        assert len({tuple(row[:first].tolist()) for row in rows}) == 1
        head = tuple(rows[0, :first].tolist())
        (prompt,) = (p for p in heads if head[: len(p)] == p)
        before = head[len(prompt) :]
        longer += bool(before)
        assert not before or before[-1] in BREAKS
        assert END not in before
        for row, inside in zip(rows, insides, strict=True):
            step = row[inside].tolist()
            over = [token in BREAKS or token == END for token in step]
            assert not any(over[:-1])
            assert over[-1] or len(step) == 6
    assert longer
    # Chance and training agree on what was drawn, prefixes included.
    torch.testing.assert_close(batch["sampled"], batch["old"], rtol=0, atol=2e-5)


def test_rewards_are_the_judges_word_on_each_step():
    seen = []

    def watched(step):
        seen.append(step)
        return worth(step)

    t = task(step=watched)
    for step in range(8):
        t.batch(step)
    questions = {i: decode(prompt) for i, prompt in enumerate(PROMPTS)}
    for step in seen:
        assert step.question == questions[step.prompt]
        assert not step.before or step.before.endswith("\n")
        assert "\n" not in step.text[:-1]
        assert len(step.text) + step.ended <= 6
    rollout = t.rollout
    for tokens, inside, ended, score in zip(
        rollout.tokens, rollout.mask, rollout.finished, rollout.score, strict=True
    ):
        step = tokens[inside].tolist()
        text = decode(step[:-1] if step[-1] == END else step)
        assert any(
            each.text == text and worth(each) == pytest.approx(float(score)) for each in seen
        )
        assert bool(ended) == (step[-1] == END or step[-1] in BREAKS)
    assert any(step.ended for step in seen)
    assert any(step.before for step in seen)


def test_groups_fill_the_batch():
    t = task(settings(select=Varied(attempts=20)))
    for step in range(3):
        batch = t.batch(step)
        assert len(batch["tokens"]) == 20
        assert len(batch["group"].unique()) == 5
        assert t.figures["limit"] == 6
        assert t.figures["length"] <= 6


def test_a_function_of_seed_and_step():
    one, other = task(), task()
    for step in (0, 1):
        a, b = one.batch(step), other.batch(step)
        assert all(torch.equal(a[name], b[name]) for name in a)
    state = json.loads(json.dumps(one.state()))
    fresh = task()
    fresh.restore(state)
    a, b = one.batch(2), fresh.batch(2)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_and_resumed_gives_the_same_bytes(tmp_path):
    def run(folder, watch=lambda *_: None):
        model = tiny.model()
        arguments = {"prompts": PROMPTS, "score": even, "decode": decode, "end": END, "step": worth}
        how = settings(save_every=100, updates=2, select=Varied(attempts=3))
        finetune(model, how, **arguments, about="test", work=folder, watch=watch)
        return model.state_dict()

    def stop(step, total, metrics):
        if step == 1:
            raise KeyboardInterrupt

    want = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop)
    got = run(tmp_path / "cut")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert any(not torch.equal(v, want[name]) for name, v in tiny.model().state_dict().items())


def test_refusals():
    with pytest.raises(ValueError, match="sampling step_level draws parts of answers"):
        settings(samples=11, cuts=({"name": "outlier"},))
    with pytest.raises(UserError, match="nothing that verifies steps"):
        task(step=None).batch(0)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match="reward of a step behind prompt"):
            task(step=lambda step, wrong=wrong: wrong).batch(0)


def test_worked_solutions_are_worth_one_at_every_step():
    """The tasks' own verdict as the stage gives it: right lines, a right end, nothing else."""
    found = Problems([], [], {name: leaf() for name, leaf in leaves(Task).items()})
    for number, (name, method) in enumerate(found.tasks.items()):
        (problem,) = method.problems(1, 5)
        found.items.append(problem)
        lines = method.solution(problem, "verbose").splitlines(keepends=True)
        for i, line in enumerate(lines):
            before = "".join(lines[:i])
            assert found.step(number, before, line, False) == 1, name
            assert found.step(number, before, line.strip(), False) == 0
            assert found.step(number, before, f"{line}{line}", False) == 0
            assert found.step(number, before, line, True) == (i == len(lines) - 1)
        assert found.step(number, "".join(lines), "", True) == 1
        assert found.step(number, "".join(lines), lines[0], False) == 0
