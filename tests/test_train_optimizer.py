"""Chain: equal to torch's optimizers where they exist, and to itself however it is run."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drawplate.core.errors import UserError
from drawplate.edits.quantized_embedding import QuantizedEmbedding
from drawplate.train import optimizer as optimizer_module
from drawplate.train.optimizer import Chain, Group, Optimizer
from drawplate.train.precision import cast
from drawplate.train.transform import Transform
from tests import tiny
from tests.laws import law
from tests.train_cases import leaf

SHAPES = [(4, 3), (4, 3), (3, 5), (7,), (7,), (2, 3, 4), ()]


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def give(ps: list[nn.Parameter], step: int, missing: bool = False) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(ps):
        grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        absent = missing and (i + step) % 3 == 0
        p.grad = None if absent else grad.to(p.grad_dtype or p.dtype)


def chain(
    ps: list[nn.Parameter], *transforms: Transform, rate: float = 0.05, decay: float = 0.1
) -> Chain:
    group = Group(rate=rate, decay=decay, transforms=transforms)
    return Chain([(group, [(f"p{i}", p) for i, p in enumerate(ps)])])


def steps(
    ps: list[nn.Parameter],
    chosen: torch.optim.Optimizer,
    n: int = 12,
    missing: bool = False,
    first: int = 0,
) -> None:
    for step in range(first, first + n):
        give(ps, step, missing)
        chosen.step()


def same(one: list[nn.Parameter], other: list[nn.Parameter], **how: Any) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **how)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("stack", [1 << 24, 12])
def test_a_chain_of_adam_is_adamw(
    missing: bool, stack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "STACK", stack)
    ours, theirs = parameters(), parameters()
    steps(
        ours, chain(ours, leaf(Transform, "adam", mean=0.8, square=0.97, eps=1e-6)), missing=missing
    )
    adamw = torch.optim.AdamW(theirs, lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    steps(theirs, adamw, missing=missing)
    same(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("transforms", "momentum", "nesterov"),
    [((), 0.0, False), (("momentum",), 0.7, False), (("nesterov",), 0.7, True)],
)
@pytest.mark.parametrize("missing", [False, True])
def test_chains_of_momentum_are_sgd(
    transforms: tuple[str, ...], momentum: float, nesterov: bool, missing: bool
) -> None:
    ours, theirs = parameters(), parameters()
    steps(
        ours,
        chain(ours, *(leaf(Transform, t, beta=momentum) for t in transforms), decay=0.0),
        missing=missing,
    )
    steps(
        theirs,
        torch.optim.SGD(theirs, lr=0.05, momentum=momentum, nesterov=nesterov),
        missing=missing,
    )
    same(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("last", "adjust"), [("scale_by_shape", "original"), ("match_rms", "match_rms_adamw")]
)
def test_orthogonalized_nesterov_is_muon_up_to_its_16_bit_products(last: str, adjust: str) -> None:
    ours, theirs = (parameters(torch.float32, [(24, 8), (8, 24), (16, 16)]) for _ in range(2))
    before = [p.detach().clone() for p in ours]
    links = [leaf(Transform, name) for name in ("nesterov", "orthogonalize", last)]
    steps(ours, chain(ours, *links), n=4)
    muon = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust)
    steps(theirs, muon, n=4)
    for start, a, b in zip(before, ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()


@law(Transform)
def test_stacks_equal_one_chain_per_parameter(method: Transform) -> None:
    shapes = [s for s in SHAPES if len(s) > 1] * 2
    together, apart = parameters(shapes=shapes), parameters(shapes=shapes)
    steps(together, chain(together, method), missing=True)
    chains = [chain([p], method) for p in apart]
    for step in range(12):
        give(apart, step, missing=True)
        for one in chains:
            one.step()
    same(together, apart, rtol=1e-12, atol=1e-13)


@law(Transform)
def test_16_bit_weights_follow_a_32_bit_copy(method: Transform) -> None:
    shapes = [s for s in SHAPES if len(s) > 1]
    small, wide = parameters(torch.bfloat16, shapes), parameters(torch.bfloat16, shapes)
    for p in small:
        p.grad_dtype = torch.float32
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    before = [p.detach().clone() for p in wide]
    one, other = chain(small, method, rate=1e-3), chain(wide, method, rate=1e-3)
    steps(small, one, n=30)
    steps(wide, other, n=30)
    copies, exact = one.tensors(), other.tensors()
    for i, (p, start) in enumerate(zip(small, before, strict=True)):
        copy, wanted = copies[f"weight/p{i}"], exact[f"weight/p{i}"]
        # One that computes in 16 bits takes a path that is near, not the same.
        near = (0.05 if method.coarse else 0.0) * (wanted - start).norm()
        assert (copy - wanted).norm() <= near
        assert torch.equal(p, copy.bfloat16())


@law(Transform)
def test_saved_and_loaded_it_goes_on_bit_by_bit(method: Transform) -> None:
    shapes = [s for s in SHAPES if len(s) > 1]
    whole, cut = (parameters(torch.float32, shapes) for _ in range(2))
    steps(whole, chain(whole, method), n=10)
    first = chain(cut, method)
    steps(cut, first, n=5)
    saved = {k: v.clone() for k, v in first.tensors().items()}
    fresh = parameters(torch.float32, shapes)
    second = chain(fresh, method)
    second.load_tensors(saved)
    steps(fresh, second, n=5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(whole, fresh, strict=True))


@law(Transform)
def test_a_layer_that_stores_inputs_by_outputs_takes_the_same_steps(method: Transform) -> None:
    """GPT-2's layers do; some are wide and some tall, one is shaped like another's transpose."""
    shapes = [(4, 3), (3, 4), (3, 4), (5, 5)]
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(o, i, generator=draw, dtype=torch.float64) for o, i in shapes]
    models = []
    for kinds in ("LLLL", "CCLC"):
        layers = nn.ModuleList()
        for kind, weight in zip(kinds, weights, strict=True):
            o, i = weight.shape
            layer = Conv1D(o, i) if kind == "C" else nn.Linear(i, o)
            layer.weight = nn.Parameter(weight.mT.contiguous() if kind == "C" else weight.clone())
            layers.append(layer.requires_grad_(False))
            layer.weight.requires_grad_()
        models.append(layers)
    chains = [Optimizer(matrices=Group(transforms=(method,))).build(m) for m in models]
    for step in range(4):
        for number, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            plain, other = (m[number] for m in models)
            absent = step == 2 and number == 1
            plain.weight.grad = None if absent else grad
            other.weight.grad = None if absent else grad.mT if isinstance(other, Conv1D) else grad
        for one in chains:
            one.step()
    for plain, other in zip(*models, strict=True):
        turned = other.weight.mT if isinstance(other, Conv1D) else other.weight
        torch.testing.assert_close(turned, plain.weight, rtol=1e-10, atol=1e-12)


def test_whole_tensors_are_handed_on_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone before the one after the next is gathered."""
    one = chain(parameters())
    wanted = one.tensors()
    gathered: list[ref[Tensor]] = []
    alive = []

    def whole(own: Tensor, parameter: Tensor) -> Tensor:
        alive.append(sum(old() is not None for old in gathered))
        made = own.clone()
        gathered.append(ref(made))
        return made

    monkeypatch.setattr(optimizer_module, "_whole", whole)
    assert all(torch.equal(value, wanted[key]) for key, value in one.each())
    assert len(alive) == len(wanted) == len(SHAPES)
    assert max(alive) == 1


def test_state_dict_goes_through_torch_save_and_keeps_rates(tmp_path: Any) -> None:
    ps = parameters(torch.float32)
    one = chain(ps, leaf(Transform, "adam"))
    one.set_factor(0.5)
    steps(ps, one, n=3)
    torch.save(one.state_dict(), tmp_path / "state")
    fresh = parameters(torch.float32)
    other = chain(fresh, leaf(Transform, "adam"), rate=1.0)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.param_groups[0]["lr"] == 0.025
    assert all(torch.equal(a, b) for a, b in zip(ps, fresh, strict=True))


def test_state_of_another_model_is_refused() -> None:
    ps = parameters()
    one = chain(ps, leaf(Transform, "adam"))
    saved = one.tensors()
    with pytest.raises(UserError, match="weight/p2 is missing"):
        one.load_tensors({k: v for k, v in saved.items() if k != "weight/p2"})
    with pytest.raises(UserError, match=r"memory/p0/0/mean has shape \(1,\)"):
        one.load_tensors(saved | {"memory/p0/0/mean": torch.zeros(1)})


def test_decay_shrinks_and_factor_scales() -> None:
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    one = chain(ps, rate=0.5, decay=0.2)
    one.set_factor(0.1)
    for p in ps:
        p.grad = torch.zeros_like(p)
    one.step()
    same(ps, [nn.Parameter(b * (1 - 0.05 * 0.2)) for b in before])


def test_a_closure_is_evaluated_with_gradients() -> None:
    ps = parameters()

    def closure() -> float:
        loss = sum(p.square().sum() for p in ps)
        assert isinstance(loss, Tensor)
        loss.backward()
        return float(loss.detach())

    one = chain(ps, rate=0.1, decay=0.0)
    first = one.step(closure)
    one.zero_grad()
    second = one.step(closure)
    assert first is not None
    assert second == pytest.approx(first * 0.64)


@pytest.mark.parametrize("kind", ["llama", "llama_untied", "qwen3", "gpt2"])
def test_layers_are_matrices_and_the_rest_is_the_rest(kind: str) -> None:
    model: PreTrainedModel = tiny.model(kind)
    frozen = next(p for p in model.parameters() if p.ndim == 1)
    frozen.requires_grad_(False)
    built = Optimizer(matrices=Group(decay=0.3)).build(model)
    groups = {g["weight_decay"]: set(g["param_names"]) for g in built.param_groups}
    for name, parameter in model.named_parameters():
        table = "embed" in name or "lm_head" in name or "wte" in name or "wpe" in name
        matrix = parameter.ndim > 1 and not table
        assert (name in groups[0.3]) == matrix
        assert (name in groups[0.0]) == (not matrix and parameter is not frozen)


@pytest.mark.parametrize("kind", ["llama", "llama_untied"])
def test_scales_of_a_packed_table_are_no_matrix(kind: str) -> None:
    model: PreTrainedModel = tiny.model(kind)
    head = "lm_head" if kind == "llama" else None
    fields: dict[str, Any] = {"bits": 4, "group": 16, "zero": False, "levels": False, "head": head}
    QuantizedEmbedding(module="model.embed_tokens", **fields).install(model)
    model.requires_grad_(True)
    matrices, rest = Optimizer().build(model).param_groups
    assert "model.embed_tokens.scale" in rest["param_names"]
    assert not any("embed" in name or "head" in name for name in matrices["param_names"])


def test_transforms_for_matrices_are_refused_for_vectors() -> None:
    group = Group(transforms=(leaf(Transform, "orthogonalize"),))
    with pytest.raises(UserError, match="orthogonalize is for matrices, but p3 is a vector"):
        chain(parameters(), *group.transforms)


def test_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no parameter"):
        Optimizer().build(model)


def test_cast_changes_parameters_only() -> None:
    model = tiny.model("llama")
    rotary = next(b for name, b in model.named_buffers() if "inv_freq" in name)
    before = rotary.clone()
    cast(model, torch.bfloat16)
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert torch.equal(rotary, before)
    tokens = tiny.tokens()
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is None or p.grad.dtype is torch.float32 for p in model.parameters())
