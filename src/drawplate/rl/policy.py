"""What a policy thinks of given answers: log-probabilities and entropies of their tokens.

The policy is softmax(logits / temperature), the distribution that answers are sampled from. Rows
are padded on the right, where a causal model needs no attention mask.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drawplate.train.attention import attention_for
from drawplate.train.loss import token_losses

Head = Callable[[Tensor], Tensor]
ROWS = 1024
"""Tokens whose logits are held at a time where entropies are computed."""


def judge(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, with a gradient, and entropy of its distribution.

    Integer tokens [B, T], bool mask [B, T] that leaves out column 0 -> 2 x [B, T], in nats, zero
    outside the mask.
    """
    hidden, head = _before(model, tokens, mask, temperature)
    logp = -token_losses(hidden, head, tokens[mask])
    with torch.no_grad():
        some = torch.split(hidden, ROWS)
        entropy = torch.cat([torch.special.entr(head(h).softmax(-1)).sum(-1) for h in some])
    return _spread(logp, mask), _spread(entropy, mask)


def _before(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Head]:
    """The hidden state that predicts each answer token, [N, H], and what makes logits of it."""
    with attention_for(model, tokens.shape[1]):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    output = cast("Head", model.get_output_embeddings())

    def head(states: Tensor) -> Tensor:
        logits = output(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature

    return hidden[:, :-1][mask[:, 1:]], head


def _spread(figures: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [B, T]: each token's figure in its place, zero elsewhere."""
    return figures.new_zeros(mask.shape).masked_scatter(mask, figures)
