"""Mutants judge the tests: `python -m tests.mutants SOURCE TEST... [-k EXPRESSION]`.

Flips one operator, constant or call in the functions of SOURCE, runs the tests in this process, and
says whether they noticed. A mutant that survives is either equivalent or a hole in the tests.
"""

import argparse
import ast
import contextlib
import copy
import io
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from hypothesis import Phase, settings

SWAP = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

HERE = ["-x", "-q", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
"""Options that keep the tests in this process, where the mutant is."""
MODULES = {"torch", "math", "functional", "nn", "np"}
"""A call on one of these becomes its first argument, a call on any other name that name."""


def variants(node: ast.AST) -> list[ast.AST]:
    """What `node` is replaced by, one mutant each."""
    found: list[ast.AST] = []

    def changed(**fields: Any) -> None:
        found.append(new := copy.copy(node))
        vars(new).update(fields)

    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAP:
            changed(op=SWAP[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in SWAP:
            changed(ops=[SWAP[type(op)]()])
        case ast.Constant(value=bool(value)):
            changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            changed(value=value + 1)
        case ast.UnaryOp(operand=operand):
            found.append(operand)
        case ast.IfExp(body=body, orelse=orelse):
            found += [body, orelse]
        case ast.Call(func=ast.Attribute(value=value), args=args):
            called = isinstance(value, ast.Name) and value.id in MODULES
            found += args[:1] if called else [value]
    return found


def mutants(source: str) -> list[tuple[str, ast.Module]]:
    """Every mutated module with a line that says what was done."""
    found = []
    tree = ast.parse(source)
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        for parent in [n for statement in function.body for n in ast.walk(statement)]:
            for field, value in ast.iter_fields(parent):
                slots = enumerate(value) if isinstance(value, list) else [(None, value)]
                for index, old in slots:
                    for new in variants(old) if isinstance(old, ast.AST) else []:
                        _put(parent, field, index, new)
                        text = f"line {old.lineno}: {ast.unparse(old)}  ->  {ast.unparse(new)}"
                        found.append((text, copy.deepcopy(tree)))
                        _put(parent, field, index, old)
    return found


def _put(parent: ast.AST, field: str, index: int | None, value: ast.AST) -> None:
    if index is None:
        setattr(parent, field, value)
    else:
        getattr(parent, field)[index] = value


def functions(module: Any) -> dict[str, FunctionType]:
    """Functions that `module` defines, those of its classes included, by qualified name."""
    places = [module, *(t for t in vars(module).values() if isinstance(t, type))]
    things = [thing for place in places for thing in vars(place).values()]
    things = [getattr(t, "fget", None) or getattr(t, "__wrapped__", t) for t in things]
    return {
        t.__qualname__: t
        for t in things
        if isinstance(t, FunctionType) and t.__module__ == module.__name__
    }


def codes(code: CodeType) -> dict[str, CodeType]:
    """Code objects inside `code` by qualified name."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {c.co_qualname: c for c in inner} | {k: v for c in inner for k, v in codes(c).items()}


def passes(arguments: list[str], seconds: int) -> bool:
    """Whether the tests are green within `seconds`."""
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return pytest.main([*HERE, *arguments]) == 0
    except TimeoutError:
        return False
    finally:
        signal.alarm(0)


def _late(*_: object) -> None:
    raise TimeoutError


def main() -> int:
    """Prints the survivors and the kill rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("-k", default="")
    given = parser.parse_args()
    arguments = [*given.tests, *(["-k", given.k] if given.k else [])]
    parts = given.source.with_suffix("").parts
    names = parts[parts.index("drawplate") :]
    module = import_module(".".join(names[:-1] if names[-1] == "__init__" else names))
    signal.signal(signal.SIGALRM, _late)
    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None)
    settings.load_profile("mutants")  # a dead mutant needs no smallest counterexample
    if not passes(arguments, 600):
        sys.exit(f"{' '.join(arguments)}: not green to begin with, or no test at all")
    originals = {name: (f, f.__code__) for name, f in functions(module).items()}
    survivors, total = [], 0
    for text, tree in mutants(given.source.read_text()):
        mutated = codes(compile(ast.fix_missing_locations(tree), str(given.source), "exec"))
        for name, (function, _) in originals.items():
            function.__code__ = mutated[name]
        total += 1
        if passes(arguments, 60):
            survivors.append(text)
            print("survived ", text, flush=True)
        for function, code in originals.values():
            function.__code__ = code
    print(f"{given.source}: {total - len(survivors)} of {total} mutants killed")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
