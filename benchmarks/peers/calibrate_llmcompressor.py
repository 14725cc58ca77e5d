"""One-shot Wanda, SparseGPT or GPTQ with llm-compressor."""

import copy

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import Settings, Turns, matrices, rows


def recipe(settings: Settings) -> object:
    """The modifier of `settings.method`."""
    if settings.method == "gptq":
        weights = QuantizationArgs(
            num_bits=settings.bits,
            strategy="group",
            group_size=settings.group,
            symmetric=False,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[settings.method]
    return kind(
        sparsity=settings.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"]
    )


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    transformers.logging.set_verbosity_error()
    dense = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokens = rows(settings.rows, settings.length, settings.vocabulary, 9)
    data = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    while True:
        model, how = copy.deepcopy(dense), recipe(settings)
        turns.wait()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=how,
            max_seq_length=settings.length,
            num_calibration_samples=settings.rows,
            batch_size=settings.batch,
            log_dir=None,
        )
        turns.done()
        save_file(matrices(model, settings.layers), settings.weights)


if __name__ == "__main__":
    main()
