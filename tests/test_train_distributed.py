"""Two processes on one machine compute what one does, and take over each other's checkpoints."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drawplate.core.errors import UserError
from drawplate.train import checkpoint, series
from drawplate.train.distributed import ALONE, World, join
from tests import faults, train_worker

MODES = ["data", "sharded"]


def alone(work: Path, **more: Any) -> None:
    train_worker.one({"work": str(work), **more}, ALONE)


def rows(work: Path) -> list[dict[str, float | None]]:
    (folder,) = (path for path in work.iterdir() if path.is_dir())
    return series.read(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this file; those of two processes in one call of torchrun."""
    root = tmp_path_factory.mktemp("work")
    alone(root / "one")
    alone(root / "nan", nan=2)
    alone(root / "odd", rows=3)
    orders = []
    for mode in MODES:
        alone(root / f"{mode}-after-one", stop=3)
        orders += [
            {"mode": mode, "work": str(root / mode)},
            {"mode": mode, "work": str(root / f"{mode}-stopped"), "stop": 3},
            {"mode": mode, "work": str(root / f"{mode}-stopped")},
            {"mode": mode, "work": str(root / f"one-after-{mode}"), "stop": 3},
            {"mode": mode, "work": str(root / f"{mode}-after-one")},
            {"mode": mode, "work": str(root / f"{mode}-nan"), "nan": 2},
            {"mode": mode, "work": str(root / f"{mode}-odd"), "rows": 3, "accumulate": 2},
        ]
    orders.append({"mode": "data", "work": str(root / "hungry"), "hungry": True})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", *where]
    worker = str(faults.ROOT / "tests" / "train_worker.py")
    done = subprocess.run(
        [sys.executable, *command, worker, json.dumps(orders)],
        env=faults.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for mode in MODES:
        with pytest.warns(UserWarning, match="another processes"):
            alone(root / f"one-after-{mode}")
    return root


def close(one: list[dict[str, float | None]], other: list[dict[str, float | None]]) -> None:
    assert len(one) == len(other) == train_worker.STEPS
    for a, b in zip(one, other, strict=True):
        for name in ("step", "loss", "lr", "grad_norm", "tokens", "skipped"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_follow_the_same_series_as_one(work: Path, mode: str) -> None:
    close(rows(work / "one"), rows(work / mode))
    one, two = (torch.load(work / w / "model.pt", weights_only=True) for w in ("one", mode))
    for name, tensor in one.items():
        if name != "seen":
            torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed_on_two_processes_is_bitwise_the_same(work: Path, mode: str) -> None:
    assert rows(work / mode) == rows(work / f"{mode}-stopped")
    whole, cut = (
        torch.load(work / w / "model.pt", weights_only=True) for w in (mode, f"{mode}-stopped")
    )
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_go_from_two_processes_to_one_and_back(work: Path, mode: str) -> None:
    close(rows(work / "one"), rows(work / f"one-after-{mode}"))
    close(rows(work / "one"), rows(work / f"{mode}-after-one"))


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_of_two_processes_hold_whole_tensors_once(work: Path, mode: str) -> None:
    saved = []
    for which in ("one", mode):
        (folder,) = (path for path in (work / which).iterdir() if path.is_dir())
        newest = checkpoint.latest(folder)
        assert newest is not None
        assert newest.step == train_worker.STEPS
        assert len(checkpoint.generations(folder)) == 2
        saved.append(checkpoint.load(newest.path)[0])
    one, two = saved
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_gradient_is_skipped_by_all_processes(work: Path, mode: str) -> None:
    close(
        [r | {"grad_norm": 0.0} for r in rows(work / "nan")],
        [r | {"grad_norm": 0.0} for r in rows(work / f"{mode}-nan")],
    )
    assert [r["skipped"] for r in rows(work / f"{mode}-nan")].index(1) == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_process_with_fewer_rows_than_parts_keeps_nobody_waiting(work: Path, mode: str) -> None:
    close(rows(work / "odd"), rows(work / f"{mode}-odd"))


def test_all_processes_halve_their_parts_together(work: Path) -> None:
    assert {row["microbatches"] for row in rows(work / "hungry")} == {2.0}
    close(rows(work / "one"), rows(work / "hungry"))


def test_without_torchrun_there_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("sharded") as world:
        assert world == World(mode="sharded")
        assert world.alone
        assert not world.sharded
        assert world.sum([1.5, 2]) == [1.5, 2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="start with torchrun"), join():
        pass
