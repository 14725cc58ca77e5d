"""Sampling side by side with transformers' `generate`, in processor seconds for the same tokens.

    python benchmarks/sampling.py [--threads 1] [--rounds 5] [--batches 32 256] [--kv-heads 8]

Every prompt is continued by exactly `--new` tokens, sampled at temperature 1 without filters, so
both sides do the same work. The contenders take turns within each round, hence share whatever else
the machine does; a ratio is the median over rounds of the ratio within a round. Processor seconds
are summed over threads. "bf16" is a model cast to bfloat16 on their side, `precision` on ours;
"products" are the bare matrix products, the bound of all. Writes `benchmarks/results/sampling.json`
and, beside it, the tables that it prints.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from drawplate.model import ModelConfig, build
from drawplate.model.sample import sample
from flows.bench.machine import machine

VOCABULARY = 2048
OUT = Path(__file__).resolve().parent / "results" / "sampling.json"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    options.add_argument("--new", type=int, default=64, help="tokens drawn after it")
    options.add_argument("--answers", type=int, default=1, help="rows per distinct prompt")
    options.add_argument("--batch-size", type=int, default=128, help="rows in flight on our side")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()

    config = ModelConfig(heads=given.heads, kv_heads=given.kv_heads)
    model = build(config, VOCABULARY, 0).eval()
    half = build(config, VOCABULARY, 0).eval().to(torch.bfloat16)
    weights = sum(weight.numel() for weight in model.parameters())
    text = (
        f"{weights / 1e6:.2f} M parameters, {given.heads}/{given.kv_heads} heads, "
        f"{given.prompt} + {given.new} tokens, {given.answers} row(s) a prompt, "
        f"{given.threads} thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(text)
    record = machine() | {"settings": vars(given), "seconds": {}}
    for batch in given.batches:
        stream = torch.Generator().manual_seed(batch)
        shape = batch // given.answers, given.prompt
        distinct = torch.randint(VOCABULARY, shape, generator=stream)
        prompts = distinct.repeat_interleave(given.answers, 0)
        their = partial(theirs, prompts=prompts, new=given.new)
        our = partial(ours, model, prompts.tolist(), given.new, given.batch_size)
        contenders: dict[str, Callable[[], None]] = {
            "generate fp32": partial(their, model),
            "generate bf16": partial(their, half),
            "drawplate fp32": partial(our, None),
            "drawplate bf16": partial(our, torch.bfloat16),
            "products bf16": partial(
                products, half, batch, given.prompt, given.new, min(batch, given.batch_size)
            ),
        }
        seconds = measured(contenders, given.rounds)
        record["seconds"] |= {batch: seconds}
        lines = table(batch, seconds)
        print(lines)
        text += f"\n{lines}"
    OUT.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    OUT.with_suffix(".txt").write_text(f"{text}\n")


def theirs(model: transformers.PreTrainedModel, prompts: torch.Tensor, new: int) -> None:
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            pad_token_id=0,
        )
    assert out.shape == (len(prompts), prompts.shape[1] + new)


def ours(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    new: int,
    batch_size: int,
    precision: torch.dtype | None,
) -> None:
    drawn = sample(model, prompts, max_new=new, end=-1, batch_size=batch_size, precision=precision)
    assert [len(answer) for answer in drawn.tokens] == [new] * len(prompts)


@torch.no_grad()
def products(
    model: transformers.PreTrainedModel, rows: int, prompt: int, new: int, at_once: int
) -> None:
    """The bare matrix products of the same work, which bound what can be reached."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    blocks = [layer for layer in layers if layer is not model.get_output_embeddings()]
    for part, count, times in (
        (blocks, rows * (prompt - 1), 1),
        (layers, at_once, new * rows // at_once),
    ):
        inputs = {each: torch.ones(count, each.in_features, dtype=model.dtype) for each in part}
        for _ in range(times):
            for layer, x in inputs.items():
                layer(x)


def measured(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of the contenders, run in turn, `rounds` times after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            gc.collect()
            before = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - before)
    return seconds


def table(batch: int, seconds: dict[str, list[float]]) -> str:
    """Medians, and how many times ours theirs are."""
    baselines = [name for name in seconds if name.startswith("generate")]
    head = "".join(f"{'x ' + base:>18s}" for base in baselines)
    lines = [f"\n{f'batch {batch}':16s}{'CPU s':>8s}{head}"]
    for name, own in seconds.items():
        ratios = "".join(
            f"{statistics.median(a / b for a, b in zip(seconds[base], own, strict=True)):18.2f}"
            for base in baselines
        )
        lines.append(f"{name:16s}{statistics.median(own):8.2f}{ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
