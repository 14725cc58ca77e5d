"""What follows from the shape of a Llama decoder alone: parameters, bytes, multiply-adds.

Letters: h hidden, f feed-forward, k width of all keys, V vocabulary, L layers, R tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from drawplate.model import ModelConfig


class Shape(NamedTuple):
    """The numbers that decide how large a Llama decoder is."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    tie: bool = False

    @classmethod
    def of(cls, model: ModelConfig, vocabulary: int) -> Shape:
        """The shape of the decoder that pretraining builds."""
        return cls(
            model.hidden,
            model.layers,
            model.heads,
            model.kv_heads,
            model.feed_forward,
            vocabulary,
            model.tie,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block, [out, in]."""
        h, f = self.hidden, self.feed_forward
        k = h // self.heads * self.kv_heads
        return {
            "q_proj": (h, h),
            "k_proj": (k, h),
            "v_proj": (k, h),
            "o_proj": (h, h),
            "gate_proj": (f, h),
            "up_proj": (f, h),
            "down_proj": (h, f),
        }

    @property
    def block(self) -> int:
        """Parameters of a block: 2 h^2 + 2 h k + 3 h f + 2 h."""
        return sum(o * i for o, i in self.matrices.values()) + 2 * self.hidden

    @property
    def vocabularies(self) -> int:
        """Parameters of embedding table and head: V h, twice where they are not tied."""
        return self.vocabulary * self.hidden * (1 if self.tie else 2)

    @property
    def parameters(self) -> int:
        """All: L (2 h^2 + 2 h k + 3 h f + 2 h) + (1 or 2) V h + h."""
        return self.layers * self.block + self.vocabularies + self.hidden

    @property
    def macs(self) -> int:
        """Multiply-adds of weights for one token: all matrices and the head, no look-up."""
        each = sum(o * i for o, i in self.matrices.values())
        return self.layers * each + self.vocabulary * self.hidden

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of the different inputs in a block: attention, its output, the MLP, its inside."""
        return (self.hidden, self.hidden, self.hidden, self.feed_forward)

    def training(self, states: int, stored: int = 4) -> int:
        """Bytes of weights, gradients and `states` optimizer numbers a weight, each 4 bytes.

        Weights and gradients have `stored` bytes; with fewer than 4 a float32 copy is kept too.
        """
        master = 0 if stored == 4 else 4
        return self.parameters * (2 * stored + master + 4 * states)

    def gathering(self, wide: int = 8) -> int:
        """Bytes of the Gram matrices of a block's inputs, sums of `wide` bytes: wide sum of I^2."""
        return wide * sum(width * width for width in self.inputs)

    def hidden_states(self, tokens: int, stored: int = 4) -> int:
        """Bytes of `tokens` calibration tokens between two blocks: R h."""
        return tokens * self.hidden * stored

    def packed(self, bits: int, group: int | None, scale: int = 4, zero: int = 1) -> int:
        """Bytes of a block's matrices as codes of `bits`.

        Each group has a scale of `scale` bytes, and a zero point of `zero` bytes.
        """
        total = 0
        for rows, columns in self.matrices.values():
            groups = 1 if group is None else -(-columns // group)
            total += rows * (-(-columns * bits // 8) + groups * (scale + zero))
        return total


LLAMA_70B = Shape(8192, 80, 64, 8, 28672, 128256)
"""meta-llama/Meta-Llama-3-70B, config.json."""
