"""What the runner itself does on the model: the start of all contenders, and their layer errors."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from turns import rows

from drawplate.model import ModelConfig, build


def save_start(folder: Path, vocabulary: int) -> PreTrainedModel:
    """A model with a tokenizer whose words are t0, t1, ...; its end token is never drawn."""
    model = build(ModelConfig(), vocabulary, 0).eval()
    model.save_pretrained(folder)
    words = {f"t{token}": token for token in range(vocabulary)} | {"<end>": vocabulary}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="t0", model_max_length=512
    )
    named.save_pretrained(folder)
    return model


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers of all blocks."""
    kinds = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in kinds if name != "lm_head"]


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, settings: dict[str, Any], files: dict[str, Path]
) -> dict[str, float]:
    """Mean over layers of |X (W - W')^T|^2 / |X W^T|^2, X the inputs in the original model."""
    grams: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, 1).double()
            grams[name] = grams.get(name, 0) + x.T @ x

        return add

    layers = linear_layers(model)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    tokens = rows(settings["rows"], settings["length"], settings["vocabulary"], 9)
    for part in tokens.split(settings["batch"]):
        model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()

    def size(matrix: torch.Tensor, name: str) -> float:
        return float((matrix @ grams[name] * matrix).sum())

    found = {}
    for contender, file in files.items():
        new, shares = load_file(file), []
        for name in layers:
            old = model.get_submodule(name).weight.double()
            shares.append(size(old - new[name].double(), name) / size(old, name))
        found[contender] = sum(shares) / len(shares)
    return found
