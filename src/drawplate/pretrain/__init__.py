"""The pretrain stage's parameters: a decoder trained from scratch, or any that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from drawplate.core.batches import Mix
from drawplate.core.method import Frozen, OneOf
from drawplate.model import ModelConfig
from drawplate.pretrain.budget import SIZES, Budget
from drawplate.pretrain.feed_forward import FeedForward
from drawplate.pretrain.norm import Norm
from drawplate.pretrain.parametrisation import Parametrisation
from drawplate.pretrain.part import Part
from drawplate.pretrain.position import Position
from drawplate.train.loop import Training

_FREE = {key: getattr(ModelConfig(), key) for key in SIZES}
"""Sizes that nobody has set."""


class Pretrain(Frozen):
    """What the pretrain stage is asked to do."""

    adopt: Path | None = None
    """Folder of a Hugging Face decoder to take; with `position` it is trained on, else set nothing
    else. DVC notices changes of what lies in `decoders/`."""
    seed: int = Field(0, ge=0)
    """Of the initial weights and of the order of the data."""
    model: ModelConfig = ModelConfig()
    """Shape of the decoder."""
    position: Annotated[Position, OneOf()] | None = None
    """How tokens know their place; null: rotary embedding."""
    feed_forward: Annotated[FeedForward, OneOf()] | None = None
    """What stands between attentions; null: the gated MLP."""
    norm: Annotated[Norm, OneOf()] | None = None
    """What normalises the residual stream; null: RMS norm."""
    parametrisation: Annotated[Parametrisation, OneOf()] | None = None
    """As what linear layers are trained; null: as the matrices that they are."""
    batch: PositiveInt = 32
    """Rows in a step."""
    length: PositiveInt = 128
    """Tokens in a row."""
    mix: Mix = Mix()
    """Share of problem rows over the run."""
    learn_prompts: bool = False
    """Whether the tokens of problems' prompts are learned too."""
    sharpness: float | None = Field(None, gt=0, le=1)
    """Log the sharpness of the loss at rows' last tokens, within this share of their logits."""
    budget: Annotated[Budget, OneOf()] | None = None
    """Compute from which steps and sizes are planned; null: they are as given."""
    training: Training = Training()
    """Steps, optimizer, schedule, precision."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_planned(cls, given: Any) -> Any:
        """With a budget, steps and sizes that are null are those of the plan."""
        if not isinstance(given, dict) or given.get("budget") is None:
            return given
        found = dict(given)
        for section, keys in (("model", SIZES), ("training", ("steps",))):
            if isinstance(found.get(section), dict):
                found[section] = {
                    key: value
                    for key, value in found[section].items()
                    if value is not None or key not in keys
                }
        return found

    @model_validator(mode="after")
    def _budget_plans(self) -> Pretrain:
        if self.budget is None:
            return self
        taken = [f"model.{key}" for key in SIZES if getattr(self.model, key) != _FREE[key]]
        if self.training.steps != Training().steps:
            taken.append("training.steps")
        if taken:
            raise ValueError(f"`budget` plans {', '.join(taken)}: remove them or set null")
        wrong = self.budget.contradictions(self.training)
        if wrong:
            raise ValueError(f"`budget` {self.budget.name} needs {', '.join(wrong)}")
        if self.adopt is not None or self.feed_forward is not None or self.parametrisation:
            raise ValueError(
                "`budget` plans a decoder of plain linear layers from scratch: remove adopt, "
                "feed_forward and parametrisation, or the budget"
            )
        return self

    @model_validator(mode="after")
    def _adopt_alone(self) -> Pretrain:
        if self.adopt is None:
            return self
        idle, why = sorted(self.model_fields_set - {"adopt"}), "nothing is trained"
        if self.position is not None:
            shape = ("model", "feed_forward", "norm", "parametrisation")
            idle, why = [name for name in shape if name in idle], "layers stay as they are"
        if idle:
            raise ValueError(f"with `adopt` {why}: remove {', '.join(idle)}")
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is chosen on the optional axes, in the order in which it is installed.

        Parts that change which layers there are come before those that go by the layers they find.
        """
        every = (self.position, self.feed_forward, self.norm, self.parametrisation)
        return tuple(part for part in every if part is not None)
