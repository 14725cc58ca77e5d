"""params.yaml: what it means, and what is said when it means nothing."""

from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from drawplate import settings
from drawplate.compress.prune import Prune
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, OneOf
from flows.local import change_params

PARAMS = (Path(__file__).parents[1] / "params.yaml").read_text()


class Inner(Frozen):
    ratio: float = 0.5
    steps: int = 3


class Section(Frozen):
    inner: Inner = Inner()
    prune: Annotated[Prune, OneOf()] | None = None
    several: tuple[Annotated[Prune, OneOf()], ...] = ()


def refused(tree):
    with pytest.raises(UserError) as caught:
        settings.validate(Section, tree, "section")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_misspelt_key_is_named_with_its_neighbours():
    text = refused({"inner": {"ration": 1}})
    assert "section.inner.ration" in text
    assert "did you mean 'ratio'" in text
    assert "steps" in text


def test_an_unknown_method_lists_the_choices():
    text = refused({"prune": {"name": "wandaa"}})
    assert text.startswith("section.prune.name: no method 'wandaa' (did you mean 'wanda'?)")
    assert "magnitude" in text


def test_an_unknown_key_of_a_method_is_named_without_inner_tags():
    assert refused({"prune": {"name": "wanda", "x": 1}}).startswith("section.prune.x is not a key")
    assert refused({"several": [{"name": "wanda", "x": 1}]}).startswith(
        "section.several.0.x is not"
    )


def test_a_wrong_value_is_shown():
    text = refused({"inner": {"steps": "many"}})
    assert text.startswith("section.inner.steps")
    assert "'many'" in text
    assert "nan" in refused({"inner": {"ratio": float("nan")}})


def test_a_wrong_value_that_is_a_section_or_long_is_not_repeated():
    for wrong in ({"a": 1}, list(range(100)), "many" * 100):
        where, _, problem = refused({"inner": {"steps": wrong}}).partition(": ")
        assert where == "section.inner.steps"
        assert "integer" in problem
        assert "got" not in problem
    assert refused({"inner": {"steps": [1, 2]}}).endswith("got [1, 2]")


def test_a_method_needs_a_name():
    assert refused({"prune": {}}) == "section.prune: choose a method with `name:`"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # a string for YAML 1.1 readers
        ("no", "no"),  # False for YAML 1.1 readers
        ("on", "on"),
        ("010", 10),
        ("0o17", 15),
        ("12:30", "12:30"),
        ("[1, 2]", [1, 2]),
        ("null", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2_as_dvc_reads_them(text, value):
    from dvc.utils.serialize import parse_yaml

    assert settings.parse(text, "here") == value
    assert parse_yaml(f"key: {text}", "params.yaml")["key"] == value


def test_duplicate_keys_and_bad_yaml_name_the_line(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("a: 1\na: 2\n")
    with pytest.raises(UserError, match="line 2"):
        settings.read(file)
    file.write_text("a: [1\n")
    with pytest.raises(UserError, match="line"):
        settings.read(file)
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="sections"):
        settings.read(file)
    file.write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="UTF-8"):
        settings.read(file)
    with pytest.raises(UserError, match="does not exist"):
        settings.read(tmp_path / "none.yaml")


def test_an_assignment_changes_one_value_and_not_the_input():
    tree = {"a": {"b": 1, "c": [1, 2]}}
    assert settings.override(tree, ["a.b=2.5", "a.c.1=x", "d.e=true"]) == {
        "a": {"b": 2.5, "c": [1, "x"]},
        "d": {"e": True},
    }
    assert tree == {"a": {"b": 1, "c": [1, 2]}}


def test_choosing_another_method_drops_the_old_ones_parameters():
    tree = {"m": {"name": "one", "x": 1}}
    assert settings.override(tree, ["m.name=two"]) == {"m": {"name": "two"}}
    assert settings.override(tree, ["m.name=one"]) == tree
    assert settings.merge(tree, {"m": {"name": "two", "y": 2}}) == {"m": {"name": "two", "y": 2}}
    assert settings.merge(tree, {"m": {"name": "one", "y": 2}})["m"] == {
        "name": "one",
        "x": 1,
        "y": 2,
    }


@pytest.mark.parametrize(
    "wrong", ["a.b", "=1", "a.b.c=1", "a.c.7=1", "a.c.x=1", "a.c.²=1", "a.c.².x=1"]
)
def test_assignments_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError):
        settings.override({"a": {"b": 1, "c": [1]}}, [wrong])


@pytest.mark.parametrize("deeper", ["", ".name"])
def test_an_empty_list_is_given_as_a_whole(deeper):
    with pytest.raises(UserError, match=r"the list is empty; .* as in -S 'a\.c=\[\.\.\.\]'"):
        settings.override({"a": {"c": []}}, [f"a.c.0{deeper}=x"])


names = st.text("abcdef", min_size=1, max_size=3)
values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
trees = st.dictionaries(
    names, st.recursive(values, lambda v: st.dictionaries(names, v, max_size=3))
)


@given(trees)
def test_any_tree_gives_a_section_or_one_line(tree):
    said = ""
    try:
        settings.validate(Section, tree, "section")
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@given(trees)
def test_what_yaml_writes_is_read_back(tree):
    from io import StringIO

    out = StringIO()
    YAML(typ="safe", pure=True).dump(tree, out)
    assert (settings.parse(out.getvalue(), "here") or {}) == tree


def test_every_preset_is_found_and_an_unknown_one_lists_them():
    assert settings.presets()
    with pytest.raises(UserError, match="did you mean 'rl/dler'"):
        settings.preset("rl/dlr")


def test_a_change_leaves_every_other_line_as_it_was(tmp_path):
    file = tmp_path / "params.yaml"

    def changed(change):
        file.write_text(PARAMS)
        change_params(file, [change], ())
        lines = unified_diff(PARAMS.splitlines(), file.read_text().splitlines(), n=0)
        return [line for line in lines if line[:2] in ("- ", "+ ")]

    file.write_text(PARAMS)
    assert changed(f"compress.ratio={settings.read(file)['compress']['ratio']}") == []
    was, now = changed("compress.ratio=0.125")
    assert "ratio: 0.125" in now
    assert was.partition("#")[2] == now.partition("#")[2] != ""
    changed("prepare.sources=[{name: text}]")
    assert settings.read(file)["prepare"]["sources"] == [{"name": "text"}]


def test_a_wrong_change_leaves_the_file_alone(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(PARAMS)
    with pytest.raises(UserError, match=r"compress\.ratoi"):
        change_params(file, ["compress.ratio=0.5", "compress.ratoi=0.3"], ())
    assert file.read_text() == PARAMS
    assert list(tmp_path.iterdir()) == [file]


def test_a_change_goes_to_where_a_link_points(tmp_path):
    file, link = tmp_path / "theirs.yaml", tmp_path / "clone" / "params.yaml"
    file.write_text(PARAMS)
    link.parent.mkdir()
    link.symlink_to("../theirs.yaml")
    change_params(link, ["compress.ratio=0.5"], ())
    assert link.is_symlink()
    assert settings.read(file)["compress"]["ratio"] == 0.5
    assert sorted(tmp_path.rglob("*.*")) == [link, file]
