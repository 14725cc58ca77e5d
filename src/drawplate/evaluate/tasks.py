"""How many held-out problems a model solves, at what length, and how sure that is.

Each problem is answered once greedily and several times by drawing. An answer is correct where the
caller's score of its text is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.core.progress import Watch, silent
from drawplate.evaluate.interval import Chance, Floats, Interval, bootstrap, share
from drawplate.model.filter import TokenFilter
from drawplate.model.sample import sample

Score: TypeAlias = Callable[[int, str], float]
"""(number of the problem, text of the answer) -> score in [0, 1]; 1 is correct."""

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """G answers to each of P problems."""

    texts: list[list[str]]
    """[P][G], without the end token."""
    scores: Floats
    """[P, G], in [0, 1]."""
    lengths: Ints
    """[P, G]: tokens drawn, the end token included."""
    finished: Bools
    """[P, G]: False where the answer was cut off."""

    @property
    def correct(self) -> Bools:
        """[P, G]: where the score is 1."""
        return np.equal(self.scores, 1)

    def of(self, problems: npt.NDArray[Any]) -> Answers:
        """The answers to some problems, by number or by mask."""
        numbers = np.arange(len(self.texts))[problems]
        return Answers(
            [self.texts[i] for i in numbers],
            self.scores[numbers],
            self.lengths[numbers],
            self.finished[numbers],
        )


class TaskScores(Frozen):
    """What the answers to a set of problems amount to."""

    problems: int
    greedy: Interval
    """Share of problems solved by the likeliest answer."""
    passes: dict[int, Interval]
    """k -> pass@k of drawn answers."""
    length: Interval
    """Mean tokens of a drawn answer; problems resampled."""
    length_correct: float | None
    """Mean over the correct drawn answers; None where there is none."""
    length_wrong: float | None
    """Mean over the others."""
    truncated: Interval
    """Share of drawn answers cut off at the limit."""
    greedy_length: float
    """Mean tokens of a greedy answer."""
    greedy_truncated: float
    """Share of greedy answers cut off at the limit."""

    def figures(self) -> dict[str, float]:
        """Flat figures by name; those that do not exist are left out."""
        found: dict[str, float | None] = {
            "problems": self.problems,
            **self.greedy.figures("greedy"),
        }
        for k, interval in self.passes.items():
            found |= interval.figures(f"pass_at_{k}")
        found |= {
            **self.length.figures("length"),
            "length_correct": self.length_correct,
            "length_wrong": self.length_wrong,
            **self.truncated.figures("truncated"),
            "greedy_length": self.greedy_length,
            "greedy_truncated": self.greedy_truncated,
        }
        return {name: float(value) for name, value in found.items() if value is not None}


def answer(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    score: Score,
    *,
    samples: int,
    max_new: int,
    end: int,
    temperature: float,
    filters: Sequence[TokenFilter] = (),
    seed: int | tuple[int | str, ...] = 0,
    batch_size: int = 128,
    watch: Watch = silent,
) -> Answers:
    """Draws `samples` answers to each prompt and scores them. Temperature 0 is greedy.

    Raises:
        UserError: the prompts do not fit the model, or a score lies outside [0, 1].
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    drawn = sample(
        model,
        repeated,
        max_new=max_new,
        end=end,
        temperature=temperature,
        filters=filters,
        seed=seed,
        batch_size=batch_size,
        watch=watch,
    )
    texts = [
        decode(tokens[:-1] if finished else tokens)
        for tokens, finished in zip(drawn.tokens, drawn.finished, strict=True)
    ]
    scores = [float(score(row // samples, text)) for row, text in enumerate(texts)]
    for row, value in enumerate(scores):
        if not 0 <= value <= 1:
            raise UserError(f"problem {row // samples}: score is {value}, it must lie in [0, 1]")
    shape = len(prompts), samples
    return Answers(
        [texts[i * samples : (i + 1) * samples] for i in range(len(prompts))],
        np.array(scores, dtype=np.float64).reshape(shape),
        np.array([len(tokens) for tokens in drawn.tokens], dtype=np.int64).reshape(shape),
        np.array(drawn.finished, dtype=bool).reshape(shape),
    )


def pass_at(k: int, correct: Bools) -> Floats:
    """Unbiased estimate, for each problem, that at least one of k answers is correct.

    1 - C(G - c, k) / C(G, k) with c correct ones of G. Chen et al. 2021, arXiv:2107.03374, eq. 1,
    in the form of its product: 1 - prod_{i = G - c + 1}^{G} (1 - k / i). Bool [P, G] -> [P].

    Raises:
        UserError: k exceeds G.
    """
    drawn = correct.shape[1]
    if not 1 <= k <= drawn:
        raise UserError(f"pass@{k} needs between 1 and the {drawn} answers drawn for each problem")
    misses = 1 - k / np.arange(1, drawn + 1)  # zero at i = k: fewer than k wrong ones never miss
    wrong = drawn - correct.sum(1)
    return np.array([1 - misses[w:].prod() for w in wrong])


def summarise(
    greedy: Answers, drawn: Answers, ks: Sequence[int], chance: Chance, *name: int | str
) -> TaskScores:
    """The figures of a set of problems, answered greedily and by drawing.

    Raises:
        UserError: there is no problem, or a k exceeds the answers drawn.
    """
    count, size = drawn.lengths.shape
    correct = drawn.correct
    return TaskScores(
        problems=count,
        greedy=share(greedy.correct[:, 0], 1, chance),
        passes={k: share(pass_at(k, correct), size, chance) for k in ks},
        length=bootstrap(drawn.lengths.sum(1), np.full(count, size), chance, *name, "length"),
        length_correct=_mean(drawn.lengths[correct]),
        length_wrong=_mean(drawn.lengths[~correct]),
        truncated=share((~drawn.finished).mean(1), size, chance),
        greedy_length=float(greedy.lengths.mean()),
        greedy_truncated=float((~greedy.finished).mean()),
    )


def _mean(values: Ints) -> float | None:
    return float(values.mean()) if len(values) else None
