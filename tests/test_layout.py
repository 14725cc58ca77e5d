"""Where things stand: file, name, class, oracle and imports of every method line up."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import drawplate
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.edits import Edit
from flows.catalogue import axes, catalogue, keys, page, settings

ROOT = Path(__file__).parents[1]
SOURCE = Path(drawplate.__file__).parent
LEAVES = [
    pytest.param(axis, name, leaf, id=f"{axis}/{name}")
    for axis, base in axes().items()
    for name, leaf in leaves(base).items()
]
# A method file may import arithmetic, its own axis, and what all share; never another subject, a
# tracker, a scheduler, the environment or a clock.
ALLOWED = {
    "__future__", "abc", "bisect", "collections", "drawplate", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "numpy", "pydantic", "re", "reasoning_gym", "torch", "typing",
}  # fmt: skip
READS_FILES = {"data/source"}
FILES = {
    "ast",
    "codecs",
    "csv",
    "datasets",
    "gzip",
    "importlib",
    "io",
    "os",
    "pathlib",
    "pyarrow",
    "warnings",
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "one subclass of Axis, found none; put helpers into a file whose name begins"),
        ("class Near(Axis): ...\nclass Far(Axis): ...\n", "found Near, Far"),
        ("class Near(Axis): name: str = 'far'\n", "name of Near is 'far', .* file, 'near'"),
    ],
    ids=["none", "two", "other"],
)
def test_a_file_that_is_no_leaf_is_named(request, tmp_path, monkeypatch, text, message):
    package = f"axis_{request.node.callspec.id}"
    (tmp_path / package).mkdir()
    own = "from drawplate.core.method import Method\nclass Axis(Method): ...\n"
    (tmp_path / package / "__init__.py").write_text(own)
    (tmp_path / package / "near.py").write_text(f"from {package} import Axis\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"near\.py: .*{message}"):
        leaves(importlib.import_module(package).Axis)


@pytest.mark.parametrize(("axis", "name", "leaf"), LEAVES)
def test_file_name_and_class_say_the_same(axis, name, leaf):
    assert leaf.model_fields["name"].default == name
    assert leaf.__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize(("axis", "name", "leaf"), LEAVES)
def test_a_method_is_one_short_file_with_white_listed_imports(axis, name, leaf):
    file = SOURCE / axis / f"{name}.py"
    lines = file.read_text().splitlines()
    limit = 150 if issubclass(leaf, Edit) else 120
    assert len(lines) <= limit
    allowed = ALLOWED | (FILES if axis in READS_FILES else set())
    subject = axis.split("/")[0]
    for module in imports(file):
        top, *rest = module.split(".")
        assert top in allowed or issubclass(leaf, Edit), module
        if top == "drawplate" and rest:
            assert rest[0] in {"core", "edits", "model", "train", subject}, module
            # What leaves share stands in their package, or beside them under a private name.
            siblings = rf"drawplate\.{axis.replace('/', '.')}\.[^_]"
            assert not re.match(siblings, module) or issubclass(leaf, Edit), f"imports {module}"


@pytest.mark.parametrize(("axis", "name", "leaf"), LEAVES)
def test_every_method_has_an_oracle_that_does_not_know_it(axis, name, leaf):
    if issubclass(leaf, Edit):
        return  # edits are proven against the dense computation in test_edits
    oracle = ROOT / "tests" / "oracle" / axis / f"{name}.py"
    assert oracle.is_file()
    assert not any(module.startswith("drawplate") for module in imports(oracle))


@pytest.mark.parametrize(("axis", "name", "leaf"), LEAVES)
def test_papers_are_ids_and_texts_are_there(axis, name, leaf):
    assert leaf.paper == "" or re.fullmatch(r"\d{4}\.\d{4,5}|10\.\d{4,}/\S+|hep-th/\d+", leaf.paper)
    for key, field in leaf.model_fields.items():
        assert key == "name" or field.description, key


@pytest.mark.parametrize("axis", axes())
def test_no_second_list_of_methods_exists(axis):
    """Outside its own file no source compares against a method's name or imports its class."""
    for name in leaves(axes()[axis]):
        needle = re.compile(rf"""(==|!=|\bin\b)\s*["']{name}["']""")
        for file in SOURCE.glob("**/*.py"):
            if file != SOURCE / axis / f"{name}.py" and name != "adapter":
                assert not needle.search(file.read_text()), f"{file} compares with {name!r}"


def test_subjects_do_not_import_one_another():
    shared = {"core", "edits", "model", "train"}
    subjects = {"data", "pretrain", "compress", "quantize", "rl", "evaluate"}
    for folder in subjects | shared:
        for file in (SOURCE / folder).glob("**/*.py"):
            for module in imports(file):
                parts = (module or "").split(".")
                if parts[0] == "drawplate" and len(parts) > 1 and parts[1] in subjects | shared:
                    assert parts[1] in shared | ({folder} & subjects), f"{file} imports {module}"
                assert parts[0] not in {"dvc", "prefect", "mlflow", "stages", "flows"}, file


def test_the_page_of_methods_is_the_generated_one():
    assert (ROOT / "docs" / "methods.md").read_text() == page(), "run `make docs`"


def test_the_page_of_settings_is_the_generated_one_and_its_links_lead_somewhere():
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == settings(), "run `make docs`"
    listed = set(re.findall(r"^- `([\w.]+)", text, re.MULTILINE))
    sections = {key for key in keys() if key.count(".") == 1}
    assert sections <= listed
    headings = {
        f"#{line[3:].replace('/', '')}" for line in page().splitlines() if line[:3] == "## "
    }
    assert set(re.findall(r"methods\.md(#\w+)", text)) <= headings


def test_papers_are_linked_by_what_names_them():
    linked = dict(re.findall(r"\(\[(\S+)\]\((https://\S+)\)\)$", page(), re.MULTILINE))
    assert linked.keys() == {row["paper"] for rows in catalogue().values() for row in rows} - {""}
    for paper, link in linked.items():
        arxiv = re.fullmatch(r"\d{4}\.\d{4,5}", paper)
        assert link == f"https://{'arxiv.org/abs' if arxiv else 'doi.org'}/{paper}"


def test_the_keys_of_forms_are_the_generated_ones():
    assert json.loads((ROOT / "flows" / "keys.json").read_bytes()) == keys(), "run `make docs`"


def test_the_catalogue_knows_every_leaf():
    listed = {(axis, row["name"]) for axis, rows in catalogue().items() for row in rows}
    assert listed == {(p.values[0], p.values[1]) for p in LEAVES}
    assert all(row["does"] for rows in catalogue().values() for row in rows)


def test_the_catalogue_shows_parameters_as_params_yaml_would_have_them():
    def parameter(axis, name, key):
        (row,) = (row for row in catalogue()[axis] if row["name"] == name)
        return row["parameters"][key]

    files = parameter("data/source", "text", "files")
    assert files["default"] == "texts/**/*.txt"
    assert f"- `files = texts/**/*.txt`: {files['does']}" in page()
    assert parameter("compress/method", "sparse", "prune")["default"] == {"name": "wanda"}
    assert parameter("data/source", "docstrings", "packages")["default"][0] == "networkx"


UNPICKLING = {"_pickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}
SAFE = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True}


def unpickles(file):
    """What in a file could run code that comes with data; our data is tensors and JSON."""
    yield from UNPICKLING & {(module or "").split(".")[0] for module in imports(file)}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.keyword) and node.arg in SAFE:
            if not isinstance(node.value, ast.Constant) or node.value.value != SAFE[node.arg]:
                yield node.arg
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from {alias.name for alias in node.names} & {"load", "save"}


def test_no_file_runs_code_from_a_checkpoint():
    for folder in (SOURCE, ROOT / "stages", ROOT / "flows"):
        for file in folder.glob("**/*.py"):
            assert not [*unpickles(file)], file


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, cloudpickle as c",
        "from joblib import load",
        "from dill.session import load_session",
        "def late():\n    import pickle",
        "torch.load(file)",
        "torch.load(file, weights_only=True)",
        "read = torch.load",
        "from torch import load",
        "torch.save(model, file)",
        "numpy.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=trusted)",
    ],
)
def test_code_that_unpickles_is_seen_wherever_it_stands(line, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(f'"""Text."""\n\n{line}\n\n\ndef last():\n    """No pickle."""\n')
    assert [*unpickles(file)]
    file.write_text('"""No pickle, no torch.load."""\n\njson.load(file, allow_pickle=False)\n')
    assert not [*unpickles(file)]


# How a stage runs and what it tells others: none of it has a say in the bytes that it writes.
HOW = {
    "stages/__init__.py",
    "stages/journal.py",
    "stages/quiet.py",
    "stages/together.py",
    "stages/tracking.py",
    "src/drawplate/data/engine.py",
}


def source(module):
    """The file of one of our modules, relative to the repository; None where it is no module."""
    for base in (ROOT / "src", ROOT):
        place = base.joinpath(*module.split("."))
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return file.relative_to(ROOT).as_posix()
    return None


def needed(file):
    """Our files that `file` imports, and what those import, without what says how.

    A method of an axis is imported when it is asked for by name: so all of an axis count.
    """
    axis_folders = {f"src/drawplate/{axis}" for axis in axes()}
    found, pending = set(), [file]
    while pending:
        file = pending.pop()
        if file in found | HOW:
            continue
        found.add(file)
        folder = Path(file).parent
        if str(folder) in axis_folders:
            pending += [f"{folder}/{leaf.name}" for leaf in (ROOT / folder).glob("*.py")]
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            ours = (name for name in names if name.split(".")[0] in {"drawplate", "stages"})
            pending += filter(None, map(source, ours))
    return found


def test_a_stage_depends_on_what_it_imports():
    """dvc.yaml lists every file that a stage imports, by itself or through others."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    for name, stage in stages.items():
        unlisted = {
            file
            for file in needed(f"stages/{name}.py")
            if not {file, *map(str, Path(file).parents)} & set(stage["deps"])
        }
        assert not unlisted, name
    # It follows a module that another imports, and one that a function imports.
    assert {"src/drawplate/train/attention.py", "src/drawplate/lineage.py"} <= needed(
        "stages/evaluate.py"
    )


def in_python(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("order", [("drawplate", "transformers"), ("transformers", "drawplate")])
def test_transformers_is_taught_whichever_is_imported_first(order):
    program = f"import {order[0]}\nimport {order[1]}\n"
    program += "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
    assert in_python(f"{program}print('drawplate' in known)") == ["True"]


def test_what_needs_no_model_does_not_wait_for_torch():
    program = "import sys, drawplate.settings, flows.cli, flows.local, flows.sync\n"
    assert in_python(f"{program}print('torch' in sys.modules)") == ["False"]
    assert in_python(f"{program}drawplate.load\nprint('torch' in sys.modules)") == ["True"]


def test_make_replaces_an_environment_without_pip_and_keeps_a_whole_one(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python, inside = tmp_path / "python", tmp_path / ".venv" / "bin" / "python"
    # An environment that it makes holds a copy of it.
    log = f'#!/bin/sh\necho "$2" >> {tmp_path}/log\n'
    python.write_text(f'{log}if [ "$2" = venv ]; then cp {python} {inside}; fi\n')
    inside.parent.mkdir(parents=True)
    inside.write_text("#!/bin/sh\nexit 1\n")
    for file in (python, inside):
        file.chmod(0o755)
    for _ in range(2):
        made = ["make", f"PYTHON={python}", ".venv/installed"]
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
        (tmp_path / ".venv" / "installed").unlink()
    assert (tmp_path / "log").read_text().split().count("venv") == 1
