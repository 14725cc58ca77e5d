"""Checkers, and a model that makes its own statements and learns from its own proofs."""

import json
import os
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drawplate.core.errors import UserError
from drawplate.core.seeds import generator
from drawplate.rl import driver
from drawplate.rl.adapt.full import Full
from drawplate.rl.checker import Checker
from drawplate.rl.checker.arithmetic import Arithmetic
from drawplate.rl.checker.lean import Lean
from drawplate.rl.length.constant import Constant
from drawplate.rl.merge import Merge
from drawplate.rl.params import Finetune
from drawplate.rl.play import Play, Said
from drawplate.rl.selfplay import SelfPlay, Tried
from drawplate.rl.selfplay.expert_iteration import ExpertIteration
from drawplate.rl.selfplay.stp import Stp
from drawplate.settings import validate
from drawplate.train.loop import Stopped, train
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.series import read
from stages import finetune
from tests import tiny
from tests.laws import law
from tests.oracle.rl.checker import arithmetic as independent
from tests.oracle.rl.checker import lean as independent_lean
from tests.rl_cases import fields, oracle
from tests.test_chain import QUIET, corpus, foreign  # noqa: F401

LEAN = """#!/bin/sh
# What Lean would say of a few texts, told by words in them.
pwd >> "{log}"
cat "$1" > "{seen}"
if grep -q slow "$1"; then sleep 60 & echo $! > "{child}"; wait; fi
if grep -q wrong "$1"; then echo "error: wrong"; exit 1; fi
if grep -q "#print axioms" "$1"; then
  if grep -q choice "$1"; then echo "'stated' depends on axioms: [propext, Classical.choice]"
  elif grep -q cheat "$1"; then echo "'stated' depends on axioms: [propext, sorryAx]"
  elif grep -q silent "$1"; then echo "nothing"
  elif grep -q pretend "$1"; then
    echo "'stated' does not depend on any axioms"; echo "'stated' depends on axioms: [sorryAx]"
  else echo "'stated' does not depend on any axioms"; fi
fi
"""


@pytest.fixture
def lean(tmp_path, monkeypatch):
    """A folder with a `lean` on the PATH; it logs where it ran and what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "lean"
    program.write_text(LEAN.format(**{name: tmp_path / name for name in ("log", "seen", "child")}))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@law(Checker)
def test_examples_are_statements_with_proofs(method, lean):
    method.ready()
    found = method.examples(8, generator("examples", 0))
    assert len({statement for statement, _ in found}) == 8
    for statement, proof in found:
        assert method.statement(statement) == statement
        assert method.accepts(statement, proof)
    assert found == method.examples(8, generator("examples", 0))
    assert found != method.examples(8, generator("examples", 1))
    few = {"operations": 1, "largest": 1} if isinstance(method, Arithmetic) else {}
    with pytest.raises(UserError, match=f"checker {method.name}: 100 "):
        type(method)(**few).examples(100, generator("examples"))


@law(Checker)
def test_nothing_is_no_statement_and_no_proof(method, lean):
    assert method.statement("") is None
    for statement, _ in method.examples(8, generator("examples")):
        for proof in ("", " ", "\n"):
            assert not method.accepts(statement, proof)


# --- arithmetic ---

WORKED = [
    ("3+4*2=11", "3+8=11\n11=11\n"),
    ("3+4*2=11", "3+8=11\n11=11"),
    ("5*7=7*5", "7*5=7*5"),
    ("2*(3+4)=2*3+2*4", "2*3+2*4=2*3+2*4"),
    ("2*3+2*4=2*(3+4)", "2*(3+4)=2*(3+4)"),
    ("1+(2+3)=6", "1+2+3=6\n3+3=6\n6=6"),
    ("6/3=2", "2=2"),
    ("4--2=6", "6=6"),
    ("0-5=-5", "-5=-5"),
    ("(1+2)*(3-4)=-3", "3*(3-4)=-3\n3*-1=-3\n-3=-3"),
    ("7=3+4", "7=7"),
]
NOT_WORKED = [
    ("3+4*2=14", "7*2=14\n14=14"),  # the product binds first
    ("3+4*2=11", "11=11"),  # two at once
    ("3+4=7", "3+4=7\n7=7"),  # nothing done
    ("3+4=7", "7=7\n7=7"),  # done already
    ("3+4=7", "7=7\n\n"),
    ("3+4=8", "7=8"),
    ("3+4=8", "8=8"),
    ("3=3", ""),
    ("3=3", "3=3"),
    ("7/2=3", "3=3"),
    ("1/0=1", "1=1"),
    ("5-7=7-5", "7-5=7-5"),
    ("3+4=7", "7 = 7"),
    ("3+4=7", "07=7"),
    ("3+4=7", "+7=7"),
    ("3+4=7", "__import__('os')=7"),
    ("3+4=7", "7=7=7"),
    ("3+4=3+4+0", "7=3+4+0"),
]


@pytest.mark.parametrize(("statement", "proof"), WORKED)
def test_right_proofs(statement, proof):
    assert Arithmetic().accepts(statement, proof)
    assert oracle(Arithmetic())(statement, proof, 32, 80)


@pytest.mark.parametrize(("statement", "proof"), NOT_WORKED)
def test_wrong_proofs(statement, proof):
    assert not Arithmetic().accepts(statement, proof)
    assert not oracle(Arithmetic())(statement, proof, 32, 80)


def edits(text):
    return {
        text[:i] + new + text[i + cut :]
        for i in range(len(text) + 1)
        for new in ["", *"0139-+*/=()\n"]
        for cut in (0, 1)
    } - {text}


def test_agrees_with_the_list_of_all_rewritings_and_proves_nothing_false():
    """Thousands of texts next to proofs: the same verdict, and what is accepted is true."""
    method = Arithmetic(operations=3)
    accepted = 0
    for statement, proof in method.examples(6, generator("edits")):
        for bad in edits(proof):
            right = method.accepts(statement, bad)
            assert right == oracle(method)(statement, bad, method.lines, method.longest), bad
            accepted += right
        for other in edits(statement):
            if method.accepts(other, proof):
                left, right = independent.equation(other, 80)
                assert independent.value(left) == independent.value(right)
    assert accepted  # a trailing line break, say


def test_every_rewriting_keeps_the_value_and_is_accepted_as_a_line():
    method = Arithmetic(operations=3)
    for statement, _ in method.examples(40, generator("rewritings")):
        left, right = independent.equation(statement, 80)
        for made in independent.successors(left):
            assert independent.value(made) == independent.value(left) == independent.value(right)


def test_statements_have_one_way_of_writing():
    method = Arithmetic()
    same = ["3+4*2=11", "(3+(4*2))=11", "((3))+4*2=(11)"]
    assert {method.statement(text) for text in same} == {"3+4*2=11"}
    assert method.statement("3-(4-2)=1") == "3-(4-2)=1"
    assert method.statement("(3-4)-2=1") == "3-4-2=1"
    for text in ("3=3", "(3)=3", "3+4", "3 + 4=7", "3+4=7\n", "x=1", "2**3=8", "1.0=1+0", "٣=2+1"):
        assert method.statement(text) is None, text
    assert method.statement("1+" * 38 + "1=39") == "1+" * 38 + "1=39"
    assert method.statement("1+" * 39 + "1=40") is None
    deep = Arithmetic(longest=200)
    assert deep.statement("(" * 98 + "1" + ")" * 98 + "=1") is None  # the same on both sides
    assert deep.statement("(" * 97 + "1+1" + ")" * 97 + "=2") == "1+1=2"


def test_examples_are_of_every_kind_and_size():
    found = [statement for statement, _ in Arithmetic().examples(60, generator("kinds"))]
    left = [statement.split("=")[0] for statement in found]
    for sign in "+-*":
        assert any(f"{a}{sign}{b}" in left for a in range(10) for b in range(10))
    assert {len(independent._tokens(text)) for text in left} == {3, 5, 7}
    assert any("(" in text for text in left)
    assert len(Arithmetic(operations=1, largest=1).examples(12, generator("kinds"))) == 12  # all


def test_every_field_of_arithmetic_matters():
    base = Arithmetic().examples(40, generator("fields"))
    for change in ({"operations": 3}, {"largest": 4}):
        assert Arithmetic(**change).examples(40, generator("fields")) != base
    long = ("1+1+1+1=4", "2+1+1=4\n3+1=4\n4=4")
    assert Arithmetic(lines=3).accepts(*long)
    assert not Arithmetic(lines=2).accepts(*long)
    assert Arithmetic(longest=9).accepts(*long)
    assert not Arithmetic(longest=8).accepts(*long)


# --- lean ---

STATEMENT = "(a b : Nat) : a + b = b + a"


def test_lean_is_given_the_theorem_in_a_folder_that_goes_away(lean):
    method = Lean(header="import Mathlib")
    assert method.accepts(STATEMENT, "by\n  simp\n")
    assert (lean / "seen").read_text() == independent_lean.file(
        "import Mathlib", STATEMENT, "by\n  simp"
    )
    assert method.statement(f"  {STATEMENT.replace(' ', '  ')}\n") == STATEMENT
    assert (lean / "seen").read_text() == f"import Mathlib\ntheorem stated {STATEMENT} := sorry\n"
    folders = (lean / "log").read_text().split()
    assert len(set(folders)) == 2
    assert not any(os.path.exists(folder) for folder in folders)


@pytest.mark.parametrize(
    ("proof", "code", "output"),
    [
        ("right", 0, "'stated' does not depend on any axioms"),
        ("choice", 0, "'stated' depends on axioms: [propext, Classical.choice]"),
        ("cheat", 0, "'stated' depends on axioms: [propext, sorryAx]"),
        ("silent", 0, "nothing"),
        (
            "pretend",
            0,
            "'stated' does not depend on any axioms\n'stated' depends on axioms: [sorryAx]",
        ),
        ("wrong", 1, "error: wrong"),
    ],
)
def test_lean_has_the_last_word(lean, proof, code, output):
    assert Lean().accepts(STATEMENT, proof) == oracle(Lean())(code, output)


def test_lean_that_takes_too_long_is_ended_with_what_it_started(lean):
    assert not Lean(timeout=1.5).accepts(STATEMENT, "slow")
    assert Lean(timeout=0.2).statement("(slow : Nat) : slow = slow") is None
    if (lean / "child").exists():  # it got that far
        state = Path(f"/proc/{(lean / 'child').read_text().strip()}/stat")
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize(
    "text",
    ["sorry", "by admit", "rfl -- so", "/- so -/ rfl", "#eval 1", "rfl\naxiom a : False",
     "by native_decide", "(rfl); rfl",
     "rfl\ntheorem stated : 1 = 1", "by run_tac x", "«stated»", "by\n  open Nat in rfl", "IO.x"],
)  # fmt: skip
def test_lean_never_sees_words_that_could_change_the_question(lean, text):
    assert not Lean().accepts(STATEMENT, text)
    assert Lean().statement(f"(a : Nat) : a = {text}") is None
    assert not (lean / "log").exists()


def test_lean_knows_nothing_of_our_environment(lean, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    program = lean / "bin" / "lean"
    program.write_text(f"#!/bin/sh\nenv > '{lean}/env'\n")
    assert Lean().statement(STATEMENT) == STATEMENT
    assert "SOME_KEY" not in (lean / "env").read_text()


def test_lean_that_is_not_installed_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (Lean().ready, lambda: Lean().accepts(STATEMENT, "rfl")):
        with pytest.raises(
            UserError, match=r"'lean' is not installed; install Lean 4 by elan"
        ) as e:
            act()
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="'lake-lean' is not installed"):
        Lean(program="lake-lean").ready()


# --- what is chosen ---


def tried(seed, count=30, attempts=8):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        right = max(0, int(torch.randint(-2, attempts + 1, (), generator=g)))
        words, shortest = torch.randint(3, 30, (2,), generator=g).tolist()
        rows.append((words, right, attempts, shortest if right else 0))
    return rows


def told(rows):
    return [Tried("x" * words, right / many, short) for words, right, many, short in rows]


@law(SelfPlay)
def test_oracle(method):
    given = {name: v for name, v in fields(method).items() if name in ("highest", "plain")}
    for seed in range(20):
        rows = tried(seed)
        want = oracle(method)(rows, **given)
        assert method.chosen(told(rows)) == want
    assert method.chosen([]) == []


@law(SelfPlay)
def test_only_what_was_proven_is_chosen(method):
    for seed in range(20):
        rows = tried(seed)
        for (_, right, many, _), take in zip(rows, method.chosen(told(rows)), strict=True):
            assert not take or 0 < Fraction(right, many) <= Fraction(1, 4)


@law(SelfPlay)
def test_a_round_has_no_more_conjectures_than_statements(method):
    for count in range(1, 20):
        assert 0 <= method.conjectures(count) <= count


def test_every_field_of_stp_matters():
    rows = told(tried(0))
    for change in ({"highest": 0.5}, {"plain": 0.6}):
        assert Stp(**change).chosen(rows) != Stp().chosen(rows)
    assert Stp(share=1.0).conjectures(8) == 8
    assert Stp().conjectures(8) == 4
    assert Stp().conjectures(1) == 1


# --- the whole ---

LETTERS = "\n 0123456789+-*/()=abcdefghijklmnopqrstuvwxyz"


def encode(text):
    return [3 + LETTERS.index(letter) for letter in text]


def decode(tokens):
    return "".join(LETTERS[token - 3] if 3 <= token < 3 + len(LETTERS) else "?" for token in tokens)


END = 2
EASY = {"name": "arithmetic", "operations": 1, "largest": 3}
SMALL = {"checker": EASY, "seeds": 12, "given": 8, "heldout": 4, "warm": 2, "rows": 6}


def settings(play=None, **given):
    rate = Group(rate=0.01)
    base = {
        "steps": 8,
        "prompts": 6,
        "samples": 4,
        "updates": 2,
        "length": Constant(tokens=12),
        "adapt": Full(),
        "optimizer": Optimizer(matrices=rate, rest=rate),
    }
    return Finetune(**(base | {"self_play": play or Stp(**SMALL)} | given))


def play(how=None, model=None):
    how = how or settings()
    return Play(model or tiny.model(), how, how.self_play, encode, decode, END)


class Scripted(Play):
    """A model that conjectures and proves by the book, but only once or twice for a statement."""

    def _say(self, prompts, temperature, limit, name):
        said = []
        for place, prompt in enumerate(prompts):
            role, text = prompt.strip().split(" ")
            if role == "conjecture":
                fresh = ["1+1=2", "2*4=8", text, "9-9=0", "so", "3+5=9", self.heldout[0]]
                said.append(Said(f"{fresh[place % len(fresh)]}\n", 5, place != 7))
                continue
            sign, one, other = independent.parse(text.split("=")[0])
            value = int(independent.value([sign, one, other]))
            way = 0 if temperature == 0 else place % self.how.samples
            turned = f"{other}{sign}{one}={value}\n" if way == 1 and sign != "-" else ""
            said.append(Said(f"{turned}{value}={value}\n" if way < 2 else "?\n", 4, True))
        return said


def scripted(how):
    return Scripted(tiny.model(), how, how.self_play, encode, decode, END)


def test_a_round_keeps_what_the_checker_accepts_and_nothing_else():
    t = scripted(settings(prompts=16, samples=8))
    before = t.state()
    assert before["round"] == -1
    t.batch(0)
    assert t.state() == before  # the seeds alone
    t.batch(2)
    checker = t.play.checker
    assert t.proofs.keys() > {statement for statement, _ in t.seeds}
    for statement, found in t.proofs.items():
        assert found
        assert all(checker.accepts(statement, proof) for proof in found)
        assert len(found) <= t.play.proofs
    assert not set(t.proofs) & set(t.heldout)
    assert t.taught
    for parent, statement in t.taught:
        assert checker.statement(statement) == statement
        assert parent in t.proofs
    assert {"2*4=8", "9-9=0"} <= {statement for _, statement in t.taught}  # 2 and 1 of 8
    assert "3+5=9" in t.seen
    assert "3+5=9" not in t.proofs
    assert t.figures["pass_rate"] == t.figures["reward"] > 0
    assert t.figures["solved_heldout"] == 1
    assert 0 < t.figures["band"] <= 1
    assert 0 < t.figures["fresh"] < 1
    assert t.figures["proven"] == len(t.proofs) - 12
    assert t.figures["generated"] > 0


def test_no_conjecture_comes_twice():
    t = scripted(settings(prompts=16, samples=8))
    t.batch(2)
    first = [statement for _, statement in t.taught]
    known = list(t.seen)
    t.batch(4)
    assert t.figures["fresh"] == 0
    assert list(t.seen) == known
    assert [statement for _, statement in t.taught] == first
    assert len(known) == len(set(known))


def test_statements_that_leave_no_room_for_an_answer_are_no_conjectures():
    class Long(Play):
        def _say(self, prompts, temperature, limit, name):
            fresh = ["9-9=0", "10+10=20"]
            return [Said(f"{fresh[place % 2]}\n", 5, True) for place in range(len(prompts))]

    how = settings(prompts=16)
    t = Long(tiny.model(context=29), how, how.self_play, encode, decode, END)
    assert t.play.checker.statement("10+10=20") == "10+10=20"
    t.batch(2)
    assert "9-9=0" in t.seen
    assert "10+10=20" not in t.seen
    assert t.figures["fresh"] == 1 / t.play.conjectures(16)
    t.longest += 2
    t.batch(4)
    assert "10+10=20" in t.seen


def test_expert_iteration_takes_given_statements_only():
    t = scripted(settings(ExpertIteration(**SMALL)))
    t.batch(2)
    assert not t.taught
    assert set(t.proofs) <= {s for s, _ in t.seeds} | set(t.given)
    t.batch(4)
    assert set(t.proofs) == {s for s, _ in t.seeds} | set(t.given)
    t.batch(6)  # nothing is left to try
    assert t.figures["pass_rate"] == 0


def test_rows_are_prompts_answers_and_end_tokens():
    t = play()
    batch = t.batch(0)
    known = {encode(p + a).__repr__(): len(encode(p)) for p, a in t.texts()}
    for tokens, mask in zip(batch["tokens"].tolist(), batch["mask"], strict=True):
        columns = mask.nonzero().flatten().tolist()
        assert columns == list(range(columns[0], columns[-1] + 1))
        assert tokens[columns[-1]] == END
        assert known[tokens[: columns[-1]].__repr__()] == columns[0]
        assert not any(tokens[columns[-1] + 1 :])
    assert int(batch["count"]) == int(batch["mask"].sum())


def test_loss_is_the_mean_of_the_models_own_and_parts_add_up():
    t = play()
    batch = t.batch(0)
    logits = t.model(input_ids=batch["tokens"]).logits.log_softmax(-1)
    logp = logits[:, :-1].gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)
    want = -logp[batch["mask"][:, 1:]].mean()
    whole, figures = t.loss(t.model, batch)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-6)
    total, added = 0.0, {}
    for rows in torch.arange(len(batch["tokens"])).tensor_split(3):
        part = {name: v[rows] if v.ndim else v for name, v in batch.items()}
        loss, found = t.loss(t.model, part)
        total += float(loss.detach())
        for name, value in found.items():
            added[name] = added.get(name, 0.0) + float(value)
    assert total == pytest.approx(float(whole.detach()), rel=1e-4)
    assert added == pytest.approx({k: float(v) for k, v in figures.items()}, rel=1e-4, abs=1e-6)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_function_of_seed_and_step_that_json_carries_on():
    one, other = play(), play()
    for step in (0, 2, 3):
        assert same(one.batch(step), other.batch(step))
    state = json.loads(json.dumps(one.state()))
    fresh = play()
    fresh.restore(state)
    for step in (3, 4, 5):
        assert same(one.batch(step), fresh.batch(step))
    moved = play(settings(seed=1))
    assert moved.seeds != one.seeds
    assert moved.identity != one.identity


def run(folder, how, watch=lambda *_: None):
    model = tiny.model()
    outcome = train(model, play(how, model), how, folder, watch)
    clock = {"seconds", "eta", "tokens_per_second"}
    rows = [{k: v for k, v in row.items() if k not in clock} for row in read(outcome.metrics)]
    return dict(model.state_dict()), rows


def test_stopped_and_resumed_gives_the_same_bytes(tmp_path):
    how = settings(save_every=100)
    want, rows = run(tmp_path / "whole", how)

    def stop(step, total, metrics):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run(tmp_path / "cut", how, stop)
    got, again = run(tmp_path / "cut", how)
    assert same(want, got)
    assert rows == again
    assert [row["generated"] for row in rows[:2]] == [0, 0]
    assert all(a["generated"] <= b["generated"] for a, b in pairwise(rows))
    assert rows[-1]["generated"] > 0


@law(Merge)
def test_what_is_solved_in_the_end_is_said_of_the_model_that_is_kept(method, tmp_path, monkeypatch):
    how, heard = settings(merge=method), []

    class Late(Scripted):
        """Proves what is held out only after its three rounds, at steps 2, 4 and 6."""

        def _say(self, prompts, temperature, limit, name):
            if temperature:
                return super()._say(prompts, temperature, limit, name)
            heard.append({key: value.clone() for key, value in self.model.state_dict().items()})
            if len(heard) == 4:
                return super()._say(prompts, temperature, limit, name)
            return [Said("?\n", 2, True) for _ in prompts]

    monkeypatch.setattr(driver, "Play", Late)
    model = tiny.model().bfloat16()
    asked = {"prompts": [[5]], "score": lambda index, text: 0.0, "about": "self-play"}
    outcome = driver.finetune(
        model, how, **asked, decode=decode, encode=encode, end=END, work=tmp_path
    )
    assert [row["solved_heldout"] for row in read(outcome.metrics)] == [0] * how.steps
    assert outcome.last["solved_heldout"] == 1
    assert len(heard) == 4
    assert same(heard[-1], dict(model.state_dict()))
    assert not same(heard[-1], heard[-2])


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_without_a_round_is_refused(steps):
    with pytest.raises(ValueError, match="begins its rounds after 2 steps"):
        settings(steps=steps)
    assert settings(steps=3, updates=1).steps == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("checker", EASY | {"largest": 4}), ("seeds", 11), ("given", 7), ("heldout", 3), ("warm", 3),
     ("rows", 5), ("proofs", 1), ("share", 1.0)],
)  # fmt: skip
def test_every_field_of_self_play_matters(field, value):
    found = []
    for given in (SMALL, SMALL | {field: value}):
        t = scripted(settings(Stp(**given), prompts=16, samples=8))
        batches = [t.batch(step)["tokens"].tolist() for step in (0, 2)]
        found.append((t.state(), batches, t.seeds))
    assert found[0] != found[1]


def test_too_few_examples_are_said_before_anything_is_trained(lean):
    how = settings(Stp(checker={"name": "lean"}), steps=60)
    with pytest.raises(UserError, match=r"352 examples wanted, `given` lists 8"):
        play(how)


def test_answers_that_do_not_fit_are_refused_before_anything_is_trained():
    with pytest.raises(UserError, match=r"max_new=600 need a context of \d+, the model has"):
        play(settings(length=Constant(tokens=600)))


def test_lean_has_to_be_there_from_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="is not installed"):
        play(settings(Stp(checker={"name": "lean"}, seeds=4, given=2, heldout=2, warm=1)))


def test_self_play_with_lean(lean):
    """The same driver, with another checker: texts of tokens, verdicts of a program."""
    letters = LETTERS + ":∧⟨⟩,.ABCDEFGHIJKLMNOPQRSTUVWXYZ_"
    how = settings(Stp(checker={"name": "lean"}, seeds=4, given=2, heldout=2, warm=1, rows=4))

    class Same(Play):
        def _say(self, prompts, temperature, limit, name):
            role = prompts[0].split(" ")[0]
            text = {"conjecture": "(a : Nat) : a = a\n", "prove": "rfl\n"}[role]
            return [Said(text, 3, True) for _ in prompts]

    t = Same(
        tiny.model(vocabulary=128, context=128),
        how,
        how.self_play,
        lambda text: [3 + letters.index(letter) for letter in text],
        lambda tokens: "".join(letters[token - 3] for token in tokens),
        END,
    )
    t.batch(1)
    assert t.proofs["(a : Nat) : a = a"] == ["rfl\n"]
    assert t.figures["pass_rate"] == t.figures["solved_heldout"] == 1
    assert not t.taught  # always provable is not barely provable


@pytest.mark.parametrize(
    "change",
    [
        {"self_play": {"name": "stp", "warm": 1, "seeds": 8, "given": 8, "heldout": 2, "rows": 4}},
        {"sampling": {"name": "step_level", "steps": 2, "tokens": 5}},
    ],
)
def test_the_stage(corpus, tmp_path, change):  # noqa: F811
    """From folders to a folder that plain transformers loads, with the corpus' own tokenizer."""
    params = {
        "steps": 2,
        "prompts": 2,
        "samples": 2,
        "length": {"name": "constant", "tokens": 16},
        "select": {"name": "every"},
    }
    start = foreign("llama", corpus, tmp_path / "foreign")
    report = finetune.finetune(
        validate(finetune.finetune.params, params | change, "finetune"),
        finetune.Inputs(model=start, corpus=corpus),
        tmp_path / "tuned",
        execution=QUIET,
    )
    assert report.steps == 2
    assert report.generated > 0
    assert (report.solved_heldout is not None) == ("self_play" in change)
    assert report.bytes_after == report.bytes_before
    assert 0 < report.length <= 16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").num_parameters()


@pytest.mark.slow
def test_a_tiny_model_trained_on_seeds_chooses_and_solves(tmp_path):
    """From noise: trained briefly on the seeds it states what is true and barely provable."""
    little = EASY | {"operations": 2, "largest": 2}
    stp = Stp(checker=little, seeds=150, given=40, heldout=32, warm=150)
    rounds = {"prompts": 48, "samples": 8, "updates": 10, "length": Constant(tokens=24)}
    how = settings(stp, steps=230, save_every=1000, **rounds)
    rows, task = [], play(how, model := tiny.model())
    train(model, task, how, tmp_path, lambda step, total, metrics: rows.append(dict(metrics)))
    assert task.taught
    for _, statement in task.taught:
        left, right = independent.equation(statement, 80)
        assert independent.value(left) == independent.value(right)
        assert task.proofs[statement]
    assert any(row["band"] > 0 for row in rows)
    assert rows[-1]["proven"] > len(task.taught)
    assert rows[-1]["solved_heldout"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    for statement, found in task.proofs.items():
        assert all(task.play.checker.accepts(statement, proof) for proof in found)
