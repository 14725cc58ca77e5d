"""Where things stand: file, name, class, oracle and imports of every method line up."""

import ast
import re
from pathlib import Path

import pytest

import drawplate
from drawplate.core.method import leaves
from drawplate.edits import Edit
from flows.catalogue import axes, catalogue, page

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


def test_the_catalogue_knows_every_leaf():
    listed = {(axis, row["name"]) for axis, rows in catalogue().items() for row in rows}
    assert listed == {(p.values[0], p.values[1]) for p in LEAVES}
    assert all(row["does"] for rows in catalogue().values() for row in rows)


def test_no_file_runs_code_from_a_checkpoint():
    for file in [*SOURCE.glob("**/*.py"), *(ROOT / "stages").glob("*.py")]:
        text = file.read_text()
        assert "trust_remote_code=True" not in text
        assert "weights_only=False" not in text
        assert not re.search(r"\bpickle\b", text.split('"""')[-1] if text.count('"""') else text), (
            file
        )


def test_a_stage_depends_on_what_it_imports():
    """dvc.yaml lists every package of drawplate that a stage's own module imports."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    for name, stage in stages.items():
        deps = stage["deps"]
        needed = {
            f"src/drawplate/{module.split('.')[1]}"
            for module in imports(ROOT / "stages" / f"{name}.py")
            if module.startswith("drawplate.") and (SOURCE / module.split(".")[1]).is_dir()
        }
        assert needed <= set(deps), (name, needed - set(deps))
