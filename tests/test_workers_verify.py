"""Verify: every damage in every place is found and mended, and DVC alone finds none (row 7)."""

import os
import subprocess
import sys

import pytest
from workers_cases import git, make_project, run_in

from drawplate.core.errors import UserError
from flows import verify
from flows.handover import begin
from flows.verify import check, faults, repair, verify_source
from flows.workspace import Workspace, source, workspace

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


SHARED = """
stages:
  one: {cmd: mkdir -p one && echo same > one/tokenizer && echo 1 > one/weights, outs: [one]}
  two: {cmd: mkdir -p two && echo same > two/tokenizer && echo 2 > two/weights, outs: [two]}
"""


def test_a_file_that_outputs_share_is_read_once_and_mended_once(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "dvc.yaml").write_text(SHARED)
    for arguments in (["init", "-q"], ["config", "cache.type", "copy"], ["repro", "-q"]):
        subprocess.run([*DVC, *arguments], cwd=tmp_path, check=True, capture_output=True)
    found = [f for f in check(tmp_path) if f.path.endswith("/tokenizer")]
    assert [f.place for f in found] == ["cache", "checkout"] * 2
    assert len({f.digest for f in found}) == 1
    for path in {place_of(tmp_path, f) for f in found}:
        flip(path)
    read = []
    stored = verify._stored
    monkeypatch.setattr(
        verify, "_stored", lambda store, digest: read.append(digest) or stored(store, digest)
    )
    damaged = check(tmp_path)
    assert sorted(read) == sorted({f.digest for f in damaged})
    assert len(faults(damaged)) == 4
    assert {f.state for f in repair(tmp_path, damaged)} == {"missing"}
    subprocess.run([*DVC, "repro", "-q"], cwd=tmp_path, check=True, capture_output=True)
    assert faults(check(tmp_path)) == []


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


@pytest.mark.slow
def test_an_object_store_is_read_and_mended_too(tmp_path):
    """A remote that is no folder: S3's protocol, from a server of the test's own."""
    pytest.importorskip("dvc_s3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    import boto3

    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        access = {
            "region_name": "us-east-1",
            "aws_access_key_id": "a",
            "aws_secret_access_key": "b",
        }
        bucket = boto3.resource("s3", endpoint_url=url, **access).create_bucket(Bucket="store")
        git(tmp_path, "init", "-q", "project")
        project = tmp_path / "project"
        (project / "dvc.yaml").write_text(YAML)
        subprocess.run([*DVC, "init", "-q"], cwd=project, check=True)
        (project / ".dvc/config").write_text(
            "[core]\n    remote = store\n[cache]\n    type = copy\n"
            f"['remote \"store\"']\n    url = s3://store/data\n    endpointurl = {url}\n"
            "    region = us-east-1\n    access_key_id = a\n    secret_access_key = b\n"
        )
        for command in ("repro", "push"):
            subprocess.run([*DVC, command, "-q"], cwd=project, check=True)
        found = check(project)
        assert (len(found), {finding.state for finding in found}) == (4 * 2 + 3, {"whole"})
        place = Workspace(project, str(project), project / ".dvc/cache", remote=True)
        assert place.lacking("make") == ([], [])

        def stored(name):
            digest = next(finding.digest for finding in found if finding.path == name)
            return bucket.Object(f"data/files/md5/{digest[:2]}/{digest[2:]}")

        stored("data/a").put(Body=b"0123456780")
        wrong = faults(check(project))
        assert [(f.path, f.place, f.state) for f in wrong] == [("data/a", "remote", "damaged")]
        assert repair(project, check(project)) == []
        assert stored("data/a").get()["Body"].read() == b"0123456789"
        # What is whole nowhere is taken away.
        for finding in [f for f in found if f.path == "single" and f.place != "remote"]:
            flip(place_of(project, finding))
        stored("single").put(Body=b"two")
        assert {(f.path, f.state) for f in repair(project, check(project))} == {
            ("single", "missing")
        }
        assert stored("single").key not in {each.key for each in bucket.objects.all()}
        assert place.lacking("make") == (["single"], ["single"])
    finally:
        server.stop()


def test_all_that_was_handed_on_is_verified_and_no_checkout_is_touched(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    make = "mkdir corpus && echo 1 > corpus/a && echo 2 > corpus/b"
    (project / "dvc.yaml").write_text(
        f"stages: {{prepare: {{cmd: '{make}', params: [prepare.seed], outs: [corpus]}}}}\n"
    )
    (project / ".gitignore").write_text("/corpus\n")
    config = project / ".dvc/config"
    config.write_text(config.read_text().replace("../..", str(tmp_path)))  # for a clone by URL
    git(project, "commit", "-qam", "a folder as output")
    monkeypatch.setenv("DRAWPLATE_SOURCE", f"file://{project}")
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DRAWPLATE_WORKSPACES", str(tmp_path / "workspaces"))
    assert verify_source(None, mend=False) == ([], [], [])
    with workspace(source()) as place:
        ref = begin(place, "nightly")
    run_in(source(), ref, "prepare")
    # A listing and two files, in cache and remote.
    findings, wrong, _ = verify_source(None, mend=False)
    assert (len(findings), wrong) == (6, [])
    assert verify_source("main", mend=False) == ([], [], [])

    def copies(name):
        digest = next(finding.digest for finding in findings if finding.path == name)
        return [tmp_path / at / "files/md5" / digest[:2] / digest[2:] for at in ("cache", "remote")]

    cache, remote = copies("corpus/a")
    flip(remote)
    (_, (damaged,), _), (*_, left) = verify_source(None, False), verify_source(None, mend=True)
    assert (damaged.path, damaged.place, left) == ("corpus/a", "remote", [])
    assert remote.read_bytes() == cache.read_bytes() == b"1\n"
    # What is whole nowhere the next run makes again.
    flip(cache)
    flip(remote)
    assert {finding.state for finding in verify_source(None, mend=True)[2]} == {"missing"}
    assert run_in(source(), ref, "prepare") == "ran"
    assert remote.read_bytes() == cache.read_bytes() == b"1\n"
    assert verify_source(ref, mend=False)[1:] == ([], [])
    assert not git(project, "status", "--porcelain")
    assert not (project / "corpus").exists()


def test_without_a_lock_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(UserError, match="nothing was computed here yet"):
        check(tmp_path)
