"""The loop: exact resume, bad numbers, memory, signals, disks, settings."""

import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drawplate.core.errors import Damaged, Exhausted, NotFinite, UserError
from drawplate.train import checkpoint, loop, precision, series
from drawplate.train.distributed import Mode, World
from drawplate.train.guard import Guard
from drawplate.train.loop import Outcome, Stopped, train
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.schedule import Schedule
from drawplate.train.transform import Transform
from tests import faults
from tests.laws import law
from tests.train_cases import Hungry, Toy, digest, leaf, model, run, settings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power, and waiting for the disk takes most of the time of a save."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return digest(run(tmp_path_factory.mktemp("undisturbed")))


class At:
    """A watch that does something after a given step, once."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action, self.rows = step, action, []  # type: ignore[var-annotated]

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, total, dict(metrics)))
        if step == self.step:
            self.step = -1
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def weights(outcome: Outcome) -> dict[str, Tensor]:
    tensors, _ = checkpoint.load(checkpoint.place(outcome.folder, outcome.steps))
    return tensors


def test_two_runs_are_equal_byte_by_byte(tmp_path: Path, undisturbed: tuple[str, str]) -> None:
    outcome = run(tmp_path)
    assert digest(outcome) == undisturbed
    assert (outcome.steps, outcome.skipped) == (24, 0)
    assert outcome.last["loss"] < 3.6


@pytest.mark.parametrize("cuts", [(1,), (4,), (5, 6, 7), (3, 11, 12, 20), (23,)])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    tmp_path: Path, undisturbed: tuple[str, str], cuts: tuple[int, ...]
) -> None:
    for cut in cuts:
        with pytest.raises(Stopped, match=f"after step {cut}, saved in"):
            run(tmp_path, watch=At(cut, interrupt))
    assert digest(run(tmp_path)) == undisturbed


def test_without_seeds_per_step_a_stopped_run_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above: they do see forgotten randomness."""
    monkeypatch.setattr(loop._Run, "_reseed", lambda self, index, purpose: None)
    torch.manual_seed(5)
    whole = digest(run(tmp_path / "whole"))
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", watch=At(10, interrupt))
    torch.manual_seed(5)
    assert digest(run(tmp_path / "cut")) != whole


def test_a_finished_run_is_not_run_again(tmp_path: Path, undisturbed: tuple[str, str]) -> None:
    run(tmp_path)
    task = Toy()
    outcome = run(tmp_path, task)
    assert task.calls == []
    assert digest(outcome) == undisturbed
    assert outcome.last["step"] == 24


def test_a_finished_run_gives_the_trained_weights_back(tmp_path: Path) -> None:
    one, other = model(), model()
    train(one, Toy(), settings(), tmp_path)
    train(other, Toy(), settings(), tmp_path)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(
    tmp_path: Path, undisturbed: tuple[str, str], number: int, code: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        run(tmp_path, watch=At(6, lambda: os.kill(os.getpid(), number)))
    assert stop.value.code == code
    assert signal.getsignal(number) is before
    (folder,) = tmp_path.iterdir()
    assert [g.step for g in checkpoint.generations(folder)] == [6, 4]
    assert digest(run(tmp_path)) == undisturbed


def test_a_signal_in_the_middle_of_a_step_abandons_it(
    tmp_path: Path, undisturbed: tuple[str, str]
) -> None:
    class Slow(Toy):
        def loss(self, model: nn.Module, part: Any) -> Any:
            if self.drawn == 8:
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("went on after the signal")
            return super().loss(model, part)

    with pytest.raises(Stopped, match="SIGTERM after step 7"):
        run(tmp_path, Slow())
    assert digest(run(tmp_path)) == undisturbed


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run(tmp_path, watch=At(6, twice))
    assert end.value.code == 143
    (folder,) = tmp_path.iterdir()
    assert [g.step for g in checkpoint.generations(folder)] == [4, 0]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, watch=At(24, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert run(tmp_path).last["step"] == 24


# ---------------------------------------------------------------- metrics


def test_every_step_is_reported_and_written_once(tmp_path: Path) -> None:
    watch = At(-1, interrupt)
    outcome = run(tmp_path, watch=watch)
    assert [row[:2] for row in watch.rows] == [(step, 24) for step in range(1, 25)]
    written = series.read(outcome.metrics, timing=True)
    assert written == [row[2] for row in watch.rows]
    expected = {"step", "loss", "lr", "grad_norm", "tokens", "skipped", "rollbacks", "microbatches"}
    assert set(written[0]) == expected | series.TIMING
    schedule = leaf(Schedule, "cosine", warmup=0.2)
    rates = [0.01 * schedule.factor(step, 24) for step in range(24)]
    assert [row["lr"] for row in written] == pytest.approx(rates)
    assert written[-1]["eta"] == 0


def test_half_a_line_and_lines_beyond_the_checkpoint_are_cut(
    tmp_path: Path, undisturbed: tuple[str, str]
) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, watch=At(9, interrupt))
    (folder,) = tmp_path.iterdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 99}\n{"step": 11, "lo')
    assert digest(run(tmp_path)) == undisturbed


@pytest.mark.parametrize("change", ["", '{"step": 1}\n', '{"step": 1}\nnoise\n', "[]\n"])
def test_a_series_that_lost_rows_is_damaged(tmp_path: Path, change: str) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, watch=At(9, interrupt))
    (folder,) = tmp_path.iterdir()
    (folder / "metrics.jsonl").write_text(change)
    with pytest.raises(Damaged, match="should hold steps 1 to 9"):
        run(tmp_path)


def test_numbers_that_are_not_finite_are_null_in_the_file_and_absent_for_the_watch(
    tmp_path: Path,
) -> None:
    watch = At(-1, interrupt)
    outcome = run(tmp_path, Toy(trouble={5: "nan loss"}), watch)
    row = series.read(outcome.metrics)[5]
    assert row["loss"] is None
    assert row["skipped"] == 1
    assert "loss" not in watch.rows[5][2]


# ---------------------------------------------------------------- parts and memory


def gradients(parts: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    net = model(dropout=0.0).to(dtype)
    batch = Toy(rows=7).batch(0)
    for part in loop._cut(batch, parts, World()):
        Toy(rows=7).loss(_Wide(net), part)[0].backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


class _Wide(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_parts_of_a_batch_add_up_to_its_gradient(parts: int) -> None:
    for one, other in zip(gradients(1), gradients(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["data", "sharded"])
def test_every_row_is_in_one_part_of_one_process(
    rows: int, parts: int, size: int, mode: Mode
) -> None:
    """Processes that gather weights for each part have equally many parts."""
    batch = {"x": torch.arange(rows), "scalar": torch.tensor(7)}
    worlds = [World(rank, size, mode) for rank in range(size)]
    if rows < size:
        with pytest.raises(UserError, match="cannot be shared"):
            list(loop._cut(batch, parts, worlds[0]))
        return
    cut = [list(loop._cut(batch, parts, world)) for world in worlds]
    if mode == "sharded":
        assert {len(own) for own in cut} == {min(parts, rows // size)}
    pieces = [piece for own in cut for piece in own]
    assert torch.equal(torch.cat([p["x"] for p in pieces]), batch["x"])
    assert all(len(p["x"]) and p["scalar"] == 7 for p in pieces)


def test_tensors_of_different_lengths_are_refused() -> None:
    batch = {"a": torch.zeros(3), "b": torch.zeros(4)}
    with pytest.raises(UserError, match=r"equal numbers of rows.*'a': 3, 'b': 4"):
        list(loop._cut(batch, 1, World()))


def _drawn(step: int) -> Tensor:
    """The rows that an undisturbed run sees at `step`."""
    task = Toy()
    task.drawn = step
    return task.batch(step)["rows"]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_halves_the_parts_and_loses_no_row(
    tmp_path: Path, error: BaseException
) -> None:
    task = Hungry(2, error)
    with pytest.raises(Stopped):
        run(tmp_path / "hungry", task, watch=At(3, interrupt), steps=5)
    again = Hungry(2, error)
    outcome = run(tmp_path / "hungry", again, steps=5)
    other = run(tmp_path / "small", steps=5, accumulate=4)
    assert [row["microbatches"] for row in series.read(outcome.metrics)] == [4.0] * 5
    for name, tensor in weights(outcome).items():
        assert torch.equal(tensor, weights(other)[name]) or name == "buffer/seen"
    # Two failed attempts in the first step (6 rows, then 3), then four parts a step.
    assert len(task.seen) == 2 + 3 * 4
    assert len(again.seen) == 2 * 4
    for i, rows in enumerate(torch.cat(task.seen[2:]).split(6)):
        assert torch.equal(rows, _drawn(i))


def test_one_row_too_many_is_a_clear_end(tmp_path: Path) -> None:
    with pytest.raises(Exhausted, match="step 1 with one row at a time"):
        run(tmp_path, Hungry(0, MemoryError()))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tmp_path, Hungry(0, RuntimeError("shape mismatch")))


def test_no_memory_for_the_batch_itself_is_a_clear_end(tmp_path: Path) -> None:
    class Fat(Toy):
        def batch(self, step: int) -> Any:
            raise MemoryError

    with pytest.raises(Exhausted, match="making the batch of step 1"):
        run(tmp_path, Fat())


# ---------------------------------------------------------------- bad numbers


KINDS = ["nan loss", "inf loss", "nan gradient", "spike"]


def finite(outcome: Outcome) -> bool:
    return all(bool(t.isfinite().all()) for t in weights(outcome).values())


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_step_is_skipped_and_only_that(tmp_path: Path, kind: str) -> None:
    outcome = run(tmp_path, Toy(trouble={13: kind}))
    skipped = [row["step"] for row in series.read(outcome.metrics) if row["skipped"]]
    assert skipped == [14]
    assert outcome.skipped == 1
    assert finite(outcome)
    assert outcome.last["loss"] < 3.8


@law(Transform)
@pytest.mark.parametrize("kind", ["nan loss", "nan gradient"])
def test_no_optimizer_lets_bad_numbers_in(
    method: Transform, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Group(rate=1e-3, transforms=(method,))
    rest = Group(rate=1e-3) if "matrix" in method.needs else small
    given = {"steps": 6, "optimizer": Optimizer(matrices=small, rest=rest)}
    assert finite(run(tmp_path / "on", Toy(trouble={2: kind, 4: kind}), **given))
    # The control: without the guard the same numbers do get in (the sign in Lion hides some).
    monkeypatch.setattr(Guard, "judge", lambda self, history, loss, norm: "good")
    assert not finite(run(tmp_path / "off", Toy(trouble={2: kind, 4: kind}), **given))


def test_repeated_trouble_goes_back_and_leaves_the_data_out(tmp_path: Path) -> None:
    trouble = {9: "nan loss", 10: "nan gradient", 11: "inf loss"}
    task = Toy(trouble=trouble)
    with pytest.warns(UserWarning, match=r"step 12 \(data index 11\): .* going back to step 8"):
        outcome = run(tmp_path, task)
    assert task.calls == [*range(12), *range(12, 24), *range(4)]
    assert finite(outcome)
    rows = series.read(outcome.metrics)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert not any(row["skipped"] for row in rows)


def test_a_run_that_went_back_and_was_stopped_ends_like_one_that_was_not(tmp_path: Path) -> None:
    trouble = {9: "nan loss", 10: "nan loss", 11: "nan loss"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = digest(run(tmp_path / "whole", Toy(trouble=trouble)))
        for cut in (10, 11, 13, 14):
            with pytest.raises(Stopped):
                run(tmp_path / "cut", Toy(trouble=trouble), watch=At(cut, interrupt))
        assert digest(run(tmp_path / "cut", Toy(trouble=trouble))) == whole


def test_trouble_after_save_every_was_raised_goes_back_to_what_there_is(tmp_path: Path) -> None:
    trouble = {9: "nan loss", 10: "nan loss", 11: "nan loss"}
    with pytest.raises(Stopped):
        run(tmp_path, Toy(trouble=trouble), watch=At(8, interrupt), save_every=4)
    with pytest.warns(UserWarning, match="going back to step 8"):
        assert finite(run(tmp_path, Toy(trouble=trouble), save_every=100))


def test_endless_trouble_stops_with_the_step_and_the_data(tmp_path: Path) -> None:
    task = Toy(trouble=dict.fromkeys(range(6, 24), "nan loss"))
    words = r"step 9 \(data index 14\): not finite, loss nan, .* after 2 returns"
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(NotFinite, match=words) as stop,
    ):
        run(tmp_path, task, guard=Guard(patience=3, rollbacks=2, window=8), save_every=6)
    assert stop.value.code == 5
    assert "\n" not in str(stop.value)


def test_a_lasting_jump_of_the_loss_does_not_stop_a_run(tmp_path: Path) -> None:
    task = Toy(trouble=dict.fromkeys(range(12, 24), "spike"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run(tmp_path, task, guard=Guard(patience=2, rollbacks=1, window=8))
    assert outcome.steps == 24


# ---------------------------------------------------------------- checkpoints


def stopped_at(work: Path, step: int, **given: Any) -> Path:
    with pytest.raises(Stopped):
        run(work, watch=At(step, interrupt), **given)
    (folder,) = work.iterdir()
    return folder


def test_all_damage_to_a_checkpoint_is_seen_and_the_one_before_is_taken(tmp_path: Path) -> None:
    folder = stopped_at(tmp_path, 8)
    assert [g.step for g in checkpoint.generations(folder)] == [8, 4]
    tried = 0
    for what in faults.damages(checkpoint.place(folder, 8)):
        with pytest.warns(UserWarning, match="an older checkpoint is used"):
            found = checkpoint.latest(folder)
        assert found is not None, what
        assert found.step == 4
        tried += 1
    assert tried > 25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest(folder) == checkpoint.generations(folder)[0]


@pytest.mark.parametrize("harm", ["newest", "all", "kind"])
def test_a_run_with_damaged_checkpoints_still_ends_right(
    tmp_path: Path, undisturbed: tuple[str, str], harm: str
) -> None:
    folder = stopped_at(tmp_path, 10)
    for generation in checkpoint.generations(folder)[: 1 if harm == "newest" else None]:
        path = generation.path / "state.safetensors"
        if harm == "kind":
            from drawplate.core.artifact import publish

            with publish(generation.path, "model") as temporary:
                (temporary / "x").write_text("something else")
        else:
            wrong = bytearray(path.read_bytes())
            wrong[-7] ^= 4
            path.write_bytes(wrong)
    with pytest.warns(UserWarning, match="an older checkpoint is used"):
        outcome = run(tmp_path)
    assert digest(outcome) == undisturbed
    assert [g.step for g in checkpoint.generations(folder)] == [24, 20]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    folder = run(tmp_path, keep=keep).folder
    assert [g.step for g in checkpoint.generations(folder)] == [24, 20, 16][:keep]


def test_keeping_one_never_deletes_the_last_good_one(
    tmp_path: Path, undisturbed: tuple[str, str]
) -> None:
    folder = stopped_at(tmp_path, 12, keep=2)
    (checkpoint.place(folder, 12) / "state.json").unlink()
    with pytest.warns(UserWarning, match="older"), pytest.raises(Stopped):
        run(tmp_path, watch=At(9, interrupt), keep=1)
    # The one of step 8 is where the run would go back to if it met bad numbers.
    assert [g.step for g in checkpoint.generations(folder)] == [9, 8]
    assert digest(run(tmp_path)) == undisturbed


def test_a_full_disk_keeps_the_last_checkpoint_and_more_room_finishes_the_run(
    tmp_path: Path, undisturbed: tuple[str, str]
) -> None:
    with faults.small_disk(tmp_path / "disk", 4) as disk:
        folder = stopped_at(disk, 9)
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
        with pytest.raises(Exhausted, match=r"step-00000012 needs \d+ bytes but \d+ are free"):
            run(disk)
        assert [g.step for g in checkpoint.generations(folder)] == [9, 8]
        assert checkpoint.latest(folder) == checkpoint.generations(folder)[0]
        filler.unlink()
        assert digest(run(disk)) == undisturbed


def test_records_are_plain_json_without_clocks(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    text = (checkpoint.place(outcome.folder, 24) / "state.json").read_text()
    record = json.loads(text, parse_constant=lambda c: pytest.fail(c))
    assert record["task"] == {"drawn": 24}
    assert not any(f'"{word}"' in text for word in series.TIMING)
    assert {p.name for p in checkpoint.place(outcome.folder, 24).iterdir()} == {
        "manifest.json",
        "state.json",
        "state.safetensors",
    }


def test_another_machine_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(tmp_path, 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.warns(UserWarning, match="another threads: .*not bit by bit"):
        run(tmp_path)


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(Exhausted, match="another run is training in"):
            run(tmp_path)

    watch = At(3, second)
    run(tmp_path, watch=watch)
    assert watch.step == -1


# ---------------------------------------------------------------- settings


def test_what_decides_the_result_has_its_own_folder(tmp_path: Path) -> None:
    base = run(tmp_path, steps=2).folder
    changes: list[dict[str, Any]] = [
        {"steps": 3},
        {"seed": 1},
        {"clip": 0.5},
        {"precision": "bf16"},
        {"schedule": leaf(Schedule, "linear")},
        {"optimizer": Optimizer()},
        {"guard": Guard()},
    ]
    folders = {run(tmp_path, **({"steps": 2} | change)).folder for change in changes}
    folders.add(run(tmp_path, Toy(rows=5), steps=2).folder)
    other = model()
    with torch.no_grad():
        other.layers[1].up.weight[0, 0] += 1e-3
    folders.add(train(other, Toy(), settings(steps=2), tmp_path).folder)
    frozen = model()
    frozen.embedding.requires_grad_(False)
    assert len(folders | {base}) == len(changes) + 3
    for same in ({"save_every": 1}, {"keep": 1}, {"accumulate": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run(tmp_path, **({"steps": 2} | same)).folder == base


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"clip": 0.01},
        {"precision": "bf16"},
        {"schedule": leaf(Schedule, "linear")},
        {"optimizer": Optimizer()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_changes_the_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    one, other = run(tmp_path, steps=4), run(tmp_path, steps=4, **change)
    name = "optimizer/weight/layers.0.up.weight"
    assert not torch.equal(weights(one)[name], weights(other)[name])


def test_the_gradient_is_never_longer_than_the_clip(tmp_path: Path) -> None:
    plain = Group(rate=1.0, transforms=())
    constant = leaf(Schedule, "constant", warmup=0.0)
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    given = {"clip": 1e-3, "steps": 1, "schedule": constant}
    outcome = train(
        net, Toy(), settings(**given, optimizer=Optimizer(matrices=plain, rest=plain)), tmp_path
    )
    assert outcome.last["grad_norm"] > 0.1
    moved = sum(
        float((p.detach() - b).square().sum())
        for p, b in zip(net.parameters(), before, strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-3)


def test_frozen_parameters_stay_and_are_not_saved(tmp_path: Path) -> None:
    net = model()
    net.embedding.requires_grad_(False)
    before = net.embedding.weight.clone()
    outcome = train(net, Toy(), settings(steps=3), tmp_path)
    assert torch.equal(net.embedding.weight, before)
    assert not any("embedding" in name for name in weights(outcome))


def test_bf16_keeps_32_bit_copies_and_resumes_exactly(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", precision="bf16")
    stopped_at(tmp_path / "cut", 10, precision="bf16")
    assert digest(run(tmp_path / "cut", precision="bf16")) == digest(whole)
    assert weights(whole)["optimizer/weight/head.weight"].dtype is torch.float32
    net = model()
    train(net, Toy(), settings(precision="bf16"), tmp_path / "whole")
    assert all(p.dtype is torch.bfloat16 for p in net.parameters())
    assert whole.last["loss"] < 3.7


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    chosen = precision.choose("auto", torch.device("cpu"))
    assert chosen is (torch.bfloat16 if fast else torch.float32)
    assert precision.choose("float32", torch.device("cpu")) is torch.float32


def test_compiling_without_a_compiler_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    search = import_module("torch._inductor.cpp_builder").cpp_compiler_search
    search.cache_clear()
    try:
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
            run(tmp_path, compile=True)
    finally:
        search.cache_clear()


@pytest.mark.slow
def test_compiled_and_plain_losses_agree(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", steps=3)
    compiled = run(tmp_path / "compiled", steps=3, compile=True)
    one, other = ([row["loss"] for row in series.read(o.metrics)][:1] for o in (plain, compiled))
    assert one == pytest.approx(other, rel=0.05)  # other dropout, same model and data
