"""Periodic limit: from the longest down to the shortest and back up, a few times in a run.

With phase f = 2 pi t / T, the limit is (longest + shortest) / 2 + (longest - shortest) / 2 cos f;
where `hold` is above zero it stays at both ends for that share of the cycle.

Paper: Wen et al. 2025, SIRI: Scaling Iterative Reinforcement Learning with Interleaved Compression,
arXiv:2509.25176, section 4.3: its cosine scheduler is `hold` 0, stair-cosine is 0.5, stair is 1.
Deviation: a cycle T is a share of the run instead of 640 steps; the limits halve as 16384 to 8192
do there, at the size of smaller problems; a stair begins in the middle of its first tread.
Cost: none.
"""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from drawplate.rl.length import Length


class Siri(Length):
    """Answers are pressed together, then given room again for what that made possible."""

    name: Literal["siri"] = "siri"
    paper: ClassVar[str] = "2509.25176"
    longest: PositiveInt = 1024
    """Most tokens of an answer where a cycle begins and ends."""
    shortest: PositiveInt = 512
    """And in its middle."""
    cycles: PositiveFloat = 3.0
    """Cycles in the run; one that ends in a half leaves the model at its shortest answers."""
    hold: float = Field(default=0.0, ge=0, le=1)
    """Share of a cycle that is spent at the two ends."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(
                f"shortest {self.shortest} has to be at most longest, which is {self.longest}"
            )
        return self

    def limit(self, step: int, steps: int) -> int:
        """Rounded to a whole number."""
        phase = self.cycles * step % steps / steps  # the remainder is exact: so is the period
        away = 2 * min(phase, 1 - phase)  # from the longest: 0 there, 1 at the shortest
        flat = self.hold / 2
        if away < flat or away >= 1 - flat:
            wave = 1.0 if away < 0.5 else -1.0
        else:
            wave = math.cos(math.pi * (away - flat) / (1 - self.hold))
        middle, swing = self.longest + self.shortest, self.longest - self.shortest
        return round((middle + swing * wave) / 2)
