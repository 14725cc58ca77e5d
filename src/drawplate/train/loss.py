"""Cross-entropy of next tokens without the logits of all tokens in memory at once."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from drawplate.core.errors import UserError
from drawplate.core.seeds import generator

IGNORED = -100
"""Target of a token that does not count."""
LOGITS = 1 << 22
"""Logits held at a time, at most, unless the vocabulary is so large that 256 rows exceed it."""


def token_losses(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, rows: int | None = None
) -> Tensor:
    """-log softmax(head(h))[target] for every token, zero where the target is `IGNORED`.

    hidden [..., H], targets [...] -> [...] float32 (float64 for float64), in nats. `head` maps
    [N, H] -> [N, V] and is applied to `rows` tokens at a time; unless these are all, the backward
    pass computes it again instead of keeping the logits.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def part(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return functional.cross_entropy(wide, t, reduction="none", ignore_index=IGNORED)

    many = rows or fitting(head)
    pieces = [*zip(torch.split(flat, many), torch.split(wanted, many), strict=True)]
    # The backward pass begins here: a single piece would be let go to be computed again at once.
    if torch.is_grad_enabled() and len(pieces) > 1:
        found = [checkpoint(part, h, t, use_reentrant=False) for h, t in pieces]
    else:
        found = [part(h, t) for h, t in pieces]
    return torch.cat(found).view(targets.shape)


def fitting(head: Callable[[Tensor], Tensor]) -> int:
    """Tokens whose logits are held at a time: `LOGITS` of them, or 1024 rows of unknown width."""
    width = getattr(head, "out_features", None)
    return max(256, LOGITS // width) if isinstance(width, int) else 1024


def states(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """[B, T] -> [B, T, H]: what the output head is given.

    With `positions` that start again at 0 in a row, attention stays within each document.
    """
    given = {} if positions is None else {"position_ids": positions}
    found: Any = model.base_model(input_ids=tokens, use_cache=False, **given)  # type: ignore[operator]
    return cast("Tensor", found.last_hidden_state)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Make sure that the logits of this model are its head applied to its last hidden state.

    The head's output is replaced by noise, which has to come out as the logits; what the head was
    given has to be the last hidden state. Weights of zero hide nothing this way.

    Raises:
        UserError: the model does something else after its last layer (a scale, a soft cap).
    """
    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    given: list[Tensor] = []
    made: list[Tensor] = []

    def noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(inputs[0])
        drawn = 10 * torch.randn(output.shape, generator=generator("check head"))
        made.append(drawn.to(output))
        return made[-1]

    training = model.training
    model.eval()
    handle = head.register_forward_hook(noise)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    finally:
        handle.remove()
        model.train(training)
    if not (len(made) == 1 and _close(logits, made[0]) and _close(given[0], hidden)):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head, which training does "
            "not support; use a decoder without logit scaling or soft capping"
        )


@torch.no_grad()
def check_apart(model: nn.Module) -> None:
    """Make sure that documents in one row do not see each other, as `states` promises.

    What stands in front of a document may not change its states, but for rounding.

    Raises:
        UserError: it does: the model ignores where positions start again.
    """
    weight = next(model.parameters())
    tokens = torch.tensor([[0, 1, 0, 1], [2, 3, 0, 1]], device=weight.device)
    positions = torch.tensor([[0, 1, 0, 1]], device=weight.device).expand_as(tokens)
    training = model.training
    model.eval()
    try:
        one, other = states(model, tokens, positions)[:, 2:].float()
    finally:
        model.train(training)
    rounding = max(torch.finfo(weight.dtype).eps, 1e-4)
    if (one - other).norm() > rounding * one.norm():
        raise UserError(
            f"{type(model).__name__} does not keep texts that share a row apart, which training "
            "needs; use a decoder whose attention follows position_ids, such as Llama"
        )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3)
