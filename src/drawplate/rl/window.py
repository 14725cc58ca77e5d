"""Answers that grow by a window a batch, and the tokens of them that the policy learns from.

A batch holds as many answers as one without windows. Those that are complete leave, others go on in
the next batch, under the policy as it is then, and new ones take the free places. Every token is
learned from once: prompts and what was learned from before are context. With `hold`, the last ones
before a cut wait for what follows them, with the log-probabilities of the policy that drew them.

Paper: Fan et al. 2025, Truncated Proximal Policy Optimization, arXiv:2506.15050.
Deviation: none; `hold` is an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor

from drawplate.core.method import Frozen


class Window(Frozen):
    """How far answers grow at a time."""

    share: float = Field(default=1 / 3, gt=0, le=1)
    """Of an answer's limit: the most by which it grows in one batch of rollouts."""
    hold: int = Field(default=0, ge=0)
    """Last tokens before a cut that are learned from one batch later: their advantages, of few
    steps each, lean on the critic the most."""

    def most(self, answer: Answer) -> int:
        """Tokens by which an answer may grow now."""
        return min(max(1, round(self.share * answer.limit)), answer.left)

    def due(self, answers: Sequence[Answer], mask: Tensor) -> Tensor:
        """Bool [B, T]: tokens that the policy learns from now, of all those in `mask`."""
        place = mask.cumsum(1)
        first = place.new_tensor([answer.learned for answer in answers])[:, None]
        past = [len(a.tokens) - (self._held(a) if a.going else 0) for a in answers]
        return mask & (place > first) & (place <= place.new_tensor(past)[:, None])

    def kept(self, answers: Sequence[Answer], old: Tensor, mask: Tensor) -> list[Answer]:
        """The answers that go on, each with what its last tokens have to remember.

        `old` [B, T] are log-probabilities under the policies that drew the tokens in `mask`.
        """
        going = []
        for answer, logp, inside in zip(answers, old, mask, strict=True):
            if answer.going:
                cut = len(answer.sampled) - self._held(answer)
                last = logp[inside][answer.learned + cut :].tolist()
                going.append(replace(answer, sampled=answer.sampled[cut:], old=tuple(last)))
        return going

    def _held(self, answer: Answer) -> int:
        return min(self.hold, len(answer.sampled))


@dataclass(frozen=True)
class Answer:
    """An answer as far as it has come."""

    place: int
    """Which draw of a prompt it belongs to."""
    number: int
    """Which row of the sampler's noise is its own."""
    limit: int
    """Most tokens that it may have."""
    tokens: tuple[int, ...] = ()
    """All of it."""
    sampled: tuple[float, ...] = ()
    """What the sampler said of the last tokens, those that the policy has not learned from."""
    old: tuple[float, ...] = ()
    """Log-probabilities of the first of these, drawn in earlier batches."""
    finished: bool = False
    """Whether it ended by itself."""

    @property
    def going(self) -> bool:
        """Whether more can follow."""
        return not self.finished and self.left > 0

    @property
    def left(self) -> int:
        """Tokens that there is still room for."""
        return self.limit - len(self.tokens)

    @property
    def learned(self) -> int:
        """First tokens that the policy has learned from."""
        return len(self.tokens) - len(self.sampled)

    def grown(self, tokens: Sequence[int], sampled: Sequence[float], finished: bool) -> Answer:
        """With more tokens behind it."""
        return replace(
            self,
            tokens=(*self.tokens, *tokens),
            sampled=(*self.sampled, *sampled),
            finished=finished,
        )


def remembered(answers: Sequence[Answer], old: Tensor, mask: Tensor) -> Tensor:
    """`old` [B, T], where tokens drawn in earlier batches keep what they had then."""
    found = old.clone()
    for row, answer in enumerate(answers):
        columns = mask[row].nonzero().flatten()[answer.learned :][: len(answer.old)]
        found[row, columns] = found.new_tensor(answer.old)
    return found
