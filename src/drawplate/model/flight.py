"""The rows that are being decoded: who they are, where they lie, which token comes next."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from drawplate.model.decoder import Decoder
from drawplate.model.slots import Slots

_READ = 8192
"""Tokens, padding included, that are read in one go: bounds the memory for many or long prompts."""


class Flight:
    """At most `places` of the rows that continue `prompts`, by up to `max_new` tokens each."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], places: int, max_new: int
    ) -> None:
        self.decoder, self.prompts = decoder, prompts
        longest = max(map(len, prompts)) - 1
        self.slots = Slots(places, longest, max_new, decoder.transposed, decoder.stored)
        self.rows: list[int] = []
        self.last = torch.empty(0, dtype=torch.long, device=decoder.device)

    def enter(self, rows: Sequence[int]) -> None:
        """Give places to rows; all of a prompt is read but its last token, which a step takes."""
        by_prompt = sorted(rows, key=lambda row: (len(self.prompts[row]), list(self.prompts[row])))
        equal = [
            list(same) for _, same in groupby(by_prompt, key=lambda row: list(self.prompts[row]))
        ]
        for portion in _portions(equal, [len(self.prompts[same[0]]) - 1 for same in equal]):
            texts = [list(self.prompts[same[0]][:-1]) for same in portion]
            width = len(texts[-1])
            padded = torch.tensor([text + [0] * (width - len(text)) for text in texts])
            layers = self.decoder.read(padded.to(self.decoder.device)) if width else {}
            pick = [index for index, same in enumerate(portion) for _ in same]
            self.slots.admit(layers, pick, [len(texts[index]) for index in pick])
        self.rows += by_prompt
        last = torch.tensor([self.prompts[row][-1] for row in by_prompt])
        self.last = torch.cat([self.last, last.to(self.last.device)])

    def step(self) -> Tensor:
        """Logits [N, V] of the next token of every row, in float32 at least."""
        self.slots.provide()
        logits = self.decoder.step(self.last, self.slots)
        self.slots.advance()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def go_on(self, token: Tensor, stays: Sequence[bool]) -> None:
        """Rows that stay go on with their token [N], the last ones in the places of the others."""
        self.last = token
        if all(stays):
            return
        left = sum(stays)
        order = list(range(left))
        gaps = [place for place in order if not stays[place]]
        tail = [place for place in range(left, len(stays)) if stays[place]]
        for gap, place in zip(gaps, tail, strict=True):
            order[gap] = place
        self.rows = [self.rows[place] for place in order]
        self.slots.keep(torch.tensor(order, dtype=torch.long))
        self.last = token[torch.tensor(order, dtype=torch.long, device=token.device)]


def _portions(items: Sequence[list[int]], widths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Consecutive items, with rising widths, in portions of at most `_READ` padded tokens."""
    portion: list[list[int]] = []
    for item, width in zip(items, widths, strict=True):
        if portion and (len(portion) + 1) * width > _READ:
            yield portion
            portion = []
        portion.append(item)
    yield portion
