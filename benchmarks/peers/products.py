"""The matrix products of a workload and nothing else: what nobody can be faster than here.

Every weight of the model multiplies random rows, as many as the workload has tokens and as many at
once, by oneDNN. Left out are attention, norms, all that lies between layers, drawing of tokens,
optimizers and solvers. A peer's seconds over these are the highest ratio that can be reached on
this processor in these numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from turns import Settings, Turns, documents

from drawplate.core.products import gram

READ_TOGETHER = ("k_proj", "v_proj", "up_proj")
"""Layers whose inputs, and so their second moments, are those of another layer."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[N, I] x [O, I] -> [N, O]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    blocks = {name: model.get_submodule(name).weight.detach() for name in settings.layers}
    head = model.get_output_embeddings().weight.detach()
    work, answer = settings.work, {}
    if work == "documents":
        given = documents(settings.count, settings.mean, settings.longest, settings.vocabulary)
        tokens = sum(map(len, given))
        work, answer = [[2048, tokens, tokens, 1]], {"tokens": tokens}
    read = [w.shape[1] for name, w in blocks.items() if not name.endswith(READ_TOGETHER)]
    most = max(rows for rows, *_ in work)
    widths = {weight.shape[1] for weight in (*blocks.values(), head)}
    inputs = {width: torch.randn(most, width, dtype=dtype) for width in widths}

    def multiply(weights: Iterable[Tensor], rows: int, tokens: int, times: int) -> None:
        for start in range(0, tokens, rows):
            for weight in weights:
                x = inputs[weight.shape[1]][: tokens - start][:rows]
                for _ in range(times):
                    product(x, weight)

    while True:
        turns.wait()
        for rows, tokens, headed, times in work * getattr(settings, "steps", 1):
            multiply(blocks.values(), rows, tokens, times)
            multiply([head], rows, headed, times)
            if settings.moments:
                for _ in range(0, tokens, rows):
                    for width in read:
                        gram(inputs[width])
        turns.done(**answer)


if __name__ == "__main__":
    main()
