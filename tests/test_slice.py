"""Slicing the residual stream: exact at full width, and what it says at any other."""

import copy
import itertools
import subprocess
import sys
from math import floor

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, Olmo2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from drawplate import edits
from drawplate.compress import stream
from drawplate.compress.anatomy import anatomy
from drawplate.compress.basis import Basis
from drawplate.compress.driver import Compress, Ledger, compress
from drawplate.compress.method import Compression
from drawplate.core.errors import Damaged, NotFinite, UserError
from drawplate.core.hf import load, save, stored_bytes
from drawplate.core.method import leaves
from drawplate.core.progress import silent
from drawplate.core.seeds import generator
from drawplate.edits.narrow import UnitNorm
from tests import tiny
from tests.compress_layers import oracle
from tests.laws import law

Slice = leaves(Compression)["slice"]


def lively(kind="llama", seed=0):
    """A tiny decoder whose gains, shifts and biases are not those of a fresh one."""
    model = tiny.model(kind, seed)
    draw = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) / 3)
    return model


@pytest.fixture
def exact_norms(monkeypatch):
    """Root mean square norms that do not round to float32."""

    def forward(self, x):
        mean = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + self.variance_epsilon)

    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


def logits(model, tokens=None):
    model.requires_grad_(False)
    with torch.no_grad():
        return model(tiny.tokens(seed=3) if tokens is None else tokens).logits


def to_width(model, width, **fields):
    """Slices `model` to that width; returns what was found out about it."""
    method, tokens = Slice(**fields), tiny.tokens()
    where = anatomy(model, tokens[:1])
    grams = stream.survey(model, tokens, where, None, silent, 4)
    ledger = stream.rewrite(model, where, method, grams, width)
    return where, grams, ledger


def run(model, ratio=0.3, work=None, watch=silent, **fields):
    params = Compress.model_validate({"ratio": ratio, "method": {"name": "slice", **fields}})
    return compress(model, tiny.tokens(), params, work, watch, batch=4)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("basis", list(leaves(Basis)))
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_nothing_deleted_changes_nothing(kind, basis):
    model = lively(kind).double()
    wanted = logits(model)
    to_width(model, 32, basis={"name": basis})
    assert {edit.name for edit in edits.of(model)} == {"narrow", "turned"}
    torch.testing.assert_close(logits(model), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [5, 16, 31, 32])
def test_oracle(width):
    model = lively("gpt2").double()
    weights = {
        name.removeprefix("transformer."): value.numpy().copy()
        for name, value in model.state_dict().items()
        if name.startswith("transformer.")
    }
    wanted = oracle("compress/method/slice")(
        weights, tiny.tokens().numpy(), tiny.tokens(seed=3).numpy(), 2, 4, 1e-5, width
    )
    to_width(model, width)
    torch.testing.assert_close(logits(model), torch.from_numpy(wanted), rtol=1e-9, atol=1e-10)


def projected(model, where, turns, tokens):
    """Logits of the original model with a projection of the whole stream at every place."""
    projectors = [turn @ turn.T for turn in turns]
    centre = torch.eye(32, dtype=torch.float64) - where.centred / 32
    state, handles, place = {}, [], 0
    for number, block in enumerate(where.blocks):
        module = model.get_submodule(block.path)

        def enter(_, args, kwargs, first=number == 0):
            state["x"] = args[0] @ centre @ projectors[0] if first else args[0]
            return (state["x"], *args[1:]), kwargs

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        names = [block.attention, block.mlp]
        for i, name in enumerate(names):
            alone = len(block.steps) == 1
            place += not alone or i == 1

            def leave(_, args, out, place=place, keep=alone and i == 0):
                mixed = out[0] if isinstance(out, tuple) else out
                if keep:  # side by side: the second branch projects for both
                    state["other"] = mixed
                    return out
                x = state["x"]
                state["x"] = (
                    x + mixed @ centre + state.pop("other", 0) @ centre
                    if "other" in state
                    else x + mixed @ centre
                ) @ projectors[place]
                changed = state["x"] - x
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

            handles.append(getattr(module, name).register_forward_hook(leave))
        if len(block.steps) == 1:
            # The first branch has been added by the block already.
            def leave_block(_, args, out):
                return state["x"]

            handles.append(module.register_forward_hook(leave_block))
    found = logits(model, tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("kind", "basis"),
    # A projection of a centred stream need not be centred, unless it commutes with centring.
    [
        (kind, basis)
        for kind in tiny.CONFIGS
        for basis in leaves(Basis)
        if basis == "pca" or kind not in ("gpt2", "phi")
    ],
)
def test_deleting_directions_is_projecting_the_stream(kind, basis):
    model = lively(kind).double()
    original = copy.deepcopy(model)
    where, grams, _ = to_width(model, 12, basis={"name": basis})
    method = Slice(basis={"name": basis})
    turns = [method.turn(grams[path], 12, i) for i, path in enumerate(where.norms)]
    wanted = projected(original, where, turns, tiny.tokens(seed=3))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_bytes_are_met_from_below_by_the_largest_width(kind, ratio):
    model = lively(kind)
    before = stored_bytes(model)
    where = anatomy(model, tiny.tokens()[:1])
    sizes = {width: stream.size(model, where, width) for width in range(1, 33)}
    budget = floor((1 - ratio) * before)
    ledger = run(model, ratio, multiple=1)
    width = ledger.rows[0].units
    assert ledger.bytes_before == before
    assert ledger.bytes_after == stored_bytes(model) == sizes[width] <= budget
    assert width == 32 or sizes[width + 1] > budget
    changes = sum(row.bytes_after - row.bytes_before for row in ledger.rows)
    assert changes == ledger.bytes_after - before


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_ledger_says_what_was_lost(kind):
    model = lively(kind).double()
    original = copy.deepcopy(model)
    where, grams, ledger = to_width(model, 12)
    rows = {row.path: row for row in ledger.rows}
    assert len(rows) == len(ledger.rows)
    assert set(edits.linears(original)) <= set(rows)
    inputs = {}

    def listen(path):
        def hook(_, args):
            inputs[path] = args[0].reshape(-1, 32)

        return original.get_submodule(path).register_forward_pre_hook(hook)

    handles = [listen(path) for path in where.norms]
    logits(original, tiny.tokens())
    for handle in handles:
        handle.remove()
    original.requires_grad_(False)
    for place, (number, step) in enumerate(where.steps):
        turn = Slice().turn(grams[step.norm], 12, place)
        x = inputs[step.norm]
        x = x - where.centred * x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        norm = original.get_submodule(step.norm)
        for path in step.readers:
            weight = edits.matrix(original.get_submodule(path)).detach() * norm.weight.detach()
            lost = weight - weight @ turn @ turn.T
            error = (x @ lost.T).square().sum() / (x @ weight.T).square().sum()
            assert rows[path].activation_error == pytest.approx(error.item(), rel=1e-3)
            share = float(lost.square().sum() / weight.square().sum())
            assert rows[path].weight_error == pytest.approx(share)
            assert rows[path].block == number
            assert (rows[path].rows, rows[path].columns) == tuple(weight.shape)
        left = float((x @ turn).square().sum() / x.square().sum())
        assert rows[step.norm].activation_error == pytest.approx(1 - left, rel=1e-3)
        for path in step.writers:
            assert 0 < rows[path].activation_error < 1
    for row in ledger.rows:
        module = model.get_submodule(row.path)
        if row.edit == "narrow":
            assert row.bytes_after == sum(p.nbytes for p in module.parameters())
        else:
            assert row.bytes_after == sum(skip.nbytes for skip in module.skips)
            assert row.bytes_before == 0
        assert row.units == 12
    read = Ledger.model_validate_json(ledger.model_dump_json())
    assert read.model_dump() == ledger.model_dump()


def test_a_tied_head_gets_weights_of_its_own():
    model = lively("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    run(model)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape


def test_principal_components_lose_least_of_the_stream():
    """Which is what they are for; what the logits make of it is another matter."""

    def lost(basis):
        model = lively()
        _, _, ledger = to_width(model, 12, basis={"name": basis})
        return ledger.rows[0].activation_error

    assert lost("pca") < 0.9 * lost("coordinates")
    assert lost("pca") < 0.9 * lost("random")


def test_more_directions_lose_less():
    errors = [to_width(lively(), width)[2].activation_error for width in (8, 16, 24, 32)]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


FRESH = """
import sys, torch, drawplate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model(ids).logits.detach(), folder + ".logits")
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2
"""


def test_loads_in_a_fresh_process_with_equal_logits(tmp_path):
    torch.save(tiny.tokens(2, 9), tmp_path / "ids")
    models = {kind: lively(kind) for kind in tiny.CONFIGS if kind != "llama_untied"}
    for kind, model in models.items():
        run(model)
        save(model, tmp_path / kind)
    folders = [str(tmp_path / kind) for kind in models]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    torch.set_num_threads(1)
    for kind, model in models.items():
        loaded = torch.load(tmp_path / f"{kind}.logits", weights_only=True)
        assert torch.equal(loaded, logits(model, tiny.tokens(2, 9))), kind
        assert torch.equal(logits(load(tmp_path / kind)), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_what_comes_after(kind):
    """Factors inside a sliced model, and masks on what is left."""
    model = lively(kind)
    first = run(model, 0.3)
    then = compress(
        model,
        tiny.tokens(),
        Compress.model_validate({"ratio": 0.15, "method": {"name": "low_rank"}}),
        batch=4,
    )
    assert then.bytes_before == first.bytes_after
    assert then.bytes_after <= 0.85 * first.bytes_after
    edits.check(model)
    assert logits(model).isfinite().all()


def test_gradients_and_hidden_states_are_those_of_a_block_of_its_kind():
    model = lively()
    kind = type(model.model.layers[0])
    run(model)
    assert isinstance(model.model.layers[0], kind)
    assert type(model.model.layers[0]) is type(model.model.layers[1])
    out = model(tiny.tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    model.requires_grad_(True)
    out = model(tiny.tokens(), labels=tiny.tokens())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_keys_and_values_may_be_kept():
    model = lively()
    run(model)
    tokens = tiny.tokens(2, 6)
    with torch.no_grad():
        cache = model(tokens[:, :5], use_cache=True).past_key_values
        last = model(tokens[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(last, logits(model, tokens)[:, 5:], rtol=1e-4, atol=1e-4)


def test_nothing_to_remove_changes_nothing():
    model = lively()
    before = copy.deepcopy(model.state_dict())
    ledger = run(model, 0.0)
    assert ledger.ratio == 0
    assert ledger.rows == ()
    assert edits.of(model) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_impossible_ratio_names_the_largest_possible():
    with pytest.raises(UserError, match=r"ratio 0\.95 cannot be reached") as caught:
        run(lively(), 0.95)
    most = float(str(caught.value).split("at most ")[1].split(" ")[0])
    assert most <= run(lively(), most).ratio < most + 2e-4
    with pytest.raises(UserError, match="cannot be reached"):
        run(lively(), most + 2e-4)


def test_resumes_with_the_same_bytes(tmp_path, monkeypatch):
    whole = lively()
    expected = run(whole, work=tmp_path)
    passes = []
    gathered = stream._gathered
    monkeypatch.setattr(stream, "_gathered", lambda *a: (passes.append(1), gathered(*a))[1])
    again = lively()
    assert run(again, work=tmp_path).model_dump() == expected.model_dump()
    assert passes == []
    (file,) = tmp_path.glob("*/survey/grams.safetensors")
    file.chmod(0o644)
    file.write_bytes(b"x")
    third = lively()
    run(third, work=tmp_path)
    assert passes == [1]
    for other in (again, third):
        for name, value in whole.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


def test_watch_counts_the_batches():
    seen = []
    run(lively(), watch=lambda step, total, metrics: seen.append((step, total)))
    assert seen == [(1, 2), (2, 2)]


def config(kind, **more):
    common = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return kind(**common, **more)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GemmaConfig, "scales or changes its embeddings"),
        (Olmo2Config, "does not read the stream at"),
    ],
)
def test_other_architectures_are_refused_with_one_line(kind, line):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind)).float().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=line) as caught:
        run(model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Strange(nn.Module):
    """A norm of neither kind."""

    def __init__(self, old):
        super().__init__()
        self.weight, self.eps = old.weight, 1e-6

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_parts_that_do_something_else_are_refused():
    model = lively()
    model.model.layers[1].input_layernorm = Strange(model.model.layers[1].input_layernorm)
    with pytest.raises(UserError, match="Strange is not a norm of the form"):
        run(model)
    model = lively()
    model.model.layers[0].mlp.register_forward_hook(lambda *given: given[-1] * 2)
    with pytest.raises(UserError, match="does not end in a linear layer"):
        run(model)
    model = lively("phi")
    model.model.layers[0].resid_dropout.p = 0.1
    with pytest.raises(UserError, match="not one attention, one feed-forward part"):
        run(model)


def test_hand_over():
    model = lively()
    run(model)
    with pytest.raises(UserError, match="is already narrow: method slice cannot follow"):
        run(model)
    model = lively()
    compress(model, tiny.tokens(), Compress(ratio=0.1))
    with pytest.raises(UserError, match="is already low_rank: method slice cannot follow"):
        run(model)
    params = {"ratio": 0.2, "method": {"name": "slice"}}
    for more in ({"exclude": ("*.down_proj",)}, {"head": True}):
        with pytest.raises(UserError, match=r"compress\.exclude and compress\.head"):
            compress(lively(), tiny.tokens(), Compress.model_validate(params | more))
    with pytest.raises(UserError, match="calibration needs token rows"):
        compress(lively(), torch.ones(4, dtype=torch.long), Compress.model_validate(params))


def test_broken_promises_are_found():
    model = lively()
    run(model)
    block = model.model.layers[0]
    block.skips[0] = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(Damaged, match=r"model\.layers\.0: skips are"):
        edits.check(model)
    model = lively()
    run(model)
    model.lm_head = nn.Linear(5, 96, bias=False)
    with pytest.raises(Damaged, match="lm_head: maps 5 to 96 numbers, the spec says"):
        edits.check(model)
    model = lively()
    run(model)
    model.model.norm = nn.Identity()
    with pytest.raises(Damaged, match=r"model\.norm: Identity is no narrow"):
        edits.check(model)
    turned = edits.of(model)[-1]
    with pytest.raises(Damaged, match=r"layers\.1: expected turned skips, found a Identity"):
        turned.check(nn.Identity())


def test_not_finite_is_named():
    model = lively()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"^model\.layers\.1: its output holds NaN"):
        run(model)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_bfloat16(kind):
    model = lively(kind).bfloat16()
    ledger = run(model)
    assert ledger.bytes_after == stored_bytes(model) <= 0.7 * ledger.bytes_before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_unit_norm():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    norm = UnitNorm(10, 0.5)
    torch.testing.assert_close(norm(x), x / (25 / 10 + 0.5) ** 0.5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_widths():
    assert Slice().widths(32) == [8, 16, 24, 32]
    assert Slice(multiple=12).widths(32) == [12, 24, 32]
    assert Slice(multiple=64).widths(32) == [32]


# The axis of bases.


def moments(size=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(60, size, generator=draw, dtype=torch.float64)
    x = x * torch.linspace(2, 0.3, size, dtype=torch.float64)[torch.randperm(size, generator=draw)]
    x = x @ (torch.eye(size) + 0.3 * torch.randn(size, size, generator=draw)).double()
    return x.T @ x / 60


@law(Basis)
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_basis_oracle(method, kept):
    gram = moments()
    normal = torch.randn(9, 9, generator=generator(0, "basis", 2), dtype=torch.float64)
    wanted = oracle(f"compress/basis/{method.name}")(gram.numpy(), kept, normal.numpy())
    found = method.directions(gram, 2)[:, :kept]
    np.testing.assert_allclose((found @ found.T).numpy(), wanted, rtol=1e-10, atol=1e-10)


@law(Basis)
def test_directions_are_orthonormal(method):
    for seed in range(4):
        found = method.directions(moments(seed=seed), seed)
        torch.testing.assert_close(found.T @ found, torch.eye(9, dtype=torch.float64))
    silent_stream = method.directions(torch.zeros(5, 5, dtype=torch.float64), 0)
    torch.testing.assert_close(silent_stream.T @ silent_stream, torch.eye(5, dtype=torch.float64))


@law(Basis)
def test_nothing_loses_less_than_principal_components(method):
    gram = moments()
    energies = torch.linalg.eigvalsh(gram)
    for kept in range(1, 10):
        found = method.directions(gram, 0)[:, :kept]
        lost = float(gram.trace() - (found.T @ gram @ found).trace())
        least = float(energies[: 9 - kept].sum())
        assert lost >= least - 1e-10
        if method.name == "pca":
            assert lost == pytest.approx(least, abs=1e-10)


@law(Basis)
def test_basis_is_pure(method):
    gram = moments()
    before = gram.clone()
    assert torch.equal(method.directions(gram, 1), method.directions(gram, 1))
    assert torch.equal(gram, before)


def test_a_drawn_basis_depends_on_seed_and_place():
    random = leaves(Basis)["random"]
    gram = moments()
    found = [random(seed=seed).directions(gram, place) for seed in (0, 1) for place in (0, 1)]
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other)
