"""Bytes, multiply-adds, memory and speed."""

import shutil
import sys

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from drawplate import edits
from drawplate.core.errors import Damaged, DrawplateError, UserError
from drawplate.core.hf import load, save
from drawplate.edits.low_rank import LowRank
from drawplate.evaluate import probe
from drawplate.evaluate.cost import Probe, macs, measure, stored_bytes
from drawplate.quantize.driver import Quantize, quantize
from tests import tiny

SMALL = Probe(prompt=8, new=4, repeats=1)


def counted(model):
    """Inputs times outputs of every matrix that a forward pass of one token goes through."""
    total = 0

    def hook(module, args, output):
        nonlocal total
        total += args[0].shape[-1] * output.shape[-1] * args[0][..., 0].numel()

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(hook)
    model(input_ids=torch.tensor([[3]]), use_cache=False)
    return total


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_macs_are_those_of_one_token(kind):
    model = tiny.model(kind)
    assert macs(model) == counted(model)


def test_edits_speak_for_themselves():
    model = tiny.model("llama_untied")
    before = macs(model)
    rank = {"first.weight": torch.zeros(3, 32), "second.weight": torch.zeros(32, 3)}
    edits.apply(model, LowRank(module="model.layers.0.self_attn.q_proj", rank=3), rank)
    assert macs(model) == before - 32 * 32 + 3 * (32 + 32)


def test_a_block_that_runs_twice_costs_twice():
    model = tiny.model("llama_untied")
    block = counted(model) - model.lm_head.weight.numel()
    model.model.layers[1] = model.model.layers[0]
    assert macs(model) == block + model.lm_head.weight.numel()


def test_of_experts_only_the_active_ones_count():
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads, **experts))
    expert, attention, router, head = 3 * 16 * 24, 4 * 16 * 16, 4 * 16, 32 * 16
    assert macs(model) == 2 * expert + attention + router + head


@pytest.mark.parametrize("kind", ["llama", "llama_untied"])
def test_stored_bytes_are_all_tensors_with_shared_ones_once(tmp_path, kind):
    model = tiny.model(kind)
    save(model, tmp_path)
    assert stored_bytes(tmp_path) == sum(p.numel() * 4 for p in model.parameters())
    save(model.bfloat16(), tmp_path)
    assert stored_bytes(tmp_path) == sum(p.numel() * 2 for p in model.parameters())


def test_stored_bytes_of_several_files_add_up(tmp_path):
    model = tiny.model("llama_untied")
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert stored_bytes(tmp_path) == sum(p.numel() * 4 for p in model.parameters())


def test_one_file_beside_an_index_is_what_counts_and_what_is_loaded(tmp_path):
    tiny.model("llama_untied", 1).save_pretrained(tmp_path, max_shard_size="20kB")
    tiny.model("llama_untied", 2).bfloat16().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path)
    loaded = load(tmp_path)
    assert stored_bytes(tmp_path) == sum(p.numel() * 2 for p in loaded.parameters())
    assert torch.equal(loaded.lm_head.weight, load(tmp_path / "other").lm_head.weight)


def test_other_files_beside_the_model_are_not_the_model(tmp_path):
    save(tiny.model(), tmp_path)
    own = stored_bytes(tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "model.safetensors", tmp_path / name)
    assert stored_bytes(tmp_path) == own


def test_folders_without_whole_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors; expected weights"):
        stored_bytes(tmp_path)
    save(tiny.model(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"model\.safetensors: not a valid safetensors file"):
        stored_bytes(tmp_path)


@pytest.mark.parametrize(("code", "kind"), [(1, DrawplateError), (2, UserError), (3, Damaged)])
def test_a_process_that_fails_is_an_error_of_its_kind(tmp_path, monkeypatch, code, kind):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho first >&2\necho why it failed >&2\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DrawplateError, match="measuring memory and speed failed: why it") as found:
        measure(tmp_path, SMALL)
    assert type(found.value) is kind


def test_a_process_that_is_killed_names_the_signal(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho something else >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DrawplateError, match=r"was ended by SIGKILL$"):
        measure(tmp_path, SMALL)


@pytest.mark.slow
def test_a_probe_that_does_not_fit_the_model_is_the_users_error(tmp_path):
    save(tiny.model(), tmp_path)
    with pytest.raises(UserError, match="need a context of 67, the model has 64"):
        measure(tmp_path, Probe(prompt=60, new=8))


def test_memory_and_speed_come_from_a_fresh_process(tmp_path):
    """What this process holds (here 400 MB) is not charged to the model, whose tensors are."""
    ballast = torch.ones(100_000_000)
    save(tiny.model("llama_untied", vocabulary=60_000), tmp_path)
    found = measure(tmp_path, SMALL)
    assert ballast.sum() > 0
    assert stored_bytes(tmp_path) < found.peak_bytes < 8 * stored_bytes(tmp_path)
    assert found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second > 0
    assert found.unpacked_decode_tokens_per_second is None
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())


def test_unpacked_is_measured_with_decoded_weights(tmp_path, monkeypatch):
    model = tiny.model()
    quantize(model, tiny.tokens(), Quantize(group=16), batch=4)
    save(model, tmp_path)
    model, seen = load(tmp_path), []

    def look(model, *_):
        packed = [module for module in model.modules() if isinstance(module, edits.Packed)]
        seen.append({module.dense is None for module in packed})

    monkeypatch.setattr(probe, "_decode", look)
    found = probe._measure(model, model.device, SMALL.model_copy(update={"repeats": 2}))
    assert seen == [{True}, {True}, {False}, {False}]
    assert found.unpacked_decode_tokens_per_second > 0


@pytest.mark.slow
def test_twice_the_model_takes_twice_the_memory(tmp_path):
    peaks = []
    for name, vocabulary in (("small", 100_000), ("large", 200_000)):
        (tmp_path / name).mkdir()
        save(tiny.model("llama_untied", vocabulary=vocabulary), tmp_path / name)
        peaks.append(measure(tmp_path / name, SMALL).peak_bytes)
    assert 1.5 < peaks[1] / peaks[0] < 2.5
