"""What the pages tell a user to type: settings that are valid, and Python that runs."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

from drawplate import settings
from drawplate.core import hf
from drawplate.core.artifact import verify
from drawplate.data.tokenizer import train
from stages.check import check

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "decoders/README.md")
SHIPPED = settings.read(ROOT / "params.yaml")


def blocks(language):
    texts = ((ROOT / page).read_text() for page in PAGES)
    return [
        found for text in texts for found in re.findall(rf"```{language}\n(.*?)```", text, re.S)
    ]


COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.splitlines()
    if re.match("drawplate (?!sweep)", line) and " -S" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_valid_with_the_params_yaml_that_is_shipped(line):
    words = shlex.split(line, comments=True)
    changes = [after for word, after in pairwise(words) if word == "-S"]
    check(settings.override(SHIPPED, changes))


def test_there_are_such_commands():
    assert sum("adopt" in line for line in COMMANDS) == len(PAGES)
    assert sum("prepare.sources" in line for line in COMMANDS) == 1


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.run._tracker", lambda *facts: None)
    lines = [f"{i} and {i + 1} are followed by {i * 7} and then by {i * i}" for i in range(1500)]
    Path("notes.txt").write_text("\n".join(lines))
    tokenizer = train(lines, 300)
    for folder in ("SMALL", "TINY"):
        hf.save(tiny.model(vocabulary=len(tokenizer), context=128), Path(folder), tokenizer)
    (plain, ours) = blocks("python")
    exec(plain, {})
    Path("TINY").rename("EARLIER")
    found = {}
    exec(ours, found)
    assert verify(Path("TINY")).kind == "model"
    assert found["model"].num_parameters() > 0
    assert found["tokenizer"].encode("7 and 8")
    assert found["report"].model_dump()
