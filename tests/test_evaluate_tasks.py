"""Answers, their scores and what they amount to."""

import numpy as np
import pytest

from drawplate.core.errors import UserError
from drawplate.evaluate.interval import Chance
from drawplate.evaluate.tasks import Answers, answer, pass_at, summarise
from drawplate.model.filter.top_k import TopK
from drawplate.model.sample import sample
from tests import tiny
from tests.oracle.evaluate.tasks import reference

CHANCE = Chance(resamples=500)
PROMPTS = [[5, 6, 7], [9], [20, 21]]
GIVEN = {"samples": 4, "max_new": 5, "end": 2, "temperature": 1.0, "seed": 0}


def ask(model=None, score=lambda number, text: 0.0, **other):
    model = model or tiny.model()
    return answer(model, PROMPTS, lambda ids: " ".join(map(str, ids)), score, **(GIVEN | other))


def made(correct, lengths, finished=None):
    correct, lengths = np.array(correct, dtype=float), np.array(lengths)
    finished = np.ones_like(lengths, bool) if finished is None else np.array(finished)
    return Answers([["t"] * lengths.shape[1]] * len(lengths), correct, lengths, finished)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_sets_with_a_correct_answer(k):
    draw = np.random.default_rng(k)
    correct = draw.random((20, 6)) < draw.random((20, 1))
    correct[0], correct[1] = False, True
    np.testing.assert_allclose(pass_at(k, correct), reference(k, correct.tolist()), rtol=1e-10)


def test_pass_at_k_is_unbiased():
    """The mean over all outcomes of G draws, by their chance, is 1 - (1 - p)^k."""
    outcomes = np.array([[bool(n >> i & 1) for i in range(5)] for n in range(32)])
    for p in (0.1, 0.6):
        chance = p ** outcomes.sum(1) * (1 - p) ** (5 - outcomes.sum(1))
        for k in (1, 3, 5):
            assert pass_at(k, outcomes) @ chance == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize("k", [0, 7])
def test_pass_at_k_needs_k_answers(k):
    with pytest.raises(UserError, match=f"pass@{k} needs between 1 and the 6"):
        pass_at(k, np.ones((2, 6), bool))


def test_answers_are_what_the_sampler_draws_without_the_end_token():
    asked = []

    def score(number, text):
        asked.append((number, text))
        return 1.0 if number == 1 else 0.25

    model = tiny.model()
    found = ask(model, score)
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    drawn = sample(model, repeated, max_new=5, end=2, temperature=1.0, seed=0)
    texts = [
        " ".join(map(str, row[:-1] if done else row))
        for row, done in zip(drawn.tokens, drawn.finished, strict=True)
    ]
    assert [text for row in found.texts for text in row] == texts
    assert asked == [(row // 4, text) for row, text in enumerate(texts)]
    assert found.lengths.ravel().tolist() == [len(row) for row in drawn.tokens]
    assert found.finished.ravel().tolist() == drawn.finished
    assert found.scores.tolist() == [[0.25] * 4, [1.0] * 4, [0.25] * 4]
    assert found.correct.tolist() == [[False] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"temperature": 0.0}, {"max_new": 3}, {"filters": [TopK(k=1)]}, {"end": 40}],
)
def test_every_argument_matters(other):
    assert ask(**other).texts != ask().texts


def test_batch_size_does_not():
    assert ask(batch_size=1).texts == ask().texts


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_scores_are_shares(value):
    with pytest.raises(UserError, match=r"problem 0: score is .*, it must lie in \[0, 1\]"):
        ask(score=lambda number, text: value)


def test_summary_counts_what_is_there():
    greedy = made([[1], [0], [0], [1]], [[4], [6], [8], [10]], [[True], [True], [False], [True]])
    drawn = made(
        [[1, 1], [0, 1], [0, 0], [0.5, 0]],
        [[2, 4], [6, 8], [9, 9], [9, 9]],
        [[True, True], [True, True], [False, True], [False, True]],
    )
    scores = summarise(greedy, drawn, (1, 2), CHANCE, "m")
    assert scores.problems == 4
    assert scores.greedy.value == 0.5
    assert (scores.passes[1].value, scores.passes[2].value) == (3 / 8, 0.5)
    assert scores.length.value == 7
    assert (scores.length_correct, scores.length_wrong) == (14 / 3, 42 / 5)
    assert scores.truncated.value == 0.25
    assert (scores.greedy_length, scores.greedy_truncated) == (7, 0.25)
    assert scores.figures()["pass_at_2_low"] == scores.passes[2].low
    none = summarise(greedy.of(np.array([1, 2])), drawn.of(np.array([2, 3])), (1,), CHANCE)
    assert none.length_correct is None
    assert "length_correct" not in none.figures()


def test_some_problems_by_number_or_mask():
    drawn = made([[1], [0], [1]], [[1], [2], [3]])
    mask = np.array([True, False, True])
    assert drawn.of(mask).lengths.tolist() == drawn.of(np.array([0, 2])).lengths.tolist()
    assert len(drawn.of(mask).texts) == 2
