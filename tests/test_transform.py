"""Laws of all optimizer transforms, and their oracles."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from drawplate.core.method import leaves
from drawplate.train.transform import Transform
from tests.laws import law


def gradients(
    n: int = 3, shape: tuple[int, ...] = (5, 4), steps: int = 4, seed: int = 0
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=draw, dtype=torch.float64) for _ in range(steps)]


def weights(n: int = 3, shape: tuple[int, ...] = (5, 4), size: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(9)
    return size * torch.randn(n, *shape, generator=draw, dtype=torch.float64)


def follow(method: Transform, directions: list[Tensor], parameter: Tensor) -> list[Tensor]:
    memory = method.init(parameter)
    steps = []
    for direction in directions:
        step, memory = method.update(direction, memory, parameter)
        steps.append(step)
    return steps


def shapes(method: Transform) -> list[tuple[int, ...]]:
    wide = [(5, 4), (3, 7), (4, 4), (2, 3, 6)]
    return wide if "matrix" in method.needs else [*wide, (6,), (1,)]


def neighbours(method: Transform) -> Iterator[tuple[str, Transform]]:
    """For each field, the leaf with another legal value of it."""
    for name, value in method.model_dump(exclude={"name"}).items():
        for other in (value * 2, value / 2, value + 1):
            try:
                yield name, type(method).model_validate(method.model_dump() | {name: other})
            except ValidationError:
                continue


@law(Transform)
def test_same_inputs_same_steps_and_inputs_unchanged(method: Transform) -> None:
    given, parameter = gradients(), weights()
    before = [g.clone() for g in given], parameter.clone()
    first, second = follow(method, given, parameter), follow(method, given, parameter)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before[0], strict=True))
    assert torch.equal(parameter, before[1])


@law(Transform)
def test_memory_is_not_changed_in_place(method: Transform) -> None:
    given, parameter = gradients(), weights()
    _, memory = method.update(given[0], method.init(parameter), parameter)
    before = {k: v.clone() for k, v in memory.items()}
    method.update(given[1], memory, parameter)
    assert all(torch.equal(memory[k], v) for k, v in before.items())


@law(Transform)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(method: Transform, dtype: torch.dtype) -> None:
    for shape in shapes(method):
        parameter = weights(2, shape).to(dtype)
        for step in follow(method, [g.to(dtype) for g in gradients(2, shape)], parameter):
            assert step.shape == parameter.shape
            assert step.dtype == dtype
            assert step.is_contiguous()


@law(Transform)
def test_a_stack_equals_a_loop(method: Transform) -> None:
    for shape in shapes(method):
        given, parameter = gradients(3, shape), weights(3, shape)
        stacked = follow(method, given, parameter)
        for n in range(3):
            alone = follow(method, [g[n : n + 1] for g in given], parameter[n : n + 1])
            for one, step in zip(alone, stacked, strict=True):
                torch.testing.assert_close(step[n : n + 1], one, rtol=1e-12, atol=1e-14)


@law(Transform)
def test_memory_has_one_row_per_parameter(method: Transform) -> None:
    parameter = weights()
    memory = method.init(parameter)
    after = method.update(gradients()[0], memory, parameter)[1]
    assert {k: v.shape for k, v in memory.items()} == {k: v.shape for k, v in after.items()}
    assert all(len(tensor) == len(parameter) for tensor in memory.values())


@law(Transform)
def test_no_gradient_no_step(method: Transform) -> None:
    nothing = [torch.zeros(2, 5, 4, dtype=torch.float64)] * 3
    for step in follow(method, nothing, weights(2)):
        assert torch.equal(step, torch.zeros_like(step))


@law(Transform)
def test_rows_and_columns_may_change_places(method: Transform) -> None:
    given, parameter = gradients(), weights()
    rows, columns = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 3, 0, 2])
    straight = follow(method, given, parameter)
    moved = follow(
        method, [g[:, rows][:, :, columns] for g in given], parameter[:, rows][:, :, columns]
    )
    for one, other in zip(straight, moved, strict=True):
        torch.testing.assert_close(one[:, rows][:, :, columns], other, rtol=1e-9, atol=1e-12)


@law(Transform)
def test_scaling_the_gradient_scales_the_step_or_leaves_it(method: Transform) -> None:
    given, parameter = gradients(), weights()
    straight = follow(method, given, parameter)
    scaled = follow(method, [1024 * g for g in given], parameter)
    ratios = torch.cat([(b / a).flatten() for a, b in zip(straight, scaled, strict=True)])
    power = round(float(ratios.median().log2()) / 10)
    assert power in (0, 1)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1024.0**power), rtol=1e-5, atol=1e-5)


@law(Transform)
def test_goes_downhill_on_a_parabola(method: Transform) -> None:
    target = weights(2, (4, 4))
    x = target + weights(2, (4, 4), 0.5)
    start = float((x - target).square().sum())
    memory = method.init(x)
    for i in range(400):
        step, memory = method.update(x - target, memory, x)
        x = x - 0.05 * (1 - i / 400) * step
    assert float((x - target).square().sum()) < 0.02 * start


@law(Transform)
def test_equals_its_oracle(method: Transform) -> None:
    reference = import_module(f"tests.oracle.train.transform.{method.name}").reference
    for leaf in (method, *(other for _, other in neighbours(method))):
        fields = leaf.model_dump(exclude={"name"})
        for shape in [(5, 4), (3, 7)]:
            given, parameter = gradients(1, shape, 5), weights(1, shape)
            expected = reference([g[0].numpy() for g in given], parameter[0].numpy(), **fields)
            for step, other in zip(follow(leaf, given, parameter), expected, strict=True):
                np.testing.assert_allclose(step[0].numpy(), other, rtol=1e-10, atol=1e-13)


@law(Transform)
def test_every_field_matters(method: Transform) -> None:
    matters: dict[str, bool] = {}
    for name, other in neighbours(method):
        for size in (1.0, 10.0):
            one = follow(method, gradients(), weights(size=size))
            two = follow(other, gradients(), weights(size=size))
            differs = any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))
            matters[name] = matters.get(name, False) or differs
    assert set(matters) == set(type(method).model_fields) - {"name"}
    assert all(matters.values()), matters


@law(Transform)
def test_survives_being_written_down(method: Transform) -> None:
    assert type(method).model_validate(method.model_dump()) == method
    with pytest.raises(ValidationError):
        type(method).model_validate({"nonsense": 1})


def make(name: str, **fields: Any) -> Transform:
    return leaves(Transform)[name](**fields)


def test_orthogonal_steps_keep_singular_vectors_and_even_out_values() -> None:
    (gradient,) = gradients(4, (12, 8), 1)
    (step,) = follow(make("orthogonalize"), [gradient], gradient)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.6
    assert values.max() < 1.25
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    polar = left @ right
    symmetric = polar.mT @ step
    torch.testing.assert_close(symmetric, symmetric.mT, rtol=1e-8, atol=1e-10)
    assert torch.linalg.eigvalsh(symmetric).min() > 0


def test_matched_steps_have_the_root_mean_square_that_was_asked_for() -> None:
    left, _, right = torch.linalg.svd(gradients(2, (12, 6), 1)[0], full_matrices=False)
    (step,) = follow(make("match_rms", rms=0.3), [left @ right], weights(2, (12, 6)))
    torch.testing.assert_close(
        step.square().mean((1, 2)).sqrt(), torch.full((2,), 0.3, dtype=torch.float64)
    )


def test_bias_correction_is_right_in_single_precision() -> None:
    gradient = torch.full((1, 3), 1e-3)
    step = follow(make("adam", square=0.999, eps=1e-12), [gradient], gradient)[0]
    torch.testing.assert_close(step, torch.ones(1, 3), rtol=1e-6, atol=0)
