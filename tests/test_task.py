"""Laws of every task: reproducible, solvable as shown, strict in its verdict."""

from __future__ import annotations

import inspect
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reasoning_gym
from pydantic import ValidationError

from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.data.task import Problem, Style, Task, allot, final
from tests.laws import law

LEAVES = leaves(Task)
STYLES: tuple[Style, ...] = ("concise", "verbose")
SIZE = 60


def oracle(method: Task) -> ModuleType:
    path = Path(__file__).parent / "oracle/data/task" / f"{method.name}.py"
    spec = spec_from_file_location(f"oracle_{method.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong(problem: Problem) -> list[str]:
    """Answers near the right one: off by one, with a digit more or less, sign flipped, ..."""
    right = problem.answer
    number = re.findall(r"\d+", right)[-1]
    head = right[: len(right) - len(number)]
    near = [head + str(int(number) + d) for d in (-1, 1, 10)]
    more = [f"{right}0", f"1{right}", f"-{right}", f"{right},0", right[:-1], right[1:], "0,0"]
    shape = [f" {right}", f"{right}.", f"{right}.0", f"+{right}", f"0{right}", f"={right}", "x"]
    equal = {right, "--" + right.removeprefix("-")}
    return [text for text in near + more + shape if text and text not in equal]


@law(Task)
def test_deterministic(method: Task) -> None:
    assert method.problems(SIZE, 7) == type(method)().problems(SIZE, 7)


@law(Task)
def test_prefix_of_a_longer_draw(method: Task) -> None:
    assert method.problems(SIZE, 7) == method.problems(2 * SIZE, 7)[:SIZE]


@law(Task)
def test_neighbouring_seeds_hardly_overlap(method: Task) -> None:
    one, other = ({p.id for p in method.problems(SIZE, seed)} for seed in (7, 8))
    assert len(one & other) < SIZE / 4


@law(Task)
def test_unique_and_disjoint_from_skipped(method: Task) -> None:
    held = method.problems(SIZE, 1)
    rest = method.problems(SIZE, 1, skip=frozenset(p.id for p in held))
    prompts = [p.prompt for p in held + rest]
    assert len(set(prompts)) == len(prompts) == len({p.id for p in held + rest}) == 2 * SIZE


def test_few_problems_beside_many_skipped_ones() -> None:
    method = LEAVES["chain_sum"]()
    held = method.problems(500, 0)
    rest = method.problems(5, 0, skip=frozenset(p.id for p in held))
    assert held + rest == method.problems(505, 0)


@law(Task)
def test_problem_survives_json(method: Task) -> None:
    (problem,) = method.problems(1, 3)
    back = Problem.model_validate_json(problem.model_dump_json())
    assert back == problem
    assert hash(back) == hash(problem)
    assert problem.task == method.name == json.loads(problem.entry)["metadata"]["source_dataset"]


@law(Task)
@pytest.mark.parametrize("style", STYLES)
def test_solution_gets_reasoning_gyms_full_score(method: Task, style: Style) -> None:
    for problem in method.problems(SIZE, 2):
        text = method.solution(problem, style)
        assert final(text) == problem.answer
        entry = json.loads(problem.entry)
        scorer = reasoning_gym.get_score_answer_fn(method.name)
        assert scorer(method.read(problem.answer), entry) == 1.0
        assert method.score(problem, text) == 1.0


@law(Task)
def test_wrong_answers_score_nothing(method: Task) -> None:
    for problem in method.problems(SIZE, 2):
        for answer in wrong(problem):
            assert method.score(problem, f"[{answer}]\n") == 0.0, (problem.prompt, answer)


@law(Task)
def test_absent_repeated_or_cut_answers_score_nothing(method: Task) -> None:
    for problem in method.problems(20, 2):
        text = method.solution(problem, "concise")
        answer = f"[{problem.answer}]"
        bad = ["", problem.answer, answer[:-1], answer[1:], f"{answer}\n{answer}\n", text + text]
        bad += [text.replace("]", ""), f"{text}so", f"so {answer}", f"[]\n{answer}", f"[{answer}]"]
        bad += [text[:-i] for i in range(2, len(text))]
        assert [method.score(problem, b) for b in bad] == [0.0] * len(bad)
        assert method.score(problem, answer) == method.score(problem, f"so\n{answer}\n\n") == 1.0


@law(Task)
def test_verbose_contains_concise_and_costs_two_to_four_times(method: Task) -> None:
    for problem in method.problems(SIZE, 4):
        short, long = (method.solution(problem, style) for style in STYLES)
        kept = [x for x in long.splitlines() if not x.startswith(("given ", "check "))]
        assert kept == short.splitlines()
        assert 2 <= len(long) / len(short) <= 4


@law(Task)
def test_every_line_is_true(method: Task) -> None:
    judge = oracle(method)
    takes = len(inspect.signature(judge.holds).parameters)
    for problem in method.problems(SIZE, 5):
        assert judge.answer(problem.prompt) == problem.answer
        given, *lines, _ = method.solution(problem, "verbose").splitlines()
        assert given == f"given {problem.prompt.removesuffix('=?' + chr(10))}"
        for line in lines:
            assert judge.holds(*(line.removeprefix("check "), problem.prompt)[:takes]), line


@law(Task)
def test_last_step_shows_the_answer(method: Task) -> None:
    for problem in method.problems(SIZE, 6):
        *_, last, _ = method.solution(problem, "concise").splitlines()
        assert problem.answer.split(",")[-1] in re.findall(r"-?\d+", last)


@law(Task)
def test_every_field_matters(method: Task) -> None:
    for field in type(method).model_fields.keys() - {"name", "share"}:
        value = getattr(method, field)
        others = []
        for other in (value + 1, value - 1, 2 * value):
            try:
                others.append(type(method).model_validate({**method.model_dump(), field: other}))
            except ValidationError:
                continue
        assert others, field
        before = method.problems(SIZE, 9)
        assert all(other.problems(SIZE, 9) != before for other in others), field


@law(Task)
def test_unknown_and_impossible_fields_are_refused(method: Task) -> None:
    bad: list[dict[str, Any]] = [{"share": 0}, {"share": -1}, {"typo": 1}, {"name": "other"}]
    bounds = [f for f in type(method).model_fields if f.startswith("min_")]
    bad += [{f: 10**6} for f in bounds]
    for change in bad:
        with pytest.raises(ValidationError):
            type(method).model_validate(change)


def lines_of(method: Task, problem: Problem, style: Style) -> list[str]:
    return method.solution(problem, style).splitlines()


def one_edit(line: str) -> set[str]:
    """Every text that one character put in, left out, replaced or exchanged makes of a line."""
    alphabet = "0179-+*/=,<x[]. "
    found = set()
    for i in range(len(line) + 1):
        found |= {line[:i] + c + line[i:] for c in alphabet}
        found |= {line[:i] + c + line[i + 1 :] for c in [*alphabet, ""]}
        found.add(line[:i] + line[i + 1 : i + 2] + line[i : i + 1] + line[i + 2 :])
    return found - {line}


@law(Task)
@pytest.mark.parametrize("style", STYLES)
def test_every_line_of_a_worked_solution_is_a_right_step(method: Task, style: Style) -> None:
    wide = type(method).model_validate({f: 3 for f in ("min_terms",) if hasattr(method, f)})
    for problem in method.problems(1000, 12) + wide.problems(200, 13):
        lines = lines_of(method, problem, style)
        assert all(method.check_steps(problem, lines)), lines
    for i, line in enumerate(lines):
        assert method.check_step(problem, lines[:i], line)


@law(Task)
@pytest.mark.parametrize("style", STYLES)
def test_no_corrupted_line_is_a_right_step(method: Task, style: Style) -> None:
    for problem in method.problems(8, 14):
        lines = lines_of(method, problem, style)
        for i, line in enumerate(lines):
            for bad in one_edit(line):
                spaces = line.startswith("[") and bad.rstrip() == line  # the verdict forgives these
                assert method.check_step(problem, lines[:i], bad) == spaces, (lines[:i], bad)


@law(Task)
def test_a_right_step_is_true(method: Task) -> None:
    """Whatever is right among the lines of many problems holds, and shows up in its own place."""
    judge = oracle(method)
    takes = len(inspect.signature(judge.holds).parameters)
    problems = method.problems(20, 15)
    pool = sorted({line for p in problems for s in STYLES for line in lines_of(method, p, s)})
    for problem in problems:
        own = lines_of(method, problem, "verbose")
        for line in pool:
            if method.check_step(problem, (), line):
                assert line in (own[0], own[-1]) or judge.holds(*(line, problem.prompt)[:takes])
                assert line in own, line


@law(Task)
def test_a_step_is_right_once_and_in_its_place(method: Task) -> None:
    for problem in method.problems(SIZE, 16):
        lines = lines_of(method, problem, "concise")
        assert method.check_steps(problem, [*lines, *lines]) == [True] * len(lines) + [False] * len(
            lines
        )
        verbose = lines_of(method, problem, "verbose")
        assert not method.check_step(problem, verbose[:1], verbose[0])  # given again
        assert not method.check_step(problem, verbose[:3], verbose[2])  # checked again
        assert not method.check_step(problem, (), verbose[2])  # checked before it was worked out
        assert method.check_step(problem, (), verbose[-1])  # answered at once
        late = [line for line in lines[1:-1] if line not in lines[0]]
        if method.name != "products":
            same = {lines[0]}  # halves of a list can be alike
            assert not any(method.check_step(problem, (), line) for line in set(late) - same)


@law(Task)
def test_a_wrong_step_changes_nothing(method: Task) -> None:
    for problem in method.problems(SIZE, 17):
        lines = lines_of(method, problem, "concise")
        bad = f"{lines[0]}0"
        among = [text for line in lines for text in (bad, line)]
        assert method.check_steps(problem, among) == [False, True] * len(lines)
    assert method.check_steps(problem, ["", "so", "[", "[]", "\n", "١+١=٢"]) == [False] * 6


def test_products_may_be_taken_in_any_order() -> None:
    method = LEAVES["products"]()
    problem = next(p for p in method.problems(SIZE, 1) if "0" not in p.prompt)
    first, second, total, answer = lines_of(method, problem, "concise")
    one, other = total.split("=")[0].split("+")
    swapped = total.replace(f"{one}+{other}", f"{other}+{one}")
    assert method.check_steps(problem, [second, first, swapped, answer]) == [True] * 4
    assert method.check_steps(problem, [first, total, second, total]) == [True, False, True, True]
    assert method.check_steps(problem, [first, first, second]) == [True, False, True]


def test_too_few_different_problems() -> None:
    method = LEAVES["products"].model_validate({"min_digits": 1, "max_digits": 1})
    assert len(method.problems(55, 0)) == 55
    with pytest.raises(UserError, match="products: 56 different"):
        method.problems(56, 0)


def test_shares_divide_the_mixture() -> None:
    sizes = {"products": 3.0, "gcd": 1.0, "chain_sum": 1.0}
    tasks = tuple(LEAVES[n].model_validate({"share": s}) for n, s in sizes.items())
    assert allot(tasks, 100) == [60, 20, 20]
    for size in range(50):
        assert sum(allot(tasks, size)) == size
