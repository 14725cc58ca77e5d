"""The loss: one formula, four axes."""

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from drawplate.core.method import Frozen, OneOf
from drawplate.rl.mask import Mask
from drawplate.rl.penalty import Penalty, divergence
from drawplate.rl.ratio import Ratio
from drawplate.rl.reduce import Reduce
from drawplate.rl.rollout import FAR, Rollout
from drawplate.rl.surrogate import Surrogate


class PolicyLoss(Frozen):
    """loss = - sum over tokens of reduce x masks x (surrogate(ratio, advantage) - penalties)."""

    ratio: Annotated[Ratio, OneOf()]
    """Importance weight."""
    surrogate: Annotated[Surrogate, OneOf()]
    """Objective of a token."""
    masks: tuple[Annotated[Mask, OneOf()], ...] = ()
    """Factors of the objective; they multiply."""
    reduce: Annotated[Reduce, OneOf()]
    """Average over tokens; a token that a mask sets to zero is not counted."""
    penalties: tuple[Annotated[Penalty, OneOf()], ...] = ()
    """Subtracted from the objective; they add."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scalar, with a gradient through `rollout.logp`."""
        return -(self.weight(rollout) * self.objective(rollout)).sum()

    def weight(self, rollout: Rollout) -> Tensor:
        """Reduce x masks, [B, T], without gradient: what each token's objective counts for.

        Depends on the batch as a whole; with it fixed, parts of the batch add up.
        """
        factor = rollout.mask.to(rollout.logp.dtype)
        for mask in self.masks:
            factor = factor * mask.weight(rollout)
        return self.reduce.weight((factor > 0).to(factor.dtype), rollout.limit) * factor

    def held(self, rollout: Rollout) -> Tensor:
        """What each penalty counts for at each token, [B, T, penalties], without gradient.

        Depends on the batch as a whole; with it fixed, parts of the batch add up.
        """
        factors = [penalty.weight * penalty.where(rollout) for penalty in self.penalties]
        none = rollout.logp.new_zeros(*rollout.mask.shape, 0)
        return torch.stack(factors, -1) if factors else none

    def objective(self, rollout: Rollout, held: Tensor | None = None) -> Tensor:
        """Surrogate - penalties of each token, [B, T]; `held` is the whole batch's, or is found."""
        factors = self.held(rollout) if held is None else held
        value = self.surrogate.value(self._log(rollout), rollout.logp, rollout.advantage)
        for penalty, factor in zip(self.penalties, factors.unbind(-1), strict=True):
            value = value - factor * penalty.value(rollout)
        return value

    def metrics(self, rollout: Rollout) -> dict[str, Tensor]:
        """Sums over the answers' tokens.

        `ratio_drift` is how far the sampler, which computes token by token, is from one pass over
        the answer, in nats: rounding. `clip_fraction` counts clipped tokens; `kl_step` and
        `kl_start` are nats moved since the answers were sampled and, where penalties compare with
        it, since training began.
        """
        moved = replace(rollout, logp=rollout.logp.detach())
        clipped = self.surrogate.clipped(self._log(moved), moved.advantage) & moved.mask
        figures = {
            "clip_fraction": clipped.sum(),
            "ratio_drift": (moved.old - moved.sampled).abs().sum(),
            "kl_step": divergence(moved.logp, moved.old).sum(),
        }
        if self.penalties:
            figures["kl_start"] = divergence(moved.logp, moved.reference).sum()
        return figures

    def _log(self, rollout: Rollout) -> Tensor:
        return self.ratio.log(rollout.logp, rollout.old, rollout.mask).clamp(-FAR, FAR)
