"""Who competes in what, with which settings, and what each environment is made of."""

from typing import Any, NamedTuple

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "huggingface": [TORCH, f"{TORCH} transformers==5.23.0 accelerate==1.15.0"],
    "litgpt": [TORCH, f"{TORCH} litgpt==0.5.13 lightning==2.6.6"],
    "trl": [TORCH, f"{TORCH} trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0"],
    "llmcompressor": [TORCH, f"{TORCH} llmcompressor==0.14.0.1 transformers==5.17.0"],
    "gptqmodel": [TORCH, f"{TORCH} gptqmodel==7.6.0 transformers==5.23.0"],
}
"""Arguments of one `pip install` after the other: torch first, which the peers then have to keep.
"""
PACKAGES = (
    "accelerate",
    "compressed-tensors",
    "drawplate",
    "gptqmodel",
    "lightning",
    "litgpt",
    "llmcompressor",
    "numpy",
    "torch",
    "transformers",
    "trl",
)
"""Whose versions are recorded."""


class Contender(NamedTuple):
    """One line of a table."""

    name: str
    environment: str | None
    """None: ours, in the interpreter that runs."""
    worker: str
    """File in this folder."""
    settings: dict[str, Any]
    group: str = ""
    """Only contenders of a group are compared."""


VOCABULARY = 2048
SETTINGS: dict[str, dict[str, Any]] = {
    "train": {"batch": 16, "length": 256, "steps": 4, "rate": 1e-3, "tokens": 16 * 256},
    "grpo": {
        "prompts": 8,
        "samples": 8,
        "prompt": 32,
        "new": 64,
        "rate": 1e-6,
        "steps": 1,
        "tokens": 64 * 64,
    },
    "calibrate": {
        "rows": 64,
        "length": 256,
        "batch": 8,
        "sparsity": 0.5,
        "bits": 4,
        "group": 64,
        "tokens": 64 * 256,
    },
    "evaluate": {"count": 128, "mean": 150, "longest": 500, "end": 0},
}
for _settings in SETTINGS.values():
    _settings["vocabulary"] = VOCABULARY
LITGPT = {
    "block_size": 512,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "n_layer": 6,
    "n_head": 8,
    "n_embd": 256,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5,
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 704,
}
"""The model in litgpt's words."""


def contenders(what: str) -> list[Contender]:
    """All of a comparison."""
    return {"train": train, "grpo": grpo, "calibrate": calibrate, "evaluate": evaluate}[what]()


def products(
    dtype: str,
    work: list[tuple[int, int, int, int]] | str,
    moments: bool = False,
    group: str = "",
) -> Contender:
    """The bare products of a step: rows at once, tokens, those that the head sees, how often.

    A weight multiplies once in a forward pass and three times with both of its gradients. `moments`
    are the sums of x x^T over the inputs of layers.
    """
    given = {"dtype": dtype, "work": work, "moments": moments}
    return Contender(f"{group} products {dtype}".strip(), None, "products", given, group)


def train() -> list[Contender]:
    """Trainer, litgpt's loop, ours."""

    def trainer(name: str, bf16: bool, compiled: bool) -> Contender:
        given = {"bf16": bf16, "compile": compiled}
        return Contender(f"Trainer {name}", "huggingface", "train_huggingface", given)

    def litgpt(name: str, compiled: bool) -> Contender:
        given = {"shape": LITGPT, "compile": compiled}
        return Contender(f"litgpt {name}", "litgpt", "train_litgpt", given)

    def ours(name: str, precision: str, compiled: bool) -> Contender:
        given = {"precision": precision, "compile": compiled}
        return Contender(f"drawplate {name}", None, "train_drawplate", given)

    return [
        trainer("fp32", False, False),
        trainer("bf16", True, False),
        trainer("bf16 compiled", True, True),
        litgpt("bf16", False),
        litgpt("bf16 compiled", True),
        ours("bf16", "bf16", False),
        ours("bf16 compiled", "bf16", True),
        products("bfloat16", [(16 * 256, 16 * 256, 16 * 256, 3)]),
    ]


def grpo() -> list[Contender]:
    """TRL and ours; bf16 are 16-bit weights."""
    found = []
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        found.append(Contender(f"TRL {name}", "trl", "grpo_trl", {"dtype": dtype}))
        found.append(Contender(f"drawplate {name}", None, "grpo_drawplate", {"dtype": dtype}))
        read, drawn, learnt = 8 * 31, 64 * 64, 64 * 95
        work = [(read, read, 0, 1), (64, drawn, drawn, 1), (learnt, learnt, drawn, 3)]
        found.append(products(dtype, work))
    return found


def calibrate() -> list[Contender]:
    """llm-compressor, GPTQModel and ours, method by method."""

    def theirs(method: str) -> Contender:
        given = {"method": method}
        title = f"llm-compressor {method}"
        return Contender(title, "llmcompressor", "calibrate_llmcompressor", given, method)

    def ours(method: str, group: str) -> Contender:
        given = {"method": method}
        return Contender(f"drawplate {method}", None, "calibrate_drawplate", given, group)

    def bare(method: str, moments: bool) -> Contender:
        """Every block multiplies twice: as it was, and as it has become."""
        return products("float32", [(8 * 256, 64 * 256, 0, 2)], moments, method)

    return [
        theirs("wanda"),
        ours("wanda", "wanda"),
        bare("wanda", False),
        theirs("sparsegpt"),
        ours("sparsegpt", "sparsegpt"),
        ours("refit", "sparsegpt"),
        bare("sparsegpt", True),
        theirs("gptq"),
        Contender("GPTQModel gptq", "gptqmodel", "calibrate_gptqmodel", {}, "gptq"),
        ours("gptq", "gptq"),
        bare("gptq", True),
    ]


def evaluate() -> list[Contender]:
    """The usual loops and ours."""
    loop, own = "evaluate_huggingface", "evaluate_drawplate"
    return [
        Contender("loop, one by one", "huggingface", loop, {"batch": 1}),
        Contender("loop, sorted, by 16", "huggingface", loop, {"batch": 16}),
        Contender("drawplate fp32", None, own, {"precision": "float32"}),
        Contender("drawplate bf16", None, own, {"precision": "bf16"}),
        products("float32", "documents"),
        products("bfloat16", "documents"),
    ]
