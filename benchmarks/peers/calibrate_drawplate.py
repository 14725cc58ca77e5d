"""Our Wanda, SparseGPT, conjugate-gradient refit and GPTQ, as the stages call them."""

import copy
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from turns import Settings, Turns, rows

from drawplate import edits
from drawplate.compress.driver import Compress, compress
from drawplate.core.hf import stored_bytes
from drawplate.quantize.driver import Quantize, quantize

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"prune": {"name": "wanda"}, "update": {"name": "unchanged"}, "rounds": 1},
    "sparsegpt": {
        "prune": {"name": "obs"},
        "pattern": {"name": "unstructured", "within": "layer"},
        "update": {"name": "obs"},
        "rounds": 1,
        "block": 128,
    },
    "refit": {"prune": {"name": "wanda"}, "update": {"name": "refit"}, "rounds": 4},
}


def share(model: Any, layers: list[str], sparsity: float) -> float:
    """What share of the stored bytes goes when every layer gets `sparsity`, masks included."""
    weights = [model.get_submodule(layer).weight for layer in layers]
    saved = sum(
        round(sparsity * w.numel()) * w.element_size() - -(-w.numel() // 8) for w in weights
    )
    return saved / stored_bytes(model)


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    start = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    tokens = rows(settings.rows, settings.length, settings.vocabulary, 9)
    while True:
        model = copy.deepcopy(start)
        checks = {}
        turns.wait()
        if settings.method == "gptq":
            quantize(
                model,
                tokens,
                Quantize(bits=settings.bits, group=settings.group, vocabulary=None),
                batch=settings.batch,
            )
        else:
            how = {
                "name": "sparse",
                "pattern": {"name": "unstructured"},
                "allocation": {"name": "uniform"},
                **METHODS[settings.method],
            }
            ratio = share(model, settings.layers, settings.sparsity)
            asked = Compress.model_validate({"ratio": ratio, "method": how})
            ledger = compress(model, tokens, asked, batch=settings.batch)
            checks["sparsity"] = min(row.sparsity for row in ledger.rows)
        turns.done(**checks)
        dense = {name: edits.matrix(model.get_submodule(name)) for name in settings.layers}
        dense = {name: w.detach().float().contiguous() for name, w in dense.items()}
        save_file(dense, settings.weights)


if __name__ == "__main__":
    main()
