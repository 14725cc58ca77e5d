"""The command line: every command explains itself, and errors are one line."""

import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize("name", names()[:6])
def test_the_example_in_a_stages_help_can_be_typed_and_sets_a_parameter(name):
    from stages.run import settings_for

    shown = CliRunner().invoke(cli, [name, "--help"]).output.split("Example:\n")[1].splitlines()[0]
    program, called, *arguments = shlex.split(shown)
    assert (program, called) == ("drawplate", name)
    given = cli.get_command(None, name).make_context(name, arguments).params
    stage = getattr(import_module(f"stages.{name}"), name)
    assert given["changes"]
    changed = settings_for(stage, given["file"], given["presets"], given["changes"])[0]
    if name != "prepare":  # which has no defaults for all
        assert changed != stage.params()


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
        (["quantize", *GIVEN, "-S", "compress.ratio=.5"], "ratio=.5 is for compress and has no"),
        (["quantize", *GIVEN, "-S", "pretrain.nonsense=3"], "is for pretrain and has no effect"),
        (["quantize", *GIVEN, "--preset", "rl/grpo"], "--preset rl/grpo is for finetune and has"),
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nframe"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_ran_out_is_one_line_and_exit_4(error, capsys):
    def entry():
        raise error

    assert guarded(entry) == 4
    said = capsys.readouterr().err
    assert said.startswith("drawplate: out of memory: ")
    assert len(said.splitlines()) == 1


def test_a_corpus_that_is_plain_text_is_one_line_where_one_of_prepare_is_needed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("text")
    Path("m").mkdir()
    arguments = ["evaluate", "--model", "m", "--corpus", "notes.txt", "--out", "o"]
    arguments += ["-S", "execution.tracking=false"]
    assert guarded(lambda: cli.main(arguments, standalone_mode=False)) == 2
    said = capsys.readouterr().err
    assert said.startswith("drawplate: notes.txt is not a corpus")
    assert len(said.splitlines()) == 1


def test_chat_greets_for_a_model_in_shards_and_goes_on_after_a_prompt_that_is_too_long(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    from drawplate.core import hf
    from tests import tiny

    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    asked = ["w5 " * 80, "w5 w6"]
    call = ["chat", "--model", str(tmp_path), "--max-new", "4"]
    done = CliRunner().invoke(cli, call, input="\n".join([*asked, "", ""]))
    assert done.exit_code == 0, done.output
    assert f"{hf.stored_bytes(model):,} bytes" in done.stdout
    assert done.stderr.startswith("drawplate: sampling: ")
    assert len(done.stderr.splitlines()) == 1
    _, answer = [line for line in done.stdout.splitlines() if not line.startswith(">")]
    assert all(word.startswith("w") for word in answer.split()), done.stdout


def test_a_file_may_hold_the_sections_of_all_stages_and_execution_is_everyones():
    from stages.quantize import quantize
    from stages.run import settings_for

    file, change = ROOT / "params.yaml", "execution.threads=3"
    params, execution = settings_for(quantize, file, ["quantize/higgs"], [change])
    assert execution.threads == 3
    assert params != settings_for(quantize, file, [], [])[0]


def test_the_exit_code_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "stages.check", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"drawplate: {tmp_path / 'none.yaml'} does not exist\n"


def test_methods_can_be_read_by_machines():
    result = CliRunner().invoke(cli, ["methods", "compress/prune", "--json"])
    found = json.loads(result.output)
    assert "wanda" in {row["name"] for row in found["compress/prune"]}
