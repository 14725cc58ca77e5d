"""The model that pretraining starts from."""

import pytest
import torch
from pydantic import ValidationError

from drawplate.model import ModelConfig, build
from drawplate.model.sample import sample

SMALL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 48, "context": 32}


def small(**fields):
    return ModelConfig(**(SMALL | fields))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_pure_function_of_its_arguments():
    before = torch.random.get_rng_state()
    first = weights(build(small(), 64, 5))
    torch.manual_seed(123)
    after = torch.random.get_rng_state()
    assert same(weights(build(small(), 64, 5)), first)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert not torch.equal(before, after)
    other = weights(build(small(), 64, 6))
    assert all(
        torch.equal(other[name], first[name]) == name.endswith("norm.weight") for name in first
    )


def test_more_layers_leave_the_first_ones_as_they_were():
    few, many = weights(build(small(), 64, 0)), weights(build(small(layers=4), 64, 0))
    assert all(torch.equal(many[name], few[name]) for name in few)


def test_the_distribution_is_the_promised_one():
    model = build(small(hidden=128, init_std=0.05), 300, 0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(weight.mean().item()) < 0.002


def test_special_tokens_belong_to_the_tokenizer():
    config = build(small(), 64, 0).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden": 64},
        {"layers": 3},
        {"heads": 8},
        {"kv_heads": 4},
        {"feed_forward": 50},
        {"tie": False},
        {"rope_theta": 50.0},
        {"norm_eps": 0.5},
        {"init_std": 0.3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_matters(fields):
    ids = torch.arange(24)[None]
    with torch.no_grad():
        one = build(small(init_std=0.1), 64, 0)(ids).logits
        other = build(small(**({"init_std": 0.1} | fields)), 64, 0)(ids).logits
    assert not torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_context_is_the_limit_of_the_sampler():
    from drawplate.core.errors import UserError

    assert len(sample(build(small(), 64, 0), [[1] * 20], max_new=13, end=-1).tokens[0]) == 13
    with pytest.raises(UserError, match="context of 33, the model has 32"):
        sample(build(small(), 64, 0), [[1] * 20], max_new=14, end=-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 36}, "even multiple of heads=4"),
        ({"hidden": 30}, "even multiple"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"norm_eps": 0.0}, "greater than 0"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        small(**fields)
