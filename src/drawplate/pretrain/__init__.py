"""The pretrain stage's parameters: a decoder trained from scratch, or any that is there already."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from drawplate.core.batches import Mix
from drawplate.core.method import Frozen
from drawplate.model import ModelConfig
from drawplate.train.loop import Training


class Pretrain(Frozen):
    """What the pretrain stage is asked to do."""

    adopt: Path | None = None
    """Folder of a Hugging Face decoder to take instead of training one; set nothing else then."""
    seed: int = Field(0, ge=0)
    """Of the initial weights and of the order of the data."""
    model: ModelConfig = ModelConfig()
    """Shape of the decoder."""
    batch: PositiveInt = 32
    """Rows in a step."""
    length: PositiveInt = 128
    """Tokens in a row."""
    mix: Mix = Mix()
    """Share of problem rows over the run."""
    learn_prompts: bool = False
    """Whether the tokens of problems' prompts are learned too."""
    training: Training = Training()
    """Steps, optimizer, schedule, precision."""

    @model_validator(mode="after")
    def _adopt_alone(self) -> Pretrain:
        idle = sorted(self.model_fields_set - {"adopt"})
        if self.adopt is not None and idle:
            raise ValueError(f"with `adopt` nothing is trained: remove {', '.join(idle)}")
        return self
