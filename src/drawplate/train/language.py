"""Next-token prediction as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.core.batches import IGNORE
from drawplate.core.batches import Batch as Rows
from drawplate.train.loss import causal_losses


def shifted(labels: Tensor) -> Tensor:
    """Labels [B, T] of the tokens themselves -> targets [B, T] of the tokens before them."""
    last = labels.new_full((len(labels), 1), IGNORE)
    return torch.cat([labels[:, 1:], last], dim=1)


def named(rows: Rows) -> dict[str, Tensor]:
    """Rows as the loop hands them on: tokens, targets, positions, and how many are learned.

    Positions start again with every document, so that no solution is learned from its place in a
    row or from the neighbour that packing gave it.
    """
    targets = shifted(rows.labels)
    return {
        "tokens": rows.input_ids,
        "targets": targets,
        "positions": rows.position_ids,
        "learned": (targets != IGNORE).sum(),
    }


class NextToken:
    """Mean loss over the learned tokens of a batch; which rows a step sees is `rows`' affair."""

    def __init__(self, rows: Callable[[int], Rows], identity: Mapping[str, Any]):
        self.rows = rows
        self.identity = identity

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of `step`."""
        return named(self.rows(step))

    def loss(
        self, model: nn.Module, part: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the batch's mean loss, in nats."""
        losses = causal_losses(model, part["tokens"], part["targets"], part["positions"])
        count = torch.tensor(part["tokens"].numel())
        return losses.sum() / part["learned"].clamp(min=1), {"tokens": count}

    def state(self) -> dict[str, Any]:
        """Nothing: rows are a function of the step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to go back to."""
