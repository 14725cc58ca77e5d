"""The chunked loss is the loss, with a fraction of its memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from drawplate.core.errors import UserError
from drawplate.train.loss import IGNORED, check_apart, check_head, states, token_losses
from tests import faults, tiny


def case(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 40, (3, 11))
    targets[0, 3:5] = IGNORED
    return hidden, nn.Linear(16, 40, bias=True).to(dtype), targets


@pytest.mark.parametrize("rows", [1, 4, 33, 100, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_cross_entropy_with_its_gradients(rows: int | None, dtype: torch.dtype) -> None:
    hidden, head, targets = case(dtype)
    weight = torch.rand(3, 11, dtype=torch.float64)
    losses = token_losses(hidden, head, targets, rows)
    (losses * weight).sum().backward()
    found = [hidden.grad, head.weight.grad, head.bias.grad]
    hidden2, head2, _ = case(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    logits = head2(hidden2).to(wide)
    expected = functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=IGNORED)
    (expected * weight).sum().backward()
    assert losses.dtype is wide
    exact = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(losses, expected, rtol=exact, atol=exact)
    for one, other in zip(found, [hidden2.grad, head2.weight.grad, head2.bias.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=exact, atol=4 * exact)


def test_is_exactly_cross_entropy_of_the_same_logits() -> None:
    """With an identity for a head nothing is rounded differently: bit by bit the same."""
    logits = torch.randn(50, 30)
    targets = torch.randint(0, 30, (50,))
    expected = functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(token_losses(logits, nn.Identity(), targets, 7), expected)


def test_ignored_targets_cost_nothing_and_teach_nothing() -> None:
    hidden, head, targets = case(torch.float32)
    losses = token_losses(hidden, head, targets, 4)
    losses.sum().backward()
    assert torch.equal(losses[0, 3:5], torch.zeros(2))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[0, 3:5], torch.zeros(2, 16))
    assert (hidden.grad[0, 5:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_is_the_loss_of_hugging_face_decoders(kind: str) -> None:
    model, tokens = tiny.model(kind), tiny.tokens()
    check_head(model)
    check_apart(model)
    head = model.get_output_embeddings()
    found = token_losses(states(model, tokens[:, :-1]), head, tokens[:, 1:]).mean()
    expected = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_models_that_change_their_logits_are_refused() -> None:
    from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 0,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2}
    scaled = GraniteConfig(**small, **special, logits_scaling=4.0)
    for config in (scaled, CohereConfig(**small, **special)):
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(UserError, match="changes its logits"):
            check_head(model)
        torch.nn.init.zeros_(model.get_output_embeddings().weight)
        with pytest.raises(UserError, match="changes its logits"):
            check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_look_past_the_start_of_a_document_are_refused(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    bloom = BloomConfig(**small, n_head=2)
    opt = OPTConfig(**small, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32)
    for config in (bloom, opt):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            parameter.data.mul_(4)  # large enough to matter
        check_head(model)
        with pytest.raises(UserError, match="does not keep texts that share a row apart"):
            check_apart(model)
        assert model.training


MEMORY = """
import sys, torch
from torch import nn
from torch.nn import functional
from drawplate.core.memory import peak_memory
from drawplate.train.loss import token_losses
torch.set_num_threads(1)
hidden, head = torch.randn(4096, 32, requires_grad=True), nn.Linear(32, 8192, bias=False)
targets = torch.randint(0, 8192, (4096,))
token_losses(hidden[:1024], head, targets[:1024]).sum().backward()  # what libraries load
before = peak_memory()
if sys.argv[1] == "chunked":
    token_losses(hidden, head, targets).sum().backward()
else:
    functional.cross_entropy(head(hidden).float(), targets, reduction="sum").backward()
print((peak_memory() - before) / 1e6)
"""


@pytest.mark.slow
def test_needs_less_than_half_of_the_memory() -> None:
    def megabytes(how: str) -> float:
        command = [sys.executable, "-c", MEMORY, how]
        done = subprocess.run(
            command, env=faults.environment(), capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    whole, chunked = megabytes("whole"), megabytes("chunked")
    print(f"peak above start: whole {whole:.0f} MB, chunked {chunked:.0f} MB")
    assert chunked < whole / 2
