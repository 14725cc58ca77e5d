"""How far a model's perplexity rises when noise is added to one of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drawplate import edits
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.seeds import generator
from drawplate.edits.sparse import SparseLinear


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, batch: int = 8) -> float:
    """The exponential of the mean of -ln p over the tokens of rows [N, T], each but a row's first.

    Raises:
        UserError: rows of one token, behind which nothing is left to predict.
        NotFinite: the mean is NaN or infinite.
    """
    if tokens.shape[1] < 2:
        raise UserError(
            "quantize.calibration.length: perplexities need rows of 2 tokens or more, these have 1"
        )
    total = 0.0
    with edits.materialized(model):
        for rows in torch.split(tokens, batch):
            ids = rows.to(edits.placement(model)["device"])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            total += float(losses.sum(dtype=torch.float64))
    mean = torch.tensor(total / (len(tokens) * (tokens.shape[1] - 1)), dtype=torch.float64)
    if not mean.isfinite():
        raise NotFinite("the model's loss on the calibration rows is NaN or infinite")
    return float(mean.exp())


@torch.no_grad()
def rise(
    model: nn.Module, tokens: Tensor, path: str, size: float, seed: int, base: float, batch: int = 8
) -> float:
    """Perplexity with noise of `size` |W| in the layer at `path`, less `base`; W is put back.

    The mean of both signs of the noise: E ((ppl(W + N) + ppl(W - N)) / 2) - ppl(W). Of a sparse
    layer only surviving weights move.
    """
    module = edits.submodule(model, path)
    weight = module.values if isinstance(module, SparseLinear) else module.get_parameter("weight")
    kept = weight.detach().clone()
    drawn = torch.randn(weight.shape, generator=generator(seed, "noise", path), dtype=torch.float64)
    step = drawn.to(kept) * (size * kept.float().norm() / drawn.norm().to(kept.device)).to(kept)
    found = []
    try:
        for sign in (1, -1):
            weight.copy_(kept + sign * step)
            found.append(perplexity(model, tokens, batch))
    finally:
        weight.copy_(kept)
    return sum(found) / 2 - base
