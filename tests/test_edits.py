"""Edits: what a stand-in computes, and that any stack of them survives a fresh process."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from drawplate import edits
from drawplate.compress.driver import Compress, compress
from drawplate.core import hf
from drawplate.core.errors import Damaged, UserError
from drawplate.core.method import leaves
from drawplate.core.pack import packed_bytes
from drawplate.edits import (
    adapter,
    low_rank,
    low_rank_sparse,
    quantized,
    quantized_embedding,
    shared,
    sliced,
    sparse,
    unnormed,
)
from drawplate.pretrain.feed_forward.trukan import Trukan
from drawplate.pretrain.position.clex import Clex


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factorise(model, path, rank=5):
    weight = edits.matrix(model.get_submodule(path))
    tensors = {
        "first.weight": draw(rank, weight.shape[1]) / 8,
        "second.weight": draw(weight.shape[0], rank, seed=1) / 8,
    }
    edits.apply(model, low_rank.LowRank(module=path, rank=rank), tensors)


def sparsify(model, path):
    weight = edits.matrix(model.get_submodule(path))
    keep = draw(*weight.shape, seed=2) > 0
    edits.apply(
        model, sparse.Sparse(module=path, kept=int(keep.sum())), sparse.tensors(weight, keep)
    )


def narrow(model, path):
    weight = edits.matrix(model.get_submodule(path))
    rows, columns = draw(weight.shape[0], seed=3) > -0.5, draw(weight.shape[1], seed=4) > -0.5
    spec = sliced.Sliced(module=path, rows=int(rows.sum()), columns=int(columns.sum()))
    edits.apply(model, spec, sliced.tensors(weight, rows, columns))


def set_apart(model, path, rank=5):
    weight = edits.matrix(model.get_submodule(path))
    outlying = draw(*weight.shape, seed=8) > 2
    spec = low_rank_sparse.LowRankSparse(module=path, rank=rank, kept=int(outlying.sum()))
    first, second = draw(rank, weight.shape[1]) / 8, draw(weight.shape[0], rank, seed=1) / 8
    edits.apply(model, spec, low_rank_sparse.tensors(second, first, weight, outlying))


def share(model, lender, borrower, rank=5):
    """The second layer uses the left factor of the first."""
    for path, owner in ((lender, None), (borrower, lender)):
        rows, columns = edits.features(model.get_submodule(path))
        tensors = {"first.weight": draw(rank, columns, seed=9) / 8}
        if owner is None:
            tensors["second.weight"] = draw(rows, rank, seed=10) / 8
        edits.apply(model, shared.Shared(module=path, rank=rank, lender=owner), tensors)


def alike(model, paths):
    """The first two of these layers with equally many outputs."""
    rows = [edits.features(model.get_submodule(path))[0] for path in paths]
    return next(
        (other, one)
        for i, one in enumerate(paths)
        for j, other in enumerate(paths[:i])
        if rows[i] == rows[j]
    )


def codes_for(shape, bits, group, zero, levels, seed=5):
    gen = torch.Generator().manual_seed(seed)
    groups = -(-shape[1] // group)
    return {
        "codes": torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=gen),
        "scale": torch.rand(shape[0], groups, generator=gen) / 40,
        "zero": torch.full((shape[0], groups), 2 ** (bits - 1), dtype=torch.uint8)
        if zero
        else None,
        "levels": torch.linspace(-1, 1, 2**bits) if levels else None,
    }


def quantize(model, path, bits=4, group=16, zero=True, levels=False):
    module = model.get_submodule(path)
    keep = module.keep() if isinstance(module, sparse.SparseLinear) else None
    made = codes_for(edits.matrix(module).shape, bits, group, zero, levels)
    earlier = {edit.module: edit for edit in edits.of(model)}.get(path)
    spec = quantized.spec(path, module, earlier, bits, group, zero, levels)
    edits.apply(model, spec, quantized.tensors(**made, bits=bits, keep=keep))
    return made


def quantize_table(model, bits=4, group=16):
    table = model.get_input_embeddings()
    (path,) = (path for path, other in model.named_modules() if other is table)
    head = None
    if quantized_embedding.is_tied(model):
        output = model.get_output_embeddings()
        (head,) = (path for path, other in model.named_modules() if other is output)
    made = codes_for(table.weight.shape, bits, group, True, False)
    spec = quantized_embedding.QuantizedEmbedding(
        module=path, bits=bits, group=group, zero=True, levels=False, head=head
    )
    tensors = quantized.tensors(**made, bits=bits)
    tensors["codes"] = tensors["codes"].view(len(table.weight), -1)
    edits.apply(model, spec, tensors)


def adapt(model, path, rank=3):
    module = model.get_submodule(path)
    out, into = edits.features(module)
    tensors = {"down.weight": draw(rank, into), "up.weight": draw(out, rank, seed=6) / 10}
    edits.apply(model, adapter.Adapter(module=path, rank=rank, scaling=0.5), tensors)


def slim(model):
    params = {"ratio": 0.1, "method": {"name": "slice"}}
    compress(model, tiny.tokens(), Compress.model_validate(params))


def unnorm(model):
    """The norm before the head passes on what it is given."""
    last = [path for path, _ in model.named_modules() if re.search(r"norm$|ln_f$", path)][-1]
    edits.apply(model, unnormed.Unnormed(module=last, gain=False), {})


def everything(model):
    """Every kind of edit at once, each stacked on what it may be stacked on."""
    first, second, third, fourth, *others = list(edits.linears(model))
    lender, borrower = alike(model, others)
    share(model, lender, borrower)
    factorise(model, first)
    sparsify(model, second)
    narrow(model, third)
    set_apart(model, fourth)
    for number, path in enumerate(edits.linears(model)):
        quantize(
            model, path, bits=(2, 3, 4, 8)[number % 4], zero=number % 3 != 1, levels=number % 3 == 1
        )
    quantize_table(model)
    unnorm(model)
    for path in (first, second, third, fourth, lender, borrower):
        adapt(model, path)
    return first, second, third, lender, borrower


FRESH = """
import sys, torch, drawplate
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[2], weights_only=True)
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model(ids).logits.detach(), folder / "logits.pt")
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == 11
"""


def test_everything_survives_a_fresh_process(tmp_path):
    """Plain `from_pretrained` in another process gives equal logits, for every architecture."""
    ids, expected = tiny.tokens(2, 9), {}
    torch.save(ids, tmp_path / "ids.pt")
    for kind in tiny.CONFIGS | tiny.FILLING:
        model = tiny.model(kind)
        everything(model)
        hf.save(model, tmp_path / "models" / kind)
        expected[kind] = model(ids).logits
    command = [sys.executable, "-c", FRESH, str(tmp_path / "models"), str(tmp_path / "ids.pt")]
    subprocess.run(command, check=True, capture_output=True)
    for kind, logits in expected.items():
        loaded = torch.load(tmp_path / "models" / kind / "logits.pt", weights_only=True)
        assert torch.equal(loaded, logits), kind


@pytest.mark.parametrize("kind", tiny.CONFIGS | tiny.FILLING)
def test_saving_twice_gives_the_same_files(kind, tmp_path):
    model = tiny.model(kind)
    everything(model)
    hf.save(model, tmp_path / "one")
    hf.save(hf.load(tmp_path / "one"), tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_stand_in_equals_its_dense_matrix(kind):
    model = tiny.model(kind)
    paths = everything(model)
    for path in paths:
        module = model.get_submodule(path)
        x = draw(4, module.in_features)
        dense = torch.nn.functional.linear(x, edits.matrix(module).float(), module.bias)
        torch.testing.assert_close(module(x), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_exact_factors_change_nothing(kind):
    model, ids = tiny.model(kind), tiny.tokens(2, 8)
    before = model(ids).logits
    for path, module in edits.linears(model).items():
        weight = edits.matrix(module)
        U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
        spec = low_rank.LowRank(module=path, rank=len(S))
        edits.apply(model, spec, {"first.weight": V.float(), "second.weight": (U * S).float()})
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_sparse_and_sliced_keep_exactly_what_they_say():
    model = tiny.model()
    path, other = list(edits.linears(model))[:2]
    weight, wide = (edits.matrix(model.get_submodule(p)).clone() for p in (path, other))
    sparsify(model, path)
    module = model.get_submodule(path)
    assert torch.equal(module.matrix(), weight * module.keep())
    narrow(model, other)
    rows, columns = draw(wide.shape[0], seed=3) > -0.5, draw(wide.shape[1], seed=4) > -0.5
    assert torch.equal(model.get_submodule(other).matrix(), wide * rows[:, None] * columns)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 24, 32])
def test_a_quantized_layer_decodes_and_packs(bits, group):
    model = tiny.model()
    path = next(iter(edits.linears(model)))
    shape = edits.matrix(model.get_submodule(path)).shape
    made = quantize(model, path, bits, group)
    module = model.get_submodule(path)
    index = torch.arange(shape[1]) // group
    expected = (made["codes"].float() - made["zero"].float()[:, index]) * made["scale"][:, index]
    assert torch.equal(module.matrix(), expected)
    assert module.codes.numel() == packed_bytes(bits, shape[0] * shape[1])


def test_masks_outlive_quantization_and_cost_one_bit(monkeypatch):
    model = tiny.model()
    path = next(iter(edits.linears(model)))
    sparsify(model, path)
    keep = model.get_submodule(path).keep()
    quantize(model, path, 4, 16)
    module = model.get_submodule(path)
    assert torch.equal(module.keep(), keep)
    assert not module.matrix()[~keep].any()
    assert module.codes.numel() == packed_bytes(4, int(keep.sum()))
    kind = type(module)
    unpacked, plain = [], kind.keep
    monkeypatch.setattr(kind, "keep", lambda m: unpacked.append(m) or plain(m))
    module.matrix()
    assert unpacked == [module]


def test_materialized_changes_no_bit_and_leaves_nothing():
    model, ids = tiny.model(), tiny.tokens(2, 8)
    everything(model)
    before = model(ids).logits
    with edits.materialized(model):
        assert torch.equal(model(ids).logits, before)
    assert all(m.dense is None for m in model.modules() if isinstance(m, edits.StandIn))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_materialized_as_a_whole_is_the_same_up_to_rounding(kind):
    model, ids = tiny.model(kind), tiny.tokens(2, 8)
    everything(model)
    before = model(ids).logits
    with edits.materialized(model, whole=True):
        inner = [m for m in model.modules() if isinstance(m, edits.StandIn) and m.dense is None]
        assert inner  # what lies inside another stand-in needs no matrix of its own
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def test_gradients_reach_factors_values_scales_and_adapters():
    model = tiny.model()
    names = list(edits.linears(model))
    factorise(model, names[0])
    sparsify(model, names[1])
    quantize(model, names[2])
    adapt(model, names[3])
    wanted = [
        model.get_submodule(names[0]).first.weight,
        model.get_submodule(names[1]).values,
        model.get_submodule(names[2]).scale,
        model.get_submodule(names[3]).up.weight,
    ]
    model.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    model(tiny.tokens(2, 8)).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in wanted)


def test_a_tied_head_passes_gradients_on_to_the_scales_that_it_reads():
    model, hidden = tiny.model(), draw(2, 32)
    quantize_table(model)
    scale = model.get_input_embeddings().scale.requires_grad_(True)
    found = []
    for within in (nullcontext, lambda: edits.materialized(model)):
        with within():
            loss = model.lm_head(hidden).square().sum()
        found += torch.autograd.grad(loss, scale)
    assert found[0].any()
    assert torch.equal(*found)


def test_stored_bytes_are_those_of_the_file(tmp_path):
    model = tiny.model()
    everything(model)
    hf.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert hf.stored_bytes(model) == sum(t.numel() * t.element_size() for t in tensors.values())


def broken(folder, change):
    """Saves an edited model, lets `change` spoil its tensors or config, and returns the folder."""
    model = tiny.model()
    everything(model)
    hf.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def first_of(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def drop(tensors, config):
    del tensors[first_of(tensors, "codes")]


def add(tensors, config):
    tensors["model.surplus"] = torch.zeros(3)


def transpose(tensors, config):
    name = first_of(tensors, "down_proj.scale")
    tensors[name] = tensors[name].T.contiguous()


def poison(tensors, config):
    tensors[first_of(tensors, "scale")][0, 0] = float("nan")


def flip_mask(tensors, config):
    tensors[first_of(tensors, "mask")] ^= 1


def unknown_edit(tensors, config):
    config["quantization_config"]["edits"][0]["name"] = "magic"


def wrong_rank(tensors, config):
    config["quantization_config"]["edits"][0]["rank"] += 1


def lost_edit(tensors, config):
    config["quantization_config"]["edits"].pop()


@pytest.mark.parametrize(
    "change", [drop, add, transpose, poison, flip_mask, unknown_edit, wrong_rank, lost_edit]
)
def test_a_folder_that_does_not_fit_itself_is_refused(change, tmp_path):
    with pytest.raises(Damaged) as caught:
        hf.load(broken(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_untouched_folder_is_not_refused(tmp_path):
    folder = broken(tmp_path, lambda tensors, config: None)
    hf.load(folder)
    (folder / "manifest.json").write_text('{"name": "an app"}')  # other programs write one too
    hf.load(folder)


def test_truncated_or_foreign_folders_get_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        hf.load(tmp_path)
    folder = broken(tmp_path, lambda tensors, config: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(Damaged, match="not readable"):
        hf.load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "0 are: num_attention_heads"),
        (3, "config.json: transformers cannot use this"),
    ],
)
def test_a_configuration_without_sense_is_one_line(wrong, says, tmp_path):
    folder = broken(tmp_path, lambda tensors, config: None)
    file = folder / "config.json"
    right = json.loads(file.read_text())
    file.write_text(json.dumps(right | wrong if isinstance(wrong, dict) else wrong))
    with pytest.raises(UserError) as caught:
        hf.load(folder)
    assert str(caught.value).startswith(f"{file}: transformers cannot use this: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("wrong", ["", '{"a', "[]", "3"])
def test_a_tokenizer_that_is_not_readable_is_one_line(name, wrong, tokenizer):
    assert hf.load_tokenizer(tokenizer)("b")["input_ids"] == [1]
    (tokenizer / name).write_text(wrong)
    with pytest.raises(Damaged) as caught:
        hf.load_tokenizer(tokenizer)
    assert str(caught.value).startswith(f"{tokenizer}: tokenizer.json or tokenizer_config.json is ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_may_leave_its_class_to_its_model(tokenizer):
    (tokenizer / "tokenizer_config.json").write_text("{}")
    tiny.CONFIGS["llama"]().save_pretrained(tokenizer)
    assert hf.load_tokenizer(tokenizer).get_vocab()["b"] == 1


def test_an_index_may_not_leave_the_folder(tmp_path):
    folder = broken(tmp_path / "model", lambda tensors, config: None)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    weights = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../outside.safetensors")
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match="outside the folder"):
        hf.load(folder)


def test_wrong_tensors_and_places_are_refused():
    model = tiny.model()
    with pytest.raises(UserError, match="no module"):
        edits.apply(model, low_rank.LowRank(module="model.nowhere", rank=2), {})
    path = next(iter(edits.linears(model)))
    with pytest.raises(UserError, match="lacks"):
        edits.apply(model, low_rank.LowRank(module=path, rank=2), {})


def test_every_edit_is_exercised():
    """Each kind of edit is built here, so that a new one cannot be forgotten."""
    model, trained = tiny.model(), tiny.model()
    slim(model)
    everything(model)
    for part in (Clex(), Trukan()):  # parts of untrained decoders, whose own tests load them anew
        part.install(trained, seed=0)
    # The sparse one is replaced by the quantized stand-in that carries its mask on.
    built = {edit.name for edit in (*edits.of(model), *edits.of(trained))}
    assert built == set(leaves(edits.Edit))
