"""Artifacts are whole or absent, and damage is seen."""

import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from drawplate.core import artifact
from drawplate.core.artifact import MANIFEST, Manifest, publish, read_manifest, tree_hash, verify
from drawplate.core.errors import Damaged, Exhausted, UserError
from tests import faults


def write(folder: Path, text: str = "one", kind: str = "thing") -> Path:
    with publish(folder, kind) as temporary:
        (temporary / "a.txt").write_text(text)
        (temporary / "deep" / "er").mkdir(parents=True)
        (temporary / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))
    return folder


def content(folder: Path) -> str:
    return (folder / "a.txt").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_manifest_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    manifest = verify(folder)
    assert manifest.kind == "thing"
    assert {k: v.sha256 for k, v in manifest.files.items()} == {
        "a.txt": hashlib.sha256(b"one").hexdigest(),
        "deep/er/b.bin": hashlib.sha256(bytes(range(256))).hexdigest(),
    }
    assert manifest.size == 3 + 256
    assert json.loads((folder / MANIFEST).read_text())["files"]["a.txt"]["size"] == 3
    assert names(tmp_path) == ["x"]


def test_equal_contents_have_equal_manifests_and_others_do_not(tmp_path: Path) -> None:
    one, other, third = (write(tmp_path / n, t) for n, t in (("a", "1"), ("b", "1"), ("c", "2")))
    assert (one / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()
    assert tree_hash(one) == tree_hash(other) != tree_hash(third)
    lines = "".join(f"{e.sha256} {e.size} {n}\n" for n, e in sorted(verify(one).files.items()))
    assert tree_hash(one) == hashlib.sha256(lines.encode()).hexdigest()


def test_manifest_does_not_depend_on_the_order_of_its_files(tmp_path: Path) -> None:
    files = verify(write(tmp_path / "x")).files
    turned = dict(reversed(files.items()))
    assert Manifest.of("k", files).render() == Manifest.of("k", turned).render()


@pytest.mark.parametrize("kernel", ["exchange", "two renames"])
def test_a_newer_artifact_replaces_the_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel == "two renames":
        monkeypatch.setattr(artifact, "_exchange", lambda one, other: False)
    folder = write(tmp_path / "x", "old")
    write(folder, "new")
    assert content(folder) == "new"
    verify(folder)
    assert names(tmp_path) == ["x"]


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Odd])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_block_leaves_nothing_behind(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    folder = tmp_path / "x"
    if before:
        write(folder, before)
    with pytest.raises(error), publish(folder, "thing") as temporary:  # noqa: PT012
        (temporary / "a.txt").write_text("new")
        raise error
    assert names(tmp_path) == (["x"] if before else [])
    if before:
        assert content(folder) == before
        verify(folder)


def test_every_damage_is_refused_in_one_line_that_names_the_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    verify(folder)
    tried = 0
    for what in faults.damages(folder):
        with pytest.raises(Damaged) as refusal:
            verify(folder)
        assert "\n" not in str(refusal.value)
        assert str(folder) in str(refusal.value), what
        tried += 1
    verify(folder)
    assert tried > 30


@pytest.mark.parametrize("name", ["a.txt", "deep/er/b.bin", MANIFEST])
def test_no_single_flipped_bit_is_accepted(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "x")
    for bit in faults.flips(folder / name, 200, seed=1):
        try:
            verify(folder)
        except Damaged:
            continue
        pytest.fail(f"bit {bit} of {name} flipped and accepted")


def test_an_edited_manifest_is_refused_even_if_it_is_valid(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"thing"', '"model"'))
    with pytest.raises(Damaged, match="altered"):
        read_manifest(folder)


def test_a_folder_that_was_never_published_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Damaged, match="no finished artifact"):
            verify(folder)


@pytest.mark.parametrize(
    "beside",
    [
        None,
        "",
        "no JSON",
        "[1]",
        "{}",
        '{"name": "an app"}',
        '{\n "schema_version": 1,\n "name": ""}',
    ],
)
def test_foreign_folders_and_files_are_never_replaced(tmp_path: Path, beside: str | None) -> None:
    """Neither where another program's `manifest.json` lies beside the files."""
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    if beside is not None:
        (precious / MANIFEST).write_text(beside)
    for folder, words in ((precious, "did not write"), (precious / "thesis.txt", "is a file")):
        with pytest.raises(UserError, match=words):
            write(folder)
    assert (precious / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_a_folder_of_ours_is_replaced_also_when_its_manifest_is_damaged(tmp_path: Path) -> None:
    whole = (write(tmp_path / "x", "old") / MANIFEST).read_bytes()
    for wrong in (whole[:60], whole[:-1], whole + b"?", whole.replace(b"256", b"257")):
        folder = write(tmp_path / "x", "old")
        (folder / MANIFEST).write_bytes(wrong)
        assert content(write(folder, "new")) == "new"
        verify(folder)


def test_links_and_reserved_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plain files"), publish(tmp_path / "x", "k") as temporary:
        (temporary / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="reserved"), publish(tmp_path / "x", "k") as temporary:
        (temporary / MANIFEST).write_text("{}")
    assert names(tmp_path) == []


def test_a_linked_folder_is_replaced_where_it_really_is(tmp_path: Path) -> None:
    real = write(tmp_path / "disk" / "x", "old")
    (tmp_path / "link").symlink_to(real)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(real) == "new"


def test_files_readable_only_by_their_owner_become_as_readable_as_the_folder(
    tmp_path: Path,
) -> None:
    with publish(tmp_path / "x", "k") as temporary:
        (temporary / "f").write_text("")
        (temporary / "f").chmod(0o600)
    assert (tmp_path / "x" / "f").stat().st_mode & 0o666 == tmp_path.joinpath(
        "x"
    ).stat().st_mode & 0o666


def test_remains_of_a_killed_process_are_cleaned_but_not_those_of_a_living_one(
    tmp_path: Path,
) -> None:
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        with publish(tmp_path / "x", "k") as temporary:
            (temporary / "a.txt").write_text("half")
            os.write(tell, b"!")
            time.sleep(60)
        os._exit(1)
    try:
        os.read(told, 1)
        write(tmp_path / "x", "mine")
        assert len(list(tmp_path.glob(".x.*.partial"))) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".x.*.partial"))) == 1
    write(tmp_path / "x", "again")
    assert names(tmp_path) == ["x"]


def test_a_slow_exchange_cut_between_its_renames_is_undone(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", "old")
    os.rename(folder, tmp_path / ".x.0123abcd.aside")
    verify(folder)
    assert content(folder) == "old"
    os.rename(folder, tmp_path / ".x.0123abcd.aside")
    write(folder, "new")
    assert content(folder) == "new"
    assert names(tmp_path) == ["x"]


def test_a_disk_too_small_is_known_before_the_first_byte(tmp_path: Path) -> None:
    entered = False
    with (
        pytest.raises(Exhausted, match=rf"{tmp_path}/x needs .* missing"),
        publish(tmp_path / "x", "k", size=1 << 60),
    ):
        entered = True
    assert not entered


def test_a_disk_that_fills_up_keeps_the_old_artifact_and_says_what_was_written(
    tmp_path: Path,
) -> None:
    with faults.small_disk(tmp_path / "disk", 4) as disk:
        folder = write(disk / "x", "old")
        words = rf"no space left for {folder}: \d+ bytes written, \d+ free; free some"
        with pytest.raises(Exhausted, match=words), publish(folder, "thing") as temporary:  # noqa: PT012
            (temporary / "a.txt").write_text("new")
            (temporary / "big").write_bytes(bytes(8 << 20))
        assert content(folder) == "old"
        verify(folder)
        assert names(disk) == ["x"]
        from safetensors.numpy import save_file

        tensors = {"w": np.zeros(2 << 20)}
        with pytest.raises(Exhausted), publish(folder, "thing") as temporary:
            save_file(tensors, temporary / "w.safetensors")
        assert names(disk) == ["x"]
        words = r"\d+ bytes written, 0 free, \d+ missing; "
        with pytest.raises(Exhausted, match=words), publish(folder, "k", 3 << 20) as temporary:  # noqa: PT012
            (disk / "of another process").write_bytes(bytes(2 << 20))
            (temporary / "big").write_bytes(bytes(3 << 20))
        (disk / "of another process").unlink()
        write(folder, "new")
        assert content(folder) == "new"


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exhausted), publish(tmp_path / "x", "k"):
        raise OSError(errno.EFBIG, "File too large")


def test_other_operating_system_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), publish(tmp_path / "x", "k"):
        raise PermissionError(errno.EACCES, "no")


def save_old(folder: str) -> None:
    write(Path(folder), "old")


def save_new(folder: str) -> None:
    write(Path(folder), "new")


def what_is_left(folder: str, failed: bool) -> str:
    """A word on what a reader finds, after an attempt that failed or did not."""
    try:
        verify(Path(folder))
    except Damaged as error:
        return str(error)
    text = content(Path(folder))
    rest = " and remains" if len(names(Path(folder).parent)) > 1 else ""
    return f"{text}{rest}, {'failed' if failed else 'done'}"


CALLS = ["rename", "renameat2", "fsync", "write", "mkdir", "openat", "unlinkat", "rmdir", "flock"]


@faults.needs_strace()
@pytest.mark.parametrize(
    ("calls", "kinds"),
    [
        pytest.param(["rename", "renameat2", "fsync"], ["signal=SIGKILL", "error=EIO"], id="few"),
        pytest.param(
            CALLS,
            ["signal=SIGKILL", "error=EIO", "error=ENOSPC"],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_save_that_dies_at_any_system_call_leaves_the_old_or_the_new(
    tmp_path: Path, calls: list[str], kinds: list[str]
) -> None:
    folder = tmp_path / "disk" / "x"
    me = "tests.test_artifact:"
    found = faults.crash_points(
        me + "save_new",
        me + "save_old",
        me + "what_is_left",
        {"folder": str(folder)},
        calls=calls,
        kinds=kinds,
        seconds=500,
    )
    print(found)
    assert found["tried"] >= 8 * len(kinds)
    killed = {"old, failed", "old and remains, failed", "new and remains, failed", "new, failed"}
    assert set(found["words"]["signal=SIGKILL"]) <= killed
    for kind in kinds[1:]:
        failed = {"old, failed", "new, failed", "new, done"}
        if "unlinkat" in calls:
            failed |= {"old and remains, failed", "new and remains, failed"}
        assert set(found["words"][kind]) <= failed
    write(folder, "last")
    assert names(folder.parent) == ["x"]


@pytest.mark.slow
def test_speed_of_verification_is_the_speed_of_the_hash(tmp_path: Path) -> None:
    with publish(tmp_path / "x", "k") as temporary:
        (temporary / "big").write_bytes(bytes(1 << 28))
    start = time.perf_counter()
    manifest = verify(tmp_path / "x")
    seconds = time.perf_counter() - start
    print(f"verified {manifest.size / seconds / 1e9:.2f} GB/s")
    assert manifest.size == 1 << 28
