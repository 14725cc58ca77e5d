"""Chain: the optimizer that all chains of transforms share.

For each parameter w with gradient g:  u = t_k(... t_1(g));  w = w - rate * decay * w - rate * u.

Everything that is not a formula of one method is here: groups, decoupled decay, 32-bit copies of
16-bit weights, parameters split over processes, saving and restoring. Parameters of equal shape are
stacked, so that a chain runs once per shape instead of once per parameter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, OneOf
from drawplate.train.transform import Memory, Transform

STACK = 1 << 24
"""Weights in one stack, at most: bounds the working memory of a step to a few times 64 MiB."""


class Group(Frozen):
    """How one kind of parameter is trained."""

    rate: float = Field(3e-3, gt=0, le=10)
    """Peak learning rate; the schedule multiplies it."""
    decay: float = Field(0.0, ge=0, le=10)
    """Weight decay, decoupled: each step shrinks a weight by rate times decay."""
    transforms: tuple[Annotated[Transform, OneOf()], ...] = Field(
        ({"name": "adam"},), validate_default=True
    )
    """What turns gradients into steps, first to last; empty means plain gradient descent."""


class Optimizer(Frozen):
    """Two groups: the matrices of the layers, and everything else."""

    matrices: Group = Group(decay=0.1)
    """Weights with two dimensions or more, except embeddings and the output head."""
    rest: Group = Group()
    """Embeddings, output head, norms, biases and other vectors."""

    def build(self, model: nn.Module) -> "Chain":
        """The optimizer of all parameters of `model` that require a gradient.

        Raises:
            UserError: nothing is trainable, or `rest` holds a transform for matrices only.
        """
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for ends in ("get_input_embeddings", "get_output_embeddings"):
            end = getattr(model, ends, lambda: None)()
            tables |= {id(p) for p in end.parameters()} if end is not None else set()
        # GPT-2's layers; known by name, as importing transformers takes seconds.
        turned = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
        groups: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and id(parameter) not in tables
                groups[matrix].append((name, parameter))
        return Chain([(self.matrices, groups[True]), (self.rest, groups[False])], turned)


@dataclass
class Stack:
    """Parameters of one shape and group, with what the chain remembers about them."""

    names: list[str]
    parameters: list[Tensor]
    transforms: Sequence[Transform]
    memories: list[Memory] = field(default_factory=list)
    master: Tensor | None = None
    """[N, ...] in 32 bits where the parameters have 16."""
    turned: bool = False
    """Whether the parameters are stored as inputs by outputs."""

    @torch.no_grad()
    def start(self) -> None:
        """Set up the memory before the first step."""
        local = torch.stack([_local(p) for p in self.parameters])
        if local.dtype in (torch.bfloat16, torch.float16):
            self.master = local = local.float()
        for transform in self.transforms:
            self.memories.append(transform.init(self.given(local, transform)))

    def given(self, stacked: Tensor, transform: Transform) -> Tensor:
        """What `transform` is handed: whole where it needs that, its matrices as O by I."""
        if transform.needs and isinstance(self.parameters[0], DTensor):
            stacked = self.gather(stacked)
        return stacked.mT if self._turns(transform) else stacked

    def taken(self, stacked: Tensor, transform: Transform) -> Tensor:
        """The way back from `given`."""
        stacked = stacked.mT.contiguous() if self._turns(transform) else stacked
        if transform.needs and isinstance(self.parameters[0], DTensor):
            stacked = self.share(stacked)
        return stacked

    def _turns(self, transform: Transform) -> bool:
        return self.turned and "matrix" in transform.needs

    def gather(self, stacked: Tensor) -> Tensor:
        """[N, rows of this process, ...] -> [N, all rows, ...]."""
        return torch.stack([_whole(x, p) for x, p in zip(stacked, self.parameters, strict=True)])

    def share(self, stacked: Tensor) -> Tensor:
        """[N, all rows, ...] -> [N, rows of this process, ...]."""
        return torch.stack([_part(x, p) for x, p in zip(stacked, self.parameters, strict=True)])

    def step(self, rate: float, decay: float) -> None:
        """One update of those parameters that have a gradient."""
        rows = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not rows:
            return
        if len(rows) < len(self.parameters):
            self._step_some(rows, rate, decay)
            return
        locals_ = [_local(p) for p in self.parameters]
        weight = torch.stack(locals_) if self.master is None else self.master
        grads = [_local(cast("Tensor", p.grad)) for p in self.parameters]
        direction = torch.stack(grads).to(weight.dtype)
        for i, transform in enumerate(self.transforms):
            direction = direction.to(locals_[0].dtype if transform.coarse else weight.dtype)
            direction, self.memories[i] = transform.update(
                self.given(direction, transform), self.memories[i], self.given(weight, transform)
            )
            direction = self.taken(direction, transform)
        direction = direction.to(weight.dtype)
        weight = (weight * (1 - rate * decay)).sub_(direction, alpha=rate)
        if self.master is not None:
            self.master = weight
        for own, new in zip(locals_, weight, strict=True):
            own.copy_(new)

    def _step_some(self, rows: list[int], rate: float, decay: float) -> None:
        """The same for a part of the stack, the others staying as they are."""
        chosen = torch.tensor(rows, device=self.parameters[0].device)
        some = Stack(
            [self.names[i] for i in rows],
            [self.parameters[i] for i in rows],
            self.transforms,
            [{k: v[chosen] for k, v in memory.items()} for memory in self.memories],
            None if self.master is None else self.master[chosen],
            self.turned,
        )
        some.step(rate, decay)
        if self.master is not None and some.master is not None:
            self.master[chosen] = some.master
        for memory, new in zip(self.memories, some.memories, strict=True):
            for key, value in new.items():
                memory[key][chosen] = value


class Chain(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` made of transforms; its groups carry `lr` and `weight_decay`.

    `turned` holds the ids of matrices that are stored as inputs by outputs.
    """

    def __init__(
        self,
        groups: Iterable[tuple[Group, Iterable[tuple[str, Tensor]]]],
        turned: Collection[int] = (),
    ) -> None:
        listed = [(group, list(named)) for group, named in groups]
        listed = [(group, named) for group, named in listed if named]
        if not listed:
            raise UserError("the model has no parameter that requires a gradient")
        super().__init__(
            [
                {"params": named, "lr": group.rate, "peak": group.rate, "weight_decay": group.decay}
                for group, named in listed
            ],
            {},
        )
        self.stacks: list[list[Stack]] = []
        for group, named in listed:
            _check(group, named)
            self.stacks.append(
                [
                    Stack(*part, group.transforms, turned=id(part[1][0]) in turned)
                    for part in _by_shape(named, turned)
                ]
            )
        for stack in self._all():
            stack.start()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; a closure is evaluated first, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, stacks in zip(self.param_groups, self.stacks, strict=True):
            for stack in stacks:
                stack.step(group["lr"], group["weight_decay"])
        return loss

    def set_factor(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    @torch.no_grad()
    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Everything a resumed run needs, whole and by parameter name, wherever it was computed.

        Keys are `weight/NAME` (in 32 bits where such a copy is kept) and `memory/NAME/LINK/KEY`.
        Every process of a split run has to go through all of it; each tensor is gathered when it
        is its turn, so that they need not fit a device together.
        """
        for stack in self._all():
            for i, (name, parameter) in enumerate(zip(stack.names, stack.parameters, strict=True)):
                own = _local(parameter) if stack.master is None else stack.master[i]
                yield f"weight/{name}", _whole(own, parameter)
                for link, key, value, split in _remembered(stack):
                    row = value[i]
                    whole = _whole(row, parameter) if split else row
                    yield f"memory/{name}/{link}/{key}", whole

    def tensors(self) -> dict[str, Tensor]:
        """All of `each` at once."""
        return dict(self.each())

    @torch.no_grad()
    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, in this or another number of processes.

        Raises:
            UserError: the names or shapes are not those of this optimizer.
        """
        for stack in self._all():
            for i, (name, parameter) in enumerate(zip(stack.names, stack.parameters, strict=True)):
                value = _take(found, f"weight/{name}", parameter.shape)
                own = _part(value.to(parameter.device), parameter)
                _local(parameter).copy_(own)
                if stack.master is not None:
                    stack.master[i] = own
                for link, key, memory, split in _remembered(stack):
                    shape = parameter.shape if split else memory[i].shape
                    value = _take(found, f"memory/{name}/{link}/{key}", shape)
                    value = value.to(parameter.device)
                    memory[i] = _part(value, parameter) if split else value

    def state_dict(self) -> dict[str, Any]:
        """`tensors` and the groups' rates, in a dictionary that torch can store."""
        keys = ("lr", "peak", "weight_decay", "param_names")
        groups = [{key: group[key] for key in keys} for group in self.param_groups]
        return {"state": {k: v.clone() for k, v in self.tensors().items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, the weights included."""
        self.load_tensors(state_dict["state"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: saved[key] for key in ("lr", "peak", "weight_decay")})

    def _all(self) -> Iterator[Stack]:
        for stacks in self.stacks:
            yield from stacks


def _remembered(stack: Stack) -> Iterator[tuple[int, str, Tensor, bool]]:
    """Each tensor of a stack's memories, and whether this process holds only its own rows of it."""
    shape = _local(stack.parameters[0]).shape
    split = isinstance(stack.parameters[0], DTensor)
    for link, (transform, memory) in enumerate(zip(stack.transforms, stack.memories, strict=True)):
        for key, value in memory.items():
            yield link, key, value, split and not transform.needs and value.shape[1:] == shape


def _check(group: Group, named: list[tuple[str, Tensor]]) -> None:
    for transform in group.transforms:
        flat = next((name for name, p in named if p.ndim < 2), None)
        if "matrix" in transform.needs and flat is not None:
            raise UserError(
                f"transform {transform.name} is for matrices, but {flat} is a vector; "
                "use it in `optimizer.matrices` only"
            )


def _by_shape(
    named: list[tuple[str, Tensor]], turned: Collection[int]
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Parameters of equal shape, dtype, device and turn together, in stacks of bounded size."""
    kinds: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for name, parameter in named:
        kind = (parameter.shape, parameter.dtype, parameter.device, id(parameter) in turned)
        kinds.setdefault(kind, []).append((name, parameter))
    for members in kinds.values():
        many = max(1, STACK // max(1, members[0][1].numel()))
        for start in range(0, len(members), many):
            part = members[start : start + many]
            yield [name for name, _ in part], [parameter for _, parameter in part]


def _local(parameter: Tensor) -> Tensor:
    """The rows of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole(own: Tensor, parameter: Tensor) -> Tensor:
    """This process' rows of something shaped like `parameter` -> all rows."""
    if not isinstance(parameter, DTensor):
        return own
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, shape=shape, stride=stride
    ).full_tensor()


def _part(whole: Tensor, parameter: Tensor) -> Tensor:
    """All rows of something shaped like `parameter` -> this process' rows."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(
        whole, parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()


def _take(found: Mapping[str, Tensor], key: str, shape: Sequence[int]) -> Tensor:
    value = found.get(key)
    if value is None or value.shape != torch.Size(shape):
        what = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise UserError(f"saved optimizer state {key} {what}, expected shape {tuple(shape)}")
    return value
