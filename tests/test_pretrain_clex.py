"""CLEX: frequencies that solve an ODE in the length, and models that read further than they saw."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from drawplate import edits
from drawplate.compress.driver import Compress, compress
from drawplate.core import hf
from drawplate.core.errors import UserError
from drawplate.core.seeds import generator
from drawplate.edits.clex import ClexRotary, reaching, solve
from drawplate.model import ModelConfig, build, lean
from drawplate.model.sample import sample
from drawplate.pretrain import Pretrain
from drawplate.pretrain.driver import pretrain
from drawplate.pretrain.position.clex import Clex
from drawplate.quantize.driver import Quantize, quantize
from drawplate.rl.policy import judge
from tests import pretrain_cases, tiny
from tests.oracle.pretrain.position.clex import reference

CONTEXT = 16


def installed(kind="llama", noise=0.3, **fields):
    """A tiny decoder of context 16 with CLEX, whose network is no longer zero."""
    model = tiny.model(kind, context=CONTEXT)
    Clex(**fields).install(model, 0)
    rotary = rotary_of(model)
    with torch.no_grad():
        rotary.down.normal_(0, noise, generator=generator("down"))
    return model, rotary


def rotary_of(model):
    (found,) = (module for module in model.modules() if isinstance(module, ClexRotary))
    return found


def base(rotary):
    return rotary.base.inv_freq.double()


def wide(rotary):
    """The same in float64."""
    rotary.double()
    return rotary


@pytest.mark.parametrize("factor", [2, 4, 7])
def test_frequencies_solve_the_equation(factor):
    _, rotary = installed(noise=0.1, factor=factor, width=2, step=0.02)
    found = wide(rotary).frequencies(factor)
    up, down = rotary.up.tolist(), rotary.down.tolist()
    for t in range(1, factor + 1):
        wanted = reference(base(rotary).tolist(), up, down, t, 50 * t)
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(found[t - 1], wanted, rtol=1e-7, atol=0)
    assert (found[-1] / found[0] - 1).abs().max() > 0.1


def test_a_network_of_zeros_is_ntk_aware_scaling():
    """Base b becomes b (2 t - 1)^(d / (d - 2)), whatever the solver's step."""
    model = tiny.model(context=CONTEXT)
    Clex(factor=4, step=1.0).install(model, 0)
    found = wide(rotary_of(model)).frequencies(4)
    d = 2 * found.shape[1]
    for t in range(1, 5):
        scaled = 10_000.0 * (2 * t - 1) ** (d / (d - 2))
        wanted = scaled ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        torch.testing.assert_close(found[t - 1], wanted, rtol=1e-6, atol=0)


def test_the_solver_reproduces_the_closed_forms_of_other_scalings():
    """A field of t alone: -1 / t is linear scaling, -2 i / (d - 2) * 2 / (2 t - 1) is NTK's."""
    log = torch.linspace(0, -9, 8, dtype=torch.float64)
    slope = torch.arange(8, dtype=torch.float64) / 7
    linear = solve(lambda t, _: torch.full_like(log, -1 / t), log, 1, 4, 0.02)
    torch.testing.assert_close(linear.exp(), log.exp() / 4, rtol=1e-8, atol=0)
    ntk = solve(lambda t, _: -slope * 2 / (2 * t - 1), log, 1, 4, 0.02)
    torch.testing.assert_close(ntk.exp(), log.exp() * 7**-slope, rtol=1e-7, atol=0)
    constant = solve(lambda t, _: slope, log, 1, 4, 1.0)
    torch.testing.assert_close(constant, log + 3 * slope, rtol=1e-14, atol=0)


def test_the_error_of_the_solver_falls_with_the_fourth_power():
    def grown(step):
        return float(solve(lambda t, y: y, torch.ones((), dtype=torch.float64), 0, 1, step))

    wanted = torch.e
    coarse, fine = abs(grown(0.2) - wanted), abs(grown(0.1) - wanted)
    assert 12 < coarse / fine < 20
    assert grown(0.3) == grown(0.25)  # equal steps of at most that much


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi"])
def test_within_the_old_context_the_model_is_what_it_was_bit_for_bit(kind):
    model, _ = installed(kind)
    short, long = tiny.tokens(2, CONTEXT), tiny.tokens(2, CONTEXT + 1)
    plain = tiny.model(kind, context=CONTEXT)
    assert torch.equal(model(short).logits, plain(short).logits)
    assert (model(long).logits - plain(long).logits).abs().max() > 1e-3
    assert model.config.max_position_embeddings == 4 * CONTEXT


def test_each_row_is_read_by_its_own_length():
    """Longer neighbours change nothing, and neither does what was packed in front of a document."""
    _, rotary = installed()
    x = torch.empty(0)
    rows = [torch.arange(40), torch.arange(12).repeat(4)[:40], torch.arange(30)[:40]]
    rows[2] = torch.cat([rows[2], torch.arange(10)])
    together = rotary(x, torch.stack(rows))
    for number, row in enumerate(rows):
        for one, all_ in zip(rotary(x, row[None]), together, strict=True):
            torch.testing.assert_close(one[0], all_[number], rtol=0, atol=1e-6)
    for places, t in ((rows[0], 3), (rows[1], 1), (rows[2], 2)):
        cos = (places[:, None] * rotary.frequencies(4)[t - 1]).cos()
        torch.testing.assert_close(rotary(x, places[None])[0][0, :, : cos.shape[1]], cos)


def test_beyond_the_largest_factor_t_stays():
    _, rotary = installed(factor=2)
    cos, _ = rotary(torch.empty(0), torch.arange(5 * CONTEXT)[None])
    wanted = (torch.arange(5 * CONTEXT)[:, None] * rotary.frequencies(2)[1]).cos()
    torch.testing.assert_close(cos[0, :, : wanted.shape[1]], wanted)


def test_gradients_reach_the_network():
    model, rotary = installed(noise=0.0)
    model(input_ids=tiny.tokens(2, 40), labels=tiny.tokens(2, 40)).loss.backward()
    assert rotary.down.grad.abs().max() > 0
    with torch.no_grad():
        rotary.down.normal_(0, 0.1)
    model(input_ids=tiny.tokens(2, 40), labels=tiny.tokens(2, 40)).loss.backward()
    assert rotary.up.grad.abs().max() > 0


def test_steps_draw_lengths_and_places_evenly():
    method, length = Clex(factor=4, pieces=None), 12
    count, hits = torch.zeros(5), torch.zeros(4 * length)
    for step in range(800):
        t, places = method.draw(length, generator("draw", step))
        assert len(places) == length
        assert (places[0], places[-1]) == (0, t * length - 1)
        assert (places.diff() > 0).all()
        count[t] += 1
        if t == 4:
            hits[places] += 1
    assert count[0] == 0
    assert (count[1:] / 800 - 0.25).abs().max() < 0.06
    inner = hits[1:-1] / count[4]
    assert abs(float(inner.mean()) - 10 / 46) < 1e-6
    assert (inner - 10 / 46).abs().max() < 0.12


def test_pieces_stay_whole_and_reach_everywhere():
    method, length = Clex(factor=3, pieces=3), 12
    gaps, last, starts = torch.zeros(3), torch.zeros(3 * length), torch.zeros(length)
    for step in range(600):
        t, places = method.draw(length, generator("pieces", step))
        steps = places.diff() - 1
        assert places[0] == 0
        assert (steps >= 0).all()
        assert places[-1] < t * length
        gaps[int((steps > 0).sum())] += 1
        last[places[-1]] += 1
        starts[1:] += steps > 0
        assert t > 1 or not steps.any()
    assert gaps[2] > 300
    assert last[length - 1] > 150  # t = 1
    assert (last[-4:] > 0).all()
    assert starts[1:].min() > 0.6 * starts[1:].mean()


def test_a_short_context_has_no_more_pieces_than_tokens():
    t, places = Clex(pieces=50, factor=64).draw(5, generator("short"))
    assert t > 1
    assert len(places) == 5
    assert (places.diff() > 1).sum() >= 2


def test_a_step_of_training_turns_rows_by_what_it_drew():
    model, rotary = installed()
    method = Clex()
    for step in range(20):
        method.before(model, step)
        t, places = rotary.drawn
        if t > 1:
            break
    positions = torch.cat([torch.arange(10), torch.arange(6)])[None]
    cos, sin = rotary(torch.empty(0), positions)
    angle = places[positions[0]][:, None] * rotary.frequencies(4)[t - 1]
    half = angle.shape[1]
    torch.testing.assert_close(cos[0, :, :half], angle.cos())
    torch.testing.assert_close(sin[0, :, half:], angle.sin())
    drawn = rotary.drawn
    method.before(model, step)
    assert torch.equal(rotary.drawn[1], drawn[1])  # a function of the step
    method.finish(model)
    assert rotary.drawn is None


@pytest.mark.parametrize(
    "change",
    [{"factor": 3}, {"width": 2}, {"step": 1.0}, {"pieces": 2}, {"pieces": None}],
    ids=str,
)
def test_every_field_matters(change):
    logits = []
    for fields in ({}, change):
        model, _ = installed(**fields)
        read = model(tiny.tokens(2, 64)).logits
        Clex(**fields).before(model, 0)
        logits.append((read, model(tiny.tokens(2, CONTEXT)).logits))
    one, other = logits
    assert all(some.isfinite().all() for some in (*one, *other))
    assert not torch.equal(one[1], other[1])
    assert torch.equal(one[0], other[0]) == ("pieces" in change)


def test_only_models_that_can_be_turned_are_taken():
    with pytest.raises(UserError, match="GPT2LMHeadModel has 0 rotary embeddings"):
        Clex().install(tiny.model("gpt2"), 0)
    model, _ = installed()
    with pytest.raises(UserError, match="already changes with the length"):
        Clex().install(model, 0)
    model = tiny.model()
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UserError, match="expected rope_type default, linear, llama3, yarn"):
        Clex().install(model, 0)


FRESH = """
import sys, torch, drawplate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model.eval()(torch.arange(80).view(2, 40)).logits, sys.argv[2])
"""


def test_a_fresh_process_loads_it_with_the_same_logits(tmp_path):
    model, _ = installed("qwen3", factor=3)
    hf.save(model, tmp_path / "model")
    wanted = model(torch.arange(80).view(2, 40)).logits.detach()
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "model", out], check=True)
    torch.testing.assert_close(torch.load(out), wanted, rtol=0, atol=0)
    loaded = hf.load(tmp_path / "model")
    assert [edit.name for edit in edits.of(loaded)] == ["clex"]
    assert loaded.config.max_position_embeddings == 48


def test_sixteen_bits_leave_the_frequencies_of_the_model_alone(tmp_path):
    model, _ = installed()
    model.to(torch.bfloat16)
    hf.save(model, tmp_path / "model")
    loaded = hf.load(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    rotary = rotary_of(loaded)
    assert torch.equal(rotary.frequencies(1)[0], tiny.model().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("method", ["slice", "low_rank"])
def test_later_stages_leave_it_alone(tmp_path, method):
    model, rotary = installed()
    before = rotary.frequencies(4)
    tokens = tiny.tokens(4, 24)
    compress(model, tokens, Compress.model_validate({"ratio": 0.2, "method": {"name": method}}))
    quantize(model, tokens, Quantize(bits=8, group=16))
    hf.save(model, tmp_path / "model")
    again = hf.load(tmp_path / "model")
    assert torch.equal(rotary_of(again).frequencies(4), before)
    assert torch.equal(again(tiny.tokens(2, 40)).logits, model(tiny.tokens(2, 40)).logits)


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("way", ["lean", "general"])
def test_a_growing_row_keeps_the_frequencies_of_its_horizon(way):
    """What the sampler reports is what one pass over the row gives, across the old context."""
    model, rotary = installed()
    horizon = 6 + 30
    assert lean.fits(model, horizon)
    if way == "general":
        model.model.register_forward_hook(lambda *_: None)
        assert not lean.fits(model, horizon)
    drawn = sample(model, PROMPTS, max_new=30, end=-1, seed=3)
    assert rotary.reach == 0
    for prompt, answer, logprobs in zip(PROMPTS, drawn.tokens, drawn.logprobs, strict=True):
        row = torch.tensor([prompt + answer])
        with reaching(model, horizon), torch.no_grad():
            logits = model(row).logits.log_softmax(-1)
        wanted = logits[0, len(prompt) - 1 : -1].gather(-1, row[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), wanted, rtol=1e-4, atol=1e-4)


def test_packed_rows_of_the_policy_are_read_like_single_ones():
    model, _ = installed()
    tokens = tiny.tokens(3, 12)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 4:] = True
    packed = judge(model, tokens, mask, 1.0)[0].detach()
    logits = model(tokens).logits.log_softmax(-1).detach()
    alone = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(packed[:, 4:], alone[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return pretrain_cases.corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def adopted(corpus, folder, kind="llama_untied", **given):
    """A tiny decoder as a folder, and settings that train it on."""
    model = tiny.model(kind, vocabulary=corpus.vocabulary, context=CONTEXT)
    model.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
    tree = pretrain_cases.params(4).model_dump(include={"batch", "training"})
    tree |= {"adopt": str(folder), "position": {"name": "clex"}, "length": CONTEXT}
    return model, tree | given


def test_training_from_scratch_reaches_the_network(corpus, tmp_path):
    model = pretrain(
        pretrain_cases.params(4, position={"name": "clex", "factor": 3}), corpus, tmp_path
    ).model
    rotary = rotary_of(model)
    assert rotary.drawn is None
    assert rotary.down.abs().max() > 0
    assert model.config.max_position_embeddings == 3 * pretrain_cases.SHAPE["context"]


def test_an_adopted_model_is_trained_on_and_its_context_extended(corpus, tmp_path):
    start, tree = adopted(corpus, tmp_path / "start")
    params = Pretrain.model_validate(tree)
    found = pretrain(params, corpus, tmp_path / "work")
    assert found.outcome.steps == 4
    assert found.model.config.max_position_embeddings == 4 * CONTEXT
    before, after = start.state_dict(), found.model.state_dict()
    extra = {"model.rotary_emb.up", "model.rotary_emb.down"}
    assert after.keys() - before.keys() == extra
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    assert all((before[name] - after[name]).abs().max() < 0.1 for name in before)
    again = pretrain(params, corpus, tmp_path / "again").model.state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_what_contradicts_an_adopted_model_is_refused(corpus, tmp_path):
    _, tree = adopted(corpus, tmp_path / "start", length=CONTEXT + 1)
    with pytest.raises(UserError, match=r"17 is longer than the context of .*start, 16"):
        pretrain(Pretrain.model_validate(tree), corpus, tmp_path / "work")
    with pytest.raises(ValidationError, match="layers stay as they are: remove feed_forward"):
        Pretrain.model_validate(tree | {"feed_forward": {"name": "trukan"}})
    with pytest.raises(ValidationError, match="nothing is trained: remove batch, length"):
        Pretrain.model_validate(tree | {"position": None})
    folder = tmp_path / "extended"
    done = tiny.model("llama_untied", vocabulary=corpus.vocabulary, context=CONTEXT)
    Clex().install(done, 0)
    hf.save(done, folder, corpus.tokenizer)
    with pytest.raises(UserError, match="already changes with the length"):
        pretrain(
            Pretrain.model_validate(tree | {"adopt": str(folder), "length": CONTEXT}),
            corpus,
            tmp_path / "work",
        )


@pytest.mark.parametrize("kind", ["falcon", "falcon_h1"])
def test_an_adopted_model_that_lets_documents_see_each_other_is_refused(corpus, tmp_path, kind):
    _, tree = adopted(corpus, tmp_path / "start", kind)
    with pytest.raises(UserError, match="does not keep texts that share a row apart"):
        pretrain(Pretrain.model_validate(tree), corpus, tmp_path / "work")


LONG, SHORT = 256, 64


def texts(source, length, rows, *seed):
    starts = torch.randint(len(source) - length, (rows,), generator=generator(*seed))
    return torch.stack([source[start : start + length] for start in starts.tolist()])


def learn(model, source, steps, rate, part=None):
    optimizer = torch.optim.AdamW(model.train().parameters(), rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        if part is not None:
            part.before(model, step)
        tokens = texts(source, SHORT, 16, "train", step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if part is not None:
        part.finish(model)
    return model.eval()


@torch.no_grad()
def perplexity(model, source, length):
    """Of the last 32 tokens of rows of `length`."""
    tokens = texts(source, length, 64, "held out", length)
    logits = model(tokens).logits[:, -33:-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, tokens[:, -32:].flatten()).exp())


@pytest.mark.slow
def test_a_model_of_short_rows_reads_rows_four_times_as_long():
    """Bytes of Python files: plain RoPE falls apart beyond its context, CLEX goes on."""
    files = sorted((Path(np.__file__).parent / "lib").glob("_*.py"))
    data = torch.tensor([byte for file in files for byte in file.read_bytes() if byte < 128])
    train, held = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 4, "feed_forward": 128}
    model = learn(build(ModelConfig(context=SHORT, **shape), 128, 0), train, 800, 3e-3)
    plain = [perplexity(model, held, length) for length in (SHORT, LONG)]
    part = Clex(factor=4)
    part.install(model, 0)
    learn(model, train, 400, 1e-3, part)
    extended = [perplexity(model, held, length) for length in (SHORT, LONG)]
    print(f"perplexity at {SHORT} and {LONG}: rope {plain}, clex {extended}")
    assert plain[1] > 3 * plain[0]
    assert extended[0] < 1.05 * plain[0]
    assert extended[1] < 2 * extended[0]
