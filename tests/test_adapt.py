import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drawplate import edits
from drawplate.core.errors import UserError
from drawplate.core.hf import load, save
from drawplate.core.pack import unpack
from drawplate.edits.adapter import Adapted
from drawplate.edits.low_rank import LowRank
from drawplate.edits.quantized import Quantized, QuantizedLinear
from drawplate.edits.sparse import Sparse
from drawplate.rl.adapt import Adapt
from drawplate.rl.adapt.full import Full
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.adapt.scales import Scales
from tests import tiny
from tests.laws import law
from tests.rl_cases import oracle

LAYER = "model.layers.0."
ATTENTION = [LAYER + f"self_attn.{name}_proj" for name in "qkvo"]


def dense(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def quantize(model, paths, bits=4, group=8):
    """Round to nearest with one scale and zero a group."""
    for path in paths:
        weight = model.get_submodule(path).weight.detach()
        parts = weight.view(len(weight), -1, group)
        low, high = parts.amin(2), parts.amax(2)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
        edit = Quantized(module=path, bits=bits, group=group, zero=True, levels=False)
        old = model.get_submodule(path)
        tensors = edits.quantized.tensors(
            codes.to(torch.uint8).view_as(weight), scale, zero.to(torch.uint8), None, bits
        )
        del old
        edits.apply(model, edit, tensors)
    return model


def compressed():
    """One layer of each stored form: quantized, low-rank, sparse, dense."""
    model = quantize(dense(), ATTENTION)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    factors = {"first.weight": s[:6, None] * v[:6], "second.weight": u[:, :6].contiguous()}
    edits.apply(model, LowRank(module=LAYER + "mlp.up_proj", rank=6), factors)
    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    keep = weight.abs() > weight.abs().median()
    spec = Sparse(module=LAYER + "mlp.gate_proj", kept=int(keep.sum()))
    edits.apply(model, spec, edits.sparse.tensors(weight, keep))
    return model


def logits(model):
    ids = torch.arange(18).view(2, 9)
    return model(input_ids=ids).logits


def train(model, parameters, steps=3, rate=0.05):
    optimizer = torch.optim.SGD(parameters.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()


@law(Adapt)
def test_changes_nothing_at_step_zero(method):
    model = compressed()
    before = logits(model)
    method.install(model, seed=3)
    assert torch.equal(logits(model), before)


@law(Adapt)
def test_lists_exactly_what_moves(method):
    model = compressed()
    parameters = method.install(model, seed=3)
    open_ = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == open_.keys()
    assert all(parameters[name] is open_[name] for name in open_)
    held = {n: p.detach().clone() for n, p in model.state_dict().items() if n not in parameters}
    before = logits(model).detach()
    train(model, parameters)
    assert not torch.equal(logits(model), before)
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            assert torch.equal(tensor, held[name]), name


@law(Adapt)
def test_finish_keeps_what_was_learned_and_the_stored_form(method, tmp_path):
    model = compressed()
    form = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    codes = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    parameters = method.install(model, seed=3)
    train(model, parameters)
    trained = logits(model)
    method.finish(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    for name, tensor in codes.items():
        kept = after.get(name, after.get(name.replace("_proj.", "_proj.base.")))
        assert torch.equal(kept, tensor)
    if method.name != "lora":
        assert {name: (t.shape, t.dtype) for name, t in after.items()} == form
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


@law(Adapt)
def test_a_function_of_the_seed(method):
    first, again, other = (compressed() for _ in range(3))
    drawn = [method.install(model, seed) for model, seed in ((first, 1), (again, 1), (other, 2))]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0].values(), drawn[1].values(), strict=True))
    differs = any(
        not torch.equal(a, b) for a, b in zip(drawn[0].values(), drawn[2].values(), strict=True)
    )
    assert differs == (method.name == "lora")


@law(Adapt)
def test_targets_choose(method):
    model = compressed()
    some = method.model_copy(update={"targets": ("*.q_proj", "*.k_proj")})
    names = some.install(model, seed=0)
    assert names
    assert all("q_proj" in name or "k_proj" in name for name in names)
    with pytest.raises(UserError, match="match nothing"):
        method.model_copy(update={"targets": ("nowhere",)}).install(compressed(), seed=0)


def test_oracle_of_lora():
    model = compressed().double()
    start = edits.matrix(model.get_submodule(ATTENTION[0])).detach()
    lora = Lora(rank=3, alpha=6)
    parameters = lora.install(model, seed=0)
    for name in parameters:
        if name.endswith("up.weight"):
            assert not parameters[name].any()
            parameters[name].data.normal_()
    down, up = (parameters[f"{ATTENTION[0]}.{part}.weight"] for part in ("down", "up"))
    assert down.shape == (3, 16)
    want = oracle(lora)(start.tolist(), down.tolist(), up.tolist(), lora.alpha)
    got = edits.matrix(model.get_submodule(ATTENTION[0]))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=0)


def test_down_starts_with_variance_one_over_the_width():
    parameters = Lora(rank=200).install(dense(), seed=0)
    down = parameters[f"{ATTENTION[0]}.down.weight"]
    assert float(down.detach().var()) == pytest.approx(1 / 16, rel=0.1)


def test_oracle_of_scales():
    model = compressed().double()
    scales = Scales()
    parameters = scales.install(model, seed=0)
    module = model.get_submodule(ATTENTION[1])
    theta = parameters[f"{ATTENTION[1]}.parametrizations.scale.0.theta"]
    theta.data.normal_()
    plain = module.parametrizations.scale.original
    zero = module.zero.double()
    codes = model_codes(module).tolist()
    want = oracle(scales)(codes, plain.tolist(), zero.tolist(), theta.tolist(), 8)
    got = module.matrix()
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-15)


def model_codes(module):
    return unpack(module.codes, module.bits, module.stored).view(16, 16).double()


def test_oracle_of_full():
    model = compressed()
    stored = {
        name: str(value.dtype).removeprefix("torch.") for name, value in model.state_dict().items()
    }
    assert Full().install(model, seed=0).keys() == oracle(Full())(stored)


def test_lora_is_outside_low_rank_factors_and_leaves_the_head():
    model = compressed()
    names = Lora().install(model, seed=0)
    assert not any("first" in name or "second" in name or "lm_head" in name for name in names)
    assert isinstance(model.model.layers[0].mlp.up_proj, Adapted)


def test_lora_leaves_routers():
    paths = Lora().places(tiny.model("phimoe"))
    assert paths
    assert all(".self_attn." in path for path in paths)


def test_lora_moves_norms_where_asked():
    plain, both = compressed(), compressed()
    names = Lora().install(plain, seed=0).keys()
    parameters = Lora(norms=True).install(both, seed=0)
    norms = {LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"}
    assert parameters.keys() == names | norms | {"model.norm.weight"}
    form = {name: tensor.shape for name, tensor in both.state_dict().items()}
    train(both, parameters)
    trained = logits(both)
    assert (both.model.norm.weight != 1).any()
    Lora(norms=True).finish(both)
    torch.testing.assert_close(logits(both), trained, rtol=1e-5, atol=1e-6)
    assert both.model.norm.weight.shape == form["model.norm.weight"]


def test_lora_merges_into_dense_layers_alone():
    model = compressed()
    specs = edits.of(model)
    lora = Lora(rank=3)
    train(model, lora.install(model, seed=0))
    lora.finish(model)
    kinds = {
        path: type(model.get_submodule(path)).__name__
        for path in (LAYER + "mlp.down_proj", LAYER + "mlp.up_proj", ATTENTION[0])
    }
    assert list(kinds.values()) == ["Linear", "Adapted", "Adapted"]
    added = edits.of(model)[len(specs) :]
    assert {edit.module for edit in added} == {
        *ATTENTION,
        LAYER + "mlp.up_proj",
        LAYER + "mlp.gate_proj",
    }
    edits.check(model)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_lora_merges_what_it_learned_whichever_way_round_weights_are_stored(kind):
    model, lora = tiny.model(kind), Lora(rank=2)
    before = logits(model)
    for name, parameter in lora.install(model, seed=0).items():
        if name.endswith("up.weight"):
            parameter.data.normal_(std=0.1, generator=torch.manual_seed(1))
    trained = logits(model)
    assert (trained - before).abs().max() > 0.1
    lora.finish(model)
    assert not edits.of(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)


def test_lora_trains_again_on_what_it_left():
    model = compressed()
    for seed in (0, 1):
        before = logits(model)
        parameters = Lora(rank=2).install(model, seed)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
        train(model, parameters)
        Lora(rank=2).finish(model)
    edits.check(model)


def test_scales_move_on_the_grid():
    """Weights stay (code - zero) x scale, with the codes of the start and other scales."""
    model = compressed()
    start = copy.deepcopy(model)
    scales = Scales()
    train(model, scales.install(model, seed=0))
    scales.finish(model)
    for path in ATTENTION:
        old, new = start.get_submodule(path), model.get_submodule(path)
        assert type(new) is QuantizedLinear
        quotient = (new.scale / old.scale).repeat_interleave(old.group, 1)
        assert (new.scale > 0).all()
        assert not torch.equal(new.scale, old.scale)
        torch.testing.assert_close(new.matrix(), old.matrix() * quotient)


def test_scales_need_a_quantized_model():
    with pytest.raises(UserError, match="none that scales can train"):
        Scales().install(dense(), seed=0)


def test_sixteen_bit_scales_are_trained_in_thirty_two():
    model = quantize(dense(), ATTENTION).to(torch.bfloat16)
    before = logits(model)
    parameters = Scales().install(model, seed=0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert torch.equal(logits(model), before)
    Scales().finish(model)
    assert model.get_submodule(ATTENTION[0]).scale.dtype == torch.bfloat16


def test_sparse_layers_stay_sparse_under_full_training():
    model = compressed()
    layer = model.model.layers[0].mlp.gate_proj
    holes = ~layer.keep()
    train(model, Full().install(model, seed=0))
    assert not layer.matrix()[holes].any()
