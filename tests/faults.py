"""Fault kit: kill, interrupt, fill, flip, cut; every tool is deterministic for a given seed.

* `kill_loop`: run a function again and again in forked children of one warm process and kill each
  child after a random part of the time that it needs, until it finishes.
* `crash_points`: with strace, let every system call of a function fail or kill, one at a time.
* `flips`, `cuts`, `damages`: wrong bytes for the files of an artifact.
* `small_disk`: a file system of a few megabytes.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def light() -> None:
    """Before the first import: let `drawplate` be a bare folder of modules in this process.

    The package itself imports transformers, which takes seconds.
    """
    package = ModuleType("drawplate")
    package.__path__ = [str(ROOT / "src" / "drawplate")]
    sys.modules["drawplate"] = package


# ---------------------------------------------------------------- processes that die


def environment() -> dict[str, str]:
    """Of a child process: one thread, the repository importable."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(p for p in paths if p)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def kill_loop(
    work: str,
    check: str,
    folder: Path,
    *,
    seed: int,
    seconds: float,
    warm: str,
    sign: signal.Signals = signal.SIGKILL,
) -> dict[str, Any]:
    """Call `work(folder)` ("module:function") until it returns, killing it in between.

    Each child lives for a random part, up to a fifth, of the time an undisturbed child took in a
    folder of its own, so that fast machines kill as often as slow ones; after each kill the
    longest life grows by a fiftieth, so that all get through. After every kill `check(folder)`
    says whether what is on the disk can be read. Gives up after `seconds`. `warm()` is called in
    the parent, to import and set up what children would otherwise spend their lives on. With
    another `sign` children are asked to end, and `slowest` is the longest that one took to.
    -> {"kills", "unreadable", "finished", "slowest", "seconds"}
    """
    order = {
        "warm": warm,
        "work": work,
        "check": check,
        "folder": str(folder),
        "seed": seed,
        "seconds": seconds,
        "sign": sign,
    }
    return _ask(order, seconds + 120)


def _ask(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run this file as a warm process that forks the children."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(order)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def function(name: str) -> Callable[..., Any]:
    """ "module:function" -> the function."""
    module, attribute = name.split(":")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


def _kills(order: dict[str, Any]) -> dict[str, Any]:
    """The warm process: everything is imported once, children start in a millisecond."""
    work, check, folder = function(order["work"]), function(order["check"]), order["folder"]
    draw = random.Random(order["seed"])
    kills, unreadable, slowest = 0, 0, 0.0
    function(order["warm"])()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as undisturbed:
        os.waitpid(_child(work, undisturbed), 0)
    longest = (time.monotonic() - start) / 5
    start = time.monotonic()
    while time.monotonic() - start < order["seconds"]:
        child = _child(work, folder)
        time.sleep(draw.uniform(longest / 20, longest))
        longest *= 1.02
        status = os.waitpid(child, os.WNOHANG)[1] if _ended(child) else None
        if status is None:
            told = time.monotonic()
            os.kill(child, order["sign"])
            os.waitpid(child, 0)
            slowest = max(slowest, time.monotonic() - told)
            kills += 1
            unreadable += not check(folder)
            continue
        finished = status == 0
        if not finished:
            unreadable += 1
        if finished or unreadable > 3:
            return _report(kills, unreadable, finished, slowest, start)
    return _report(kills, unreadable, False, slowest, start)


def _child(work: Callable[..., Any], folder: str) -> int:
    """The process number of a fork that does `work(folder)` and leaves."""
    child = os.fork()
    if not child:
        try:
            work(folder)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _report(
    kills: int, unreadable: int, finished: bool, slowest: float, start: float
) -> dict[str, Any]:
    return {
        "kills": kills,
        "unreadable": unreadable,
        "finished": finished,
        "slowest": round(slowest, 2),
        "seconds": round(time.monotonic() - start, 2),
    }


# ---------------------------------------------------------------- system calls that fail


def needs_strace() -> Any:
    """Mark for tests that inject faults into system calls."""
    reason = "strace is not installed or may not trace here"
    return pytest.mark.skipif(not _can_trace(), reason=reason)


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    command = ["strace", "-o", os.devnull, "-e", "inject=getpid:error=EIO:when=65535", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def crash_points(
    work: str,
    prepare: str,
    check: str,
    arguments: Mapping[str, Any],
    *,
    calls: Sequence[str],
    kinds: Sequence[str],
    seconds: float = 300,
) -> dict[str, Any]:
    """Let each system call of `work(**arguments)` fail or kill, one at a time.

    A first run counts how often each of `calls` is made. Then, for each of them and each of `kinds`
    (strace's "error=EIO", "error=ENOSPC", "signal=SIGKILL"), `prepare(**arguments)` is called,
    `work` runs in a child with that fault, and `check(failed=..., **arguments)` returns a word
    about what it left. All functions are "module:function".
    -> {"counts": calls made, "tried": faults injected, "words": {kind: {word: times}}}
    """
    order = {
        "work": work,
        "prepare": prepare,
        "check": check,
        "arguments": dict(arguments),
        "calls": list(calls),
        "kinds": list(kinds),
    }
    return _ask(order, seconds)


def _every_crash(order: dict[str, Any]) -> dict[str, Any]:
    work, prepare, check = (function(order[k]) for k in ("work", "prepare", "check"))
    given = order["arguments"]
    prepare(**given)
    with tempfile.NamedTemporaryFile() as log:
        traced = f"trace={','.join(order['calls'])}"
        assert _traced(work, given, ["-o", log.name, "-e", traced]) == 0
        lines = Path(log.name).read_text(errors="replace").splitlines()
    found = (re.match(r"(?:\d+\s+)?(\w+)\(", line) for line in lines)
    counts = Counter(name[1] for name in found if name)
    words: dict[str, Counter[str]] = {kind: Counter() for kind in order["kinds"]}
    for call, count in counts.items():
        for number in range(1, count + 1):
            for kind in order["kinds"]:
                prepare(**given)
                fault = f"inject={call}:{kind}:when={number}"
                status = _traced(work, given, ["-o", os.devnull, "-e", fault])
                words[kind][check(failed=status != 0, **given)] += 1
    tried = sum(sum(found.values()) for found in words.values())
    return {"counts": counts, "tried": tried, "words": words}


def _traced(work: Callable[..., Any], given: Mapping[str, Any], options: list[str]) -> int:
    """Exit status of `work` in a forked child to which strace is attached before it begins."""
    gate, opener = os.pipe()
    child = os.fork()
    if not child:
        os.close(opener)
        os.read(gate, 1)
        try:
            work(**given)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(gate)
    strace = subprocess.Popen(
        ["strace", "-p", str(child), *options], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    assert "attached" in strace.stderr.readline()
    os.close(opener)
    status = os.waitpid(child, 0)[1]
    strace.communicate()
    return status


# ---------------------------------------------------------------- bytes that are wrong


def flips(path: Path, count: int, seed: int) -> Iterator[int]:
    """Flip one random bit of `path`, `count` times; the file is right again after each."""
    draw = random.Random(seed)
    right = path.read_bytes()
    for _ in range(count):
        bit = draw.randrange(8 * len(right))
        wrong = bytearray(right)
        wrong[bit // 8] ^= 1 << bit % 8
        path.write_bytes(wrong)
        yield bit
    path.write_bytes(right)


def cuts(path: Path, count: int, seed: int) -> Iterator[int]:
    """Cut `path` at random lengths, `count` times, once to nothing; right again after each."""
    draw = random.Random(seed)
    right = path.read_bytes()
    for length in [0, *(draw.randrange(len(right)) for _ in range(count - 1))]:
        path.write_bytes(right[:length])
        yield length
    path.write_bytes(right)


def damages(folder: Path, seed: int = 0) -> Iterator[str]:
    """Every kind of damage to every file of `folder`, one at a time; whole again after each."""
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    for name in names:
        path = folder / name
        right = path.read_bytes()
        for bit in flips(path, 3, seed):
            yield f"bit {bit} of {name} flipped"
        for length in cuts(path, 3, seed):
            yield f"{name} cut to {length} bytes"
        for what, wrong in (("zeroed", bytes(len(right))), ("longer", right + b"\0")):
            path.write_bytes(wrong)
            yield f"{name} {what}"
        path.unlink()
        yield f"{name} missing"
        path.mkdir()
        yield f"{name} is a folder"
        path.rmdir()
        path.write_bytes(right)
    for one, other in pairwise(names):
        swapped = folder / one, folder / other
        before = [path.read_bytes() for path in swapped]
        swapped[0].write_bytes(before[1])
        swapped[1].write_bytes(before[0])
        yield f"{one} and {other} swapped"
        swapped[0].write_bytes(before[0])
        swapped[1].write_bytes(before[1])
    stranger = folder / "stranger"
    stranger.write_bytes(b"")
    yield "a file too many"
    stranger.unlink()


# ---------------------------------------------------------------- resources that run out


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of `megabytes` at `folder`; the test is skipped where mounting is forbidden."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={megabytes}m"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        reason = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        reason = "no mount command"
    if reason:
        pytest.skip(f"cannot mount a small disk: {reason}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    light()
    asked = json.loads(sys.argv[1])
    print(json.dumps(_every_crash(asked) if "calls" in asked else _kills(asked)))
