"""Verify: every damage in every place is found and mended, and DVC alone finds none (row 7)."""

import os
import subprocess
import sys

import pytest
from workers_cases import git

from drawplate.core.errors import UserError
from flows.verify import check, faults, repair

DVC = [sys.executable, "-m", "dvc"]
YAML = """
stages:
  make:
    cmd: mkdir -p data && printf 0123456789 > data/a && printf abc > data/b && printf one > single
    outs: [data, single]
"""


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A project with its outputs in checkout, cache and remote."""
    folder = tmp_path_factory.mktemp("verify")
    project = folder / "project"
    project.mkdir()
    git(project, "init", "-q")
    (project / "dvc.yaml").write_text(YAML)
    for arguments in (
        ["init", "-q"],
        ["config", "cache.type", "copy"],
        ["remote", "add", "-q", "-d", "store", str(folder / "remote")],
        ["repro", "-q"],
        ["push", "-q"],
    ):
        subprocess.run([*DVC, *arguments], cwd=project, check=True, capture_output=True)
    return project


@pytest.fixture
def project(computed):
    """The same, whole again for every test."""
    yield computed
    subprocess.run([*DVC, "repro", "-q", "-f"], cwd=computed, check=True, capture_output=True)
    subprocess.run([*DVC, "push", "-q"], cwd=computed, check=True, capture_output=True)
    assert not faults(check(computed))


def flip(path):
    """One bit, as a disk turns it: size, time and mode stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    stamp = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(stamp.st_mode)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def truncate(path):
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def place_of(project, finding):
    if finding.place == "checkout":
        return project / finding.path
    root = project / ".dvc/cache" if finding.place == "cache" else project.parent / "remote"
    return root / "files/md5" / finding.digest[:2] / finding.digest[2:]


def test_whole_everywhere_means_no_fault(project):
    found = check(project)
    assert {finding.state for finding in found} == {"whole"}
    # A listing and two files, and one file alone, in two stores; three files in the checkout.
    assert len(found) == 4 * 2 + 3


@pytest.mark.parametrize("damage", [flip, truncate])
def test_every_damage_in_every_place_is_found_alone_and_mended(project, damage):
    for whole in check(project):
        before = place_of(project, whole).read_bytes()
        damage(place_of(project, whole))
        found = check(project)
        wrong = faults(found)
        assert [(f.path, f.place, f.state) for f in wrong] == [(whole.path, whole.place, "damaged")]
        assert repair(project, found) == []
        assert place_of(project, whole).read_bytes() == before


def test_dvc_alone_hands_out_a_flipped_object(project):
    """The control: what `check` is for."""
    single = next(f for f in check(project) if f.path == "single" and f.place == "cache")
    flip(place_of(project, single))
    status = subprocess.run(
        [*DVC, "status"], cwd=project, check=True, capture_output=True, text=True
    )
    assert "up to date" in status.stdout
    assert [f.path for f in faults(check(project))] == ["single"]
    assert repair(project, check(project)) == []


def test_a_file_missing_in_one_place_is_no_fault_and_missing_everywhere_is_one(project):
    copies = [f for f in check(project) if f.path == "single"]
    for finding in copies[:-1]:
        place_of(project, finding).unlink()
    assert faults(check(project)) == []
    place_of(project, copies[-1]).unlink()
    assert {f.path for f in faults(check(project))} == {"single"}


def test_what_is_whole_nowhere_is_taken_away_and_computed_again(project):
    for finding in [f for f in check(project) if f.path == "single"]:
        truncate(place_of(project, finding))
    left = repair(project, check(project))
    assert {(f.path, f.state) for f in left} == {("single", "missing")}
    subprocess.run([*DVC, "repro", "-q"], cwd=project, check=True, capture_output=True)
    assert faults(check(project)) == []


def test_the_command_says_what_is_damaged_and_mends_it(project):
    finding = next(f for f in check(project) if f.path == "data/a" and f.place == "remote")
    flip(place_of(project, finding))
    command = [sys.executable, "-m", "flows.cli", "verify"]
    told = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert told.returncode == 3
    assert "damaged  remote   data/a" in told.stdout
    assert "call it with --repair" in told.stderr
    mended = subprocess.run([*command, "--repair"], cwd=project, capture_output=True, check=False)
    assert mended.returncode == 0
    assert faults(check(project)) == []


def test_without_a_lock_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(UserError, match="nothing was computed here yet"):
        check(tmp_path)
