"""What the model learns to reason about: generated problems, worked solutions, strict verdicts.

The problems and the final verdict are reasoning_gym's; the compact prompt and the worked solution
are ours. A worked solution is a list of steps. Its *concise* style states the steps; its *verbose*
style first repeats the problem and then checks after every step what the step has just shown, so it
contains the concise one line for line, costs two to three times the tokens and proves no more.

Both styles end in the final answer on a line of its own, `[42]`. The closing bracket makes an
answer that was cut off unreadable instead of wrong.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from hashlib import sha256
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, cast

import reasoning_gym
from pydantic import PositiveFloat, model_validator

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, Method

Style: TypeAlias = Literal["concise", "verbose"]
Entry: TypeAlias = Mapping[str, Any]

NUMBER = r"(0|-?[1-9][0-9]*)"
"""Regular expression of a whole number in the one way of writing it, as a group."""

_FINAL = re.compile(r"(?:[^\[\]]*\n)?\[([^\[\]\n]+)\]\s*")
_DRAWS = 50
"""Draws allowed per wanted problem before a configuration counts as exhausted."""


class Problem(Frozen):
    """One question and all that its verdict needs."""

    task: str
    """Name of the leaf that made it."""
    id: str
    """Equal for two problems of a task exactly when their prompts are equal."""
    prompt: str
    answer: str
    """The final answer as a solution writes it between the brackets."""
    entry: str
    """reasoning_gym's own record of the problem, as JSON."""


def asked(question: str) -> str:
    """A question as all problems are asked: `12 + 30` -> `12 + 30=?` and a newline."""
    return f"{question.strip().removesuffix('?').removesuffix('=').rstrip()}=?\n"


class Step(NamedTuple):
    """One line of a solution, and a line that confirms it from what is already known."""

    work: str
    check: str


class Task(Method):
    """Contract: the bracketed answer of every solution gets reasoning_gym's full score.

    A leaf names a reasoning_gym data set by its own name and says how to configure it (`config`),
    how to ask (`ask`), how to solve (`steps`) and which lines are right (`start`, `follow`);
    everything else is written here once.
    """

    shape: ClassVar[str] = r"(?:0|-?[1-9][0-9]*)"
    """Regular expression of a well-formed final answer; anything else scores zero."""

    share: PositiveFloat = 1.0
    """Weight of this task in the mixture, relative to the other tasks."""

    @model_validator(mode="after")
    def _configurable(self) -> Self:
        """reasoning_gym's own limits, reported as the fault of the field and not of a later run."""
        try:
            self._source(0)
        except AssertionError as fault:
            raise ValueError(f"reasoning_gym: {fault}") from fault
        return self

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments of the reasoning_gym data set, besides size and seed."""

    @abstractmethod
    def ask(self, entry: Entry) -> str:
        """The problem as one short line, without the closing `=?`."""

    @abstractmethod
    def steps(self, entry: Entry) -> list[Step]:
        """The solution, from the problem to the line that shows the answer."""

    @abstractmethod
    def start(self, entry: Entry) -> Any:
        """What is known before the first line, in a form of the leaf's own."""

    @abstractmethod
    def follow(self, known: Any, line: str) -> tuple[Any, str] | None:
        """What is known after `line`, and the line that would check it; None if it is not right.

        Right is a line that states the truth and is an operation to be done next.
        """

    def write(self, entry: Entry) -> str:
        """The correct final answer in the leaf's `shape`."""
        return cast("str", entry["answer"])

    def read(self, answer: str) -> str:
        """A final answer of the leaf's `shape` in the form that reasoning_gym scores."""
        return answer

    def problems(self, size: int, seed: int, skip: AbstractSet[str] = frozenset()) -> list[Problem]:
        """The first `size` different problems of stream `seed` whose ids are not in `skip`.

        reasoning_gym seeds item i with seed + i, so neighbouring seeds would share all but one of
        their items; the stream therefore starts at a hash of the task's name and the seed.

        Raises:
            UserError: the configuration does not hold that many different problems.
        """
        start = int.from_bytes(sha256(f"{self.name} {seed}".encode()).digest()[:6])
        source = self._source(start)
        found: dict[str, Problem] = {}
        for index in range(_DRAWS * (size + len(skip))):
            if len(found) == size:
                break
            problem = self._problem(source[index])
            if problem.id not in skip:
                found.setdefault(problem.id, problem)
        if len(found) < size:
            raise UserError(
                f"prepare.tasks {self.name}: {size} different problems wanted, {len(found)} found; "
                "widen the task's ranges or ask for fewer"
            )
        return list(found.values())

    def solution(self, problem: Problem, style: Style) -> str:
        """The worked solution, closed by the bracketed answer and a line break."""
        entry = json.loads(problem.entry)
        lines = [f"[{problem.answer}]"]
        if style == "concise":
            lines[:0] = [step.work for step in self.steps(entry)]
        else:
            checked = (line for s in self.steps(entry) for line in (s.work, f"check {s.check}"))
            lines[:0] = [f"given {self.ask(entry)}", *checked]
        return "\n".join(lines) + "\n"

    def score(self, problem: Problem, response: str) -> float:
        """1 where reasoning_gym gives the final answer its full score, else 0: no partial credit.

        The full score is asked for because the scorers also reward a wrong number that merely
        contains the right one ("12" earns half for "1").
        """
        answer = final(response)
        if answer is None or re.fullmatch(self.shape, answer) is None:
            return 0.0
        scorer = reasoning_gym.get_score_answer_fn(self.name)
        return float(scorer(self.read(answer), json.loads(problem.entry)) == 1.0)

    def check_step(self, problem: Problem, before: Sequence[str], line: str) -> bool:
        """Whether `line` is right behind the lines `before`; wrong ones among them do not count.

        Right are, in either style: the operations of the worked solution that are to be done next,
        as far as the task leaves their order free; directly behind one its check; as the first line
        the problem; and once, as the last line, the bracketed answer, worked out or not.
        """
        return self.check_steps(problem, [*before, line])[-1]

    def check_steps(self, problem: Problem, lines: Sequence[str]) -> list[bool]:
        """`check_step` of each line behind those before it."""
        entry = json.loads(problem.entry)
        known, done = self.start(entry), False
        confirm: str | None = f"given {self.ask(entry)}"
        right = []
        for line in lines:
            step = None if done else self.follow(known, line)
            answers = not (step or done) and self.score(problem, line) == 1
            right.append(bool(step or answers or (not done and line == confirm)))
            known, confirm = (step[0], f"check {step[1]}") if step else (known, None)
            done = done or answers
        return right

    def _source(self, seed: int) -> Any:
        return reasoning_gym.create_dataset(self.name, size=1, seed=seed, **self.config())

    def _problem(self, entry: Entry) -> Problem:
        prompt = asked(self.ask(entry))
        return Problem(
            task=self.name,
            id=sha256(f"{self.name} {prompt}".encode()).hexdigest()[:16],
            prompt=prompt,
            answer=self.write(entry),
            entry=json.dumps({k: entry[k] for k in ("question", "answer", "metadata")}),
        )


def final(response: str) -> str | None:
    r"""The text inside the brackets of the last line; None unless it is the only bracketed text.

    >>> final("2+3=5\n[5]\n"), final("[5]\n[6]\n"), final("[5"), final("5")
    ('5', None, None, None)
    """
    found = _FINAL.fullmatch(response)
    return found[1] if found else None


def allot(tasks: tuple[Task, ...], size: int) -> list[int]:
    """How many of `size` problems each task gets: by share, largest remainder first.

    >>> from drawplate.data.task.gcd import Gcd
    >>> allot((Gcd(share=2.0), Gcd(), Gcd()), 10)
    [5, 3, 2]
    """
    total = sum(task.share for task in tasks)
    exact = [size * task.share / total for task in tasks]
    counts = [int(x) for x in exact]
    order = sorted(range(len(tasks)), key=lambda i: counts[i] - exact[i])
    for i in order[: size - sum(counts)]:
        counts[i] += 1
    return counts
