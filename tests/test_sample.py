"""The sampler against transformers' `generate`, against a full forward pass, and against itself."""

from collections import Counter

import pytest
import tiny
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MistralConfig

from drawplate import edits
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.products import swift
from drawplate.edits import low_rank, materialized, sparse
from drawplate.model.decoder import General, decoder
from drawplate.model.filter.min_p import MinP
from drawplate.model.filter.top_k import TopK
from drawplate.model.filter.top_p import TopP
from drawplate.model.lean import Lean
from drawplate.model.sample import sample

END = 7
LEAN = ["llama", "llama_untied", "qwen2", "qwen3", "mistral"]
OTHERS = {
    "biased": lambda shape: LlamaConfig(**shape, attention_bias=True, mlp_bias=True),
    "stretched": lambda shape: LlamaConfig(
        **shape, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    ),
    "window": lambda shape: MistralConfig(**shape, sliding_window=5),
    "gemma2": lambda shape: Gemma2Config(**shape, head_dim=8, sliding_window=5),
    "bloom": lambda shape: BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
}
"""More shapes than `tiny` has: biases, angles, sliding windows, caps on logits, no positions."""


def model(kind="llama"):
    if kind not in OTHERS:
        return tiny.model(kind)
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(OTHERS[kind](tiny._common))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.float().eval()


def prompts(seed=1, lengths=(1, 5, 9, 9, 3, 14, 2)):
    stream = torch.Generator().manual_seed(seed)
    made = [torch.randint(8, 96, (n,), generator=stream).tolist() for n in lengths]
    return [*made, made[2], made[0]]


def greedy(model, prompt, new):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=END,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def forward(model, prompt, answer):
    """Log-probabilities of the answer's tokens, from one pass over all of it."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("kind", [*tiny.CONFIGS, *OTHERS])
def test_greedy_is_generate(kind):
    """Rows of all lengths, in places that become free and are taken again."""
    made = model(kind)
    want = [greedy(made, prompt, 20) for prompt in prompts()]
    for batch_size in (1, 3, 16):
        drawn = sample(made, prompts(), max_new=20, end=END, temperature=0, batch_size=batch_size)
        assert drawn.tokens == want
        assert drawn.finished == [END in answer for answer in want]


@pytest.mark.parametrize("kind", [*tiny.CONFIGS, *OTHERS])
def test_log_probabilities_are_those_of_a_full_forward_pass(kind):
    made = model(kind).double()
    drawn = sample(made, prompts(), max_new=20, end=END, batch_size=4)
    for prompt, answer, logprobs in zip(prompts(), drawn.tokens, drawn.logprobs, strict=True):
        want = forward(made, prompt, answer)
        torch.testing.assert_close(torch.tensor(logprobs).double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", LEAN)
def test_both_decoders_say_the_same(kind):
    made = model(kind)
    assert isinstance(decoder(made, 40), Lean)
    drawn = [sample(made, prompts(), max_new=20, end=END, temperature=0)]
    made.register_forward_hook(lambda *_: None)  # somebody listens: the model's own code runs
    assert isinstance(decoder(made, 40), General)
    drawn.append(sample(made, prompts(), max_new=20, end=END, temperature=0))
    assert drawn[0].tokens == drawn[1].tokens
    for one, other in zip(drawn[0].logprobs, drawn[1].logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "phi", "window", "gemma2", "bloom"])
def test_other_blocks_are_left_to_their_own_code(kind):
    assert isinstance(decoder(model(kind), 40), General)


def test_a_window_wider_than_any_row_is_no_window():
    made = model("window")
    assert isinstance(decoder(made, 5), Lean)
    assert isinstance(decoder(made, 6), General)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_depends_on_seed_and_index_alone(kind):
    made = model(kind).double()  # so that rounding does not decide between two tokens
    asked = [prompt for prompt in prompts() for _ in range(3)]
    drawn = [
        sample(made, asked, max_new=24, end=END, seed=(5, "rollout"), batch_size=batch_size)
        for batch_size in (1, 2, 7, 100)
    ]
    for other in drawn[1:]:
        assert other.tokens == drawn[0].tokens
        assert other.finished == drawn[0].finished
        for mine, first in zip(other.logprobs, drawn[0].logprobs, strict=True):
            assert mine == pytest.approx(first, rel=1e-9)
    assert len(set(map(len, drawn[0].tokens))) > 3  # rows did leave at different times
    first = sample(made, asked[:4], max_new=24, end=END, seed=(5, "rollout"))
    assert first.tokens == drawn[0].tokens[:4]
    other = sample(made, asked, max_new=24, end=END, seed=(6, "rollout"))
    assert all(a != b for a, b in zip(drawn[0].tokens, other.tokens, strict=True))
    assert drawn[0].tokens[0] != drawn[0].tokens[1]  # one prompt, another row


def test_global_randomness_is_not_touched():
    made = model()
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    sample(made, prompts(), max_new=4, end=END)
    assert torch.equal(torch.random.get_rng_state(), before)


def expected(made, prompt, temperature, filters):
    with torch.no_grad():
        logits = made(torch.tensor([prompt])).logits[0, -1:] / temperature
    for each in filters:
        logits = logits.masked_fill(~each.keep(logits), -torch.inf)
    return logits.softmax(-1)[0].double()


@pytest.mark.parametrize(
    ("temperature", "filters"),
    [
        (1.0, ()),
        (0.7, ()),
        (1.0, (TopK(k=5),)),
        (1.3, (TopP(p=0.8),)),
        (2.0, (MinP(share=0.2), TopK(k=7))),
    ],
)
def test_frequencies_are_the_probabilities(temperature, filters):
    made, prompt, draws = model(), [9, 40, 23], 4000
    drawn = sample(
        made,
        [prompt] * draws,
        max_new=1,
        end=END,
        temperature=temperature,
        filters=filters,
        batch_size=1000,
    )
    chance = expected(made, prompt, temperature, filters)
    seen = Counter(answer[0] for answer in drawn.tokens)
    assert set(seen) <= set(chance.nonzero()[:, 0].tolist())
    # Cells with fewer than five expected are put together, as the test needs.
    often = [token for token in range(96) if chance[token] * draws >= 5]
    counts = [seen[token] for token in often]
    wanted = [float(chance[token]) * draws for token in often]
    if len(often) < int((chance > 0).sum()):
        counts.append(draws - sum(counts))
        wanted.append(draws - sum(wanted))
    assert chisquare(counts, wanted, sum_check=False).pvalue > 1e-3
    answers = zip(drawn.tokens, drawn.behaviour, drawn.logprobs, strict=True)
    plain = expected(made, prompt, 1.0, ())
    for (token,), (behaviour,), (logprob,) in answers:
        assert behaviour == pytest.approx(float(chance[token].log()), abs=1e-4)
        assert logprob == pytest.approx(float(plain[token].log()), abs=1e-4)


def test_behaviour_is_certain_at_temperature_0_and_the_model_without_filters():
    drawn = sample(model(), prompts(), max_new=5, end=END, temperature=0)
    assert {value for row in drawn.behaviour for value in row} == {0.0}
    drawn = sample(model(), prompts(), max_new=5, end=END)
    assert drawn.behaviour == drawn.logprobs


class Counting(nn.Module):
    """A stand-in that notes how many rows it is given at a time."""

    def __init__(self, old):
        super().__init__()
        self.old, self.calls = old, []

    def forward(self, x):
        self.calls.append(x.shape[:-1].numel())
        return self.old(x)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_work_for_finished_rows_and_equal_prompts_are_read_once(kind):
    made = model(kind)
    block = made.model.layers[0] if kind == "llama" else made.transformer.h[0]
    name = "down_proj" if kind == "llama" else "c_proj"
    counter = Counting(getattr(block.mlp, name))
    setattr(block.mlp, name, counter)
    asked = [[40, 41, 42, 43]] * 3 + [[50, 51]] * 2
    drawn = sample(made, asked, max_new=30, end=END)
    assert isinstance(decoder(made, 40), Lean if kind == "llama" else General)
    steps = max(map(len, drawn.tokens))
    reads, taken = counter.calls[:-steps], counter.calls[-steps:]
    assert taken == [sum(len(a) > step for a in drawn.tokens) for step in range(steps)]
    assert len(set(taken)) > 1
    assert reads == [2 * 3]  # two texts, of 3 tokens and 1, without their last tokens


def test_long_prompts_are_read_in_portions(monkeypatch):
    made = model()
    whole = sample(made, prompts(), max_new=6, end=END, temperature=0)
    counter = Counting(made.model.layers[0].mlp.down_proj)
    made.model.layers[0].mlp.down_proj = counter
    monkeypatch.setattr("drawplate.model.flight._READ", 16)
    drawn = sample(made, prompts(), max_new=6, end=END, temperature=0)
    assert drawn.tokens == whole.tokens
    # Lengths without the last token are 0, 1, 2, 4, then 8, 8, then 13; at most 16 go together.
    assert counter.calls[:3] == [4 * 4, 2 * 8, 13]


def test_watch_hears_of_every_step():
    heard = []
    drawn = sample(
        model(),
        prompts(),
        max_new=9,
        end=END,
        batch_size=4,
        watch=lambda *report: heard.append(report),
    )
    done = [step for step, _, _ in heard]
    assert done == sorted(done)
    assert done[-1] == len(prompts())
    assert {total for _, total, _ in heard} == {len(prompts())}
    assert heard[-1][2] == {"tokens": sum(map(len, drawn.tokens)), "rows": 0}
    assert max(metrics["rows"] for _, _, metrics in heard) <= 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_modes_calls_and_gradients_are_put_back(kind):
    made = model(kind).train()
    next(iter(made.children())).eval()
    modes = [module.training for module in made.modules()]
    want = [greedy(made.eval(), prompt, 6) for prompt in prompts()]
    for module, mode in zip(made.modules(), modes, strict=True):
        module.training = mode
    assert sample(made, prompts(), max_new=6, end=END, temperature=0).tokens == want  # no dropout
    assert [module.training for module in made.modules()] == modes
    assert not any("forward" in vars(module) for module in made.modules())
    assert torch.is_grad_enabled()
    made(torch.tensor([[1, 2]])).logits.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def factorised():
    made = model()
    stream = torch.Generator().manual_seed(0)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = edits.matrix(made.get_submodule(path))
        tensors = {
            "first.weight": torch.randn(5, weight.shape[1], generator=stream) / 3,
            "second.weight": torch.randn(weight.shape[0], 5, generator=stream) / 3,
        }
        edits.apply(made, low_rank.LowRank(module=path, rank=5), tensors)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"):
        weight = edits.matrix(made.get_submodule(path))
        keep = torch.rand(weight.shape, generator=stream) > 0.4
        spec = sparse.Sparse(module=path, kept=int(keep.sum()))
        edits.apply(made, spec, sparse.tensors(weight, keep))
    return made.eval()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_stand_ins_are_called_as_they_are(precision):
    made = factorised()
    assert isinstance(decoder(made, 40), Lean)
    want = [greedy(made, prompt, 12) for prompt in prompts()]
    packed = sample(made, prompts(), max_new=12, end=END, temperature=0, precision=precision)
    with materialized(made):
        dense = sample(made, prompts(), max_new=12, end=END, temperature=0, precision=precision)
    if precision is None:
        assert packed.tokens == dense.tokens == want
    else:
        assert packed.tokens != want  # it does matter, and is still near:
        first = [row[0] for row in packed.logprobs]
        exact = [
            row[0] for row in sample(made, prompts(), max_new=1, end=END, temperature=0).logprobs
        ]
        torch.testing.assert_close(torch.tensor(first), torch.tensor(exact), rtol=0, atol=0.2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi"])
def test_precision_moves_little_but_something(kind):
    made = model(kind)
    exact = sample(made, prompts(), max_new=1, end=END, temperature=0).logprobs
    rough = sample(
        made, prompts(), max_new=1, end=END, temperature=0, precision=torch.bfloat16
    ).logprobs
    assert exact != rough
    torch.testing.assert_close(torch.tensor(rough), torch.tensor(exact), rtol=0, atol=0.2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_model_in_half_precision(kind):
    made = model(kind).bfloat16()
    drawn = sample(made, prompts(), max_new=8, end=END, batch_size=4)
    for prompt, answer, logprobs in zip(prompts(), drawn.tokens, drawn.logprobs, strict=True):
        want = forward(made.float(), prompt, answer)
        torch.testing.assert_close(torch.tensor(logprobs), want, rtol=0, atol=0.3)


def test_nothing_to_do():
    drawn = sample(model(), [], max_new=3, end=END)
    assert (drawn.tokens, drawn.logprobs, drawn.finished) == ([], [], [])


@pytest.mark.parametrize(
    ("asked", "given", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [2, 96]], {}, "prompt 1 holds token 96, the model knows 0 to 95"),
        ([[-1]], {}, "holds token -1"),
        ([[1]], {"max_new": 0}, "max_new=0"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1] * 40], {"max_new": 26}, "need a context of 65, the model has 64"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(asked, given, message):
    with pytest.raises(UserError, match=message) as caught:
        sample(model(), asked, **({"max_new": 2, "end": END} | given))
    assert "\n" not in str(caught.value)


def test_the_whole_context_can_be_used():
    drawn = sample(model("gpt2"), [[1] * 40], max_new=25, end=-1)
    assert len(drawn.tokens[0]) == 25


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(temperature, value):
    made = model("llama_untied")
    with torch.no_grad():
        made.lm_head.weight[3] = value
    with pytest.raises(NotFinite, match="not finite"):
        sample(made, prompts(), max_new=2, end=END, temperature=temperature)
    assert not any("forward" in vars(module) for module in made.modules())


def test_swift_leaves_no_trace_when_the_body_fails():
    made = model()
    with pytest.raises(KeyError), swift(made):
        raise KeyError
    assert not any("forward" in vars(module) for module in made.modules())
