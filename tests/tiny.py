"""Tiny random decoders of every supported architecture, made in the test."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
_common: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_common, tie_word_embeddings=True),
    "llama_untied": lambda: LlamaConfig(**_common, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_common | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_common, head_dim=8),
    "mistral": lambda: MistralConfig(**_common),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0
    ),
    "phi": lambda: PhiConfig(**_common),
}
_gpt: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FILLING = {
    "gpt_neo": lambda: GPTNeoConfig(
        **_gpt, attention_types=[[["global", "local"], 1]], window_size=5
    ),
    "gptj": lambda: GPTJConfig(**_gpt, rotary_dim=4),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_gpt),
    "falcon_h1": lambda: FalconH1Config(
        **_common, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, ssm_multipliers=[0.5] * 5
    ),
}
"""What they compute with is partly in no file, or a weight is initialised by its parent."""
_types = ["sliding_attention", "full_attention"]
OTHERS = {
    "gemma3": lambda: Gemma3TextConfig(**_common, head_dim=8, sliding_window=5, layer_types=_types),
    "qwen2_window": lambda: Qwen2Config(
        **_common, use_sliding_window=True, sliding_window=5, layer_types=_types[::-1]
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=6, n_head=4),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "phimoe": lambda: PhimoeConfig(**_common, num_local_experts=4),
}
"""Blocks with masks and angles of their own, blocks that give tuples, scaled tables, experts."""


def model(
    kind: str = "llama", seed: int = 0, vocabulary: int = VOCABULARY, context: int = 64
) -> PreTrainedModel:
    """A random decoder in float32 and evaluation mode; its weights are large enough to matter."""
    torch.manual_seed(seed)
    config = (CONFIGS | OTHERS | FILLING)[kind]()
    config.vocab_size, config.max_position_embeddings = vocabulary, context
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return made.float().eval()


def tokens(rows: int = 6, length: int = 16, seed: int = 0) -> torch.Tensor:
    """[rows, length] random token ids."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=draw)
