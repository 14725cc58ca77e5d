"""Attention for short rows in bf16: three matrix products, which a CPU does fastest.

    softmax(scale Q K^T + bias) V

PyTorch's fused kernel keeps [T, T] scores out of memory, which pays on long rows; on rows of a
few hundred tokens its bookkeeping costs more than the scores. In float32 the two are even.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "drawplate_short_rows"
LONGEST = 512
"""Tokens in a row up to which the plain products are faster."""


def short_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Query [B, H, T, K], key and value [B, H / n, T, K], additive mask [B or 1, 1, T, T].

    Returns [B, T, H, K] and, as the interface wants, no weights.
    """
    B, H, T, K = query.shape
    if key.shape[1] != H:
        key, value = (t.repeat_interleave(H // t.shape[1], 1) for t in (key, value))
    flat = (B * H, T, -1)
    scale = K**-0.5 if scaling is None else scaling
    if attention_mask is None:
        attention_mask = query.new_full((T, T), torch.finfo(query.dtype).min).triu(1)[None, None]
    scores = torch.bmm(query.reshape(flat) * scale, key.reshape(flat).mT)
    scores = scores.view(B, H, T, T).add_(attention_mask).reshape(flat)
    weights = nn.functional.dropout(torch.softmax(scores, -1), dropout, module.training)
    mixed = torch.bmm(weights, value.reshape(flat)).view(B, H, T, -1)
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, short_rows)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def attention_for(
    model: nn.Module, length: int, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Inside, a bf16 model on a CPU that uses the fused kernel attends to short rows this way.

    Other lengths, dtypes and devices and models with an attention of their own stay as they are.
    `dtype` is what the model will compute in, where that is not yet its own.
    """
    config = cast("Any", model).config
    before = getattr(config, "_attn_implementation", None)
    weight = next(model.parameters())
    suited = (dtype or weight.dtype) is torch.bfloat16 and weight.device.type == "cpu"
    if before != "sdpa" or length > LONGEST or not suited:
        yield
        return
    named = cast("PreTrainedModel", model)
    named.set_attn_implementation(NAME)
    try:
        yield
    finally:
        named.set_attn_implementation(before)
