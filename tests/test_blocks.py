"""The block-by-block driver: statistics, propagation, resume."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from pydantic import BaseModel

from drawplate import edits
from drawplate.core import hf, linalg
from drawplate.core import stats as statistics
from drawplate.core.blocks import Outcome, walk
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.stats import PARTS, Gather
from drawplate.edits.low_rank import LowRank
from drawplate.edits.quantized import QuantizedLinear
from drawplate.quantize.driver import Quantize, quantize


class Row(BaseModel):
    path: str
    energy: float


def truncate(number, sites):
    """Halves the rank of every layer by plain SVD."""
    changes, rows = [], []
    for path, module, stats in sites:
        weight = edits.matrix(module)
        rank = max(1, min(weight.shape) // 2)
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        tensors = {"first.weight": V[:rank], "second.weight": U[:, :rank] * S[:rank]}
        changes.append((LowRank(module=path, rank=rank), tensors))
        rows.append(Row(path=path, energy=float(stats.gram.trace())))
    return Outcome(changes, rows)


def seen_inputs(model, tokens):
    """What each linear layer is really given, from one plain forward pass."""
    inputs = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: inputs.__setitem__(
                path, args[0].reshape(-1, args[0].shape[-1])
            )
        )
        for path, module in edits.linears(model).items()
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("kind", tiny.CONFIGS | tiny.OTHERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_statistics_are_those_of_a_plain_forward_pass(kind, attention):
    model, tokens = tiny.model(kind), tiny.tokens(5, 12)
    model.set_attn_implementation(attention)
    inputs, seen = seen_inputs(model, tokens), {}

    def visit(number, sites):
        seen.update({path: stats for path, _, stats in sites})
        return Outcome([], [])

    walk(model, tokens, PARTS, visit, Row, batch=2)
    assert set(seen) == set(inputs)
    for path, x in inputs.items():
        x = x.double()
        stats = seen[path]
        assert stats.count == len(x) == 60
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(stats.gram.double(), x.T @ x / len(x), **close)
        torch.testing.assert_close(stats.mean.double(), x.mean(0), **close)
        torch.testing.assert_close(stats.absmean.double(), x.abs().mean(0), **close)
        torch.testing.assert_close(stats.peak.double(), x.abs().amax(0), **close)


def test_statistics_are_gathered_of_wanted_layers_alone():
    wanted, seen = {"model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"}, []

    def visit(number, sites):
        seen.extend(site.path for site in sites)
        return Outcome([], [])

    walk(tiny.model(), tiny.tokens(), PARTS, visit, Row, wanted=wanted)
    assert set(seen) == wanted


def test_layers_with_one_input_share_one_record():
    seen = {}

    def visit(number, sites):
        seen.update({path: stats for path, _, stats in sites})
        return Outcome([], [])

    walk(tiny.model(), tiny.tokens(), PARTS, visit, Row)
    q, k, v, o = (seen[f"model.layers.0.self_attn.{n}_proj"] for n in "qkvo")
    assert q is k is v
    assert o is not q


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "gemma3", "qwen2_window"])
def test_later_blocks_see_what_was_changed(kind):
    model, tokens = tiny.model(kind), tiny.tokens()
    rows = walk(model, tokens, frozenset({"gram"}), truncate, Row, batch=4)
    half = tiny.model(kind)  # the first block edited, the second as it was

    def first_only(number, sites):
        return truncate(number, sites) if number == 0 else Outcome([], [])

    walk(half, tokens, frozenset({"gram"}), first_only, Row, batch=4)
    before = (seen_inputs(tiny.model(kind), tokens), seen_inputs(half, tokens))
    for row in rows:
        x = before[".1." in row.path][row.path].double()
        assert row.energy == pytest.approx(float(x.square().sum() / len(x)), rel=1e-3)


def test_a_run_that_stops_goes_on_at_the_next_block_with_the_same_result(tmp_path):
    tokens = tiny.tokens()
    whole = tiny.model()
    rows = walk(whole, tokens, frozenset({"gram"}), truncate, Row)

    def stops(number, sites):
        if number == 1:
            raise KeyboardInterrupt
        return truncate(number, sites)

    cut = tiny.model()
    with pytest.raises(KeyboardInterrupt):
        walk(cut, tokens, frozenset({"gram"}), stops, Row, work=tmp_path)
    visited = []

    def counts(number, sites):
        visited.append(number)
        return truncate(number, sites)

    again = tiny.model()
    assert walk(again, tokens, frozenset({"gram"}), counts, Row, work=tmp_path) == rows
    assert visited == [1]
    assert edits.of(again) == edits.of(whole)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_damaged_block_is_solved_again(tmp_path):
    tokens, visited = tiny.tokens(), []
    walk(tiny.model(), tokens, frozenset({"gram"}), truncate, Row, work=tmp_path)
    file = tmp_path / "block-0001" / "tensors.safetensors"
    spoiled = bytearray(file.read_bytes())
    spoiled[-3] ^= 4
    file.write_bytes(bytes(spoiled))

    def counts(number, sites):
        visited.append(number)
        return truncate(number, sites)

    walk(tiny.model(), tokens, frozenset({"gram"}), counts, Row, work=tmp_path)
    assert visited == [1]


@pytest.mark.parametrize("kind", ["llama_untied", "gpt2", "phi"])
def test_the_head_is_visited_with_its_own_inputs(kind):
    model, tokens, seen = tiny.model(kind), tiny.tokens(), {}

    def visit(number, sites):
        if number == -1:
            seen.update({site.path: site.stats for site in sites})
        return Outcome([], [])

    walk(model, tokens, PARTS, visit, Row, head=True)
    ((path, stats),) = seen.items()
    x = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: x.append(args[0]))
    with torch.no_grad():
        model(tokens)
    rows = x[0].reshape(-1, x[0].shape[-1]).double()
    torch.testing.assert_close(stats.gram.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert model.get_submodule(path) is model.get_output_embeddings()


def test_the_head_is_visited_with_packed_layers_decoded_once_at_equal_bits(monkeypatch):
    model, tokens = tiny.model("llama_untied"), tiny.tokens()
    quantize(model, tokens, Quantize(group=16, vocabulary=None), batch=4)
    seen, calls = [], []
    decode = QuantizedLinear.matrix

    def visit(number, sites):
        if number == -1:
            seen.extend(site.stats.gram for site in sites)
        return Outcome([], [])

    def counted(module):
        calls.append(module)
        return decode(module)

    monkeypatch.setattr(QuantizedLinear, "matrix", counted)
    walk(model, tokens, PARTS, visit, Row, head=True, batch=2)
    most = max(calls.count(module) for module in calls)
    assert most == 3  # here, with its block, and the first block also for its kind of output
    with monkeypatch.context() as patched:
        patched.setattr(edits, "materialized", lambda _: nullcontext())
        walk(model, tokens, PARTS, visit, Row, head=True, batch=2)
    assert len(calls) > 10
    assert torch.equal(*seen)


def test_nan_behind_the_last_block_is_named():
    model = tiny.model("llama_untied")

    def visit(number, sites):
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        return Outcome([], [])

    with pytest.raises(NotFinite, match="lm_head: its output holds NaN"):
        walk(model, tiny.tokens(), PARTS, visit, Row, head=True)


def test_sums_and_errors_by_slabs_are_those_of_whole_matrices(monkeypatch):
    monkeypatch.setattr(statistics, "_SLAB", 3)
    monkeypatch.setattr(linalg, "SLAB", 3)
    batches = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    gather = Gather(PARTS)
    for batch in batches:
        gather.add(batch)
    found, x = gather.stats(), batches.flatten(0, 1).double()
    for part, whole in {
        "gram": x.T @ x / len(x),
        "mean": x.mean(0),
        "absmean": x.abs().mean(0),
        "peak": x.abs().amax(0),
    }.items():
        got = getattr(found, part)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got.double(), whole, rtol=1e-6, atol=1e-7)
    matrix = x[:7]
    error = ((matrix @ found.gram.double()) * matrix).sum()
    torch.testing.assert_close(linalg.output_error(matrix, found.gram), error)


def test_nan_is_named():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"layers\.1"):
        walk(model, tiny.tokens(), PARTS, lambda number, sites: Outcome([], []), Row)


def test_unknown_statistics_and_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="do not exist"):
        Gather(frozenset({"median"}))
    with pytest.raises(UserError, match="calibration"):
        walk(tiny.model(), torch.zeros(0, 4).long(), PARTS, truncate, Row)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="decoder blocks"):
        hf.blocks(torch.nn.Linear(2, 2))
