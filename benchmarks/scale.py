"""What compressing and quantizing one decoder block takes, beside the formulas of docs/scale.md.

    python benchmarks/scale.py                       three small blocks; writes results/scale.*
    python benchmarks/scale.py --block llama-70b --stage "quantize nearest" --only q_proj k_proj

Each block is a Llama-3-70B block made smaller in all its widths alike, with random weights in
bfloat16 and a small vocabulary, in a process of its own. Peaks are growth over what the libraries
and a first tiny block take. The second form runs one block of real size and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIDTHS = (512, 1024, 1536)
STAGES = {
    "quantize nearest": {"round": {"name": "nearest"}},
    "quantize gptq": {"round": {"name": "gptq"}},
    "compress wanda": {
        "ratio": 0.3,
        "method": {
            "name": "sparse",
            "prune": {"name": "wanda"},
            "update": {"name": "unchanged"},
            "rounds": 1,
        },
    },
}
VOCABULARY = 1024


def scaled(hidden: int) -> Any:
    """The shape of a Llama-3-70B block of this width."""
    from drawplate.forecast.shape import LLAMA_70B, Shape

    heads = hidden // 128
    kv_heads = max(heads // 8, 1)
    return (
        Shape(hidden, 1, heads, kv_heads, hidden * 7 // 2, VOCABULARY)
        if (hidden != LLAMA_70B.hidden)
        else LLAMA_70B._replace(layers=1, vocabulary=VOCABULARY)
    )


def work(shape: Any, tokens: int, stage: str) -> float:
    """Multiply-adds of a block: forward passes, Gram matrices, solving, and the ledger's errors.

    The ledger's error of a layer multiplies two [O, I] matrices by the Gram matrix: 2 O I^2.
    GPTQ adds I^3 for the inverse and O I^2 for the layer; a Gram matrix takes R I^2.
    """
    matrices = shape.matrices.values()
    total = tokens * sum(o * i for o, i in matrices)
    total += tokens * sum(width**2 for width in shape.inputs)
    total += 2 * sum(o * i * i for o, i in matrices)
    if stage == "quantize gptq":
        total += sum(width**3 for width in shape.inputs) + sum(o * i * i for o, i in matrices)
    return float(total)


def memory(shape: Any, tokens: int, stage: str) -> int:
    """Most bytes at once, beside the libraries: weights and what gathering or the ledger holds."""
    from drawplate.core.linalg import SLAB

    weights = 2 * shape.parameters
    f, h = shape.feed_forward, shape.hidden
    sums = shape.gathering()
    # The widest Gram matrix is added last, in float32, to the float64 sums of all.
    gather = sums + 4 * f * f
    # Records in float32 beside the sums.
    record = sums + sums // 2
    # The ledger's error of down_proj, beside all records: dense and difference in float64 and
    # float32, a slab of its Gram matrix and its image in float64.
    ledger = sums // 2 + 2 * 12 * h * f + 8 * min(SLAB, f) * (f + 2 * h)
    # GPTQ's inverse, five float64 matrices at its peak, beside all records and the weights.
    inverse = sums // 2 + 5 * 8 * f * f + 2 * 4 * h * f if stage == "quantize gptq" else 0
    states = 2 * shape.hidden_states(tokens, stored=2)
    return weights + states + max(gather, record, ledger, inverse)


def one(hidden: int, stage: str, rows: int, length: int, batch: int, only: list[str]) -> None:
    """Measures in this process and prints a JSON line."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from drawplate import settings
    from drawplate.compress.driver import Compress, compress
    from drawplate.core.memory import peak_memory
    from drawplate.quantize.driver import Quantize, quantize

    def build(shape: Any) -> Any:
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=1,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.feed_forward,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=length,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)

    def run(model: Any, tokens: Any) -> None:
        given: dict[str, Any] = dict(STAGES[stage])
        names = [name for name in scaled(hidden).matrices if name not in only] if only else []
        if stage.startswith("quantize"):
            given |= {"vocabulary": None, "overrides": {f"*.{name}": None for name in names}}
            quantize(model, tokens, settings.validate(Quantize, given, "quantize"), batch=batch)
        else:
            given |= {"exclude": [f"*.{name}" for name in names]}
            compress(model, tokens, settings.validate(Compress, given, "compress"), batch=batch)

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (rows, length))
    run(build(scaled(256)), tokens[:1])
    before = peak_memory()
    model = build(scaled(hidden))
    built = peak_memory() - before
    started = perf_counter()
    run(model, tokens)
    seconds = perf_counter() - started
    told = {"seconds": seconds, "peak": peak_memory() - before, "built": built}
    print(json.dumps(told | {"threads": torch.get_num_threads()}))


def measure(hidden: int, stage: str, rows: int, length: int, batch: int) -> dict[str, Any]:
    """One block in a fresh process, beside its formulas."""
    command = [sys.executable, __file__, "--inside", str(hidden), stage]
    command += [str(rows), str(length), str(batch)]
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    shape = scaled(hidden)
    tokens = rows * length
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | {
        "hidden": hidden,
        "feed_forward": shape.feed_forward,
        "stage": stage,
        "tokens": tokens,
        "formula": memory(shape, tokens, stage),
        "macs": work(shape, tokens, stage),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Measured and calculated, a line a block."""
    lines = [
        f"{'stage':17} {'hidden':>6} {'ffn':>6} {'peak MB':>8} {'formula':>8} {'off':>6}"
        f" {'seconds':>8} {'GMAC':>9} {'GMAC/s':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row['stage']:17} {row['hidden']:6} {row['feed_forward']:6} {row['peak'] / 1e6:8.0f}"
            f" {row['formula'] / 1e6:8.0f} {row['formula'] / row['peak'] - 1:+6.0%}"
            f" {row['seconds']:8.2f} {row['macs'] / 1e9:9.1f}"
            f" {row['macs'] / 1e9 / row['seconds']:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", choices=["llama-70b"])
    parser.add_argument("--stage", choices=list(STAGES), default="quantize nearest")
    parser.add_argument("--only", nargs="*", default=[], help="layers to change; all otherwise")
    parser.add_argument("--inside", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        hidden, stage, rows, length, batch = given.inside
        one(int(hidden), stage, int(rows), int(length), int(batch), [])
        return
    if given.block:
        one(8192, given.stage, given.rows, given.length, given.batch, given.only)
        return
    rows = [
        measure(hidden, stage, given.rows, given.length, given.batch)
        for stage in STAGES
        for hidden in WIDTHS
    ]
    text = table(rows)
    print(text)
    packages = {name: version(name) for name in ("drawplate", "torch", "transformers")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    record = {"rows": rows, "versions": packages, **machine}
    (RESULTS / "scale.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    (RESULTS / "scale.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
