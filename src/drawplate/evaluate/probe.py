"""Measures one model in this process; `drawplate.evaluate.cost.measure` runs it as a fresh one.

What Python, the libraries and a first small model take is the baseline that memory is counted from.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import transformers

from drawplate.core.errors import told
from drawplate.core.hf import load, save
from drawplate.core.memory import peak_memory
from drawplate.edits import Packed, materialized
from drawplate.evaluate.cost import Machine, Probe, Trial
from drawplate.evaluate.runtime import running
from drawplate.model import ModelConfig, build
from drawplate.model.runtime.plain import Plain
from drawplate.model.sample import sample

_NEVER = -1
"""An end token that no model draws."""
_SMALL = ModelConfig(hidden=32, layers=1, heads=2, kv_heads=2, feed_forward=32, context=32)


def run(folder: Path, device: torch.device, trial: Trial) -> Machine:
    """Loads the model, generates, and reads the clock and the memory meter."""
    probe = trial.probe
    for name in transformers.AutoConfig.from_pretrained(folder).architectures or ():
        getattr(transformers, name)  # imports the code of the class
    with TemporaryDirectory() as other:
        save(build(_SMALL, 64, 0), Path(other))
        _decode(load(other).to(device), 8, 8)
    before = _peak(device)
    model = load(folder).to(device)
    text = torch.tensor([trial.text]) if trial.text else _tokens(model, probe.prompt)[None]
    loaded = _peak(device)
    changed = trial.runtime != Plain() and trial.runtime.unfit(model) is None
    if changed:
        _own(model)
    with running(trial.runtime, model, text) as figures:
        forgotten = _forget_peak(device)
        _prefill(model, probe.prompt)
        _decode(model, probe.prompt, probe.new)
        peak = _peak(device)
        measured = _measure(model, device, probe)
        found = figures()
    return measured.model_copy(
        update={
            "peak_bytes": max(peak, loaded) - before,
            "running_bytes": peak - before if forgotten else None,
            "runtime": found or None,
        }
    )


@torch.no_grad()
def _measure(model: transformers.PreTrainedModel, device: torch.device, probe: Probe) -> Machine:
    """The rates; the peak is not yet known."""

    def rate(tokens: int, action: Callable[[], None]) -> float:
        return tokens / median(_seconds(action, device) for _ in range(probe.repeats))

    def decode() -> float:
        return rate(probe.new, lambda: _decode(model, 1, probe.new))

    prefill, stored, unpacked = (
        rate(probe.prompt, lambda: _prefill(model, probe.prompt)),
        decode(),
        None,
    )
    if any(isinstance(module, Packed) for module in model.modules()):
        with materialized(model):
            unpacked = decode()
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=stored,
        unpacked_decode_tokens_per_second=unpacked,
        peak_bytes=0,
    )


def _tokens(model: transformers.PreTrainedModel, count: int) -> torch.Tensor:
    width = int(model.config.vocab_size)
    return torch.arange(count, device=model.device) % width


@torch.no_grad()
def _prefill(model: transformers.PreTrainedModel, count: int) -> None:
    model(input_ids=_tokens(model, count)[None], use_cache=True, logits_to_keep=1)


def _decode(model: transformers.PreTrainedModel, prompt: int, new: int) -> None:
    sample(model, [_tokens(model, prompt).tolist()], max_new=new, end=_NEVER, temperature=0)


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    begun = perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - begun


def _peak(device: torch.device) -> int:
    """Most bytes that this process has held so far, on the device or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _own(model: transformers.PreTrainedModel) -> None:
    """Copies tensors out of the mapped file: pages of that count as long as any of them is used."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _forget_peak(device: torch.device) -> bool:
    """Gives back what is free and lets the peak start again, if the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
    if trim is not None:
        trim(0)
    switch = Path("/proc/self/clear_refs")
    try:
        switch.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    settings = Trial.model_validate_json(sys.stdin.read())
    try:
        print(run(Path(sys.argv[1]), torch.device(sys.argv[2]), settings).model_dump_json())
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        print(known, file=sys.stderr)
        sys.exit(known.code)
