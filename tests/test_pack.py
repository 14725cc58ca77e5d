"""Codes in bytes: exact for every width, on every device that torch has, and back to weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.core.pack import decode, pack, pack_mask, packed_bytes, unpack, unpack_mask


def stream(codes: list[int], bits: int) -> bytes:
    """Code k at bits k * bits and up of one large integer, in little-endian bytes."""
    whole = sum(code << (bits * k) for k, code in enumerate(codes))
    return whole.to_bytes(packed_bytes(bits, len(codes)), "little")


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 8))
def test_bytes_are_the_bit_stream_and_come_back(data, bits):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(given_codes, bits)
    assert bytes(packed.tolist()) == stream(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    assert given_codes.tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes(bits):
    for code in (0, 2**bits - 1):
        codes = torch.full((1001,), code, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (-(-1001 * bits // 8),)
        assert torch.equal(unpack(packed, bits, 1001), codes)


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (2, 3, 5), (8, 8)])
def test_masks_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    packed = pack_mask(mask)
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape), mask)


@pytest.mark.parametrize("bits", range(1, 9))
def test_shapes_without_data(bits):
    codes = torch.zeros(37, dtype=torch.uint8)
    meta = pack(codes.to("meta"), bits)
    assert (meta.shape, meta.dtype) == (pack(codes, bits).shape, torch.uint8)
    assert unpack(meta, bits, 37).shape == (37,)


@pytest.mark.parametrize("bits", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_unpack_is_one_traced_graph(bits):
    codes = torch.arange(37, dtype=torch.uint8) % 2**bits
    traced = torch.compile(unpack, backend="eager", fullgraph=True)
    assert torch.equal(traced(pack(codes, bits), bits, 37), codes)


def test_refusals():
    codes = torch.tensor([1, 8], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(codes, 3)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            pack(codes, bits)
        with pytest.raises(ValueError, match="1 to 8 bits"):
            unpack(codes, bits, 2)
    with pytest.raises(ValueError, match=r"5 codes of 4 bits are \[3\] bytes, not \[2\]"):
        unpack(codes, 4, 5)
    with pytest.raises(ValueError, match="int64"):
        pack(codes.long(), 4)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        pack(codes[None], 4)


@pytest.mark.parametrize("kind", ["none", "shared", "row"])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("group", [1, 4, 5, 11, 30])
def test_decode_is_level_minus_zero_times_scale(kind, has_zero, group):
    rows, width = 3, 11
    draw = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 8, (rows, width), generator=draw, dtype=torch.uint8)
    groups = -(-width // group)
    scale = torch.rand(rows, groups, generator=draw, dtype=torch.float64)
    zero = torch.randint(0, 8, (rows, groups), generator=draw, dtype=torch.uint8)
    table = torch.randn(rows, 8, generator=draw, dtype=torch.float64)
    levels = {"none": None, "shared": table[0], "row": table}[kind]
    got = decode(levels, codes, scale, zero if has_zero else None, group)
    for o in range(rows):
        for i in range(width):
            c = int(codes[o, i])
            level = {"none": c, "shared": float(table[0, c]), "row": float(table[o, c])}[kind]
            want = (level - has_zero * int(zero[o, i // group])) * float(scale[o, i // group])
            assert float(got[o, i]) == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_decode_in_single_precision_from_any_storage_and_differentiable():
    codes = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    levels = torch.tensor([-1.0, 0.25, 3.0, 9.0], requires_grad=True)
    weight = decode(levels, codes, scale, None, 2)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-0.5, 0.125, 6.0]]
    weight.sum().backward()
    assert scale.grad.tolist() == [[-0.75, 3.0]]
    assert levels.grad.tolist() == [0.5, 0.5, 2.0, 0.0]
