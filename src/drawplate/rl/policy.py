"""What a policy thinks of given answers: log-probabilities and entropies of their tokens.

The policy is softmax(logits / temperature), the distribution that answers are sampled from. Rows
are laid end to end, so that little is computed for padding; none of them sees its neighbours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from drawplate.core.products import swift
from drawplate.edits import materialized
from drawplate.train.attention import attention_for
from drawplate.train.loss import fitting, states, token_losses

Head = Callable[[Tensor], Tensor]
LINE = 128
"""Tokens of a line that several rows share, unless a row is longer."""
ROWS = 1024
"""Tokens whose logits are held at a time, at most."""


def judge(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, with a gradient, and entropy of its distribution.

    Integer tokens [B, T], bool mask [B, T] that leaves out column 0 -> 2 x [B, T], in nats, zero
    outside the mask.
    """
    hidden, head, rows = _before(model, tokens, mask, temperature)
    logp = -token_losses(hidden, head, tokens[mask], rows)
    with torch.no_grad():
        some = torch.split(hidden, rows)
        whole = (head(h).log_softmax(-1) for h in some)
        entropy = torch.cat([-torch.linalg.vecdot(p.exp(), p) for p in whole])
    return spread(logp, mask), spread(entropy, mask)


def look(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities as `judge` gives, and the hidden state that predicts each token, [N, H]."""
    hidden, head, rows = _before(model, tokens, mask, temperature)
    return spread(-token_losses(hidden, head, tokens[mask], rows), mask), hidden


def _before(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Head, int]:
    """The hidden state that predicts each answer token, [N, H], and what makes logits of it.

    And of how many at a time.
    """
    line, column = _packed(mask)
    used = column >= 0
    shape = int(line.max()) + 1, int(column.max()) + 1
    packed, positions = (tokens.new_zeros(shape) for _ in range(2))
    places = (line[:, None].expand_as(column)[used], column[used])
    packed[places] = tokens[used]
    positions[places] = torch.arange(mask.shape[1], device=mask.device).expand_as(column)[used]
    output: Any = model.get_output_embeddings()
    with attention_for(model, shape[1]), materialized(model), swift(model):
        hidden = states(model, packed, positions)
        dense = getattr(output, "dense", None)
    product: Head = output
    if dense is not None:  # every piece of rows would decode it again
        product = partial(functional.linear, weight=dense.to(hidden.dtype), bias=output.bias)

    def head(states: Tensor) -> Tensor:
        logits = product(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    asked = mask[:, 1:]
    before = hidden[line[:, None].expand_as(asked)[asked], column[:, :-1][asked]]
    return before, head, min(ROWS, fitting(output))


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, up to the last column of `mask` [B, T], laid end to end in lines of about `LINE`.

    Returns the line of each row [B] and, for each of its columns, the column there, -1 behind its
    end [B, T]. Longest rows first, each into the first line with room.
    """
    lengths = (mask.shape[1] - mask.flip(1).int().argmax(1)).tolist()
    room: list[int] = []
    line, start = [0] * len(lengths), [0] * len(lengths)
    widest = max(LINE, *lengths)
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        place = next((i for i, free in enumerate(room) if free >= lengths[row]), len(room))
        if place == len(room):
            room.append(widest)
        line[row], start[row] = place, widest - room[place]
        room[place] -= lengths[row]
    lines, starts, ends = (torch.tensor(v, device=mask.device) for v in (line, start, lengths))
    steps = torch.arange(mask.shape[1], device=mask.device)
    return lines, (starts[:, None] + steps).masked_fill(steps >= ends[:, None], -1)


def spread(figures: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [B, T]: each token's figure in its place, zero elsewhere."""
    return figures.new_zeros(mask.shape).masked_scatter(mask, figures)
