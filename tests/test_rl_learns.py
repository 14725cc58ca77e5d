"""What the recipe is for: on a quantized model, more right answers with fewer tokens."""

import json
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from drawplate import edits
from drawplate.edits.quantized import QuantizedLinear
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.adapt.scales import Scales
from drawplate.rl.driver import finetune
from drawplate.rl.length.constant import Constant
from drawplate.rl.params import Finetune
from drawplate.rl.select.varied import Varied
from drawplate.train.optimizer import Group, Optimizer
from tests.test_adapt import quantize

PAD, ASK, END, THINK, DIGITS = 0, 1, 2, 3, 4
VOCABULARY = DIGITS + 10
PROMPTS = [[DIGITS + d, ASK] for d in range(10)]
LIMIT = 8


def speaker():
    """Repeats a digit, three times in four the right one, half the time after idle tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    every, column = torch.arange(64), torch.arange(17)
    for _ in range(150):
        digit, other = torch.randint(10, (2, 64), generator=g)
        idle = torch.randint(3, 13, (64,), generator=g) * (torch.rand(64, generator=g) < 0.5)
        said = torch.where(torch.rand(64, generator=g) < 0.75, digit, other)
        rows = torch.where(column < 2 + idle[:, None], THINK, PAD)
        rows[:, 0], rows[:, 1] = DIGITS + digit, ASK
        rows[every, 2 + idle], rows[every, 3 + idle] = DIGITS + said, END
        answer = (column >= 2) & (column <= 3 + idle[:, None])
        logits = model(rows).logits[:, :-1][answer[:, 1:]]
        loss = cross_entropy(logits, rows[answer])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layers = [path for path, m in model.named_modules() if path.endswith("_proj")]
    return quantize(model.eval(), layers)


def learn(adapt, rate, folder, steps=30):
    group = Group(rate=rate)
    how = Finetune(
        steps=steps,
        prompts=8,
        samples=8,
        select=Varied(attempts=3),
        length=Constant(tokens=LIMIT),
        adapt=adapt,
        optimizer=Optimizer(matrices=group, rest=group),
    )
    model = speaker()
    codes = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("codes")}
    outcome = finetune(
        model,
        how,
        prompts=PROMPTS,
        score=lambda index, text: float(text.endswith(str(index))),
        decode=lambda tokens: "".join(
            "." if t == THINK else str(t - DIGITS) if t >= DIGITS else "?" for t in tokens
        ),
        end=END,
        about="repeat the digit",
        work=folder,
    )
    rows = [json.loads(line) for line in outcome.metrics.read_text().splitlines()]
    return model, codes, rows


def mean(rows, name):
    return statistics.fmean(row[name] for row in rows)


@pytest.mark.parametrize(
    ("adapt", "rate"), [(Lora(rank=4, alpha=8), 5e-3), (Scales(), 2e-2)], ids=["lora", "scales"]
)
def test_right_more_often_and_shorter(adapt, rate, tmp_path):
    model, codes, rows = learn(adapt, rate, tmp_path)
    before, after = rows[:5], rows[-5:]
    assert mean(after, "reward") > mean(before, "reward") + 0.2
    assert mean(after, "length") < 0.7 * mean(before, "length")
    assert mean(after, "truncated") < 0.5 * mean(before, "truncated")
    state = model.state_dict()
    for name, held in codes.items():
        moved = name.replace(".codes", ".base.codes")
        assert torch.equal(state[name if name in state else moved], held)
    edits.check(model)
    kinds = {type(m) for m in model.modules()}
    assert QuantizedLinear in kinds
