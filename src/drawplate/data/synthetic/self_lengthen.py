"""Self-Lengthen: an Extender lengthens a response half by half; the longer one trains both roles.

With the response x = x1 x2, cut between sentences at half of them: y1 = the first `lead` of the
sentences of Extender(x1), then y2 = what Extender(x) writes behind y1, and the longer response is
y1 y2. What passes the gate trains the Generator (instruction -> y1 y2) and the Extender (x with
sentences left out -> y1 y2), which the next round uses.

Paper: Quan et al. 2024, Language Models can Self-Lengthen to Generate Long Texts,
arXiv:2410.23933; endings, the window of 13, `factor`, `lead`, `left_out`, `bias` and the order of
calls are those of the authors' code.
Deviation: one full copy of the model plays both roles, instead of an adapter for each; instructions
are beginnings of documents instead of being made by the model; sentences are cut instead of
paragraphs; words are counted as `drawplate.data.grams` sees them, and what repeats is looked for in
windows of words; the gate also asks for `most_repeated`, `kept` and known characters; a refused
text is tried again in a later pass only; `bias` chooses what is learned from, while every kept text
enters the corpus.
Cost: two answers of the Extender a pass; the gate is linear in the text, but for the words in
order, which take its length times that of the response, 64 pairs of words at a time.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from drawplate.data.grams import in_order, repeated, words
from drawplate.data.synthetic import Ask, Reason, Synthetic, sentences, without


class SelfLengthen(Synthetic):
    """Split, lengthen, join, judge, learn; then again."""

    name: Literal["self_lengthen"] = "self_lengthen"
    paper: ClassVar[str] = "2410.23933"
    lead: float = Field(2 / 3, gt=0, le=1)
    """Sentences of the lengthened first half that are kept: its end was written as an end."""
    factor: float = Field(1.2, ge=1)
    """A longer response has more than this times the words of the one it came from."""
    endings: str = Field(".!?…。！？\"'”’)]}】）>`", min_length=1)
    """Signs that a text may end with."""
    window: PositiveInt = 13
    """Words in a row that may not occur twice."""
    most_repeated: float = Field(0.3, ge=0, lt=1)
    """Largest share of three-word windows that stood in the text before."""
    kept: float = Field(0.6, ge=0, le=1)
    """Least share of the response's words that stand in the longer one, in their order."""
    left_out: float = Field(0.2, ge=0, lt=1)
    """Chance of a response's sentence to be left out of what the Extender learns to start from."""
    bias: float = Field(2.0, ge=0)
    """A text is learned from with chance 1 - bias r^3, r being the share of its round's texts that
    are longer."""

    def ask(self, response: str, said: Sequence[str]) -> Ask | None:
        """The first half alone, then the whole behind the lengthened first half."""
        if not said:
            return Ask(split(response)[0].strip(), "")
        return Ask(response, self.head(said[0])) if len(said) == 1 else None

    def join(self, said: Sequence[str]) -> str:
        """The lengthened first half, and what was written behind it."""
        first, rest = said
        return self.head(first) + rest

    def head(self, first: str) -> str:
        """The first `lead` of the sentences, at least one."""
        parts = sentences(first)
        return "".join(parts[: max(1, int(self.lead * len(parts) + 1e-9))]).rstrip()

    def flaw(self, text: str, ended: bool, alphabet: frozenset[str]) -> Reason | None:
        """Cut off, of unknown characters, or saying something twice."""
        if not ended:
            return "cut"
        if not text or text[-1] not in self.endings:
            return "ending"
        if not alphabet.issuperset(text):
            return "characters"
        if repeated(words(text), self.window) > 0:
            return "duplicated"
        return "repetitive" if repeated(words(text), 3) > self.most_repeated else None

    def refusal(
        self, response: str, longer: str, ended: bool, alphabet: frozenset[str]
    ) -> Reason | None:
        """A flaw, too little of the response in it, or too few words."""
        found = self.flaw(longer, ended, alphabet)
        if found is not None:
            return found
        before, after = words(response), words(longer)
        if in_order(before, after) < self.kept * len(before):
            return "lost"
        return None if len(after) > self.factor * len(before) else "short"

    def shortened(self, response: str, chance: Sequence[float]) -> str:
        """A sentence stays where its number reaches `left_out`."""
        return without(response, self.left_out, chance)

    def learned(self, lengths: Sequence[int], chance: Sequence[float]) -> list[bool]:
        """Length-biased sampling; the longest ones are never left out."""
        order = sorted(lengths)
        ranks = [1 - bisect_right(order, length) / len(order) for length in lengths]
        return [u >= self.bias * r**3 for u, r in zip(chance, ranks, strict=True)]


def split(response: str) -> tuple[str, str]:
    """The two halves by sentences, the first one not the shorter; joined they are the text."""
    parts = sentences(response)
    middle = (len(parts) + 1) // 2
    return "".join(parts[:middle]), "".join(parts[middle:])
