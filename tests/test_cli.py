"""The command line: every command explains itself, and errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli import cli
from stages.quiet import guarded

ROOT = Path(__file__).parents[1]


def names():
    return cli.list_commands(None)


@pytest.mark.parametrize("name", names())
def test_every_command_has_help(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert any(line.startswith(f"    drawplate {name}") for line in result.output.splitlines())
    assert "\\b" not in result.output


def test_stages_stand_first_and_help_imports_nothing_heavy():
    assert names()[:6] == ["prepare", "pretrain", "compress", "quantize", "finetune", "evaluate"]
    script = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from flows.cli import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'mlflow', 'dvc', 'prefect'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


GIVEN = ["--model", "m", "--corpus", "c", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "--corpus", "x", "--out", "y"], "--model"),
        (["compress", "--model", "none", "--corpus", "none", "--out", "o"], "none does not exist"),
        (["compress", *GIVEN, "-S", "compress.ratoi=1"], "ratio"),
        (["compress", *GIVEN, "-S", "compres.ratio=1"], "compress"),
        (["compress", *GIVEN, "-S", "compress.ratio"], "key=value"),
        (["compress", *GIVEN, "-S", "compress.ratio=1.5"], "less than 1"),
        (["compress", *GIVEN, "-S", "compress.method.name=x"], "low_rank"),
        (["finetune", *GIVEN, "--preset", "rl/grop"], "rl/grpo"),
        (["methods", "compress/prun"], "compress/prune"),
        (["verify", "nowhere"], "does not exist"),
        (["generate", "1+1", "--model", "nowhere"], "config.json"),
        (["nonsense"], "No such command"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert guarded(lambda: cli.main(arguments, standalone_mode=False)) == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) == 1
    assert text.startswith("drawplate: ")
    assert says in text
    assert not list(tmp_path.iterdir())


def test_the_exit_code_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "stages.check", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"drawplate: {tmp_path / 'none.yaml'} does not exist\n"


def test_methods_can_be_read_by_machines():
    result = CliRunner().invoke(cli, ["methods", "compress/prune", "--json"])
    found = json.loads(result.output)
    assert "wanda" in {row["name"] for row in found["compress/prune"]}
