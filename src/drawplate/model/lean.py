"""Decoding for blocks of the Llama kind, without what one token at a time does not need.

x += o(attention(rotate(q(norm x)), rotate(k(norm x)), v(norm x)))
x += down(act(gate(norm x)) * up(norm x))

The model's own modules and parameters are called in place, so that stand-ins for linear layers work
as they are; only what lies between them is ours. The residual stream x and the norms are at least
float32; products have the model's dtype or, if given, a lower precision.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from drawplate.core.products import plain
from drawplate.edits.clex import ClexRotary
from drawplate.model.slots import Layers, Slots

Map = Callable[[Tensor], Tensor]

_SKELETONS: dict[type, tuple[type, ...]] = {
    getattr(source, f"{name}ForCausalLM"): tuple(
        getattr(source, f"{name}{part}")
        for part in ("Model", "RotaryEmbedding", "DecoderLayer", "Attention", "MLP")
    )
    for source, name in ((llama, "Llama"), (mistral, "Mistral"), (qwen2, "Qwen2"), (qwen3, "Qwen3"))
}
"""Model class -> the classes whose forward this module stands for."""

_NORMS = (llama.LlamaRMSNorm, mistral.MistralRMSNorm, qwen2.Qwen2RMSNorm, qwen3.Qwen3RMSNorm)
_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position alone."""


def fits(model: PreTrainedModel, horizon: int) -> bool:
    """Whether each block is exactly one that this module walks, for rows of up to `horizon` tokens.

    A model that somebody listens to, through hooks or a changed `forward`, is left to its own code.
    """
    skeleton = _SKELETONS.get(type(model))
    if skeleton is None:
        return False
    body, rotary, layer, attention, mlp = skeleton
    core: Any = model.model
    turning = core.rotary_emb
    # Its frequencies go by the horizon, for which they are asked once.
    turning = turning.base if isinstance(turning, ClexRotary) else turning
    parts = [(core, body), (turning, rotary)]
    for block in core.layers:
        parts += [(block, layer), (block.self_attn, attention), (block.mlp, mlp)]
    window = getattr(model.config, "sliding_window", None)
    return (
        all(type(part) is kind for part, kind in parts)
        and not any(_watched(module) for module in model.modules())
        and turning.rope_type in _ROTARY
        and (window is None or window >= horizon)
    )


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Lean:
    """A `Decoder` for models that `fits`; see there for the contract of its members."""

    def __init__(self, model: PreTrainedModel, horizon: int, precision: torch.dtype | None) -> None:
        core: Any = model.model
        own = model.dtype
        self.device, self.stream = model.device, torch.promote_types(own, torch.float32)
        self.work = work = precision or own
        # Processors are slow at products of many small matrices in half precision.
        self.stored = self.stream if self.device.type == "cpu" else work
        self.heads = model.config.num_key_value_heads
        self.queries = model.config.num_attention_heads // self.heads
        # One query takes its product with each key fastest along the key, several along the keys.
        self.transposed = self.queries > 1
        self.blocks = [_Block(layer, own, work) for layer in core.layers]
        self.embed, self.norm = core.embed_tokens, _norm(core.norm, work)
        self.head = _product(model.lm_head, own, work)
        positions = torch.arange(horizon, device=self.device)[None]
        cos, sin = core.rotary_emb(torch.empty(0, dtype=work, device=self.device), positions)
        first, second = sin[0].chunk(2, -1)
        self.cos, self.sin = cos[0], torch.cat([-first, second], -1)

    def read(self, tokens: Tensor) -> Layers:
        """See `Decoder`."""
        prompts, width = tokens.shape
        x = self.embed(tokens.flatten()).to(self.stream)
        turn = self._turn(torch.arange(width, device=x.device).repeat(prompts))
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(self.blocks):
            query, key, value = (
                part.view(prompts, width, *part.shape[1:]).transpose(1, 2)
                for part in block.project(x, turn)
            )
            layers[index] = key, value
            if index + 1 == len(self.blocks):
                break  # nobody asks what the last block makes of them
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=block.scale, enable_gqa=True
            )
            x = block.finish(x, mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        return layers

    def step(self, token: Tensor, slots: Slots) -> Tensor:
        """See `Decoder`."""
        x = self.embed(token).to(self.stream)
        turn = self._turn(slots.lengths().to(x.device))
        rows, heads, queries = slots.count, self.heads, self.queries
        outside = torch.zeros(rows, 1, 1, slots.room, dtype=self.stored)
        outside = outside.masked_fill(~slots.owned()[:, None, None], -torch.inf).to(x.device)
        outside = outside.expand(-1, heads, queries, -1).flatten(0, 1)
        for index, block in enumerate(self.blocks):
            query, key, value = block.project(x, turn)
            keys, values = slots.append(index, key[:, :, None], value[:, :, None])
            query = query.to(self.stored).view(rows * heads, queries, -1)
            keys = keys.flatten(0, 1).transpose(1, 2)
            scores = torch.baddbmm(outside, query, keys, alpha=block.scale)
            mixed = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
            x = block.finish(x, mixed.view(rows, -1).to(self.work))
        return self.head(self.norm(x))

    def _turn(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position, None], self.sin[position, None]


class _Block:
    """One decoder layer on a flat list of tokens, split where attention mixes them."""

    def __init__(self, layer: Any, own: torch.dtype, work: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width, self.scale = attention.head_dim, attention.scaling
        self.before = _norm(layer.input_layernorm, work)
        self.between = _norm(layer.post_attention_layernorm, work)
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = (
            _product(module, own, work)
            for module in (
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            )
        )
        self.act = mlp.act_fn
        normed = hasattr(attention, "q_norm")
        self.query_norm = _norm(attention.q_norm, work) if normed else None
        self.key_norm = _norm(attention.k_norm, work) if normed else None

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[N, hidden] -> query [N, H, D], key and value [N, K, D]."""
        x = self.before(x)
        query, key, value = (
            product(x).view(len(x), -1, self.width)
            for product in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return _rotate(query, *turn), _rotate(key, *turn), value

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual stream [N, hidden] and attention's result [N, H * D] -> residual stream."""
        x = x + self.out(mixed)
        inner = self.between(x)
        return x + self.down(self.act(self.gate(inner)) * self.up(inner))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (a, b) -> (a cos - b sin, b cos + a sin), [N, H, D]; `sin` brings the minus."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _norm(module: nn.Module, work: torch.dtype) -> Map:
    if type(module) not in _NORMS:
        return lambda x: module(x).to(work)
    eps: Any = module.variance_epsilon
    weight: Any = module.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return lambda x: F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(work)


def _product(module: nn.Module, own: torch.dtype, work: torch.dtype) -> Map:
    """A linear layer or its stand-in as it is; only plain ones are given a foreign dtype."""
    if own == work or plain(module) is not None:
        return module
    return lambda x: module(x.to(own)).to(work)
