"""Whether a model's answers are fit to be shown: few cut off, empty or looping, none solved worse.

A reasoning model can gain on a score and still fail its reader. So a checkpoint has a bill of
health of its own, made from the answers that were drawn and from the verdicts against its parent.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from drawplate.core.method import Frozen
from drawplate.evaluate.compare import Comparison
from drawplate.evaluate.tasks import Answers

_LEAST = 16
"""Characters that must repeat before they count as a loop; a sum may well end in 1000000."""


class Health(Frozen):
    """What drawn answers may suffer from in a healthy model."""

    truncated: float = Field(0.05, ge=0, le=1)
    """Largest share of answers cut off at the limit."""
    empty: float = Field(0.01, ge=0, le=1)
    """Largest share of answers without a visible character."""
    looping: float = Field(0.02, ge=0, le=1)
    """Largest share of answers that are wrong and end in a loop: the same piece four times."""


class Checkup(Frozen):
    """What was found about one model."""

    name: str
    truncated: float
    empty: float
    looping: float
    reasons: tuple[str, ...]
    """Why the model is not healthy; none where it is."""

    @property
    def healthy(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


def examine(name: str, drawn: Answers, against: Sequence[Comparison], limits: Health) -> Checkup:
    """The checkup of a model from its drawn answers and its comparisons with its parent.

    A share above its limit is a reason, and so is every share of solved problems ("greedy",
    "pass_at_k") whose paired verdict is "worse". A model without a parent has no such verdicts.
    """
    texts = [text for each in drawn.texts for text in each]
    wrong = (~drawn.correct).ravel().tolist()
    found = {
        "truncated": float((~drawn.finished).mean()),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "looping": sum(w and loops(t) for t, w in zip(texts, wrong, strict=True)) / len(texts),
    }
    allowed = limits.model_dump()
    reasons = [
        f"{share:.1%} of answers are {what}, at most {allowed[what]:.1%} may be"
        for what, share in found.items()
        if share > allowed[what]
    ]
    reasons += [
        f"{one.metric} is worse than its parent's: {one.child:.1%} after {one.parent:.1%}"
        for one in against
        if one.verdict == "worse" and one.metric.startswith(("greedy", "pass_at_"))
    ]
    return Checkup(name=name, **found, reasons=tuple(reasons))


def loops(text: str) -> bool:
    """Whether a text ends in the same piece four times, or in 16 characters that repeat a shorter.

    For a period p the last max(4 p, 16) characters each equal the one p before them.

    >>> loops("so 3 + 4. so 3 + 4. so 3 + 4. so 3 + 4. "), loops("1, 2, 3, 4, 5, 6, 7, 8, 9")
    (True, False)
    """
    for period in range(1, len(text) // 4 + 1):
        tail = text[-max(4 * period, _LEAST) :]
        if len(tail) >= _LEAST and tail[period:] == tail[:-period]:
            return True
    return False
