"""Workspaces, and handing results on: isolation, one line for a wrong revision, nothing lost."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from workers_cases import git, make_project, run_in

from drawplate.core.errors import UserError
from flows import ahead, handover, slots
from flows.graph import inputs, outdated, repro
from flows.handover import begin, entries, hand_on, tip
from flows.stage import StageFailed
from flows.workspace import workspace


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAWPLATE_WORKSPACES", str(tmp_path / "workspaces"))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("DRAWPLATE_STATE", str(tmp_path / "state"))
    return make_project(tmp_path / "project")


def test_a_workspace_is_the_revision_not_the_checkout_and_is_removed(project, tmp_path):
    first = git(project, "rev-parse", "HEAD")
    (project / "params.yaml").write_text("changed: 1\n")
    git(project, "commit", "-qam", "second")
    (project / "params.yaml").write_text("dirty: 1\n")
    (project / "untracked").touch()
    before = git(project, "status", "--porcelain")
    for revision, word in (("HEAD", "changed"), (first, "prepare"), ("main~1", "prepare")):
        with workspace(str(project), revision) as place:
            assert word in (place.root / "params.yaml").read_text()
            assert not (place.root / "untracked").exists()
            (place.root / "params.yaml").write_text("mine")
    assert list((tmp_path / "workspaces").iterdir()) == []
    assert git(project, "status", "--porcelain") == before
    assert (project / "params.yaml").read_text() == "dirty: 1\n"


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40, "--upload-pack=touch x", ""])
def test_a_revision_that_does_not_exist_is_one_line_and_leaves_nothing(project, tmp_path, revision):
    with pytest.raises(UserError) as error, workspace(str(project), revision):
        pass
    assert "\n" not in str(error.value)
    assert f"has no revision {revision!r}" in str(error.value)
    assert list((tmp_path / "workspaces").iterdir()) == []


def test_a_workspace_that_is_swept_before_it_is_locked_is_made_again(project, monkeypatch):
    plain, swept = fcntl.flock, []

    def flock(file, how):
        if how == fcntl.LOCK_EX and not swept:
            swept.append(Path(file.name).parent)
            shutil.rmtree(swept[0])
        plain(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with workspace(str(project)) as place:
        assert (place.root / "dvc.yaml").exists()
        assert swept[0] not in place.root.parents


def test_a_folder_without_dvc_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAWPLATE_WORKSPACES", str(tmp_path / "workspaces"))
    git(tmp_path, "init", "-q", "bare")
    git(
        tmp_path / "bare",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a",
        "commit",
        "-q",
        "-m",
        "x",
        "--allow-empty",
    )
    with pytest.raises(UserError, match="is no DVC project"), workspace(str(tmp_path / "bare")):
        pass


def set_remote(project, url):
    command = [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "-f", "store", url]
    subprocess.run(command, cwd=project, check=True)
    git(project, "commit", "-qam", "a remote")


def test_a_source_given_by_url_is_cloned_with_its_own_cache(project, tmp_path, monkeypatch):
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "elsewhere"))
    set_remote(project, str(tmp_path / "remote"))
    with workspace(f"file://{project}", "main") as place:
        assert place.cache == tmp_path / "elsewhere"
        assert git(place.root, "rev-parse", "HEAD") == git(project, "rev-parse", "main")
        assert not (place.root / ".git/objects/info/alternates").exists()
    with pytest.raises(UserError, match="no-such"), workspace(f"file://{project}", "no-such"):
        pass


def test_a_source_elsewhere_with_a_remote_beside_it_is_refused(project, tmp_path, monkeypatch):
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="relative path"), workspace(f"file://{project}", "main"):
        pass
    with workspace(str(project)) as place:  # a folder knows what its path means
        assert place.remote
    set_remote(project, str(tmp_path / "remote"))
    with workspace(f"file://{project}", "main") as place:
        assert place.remote


def test_what_a_killed_run_left_is_swept_and_what_lives_stays(project, tmp_path):
    script = (
        "import sys, os\nfrom flows.workspace import workspace\n"
        f"with workspace({str(project)!r}) as place:\n print(place.root, flush=True)\n"
        " os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    (left,) = (tmp_path / "workspaces").iterdir()
    with workspace(str(project)) as first:
        assert not left.exists()
        with workspace(str(project)) as second:
            assert first.root.exists()
            assert second.root.exists()


def test_a_dvc_that_fails_says_why(project, tmp_path):
    """`--quiet` would hide some of it, and the last line is a link."""
    with workspace(str(project)) as place:
        (place.root / "texts").mkdir()
        (place.root / "texts/a").write_text("a")
        place.dvc("add", "texts/a")
        (place.root / "texts/a").unlink()
        (tmp_path / "remote").rmdir()
        (tmp_path / "remote").write_text("no folder")
        with pytest.raises(RuntimeError, match=r"^dvc push: .*(Not a directory|File exists)"):
            place.dvc("push")
        shutil.rmtree(place.cache)
        with pytest.raises(RuntimeError, match=r"^dvc checkout texts/a: .* targets: texts/a$"):
            place.dvc("checkout", "texts/a")


def test_what_will_run_is_known_without_its_data(project):
    chain = ["prepare", "pretrain", "compress"]
    with workspace(str(project)) as place:
        ref = begin(place, "one")
        assert outdated(place.root, chain) == chain
    run_in(project, ref, *chain)
    with workspace(str(project), ref) as place:
        assert outdated(place.root, chain) == []
        assert not (place.root / "base.txt").exists()
        file = place.root / "params.yaml"
        text = file.read_text()
        assert "    steps: 3\n" in text
        file.write_text(text.replace("    steps: 3\n", "    steps: 4\n"))
        assert outdated(place.root, chain) == ["pretrain", "compress"]
        assert outdated(place.root, ["prepare"]) == []


@pytest.mark.slow
def test_a_user_gets_everything_by_exp_apply_and_pull(project, tmp_path, monkeypatch):
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "another-machine"))
    with workspace(str(project)) as place:
        ref = begin(place, "trial")
    run_in(project, ref, "prepare", "pretrain", "compress", "quantize", "finetune")

    def dvc(*arguments, check=True):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=project, check=check, capture_output=True, text=True)
        return done.stdout

    assert dvc("exp", "list", "--name-only").split() == ["trial"]
    # What is not in this machine's cache yet is named by `apply`, and comes with `pull`.
    dvc("exp", "apply", "trial", check=False)
    dvc("pull")
    for name in ("corpus.txt", "base.txt", "compressed.txt", "quantized.txt", "tuned.txt"):
        assert (project / name).exists()
    assert "up to date" in dvc("status")


@pytest.mark.slow
def test_a_user_gets_the_stages_that_were_asked_for_by_exp_apply_and_pull(project):
    """DVC calls the outputs of the others missing: `apply` does all the same, `pull` is told."""
    with workspace(str(project)) as place:
        ref = begin(place, "part")
    run_in(project, ref, "prepare")

    def dvc(*arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=project, check=False, capture_output=True, text=True)
        return done.returncode

    assert dvc("exp", "apply", "part") != 0
    assert "corpus.txt" in (project / "dvc.lock").read_text()
    (project / "corpus.txt").unlink(missing_ok=True)
    assert dvc("pull") != 0
    (project / "corpus.txt").unlink(missing_ok=True)
    assert dvc("pull", "prepare") == 0
    assert (project / "corpus.txt").exists()


def test_another_machine_computes_nothing_again(project, tmp_path, monkeypatch):
    """Also where a stage has metrics, which git keeps and `dvc push` alone leaves behind."""
    with workspace(str(project)) as place:
        refs = [begin(place, name) for name in ("here", "there")]
    for ref, status in zip(refs, ("ran", "cached"), strict=True):
        monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / status))
        assert run_in(project, ref, "prepare") == status
        assert run_in(project, ref, "pretrain") == status
    assert git(project, "show", f"{refs[0]}:pretrain.json") == git(
        project, "show", f"{refs[1]}:pretrain.json"
    )


def test_what_the_lock_names_and_no_place_holds_is_made_again(project, tmp_path, monkeypatch):
    """As where a user computed, and committed dvc.lock without a push."""
    make = "mkdir corpus && echo 1 > corpus/a && echo 2 > corpus/b"
    (project / "dvc.yaml").write_text(
        f"stages: {{prepare: {{cmd: '{make}', params: [prepare.seed], outs: [corpus]}},"
        " pretrain: {cmd: cp corpus/a base.txt, deps: [corpus], outs: [base.txt]}}\n"
    )
    (project / ".gitignore").write_text("/*.txt\n/corpus\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=project, check=True)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "computed")
    with workspace(str(project)) as place:
        refs = [begin(place, name) for name in ("elsewhere", "here")]
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "another-machine"))
    # A folder of which only the listing is left is lost too.
    listing = next((project / ".dvc/cache/files/md5").glob("*/*.dir"))
    copy = tmp_path / "another-machine/files/md5" / listing.parent.name / listing.name
    copy.parent.mkdir(parents=True)
    shutil.copy(listing, copy)
    assert run_in(project, refs[0], "prepare") == "ran"
    # What only this machine has is sent, not computed.
    monkeypatch.delenv("DRAWPLATE_CACHE")
    assert run_in(project, refs[1], "pretrain") == "unchanged"
    with workspace(str(project), refs[1]) as place:
        assert place.lacking("pretrain") == place.lacking("prepare") == ([], [])


def test_many_stages_that_end_at_once_all_arrive(project):
    """A hand-over that read, changed and wrote without a lease would lose most of them."""
    with workspace(str(project)) as place:
        ref = begin(place, "race")
        base = git(project, "rev-parse", f"{ref}^")
        errors = []

        def add(number):
            try:
                hand_on(place, ref, f"stage{number}", {"cmd": "true", "outs": []})
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        place.git("checkout", "--quiet", "--force", "--detach", tip(place, ref))
        assert sorted(entries(place)) == [f"stage{number}" for number in range(8)]
        # Still one experiment: one commit on the base.
        assert git(project, "rev-parse", f"{ref}^") == base


def test_the_same_name_begins_once(project):
    with workspace(str(project)) as place:
        ref = begin(place, "twice")
        first = tip(place, ref)
        hand_on(place, ref, "done", {"cmd": "true"})
        params = place.root / "params.yaml"
        params.write_text(f"# The same, as a run that starts again has it.\n{params.read_text()}")
        assert begin(place, "twice") == ref
        assert tip(place, ref) != first
        assert "done" in place.git("show", f"{tip(place, ref)}:dvc.lock")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_name_that_holds_other_settings_is_refused(project, monkeypatch, at_once):
    with workspace(str(project)) as place:
        ref = begin(place, "taken")
        before = tip(place, ref)
        params = place.root / "params.yaml"
        params.write_text(params.read_text().replace("bits: 4", "bits: 3"))
        with monkeypatch.context() as patched:
            if at_once:  # the other run made it after this one had looked for it
                found = [None, before]
                patched.setattr(handover, "tip", lambda place, ref: found.pop(0))
            with pytest.raises(UserError, match=r"^taken holds other settings .*; choose another"):
                begin(place, "taken")
        assert tip(place, ref) == before


def test_the_key_of_a_stage_is_that_of_its_inputs(project):
    def key(change=None, stage="prepare"):
        with workspace(str(project)) as place:
            if change:
                file, old, new = change
                text = (place.root / file).read_text()
                assert old in text
                (place.root / file).write_text(text.replace(old, new))
                place.git("-c", "user.name=a", "-c", "user.email=a", "commit", "-qam", "x")
            return inputs(place.root, stage).key

    assert key() == key()
    assert key() != key(stage="quantize")
    assert key() == key(("params.yaml", "device: cpu", "device: cuda"))
    assert key() == key(("params.yaml", "bits: 4", "bits: 3"))
    assert key(stage="quantize") != key(("params.yaml", "bits: 4", "bits: 3"), "quantize")
    assert key() != key(("work.py", "7919", "7907"))
    assert key() != key(("dvc.yaml", "python work.py prepare", "python  work.py prepare"))
    with pytest.raises(KeyError), workspace(str(project)) as place:
        inputs(place.root, "nothing")


def test_a_text_in_dvcs_care_reaches_rehearsal_and_stage(project, monkeypatch):
    rehearsed = []

    def rehearse(command, root, environment, line):
        rehearsed.append((command[-1], (root / "texts/notes.txt").read_text()))
        return 1

    monkeypatch.setattr(ahead, "with_worker", nullcontext)
    monkeypatch.setattr(ahead, "get_run_logger", lambda: SimpleNamespace(info=print))
    monkeypatch.setattr(ahead, "follow", rehearse)
    monkeypatch.setenv("DRAWPLATE_SOURCE", str(project))

    def notes(text):
        (project / "texts/notes.txt").write_text(text)
        dvc = [sys.executable, "-m", "dvc"]
        for command in (["add", "texts/notes.txt"], ["push"]):
            subprocess.run([*dvc, *command], cwd=project, check=True, capture_output=True)
        git(project, "add", "texts", "dvc.yaml")
        git(project, "commit", "-qm", text)
        with workspace(str(project)) as place:
            assert not (place.root / "texts/notes.txt").exists()
            read = inputs(place.root, "prepare")
            assert read.added == ("texts/notes.txt",)
            return begin(place, text), read.key

    (project / "texts").mkdir()
    described = (project / "dvc.yaml").read_text()
    described = described.replace("work.py prepare\n", "work.py prepare texts/notes.txt\n")
    described = described.replace(
        "[work.py]\n    params: [prepare", "[work.py, texts]\n    params: [prepare"
    )
    (project / "dvc.yaml").write_text(described)
    keys = set()
    for text in ("first", "second"):
        ref, key = notes(text)
        keys.add(key)
        asked = ahead.Rehearsal(ref=ref, stages=["prepare"])
        with pytest.raises(StageFailed, match="preflight"):
            ahead.preflight.fn(asked)
        assert rehearsed[-1] == ("prepare", text)
        run_in(project, ref, "prepare")
        assert ahead.preflight.fn(asked).message == "nothing will run"
        with workspace(str(project), ref) as place:
            place.bring(["corpus.txt"])
            assert f"'{text}'" in (place.root / "corpus.txt").read_text()
    assert len(keys) == 2


def test_a_stage_with_new_inputs_runs_although_their_data_is_not_there(project):
    """`--allow-missing` alone would call it unchanged: the control."""
    with workspace(str(project)) as place:
        ref = begin(place, "first")
    run_in(project, ref, "prepare", "quantize")
    git(project, "update-ref", "refs/heads/done", ref)
    with workspace(str(project), "done") as place:
        params = place.root / "params.yaml"
        params.write_text(params.read_text().replace("prepare:\n  seed: 0", "prepare:\n  seed: 5"))
        second = begin(place, "second")
    run_in(project, second, "prepare")
    with workspace(str(project), second) as place:
        assert not inputs(place.root, "quantize").settled
        careless = repro(
            place.root,
            ["quantize"],
            single=True,
            options=["--allow-missing", "--pull"],
            environment=place.environment(),
            line=lambda text: None,
        )
        assert careless.statuses["quantize"] == "unchanged"
    with workspace(str(project), second) as place:
        before = entries(place)["quantize"]
    run_in(project, second, "quantize")
    with workspace(str(project), second) as place:
        assert inputs(place.root, "quantize").settled
        assert entries(place)["quantize"] != before


def test_one_file_of_an_output_is_brought_without_the_rest(project, tmp_path, monkeypatch):
    make = "mkdir big && echo 1 > big/lineage.json && echo 2 > big/weights"
    (project / "dvc.yaml").write_text(
        f"stages: {{prepare: {{cmd: '{make}', params: [prepare.seed], outs: [big]}}}}\n"
    )
    (project / ".gitignore").write_text("/big\n")
    git(project, "commit", "-qam", "a folder as output")
    with workspace(str(project)) as place:
        ref = begin(place, "one")
    run_in(project, ref, "prepare")
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "other"))  # as on another machine
    with workspace(str(project), ref) as place:
        place.bring(["big/lineage.json"])
        assert [file.name for file in (place.root / "big").iterdir()] == ["lineage.json"]
        place.bring(["big"])
        assert len(list((place.root / "big").iterdir())) == 2


def test_a_gpu_is_held_by_a_file_that_workers_of_other_users_can_hold_too(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "slot", lambda *_: nullcontext())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0o077)
    try:
        with slots.device("gpu@host:0", print):
            (file,) = tmp_path.iterdir()
            assert file.stat().st_mode & 0o444 == 0o444
    finally:
        os.umask(before)
    file.chmod(0o444)  # as others see it
    with slots.device("gpu@host:0", print):
        assert list(tmp_path.iterdir()) == [file]
