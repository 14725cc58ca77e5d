from types import SimpleNamespace

import pytest

from drawplate.data.contamination import in_problems, in_texts, question


def ask(*prompts, task="any"):
    return [SimpleNamespace(task=task, prompt=prompt) for prompt in prompts]


LONG = "Tom has 5 apples and buys 7 more in the shop on the corner of 3 streets. How many?"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("12+34-5=?\n", "12+34-5=?\n"),
        ("12+34-5=?\n", "so 12 + 34 - 5 = 41, as one sees"),
        ("12+34-5=?\n", "(12+34\n   -5)"),
        ("12+34-5=?\n", "１２+３４-５"),
        ("gcd 84,36=?\n", "The GCD 84, 36 is"),
        ("7*x+6=34, x=?\n", "solve 7*X + 6 = 34, x"),
        ("7*x+6=34, x=?\n", "solve 7 x + 6 = 34 where 7×x+6=34."),
        ("17*x-10=143, x=?\n", "17 ⋅ x − 10 = 143"),
        ("12+34-5=?\n", "12 + 34 − 5"),
        ("sort up 52,17,88=?\n", "Sort up: sort up 52,17,88"),
        (LONG, "He said: " + LONG.upper()),
        (LONG, "more in the shop on the corner of 3 streets. How many?"),
        (LONG, "and TOM has 5 apples and buys 7 more in the shop on the"),
    ],
)
def test_asked(prompt, text):
    heldout = ask("1+1=?", prompt)
    assert in_texts(heldout, ["nothing", "x " + text + " y", text], 13) == [(1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("12+34-5=?\n", "112+34-5"),
        ("12+34-5=?\n", "12+34-51"),
        ("12+34-5=?\n", "12+34 5"),
        ("12+34-5=?\n", "12-34+5"),
        ("12+34-5=?\n", "12+34"),
        ("gcd 84,36=?\n", "gcd 36,84"),
        ("gcd 84,36=?\n", "gcds 84,36"),
        ("gcd 84,36=?\n", "gcd 84"),
        ("7*x+6=34, x=?\n", "7*x+6=3, 4"),
        (LONG, "in the shop on the corner of 3 streets. How many?"[3:]),
        (LONG, "Tom has 5 apples and buys 8 more in the shop on the corner."),
    ],
)
def test_not_asked(prompt, text):
    assert in_texts(ask(prompt), [text], 13) == []


def test_a_question_does_not_run_over_two_texts():
    assert in_texts(ask("12+34-5=?"), ["so 12 + 34", "- 5 = 41"], 13) == []
    assert in_texts(ask("12+34-5=?"), ["", "12+34", "-5", "12+34-5", ""], 13) == [(0, 3)]


def test_every_text_is_searched_however_many():
    texts = ["nothing here"] * 2500
    for place in (0, 999, 1000, 2499):
        texts[place] = "so 12+34-5"
    want = [(0, 0), (0, 999), (0, 1000), (0, 2499)]
    assert in_texts(ask("12+34-5=?"), texts, 13) == want


def test_the_window_matters():
    text = "the shop on the corner of 3 streets"
    assert in_texts(ask(LONG), [text], 13) == []
    assert in_texts(ask(LONG), [text], 8) == [(0, 0)]


def test_nothing_to_look_for_or_in():
    assert in_texts([], ["a"], 13) == []
    assert in_texts(ask("1+1=?"), [], 13) == []
    assert in_texts(ask("?"), ["what?"], 13) == [(0, 0)]


def test_agrees_with_plain_search():
    from random import Random

    draw = Random(0)
    texts = [" ".join(draw.choices("ab", k=draw.randrange(30))) for _ in range(60)]
    heldout = ask(*(" ".join(draw.choices("ab", k=draw.randrange(1, 10))) for _ in range(60)))
    want = []
    for index, problem in enumerate(heldout):
        parts = problem.prompt.split()
        size = min(4, len(parts))
        runs = {" ".join(parts[i : i + size]) for i in range(len(parts) - size + 1)}
        want += [(index, n) for n, text in enumerate(texts) if any(run in text for run in runs)]
    assert in_texts(heldout, texts, 4) == want
    assert len(want) > 100


def test_training_problems_count_from_end_to_end():
    training = ask("2+3+4=?\n", "12+34=?", "Sort up 1, 2 = ?", task="other")
    assert in_problems(ask("12 + 34", "3+4=?", "sort up 1,2=?\n", "2+34=?"), training) == [
        (0, 1),
        (2, 2),
    ]


def test_the_question_ends_before_the_sign_that_asks():
    assert question("x = ?") == ["x"]
    assert question("= ?") == ["="]
    assert question("Why?!") == ["why", "?", "!"]
