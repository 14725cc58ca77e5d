"""What the sampler asks of a model, and the form of it that every Hugging Face decoder has."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from drawplate.core.errors import UserError
from drawplate.model import lean
from drawplate.model.slots import Layers, Slots


class Decoder(Protocol):
    """Reads prompts into keys and values, then takes one token per row and step."""

    transposed: bool
    """Which layout of keys in memory `step` likes, see `Slots`."""
    stored: torch.dtype | None
    """In which dtype it wants keys and values kept, None being that of `read`."""
    device: torch.device
    """Where tokens are expected."""

    def read(self, tokens: Tensor) -> Layers:
        """Prompts, padded on the right, [P, T] -> keys and values of every layer.

        What comes out at the padding is of no meaning and never looked at.
        """

    def step(self, token: Tensor, slots: Slots) -> Tensor:
        """The last token of each row, [N] -> logits of the next, [N, V]; appends to `slots`."""


def decoder(model: PreTrainedModel, horizon: int, precision: torch.dtype | None = None) -> Decoder:
    """The lean decoder where the model's blocks are of the kind that it knows, else the general.

    For rows of up to `horizon` tokens; `precision` is that of the products, see `products.swift`.
    """
    if lean.fits(model, horizon):
        return lean.Lean(model, horizon, precision)
    return General(model)


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer of `Slots` as transformers sees it."""

    def __init__(self, slots: Slots, index: int) -> None:
        super().__init__()
        self.slots, self.index = slots, index

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        window = slice(self.slots.base, self.slots.cursor + 1)
        keys, values = self.slots.append(self.index, key_states, value_states)
        return keys[:, :, window], values[:, :, window]

    def get_seq_length(self) -> int:
        return self.slots.cursor - self.slots.base


class General:
    """Any decoder with keys and values, through its own `forward`."""

    transposed = False
    stored: torch.dtype | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }
        if kinds:
            raise _unfit(model, f"the kind {', '.join(sorted(kinds))}")
        self.model, self.device = model, model.device
        self.layers = model.config.num_hidden_layers
        shared = getattr(model.config, "num_kv_shared_layers", None) or 0
        self.caching = self.layers - shared

    def read(self, tokens: Tensor) -> Layers:
        """See `Decoder`. Padding on the right needs no mask: a causal model looks to the left.

        Raises:
            UserError: the model keeps something else than keys and values.
        """
        cache = DynamicCache()
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        stored = [layer.get_seq_length() for layer in cache.layers]
        if stored != [tokens.shape[1]] * self.caching:
            raise _unfit(self.model, "other kinds")
        return {i: (layer.keys, layer.values) for i, layer in enumerate(cache.layers)}

    def step(self, token: Tensor, slots: Slots) -> Tensor:
        """See `Decoder`.

        Raises:
            UserError: the model keeps something else than keys and values.
        """
        window = slice(slots.base, slots.cursor + 1)
        owned = slots.owned()[:, window]
        cache = Cache(layers=[_Layer(slots, index) for index in range(self.layers)])
        logits: Tensor = self.model(
            input_ids=token[:, None],
            attention_mask=None if owned.all() else owned.to(token.device),
            position_ids=slots.lengths().to(token.device)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
        if slots.layers != self.caching:  # prompts of one token are never read
            raise _unfit(self.model, "other kinds")
        return logits[:, -1]


def _unfit(model: PreTrainedModel, what: str) -> UserError:
    return UserError(
        f"sampling from {type(model).__name__} is not possible: layers of {what} keep more than "
        "keys and values; choose a model whose layers are all full_attention or sliding_attention"
    )
