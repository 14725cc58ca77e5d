"""Every setting of a reinforcement learning run."""

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from drawplate.core.method import OneOf
from drawplate.rl.adapt import Adapt
from drawplate.rl.adapt.lora import Lora
from drawplate.rl.advantage import Advantage
from drawplate.rl.advantage.batch import Batch
from drawplate.rl.critic import Critic
from drawplate.rl.cut import Cut
from drawplate.rl.length import Length
from drawplate.rl.length.constant import Constant as ConstantLength
from drawplate.rl.loss import PolicyLoss
from drawplate.rl.mask import Mask
from drawplate.rl.merge import Merge
from drawplate.rl.merge.whole import Whole
from drawplate.rl.penalty import Penalty
from drawplate.rl.ratio import Ratio
from drawplate.rl.ratio.token import Token
from drawplate.rl.reduce import Reduce
from drawplate.rl.reduce.fixed_length import FixedLength
from drawplate.rl.reduce.token_mean import TokenMean
from drawplate.rl.sampling import Sampling
from drawplate.rl.sampling.whole import Whole as WholeAnswers
from drawplate.rl.select import Select
from drawplate.rl.select.every import Every
from drawplate.rl.select.varied import Varied
from drawplate.rl.selfplay import SelfPlay
from drawplate.rl.shaping import Shaping
from drawplate.rl.shaping.overlong_ramp import OverlongRamp
from drawplate.rl.shaping.truncation import Truncation
from drawplate.rl.surrogate import Surrogate
from drawplate.rl.surrogate.ppo_clip import PpoClip
from drawplate.rl.window import Window
from drawplate.train.guard import Guard
from drawplate.train.loop import Training
from drawplate.train.optimizer import Group, Optimizer
from drawplate.train.precision import Precision
from drawplate.train.schedule import Schedule
from drawplate.train.schedule.constant import Constant

GROUP = Group(rate=1e-4)


class Finetune(Training):
    """The training loop's settings, and what is particular to learning from rewards.

    The defaults are DLER, arXiv:2510.15110, with adapters.
    """

    steps: int = Field(200, ge=1)
    """Optimizer steps of the run."""
    precision: Precision = "float32"
    """Numbers of the forward and backward pass; never fewer bits than the model is stored in."""
    schedule: Annotated[Schedule, OneOf()] = Constant(warmup=0.0)
    """The learning rate over the run."""
    optimizer: Optimizer = Optimizer(matrices=GROUP, rest=GROUP)
    """What turns gradients into steps."""
    guard: Guard = Guard(spike=0.0)
    """What happens when numbers go bad. Rewards are sparse, so steps of unusual size are normal."""

    prompts: PositiveInt = 16
    """Groups of answers in one batch of rollouts."""
    samples: PositiveInt = 8
    """Answers in a group."""
    updates: PositiveInt = 1
    """Optimizer steps on one batch of rollouts, each on an equal part of it."""
    temperature: PositiveFloat = 1.0
    """Of sampling. The policy that is trained is the one at this temperature."""
    parallel: PositiveInt = 256
    """Most answers in flight while sampling: memory against speed."""

    adapt: Annotated[Adapt, OneOf()] = Lora()
    """Which parameters move."""
    length: Annotated[Length, OneOf()] = ConstantLength()
    """Most tokens of an answer, step by step."""
    sampling: Annotated[Sampling, OneOf()] = WholeAnswers()
    """Where answers begin and end, and what is compared."""
    window: Window | None = None
    """How far answers grow in one batch, to go on in the next; none gives whole answers."""
    critic: Critic | None = None
    """What rewards are expected, for advantages that ask for it."""
    select: Annotated[Select, OneOf()] = Varied()
    """Groups that are kept; the others are replaced by answers to further prompts."""
    cuts: tuple[Annotated[Cut, OneOf()], ...] = ()
    """Where answers end after all, first to last; what is left is scored again."""
    shaping: tuple[Annotated[Shaping, OneOf()], ...] = (Truncation(),)
    """Changes of the reward for length, first to last."""
    advantage: Annotated[Advantage, OneOf()] = Batch()
    """From rewards to advantages."""
    ratio: Annotated[Ratio, OneOf()] = Token()
    """Importance weight."""
    surrogate: Annotated[Surrogate, OneOf()] = PpoClip()
    """Objective of a token."""
    masks: tuple[Annotated[Mask, OneOf()], ...] = ()
    """Tokens that do not take part."""
    reduce: Annotated[Reduce, OneOf()] = TokenMean()
    """Average over tokens."""
    penalties: tuple[Annotated[Penalty, OneOf()], ...] = ()
    """Terms that hold the policy back."""
    merge: Annotated[Merge, OneOf()] = Whole()
    """How much of what training changed goes into the model."""
    self_play: Annotated[SelfPlay, OneOf()] | None = None
    """The model's own statements and proofs instead of problems and rewards.

    Then `prompts` are the statements of a round, `samples` the attempts at each, `updates` the
    optimizer steps between rounds; what turns rewards into a loss has no part in it.
    """

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.compile:
            raise ValueError(
                "answers differ in length from step to step and each shape would be compiled anew: "
                "set compile: false"
            )
        if self.simulate is not None:
            raise ValueError(
                "answers are drawn without simulated numbers, so another policy would learn than "
                "the one that answered: remove simulate"
            )
        if self.samples < self.advantage.least:
            raise ValueError(
                f"advantage {self.advantage.name} compares answers to one prompt, so samples has "
                f"to be at least {self.advantage.least}"
            )
        if (self.critic is None) == ("value" in self.advantage.needs):
            verb = "asks for a critic's values: set" if self.critic is None else "does not ask for"
            raise ValueError(f"advantage {self.advantage.name} {verb} critic")
        if (self.window is None) == ("going" in self.advantage.needs):
            verb = "is for unfinished answers: set" if self.window is None else "cannot do with"
            raise ValueError(f"advantage {self.advantage.name} {verb} window")
        if self.window and (self.cuts or not isinstance(self.select, Every)):
            raise ValueError("with window, answers end one by one: set cuts [] and select every")
        if self.window and not isinstance(self.length, ConstantLength):
            # An answer keeps the limit that it began with, so a batch holds several.
            for piece in (self.reduce, *self.shaping):
                if isinstance(piece, FixedLength | OverlongRamp):
                    raise ValueError(
                        f"{piece.name} measures answers by one limit, which with window have "
                        "several where it changes: set length constant"
                    )
        if self.samples == 1 and not isinstance(self.select, Every):
            raise ValueError(
                f"select {self.select.name} compares answers to one prompt: set samples to at "
                "least 2, or select every"
            )
        if self.sampling.partial and (self.cuts or self.window):
            raise ValueError(
                f"sampling {self.sampling.name} draws parts of answers: set cuts [] and no window"
            )
        for cut in self.cuts:
            if self.samples < cut.least:
                raise ValueError(f"cut {cut.name} needs at least {cut.least} samples to find any")
        if self.self_play and self.steps <= self.self_play.warm:
            raise ValueError(
                f"self_play begins its rounds after {self.self_play.warm} steps, as warm says: set "
                "steps higher, or warm lower"
            )
        if self.updates > self.prompts * self.samples:
            raise ValueError(
                f"updates cannot exceed prompts x samples = {self.prompts * self.samples}"
            )
        return self

    @property
    def once(self) -> bool:
        """Whether the policy that sampled is the one that learns, and nothing asks for it earlier.

        Then the training pass itself gives the log-probabilities that ratios start from.
        """
        return self.updates == 1 and not self.masks and not self.penalties and self.critic is None

    @property
    def loss(self) -> PolicyLoss:
        """The loss that these settings describe."""
        return PolicyLoss(
            ratio=self.ratio,
            surrogate=self.surrogate,
            masks=self.masks,
            reduce=self.reduce,
            penalties=self.penalties,
        )
