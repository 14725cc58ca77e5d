"""A contender's process, and the environment that it runs in."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from contenders import ENVIRONMENTS, PACKAGES, Contender

BENCHMARKS = Path(__file__).resolve().parents[1]


def python_of(environment: str | None) -> str:
    """The interpreter of an environment, which is made first where it is missing or outdated."""
    if environment is None:
        return sys.executable
    home = BENCHMARKS / ".environments" / environment
    python, made = str(home / "bin" / "python"), home / "pins.txt"
    steps = ENVIRONMENTS[environment]
    if not made.exists() or made.read_text() != "\n".join(steps):
        print(f"making the environment of {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        (home.parent / ".gitignore").write_text("*\n")
        for step in steps:
            pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", *step.split()]
            subprocess.run(pip, check=True, env=environ(ours=False))
        made.write_text("\n".join(steps))
    return python


def environ(ours: bool) -> dict[str, str]:
    """Environment variables of a worker: peers see nothing of this project."""
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    path = found.pop("PYTHONPATH", "")
    return {**found, "PYTHONPATH": f"{BENCHMARKS.parent / 'src'}:{path}"} if ours else found


def versions(python: str, ours: bool) -> dict[str, str]:
    """What an environment holds of the packages that matter."""
    code = (
        "import json, sys, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version "
        "for d in m.distributions() if d.name and d.name.lower() in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", code, *PACKAGES], check=True, capture_output=True, env=environ(ours)
    )
    found: dict[str, str] = json.loads(done.stdout)
    return dict(sorted(found.items()))


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender, settings: dict[str, Any], folder: Path):
        self.contender, ours = contender, contender.environment is None
        self.log = folder / f"{contender.name}.log".replace(" ", "_")
        self.weights = folder / f"{contender.name}.safetensors".replace(" ", "_")
        python = python_of(contender.environment)
        self.versions = versions(python, ours)
        read, write = os.pipe()
        given = {
            **settings,
            **contender.settings,
            "weights": str(self.weights),
            "answers": write,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(BENCHMARKS / "peers" / f"{contender.worker}.py"), json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                cwd=folder,
                env={**environ(ours), "OMP_NUM_THREADS": str(settings["threads"])},
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def round(self) -> dict[str, Any]:
        """Processor seconds and checks of one round; RuntimeError where the process has ended."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            words = "\n".join(self.log.read_text().splitlines()[-25:])
            raise RuntimeError(f"{self.contender.name} ended without an answer:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """No more rounds."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
