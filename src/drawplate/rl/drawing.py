"""Groups of answers from the model itself: drawn as the sampling axis asks, each scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedModel

from drawplate.core.errors import UserError
from drawplate.core.seeds import generator, seed_of
from drawplate.edits import materialized
from drawplate.model.sample import sample
from drawplate.rl.judge import Judge, Step, Verify
from drawplate.rl.params import Finetune
from drawplate.rl.sampling import Answer, Group, Start
from drawplate.train.distributed import World


class Drawing:
    """Draws behind prompts, in all processes together."""

    def __init__(
        self,
        model: PreTrainedModel,
        how: Finetune,
        prompts: Sequence[list[int]],
        score: Callable[[int, list[int]], float],
        verify: Verify,
        decode: Callable[[list[int]], str],
        end: int,
        world: World,
    ):
        self.model, self.how, self.prompts, self.score = model, how, prompts, score
        self.verify, self.decode, self.end, self.world = verify, decode, end, world
        self.breaks: dict[int, bool] = {}
        self.generated = 0
        """Tokens that the model has given so far."""

    def groups(self, starts: Sequence[Start], limit: int, seed: int) -> list[Group]:
        """All groups that begin at these prompts."""
        draw = partial(self._draw, seed)
        return self.how.sampling.groups(starts, limit, draw, generator(seed, "prefixes"))

    def _draw(
        self, seed: int, starts: Sequence[Start], most: int, judge: Judge | None
    ) -> list[Group]:
        many = self.how.samples
        rows = [start for start in starts for _ in range(many)]
        mine = self.world.share(len(rows))
        with materialized(self.model, whole=True):
            drawn = sample(
                self.model,
                [[*self.prompts[rows[row].prompt], *rows[row].before] for row in mine],
                max_new=most,
                end=self.end,
                temperature=self.how.temperature,
                seed=seed_of(seed, *(start.number for start in starts)) if judge else seed,
                first=mine.start,
                batch_size=self.how.parallel,
                precision=self.model.dtype,
            )
        self.generated += sum(self.world.gather([len(tokens) for tokens in drawn.tokens]))
        cuts = [self._line(tokens) if judge else len(tokens) for tokens in drawn.tokens]
        texts = [tokens[:cut] for tokens, cut in zip(drawn.tokens, cuts, strict=True)]
        scores = self._scores([rows[row] for row in mine], texts, judge)
        answers = self.world.gather(
            [
                Answer(
                    tokens,
                    behaviour[: len(tokens)],
                    self._over(tokens, judge),
                    self._ended(tokens),
                    score,
                )
                for tokens, behaviour, score in zip(texts, drawn.behaviour, scores, strict=True)
            ]
        )
        return [
            Group(start, answers[place * many : (place + 1) * many])
            for place, start in enumerate(starts)
        ]

    def _scores(
        self, starts: Sequence[Start], texts: Sequence[list[int]], judge: Judge | None
    ) -> list[float]:
        pairs = list(zip(starts, texts, strict=True))
        if judge is None:
            return [self.score(start.prompt, tokens) for start, tokens in pairs]
        steps = [self._step(start, tokens) for start, tokens in pairs]
        rewards = judge.rewards(steps, self.verify)
        for step, reward in zip(steps, rewards, strict=True):
            if not 0 <= reward <= 1:
                raise UserError(
                    f"the reward of a step behind prompt {step.prompt} is {reward}, not in [0, 1]"
                )
        return rewards

    def _step(self, start: Start, tokens: list[int]) -> Step:
        before = self.decode(list(start.before)) if start.before else ""
        ended = self._ended(tokens)
        # Decoded as a whole, since some tokenizers read a token otherwise where it comes first.
        whole = self.decode([*start.before, *(tokens[:-1] if ended else tokens)])
        question = self.decode(self.prompts[start.prompt])
        return Step(start.prompt, question, before, whole[len(before) :], ended)

    def _line(self, tokens: list[int]) -> int:
        """How many tokens there are up to the first that breaks the line."""
        places = (place for place, token in enumerate(tokens) if self._breaks(token))
        return next(places, len(tokens) - 1) + 1

    def _breaks(self, token: int) -> bool:
        if token not in self.breaks:
            self.breaks[token] = token != self.end and "\n" in self.decode([token])
        return self.breaks[token]

    def _ended(self, tokens: list[int]) -> bool:
        return tokens[-1] == self.end

    def _over(self, tokens: list[int], judge: Judge | None) -> bool:
        """Whether an answer ended by itself, or a step with its line."""
        return self._ended(tokens) or (judge is not None and self._breaks(tokens[-1]))
