"""The rounds of making texts: a task of the training loop whose rows are the model's own texts.

    warm steps on documents, round 0, `updates` steps, round 1, ..., the last round

A round draws documents, has the Generator answer their instructions and the Extender lengthen the
answers, and keeps what the gate lets pass; the steps behind it learn both roles from that. All of
it is a function of the seed, the documents and the model. A run that is interrupted goes on from
its last checkpoint; of a round nothing is kept before it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drawplate.core import hf
from drawplate.core.batches import IGNORE, Batch
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import generator
from drawplate.data.grams import words
from drawplate.data.source import Document
from drawplate.data.synthetic import Synthetic, filled, sentences, without
from drawplate.edits import materialized
from drawplate.model.sample import sample
from drawplate.train.language import NextToken
from drawplate.train.loop import train
from drawplate.train.loss import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"""Tokens of a prompt, and those behind it that are learned, or with which an answer begins."""


class Seed(NamedTuple):
    """A document as an instruction, the white space behind it, and a response."""

    file: str
    line: int
    instruction: str
    gap: str
    response: str

    @classmethod
    def of(cls, document: Document, opening: int) -> Seed | None:
        """None where no sentence is left for the response."""
        parts = sentences(document.text.strip())
        first = "".join(parts[:opening])
        instruction, rest = first.rstrip(), "".join(parts[opening:])
        if not rest:
            return None
        return cls(document.file, document.line, instruction, first[len(instruction) :], rest)


class Text(NamedTuple):
    """A text that was kept: from which document it was made, in which round, and by what."""

    round: int
    file: str
    line: int
    instruction: str
    gap: str
    response: str
    longer: str

    @property
    def text(self) -> str:
        """The whole of it, as a document."""
        return f"{self.instruction}{self.gap}{self.longer}"


class Round(Frozen):
    """What came of a round: asked = unwritten + written, written = refused + kept."""

    asked: int
    """Instructions times samples."""
    unwritten: dict[str, int]
    """Responses that were refused, by reason."""
    written: int
    """Responses that were given to the Extender."""
    refused: dict[str, int]
    """Lengthened responses that were refused, by the reason of the last pass."""
    kept: int
    response_words: float
    """Mean words of the responses that were written; 0 without any."""
    kept_words: float
    """Mean words of the lengthened responses that were kept; 0 without any."""

    @property
    def accepted(self) -> float:
        """Kept texts as a share of those that were asked for."""
        return self.kept / self.asked


class Made(NamedTuple):
    """What all rounds made."""

    model: str
    """Content hash of the model's folder."""
    texts: list[Text]
    rounds: list[Round]


class Said(NamedTuple):
    """What the model wrote; `room` is False where its context had no place left."""

    text: str
    ended: bool
    room: bool = True


def synthesize(
    how: Synthetic,
    documents: Sequence[Document],
    seed: int,
    work: Path,
    device: torch.device | str = "cpu",
    part: Callable[[str], Watch] = lambda label: silent,
) -> Made:
    """Texts made from `documents`, which are training texts; checkpoints go to `work`.

    Raises:
        UserError: the folder holds no decoder that can learn, no document is long enough, or a
            round that is to be learned from kept nothing.
        Stopped, NotFinite, Exhausted, Damaged: as `drawplate.train.loop.train`.
    """
    from drawplate.lineage import content_hash

    model = hf.load(how.model).to(device)
    check_head(model)
    task = Lengthen(model, hf.load_tokenizer(how.model), how, documents, seed, part("rounds"))
    if how.training is not None:
        train(model, task, how.training, work, part("learn"))
    task.write_up_to(how.rounds - 1)
    return Made(content_hash(how.model), task.texts, task.rounds)


class Lengthen(NextToken):
    """Next tokens of what the roles should write; the rounds happen while rows are asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        how: Synthetic,
        documents: Sequence[Document],
        seed: int,
        watch: Watch = silent,
    ):
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.seed, self.watch = seed, watch
        found = (Seed.of(document, how.opening) for document in documents)
        self.seeds = [each for each in found if each is not None]
        if not self.seeds:
            raise UserError(
                f"prepare.synthetic: none of {len(documents)} training texts has more than "
                f"opening={how.opening} sentences; lower it or give longer texts"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{how.model}: its tokenizer names no eos_token, so no text can end")
        self.end: int = tokenizer.eos_token_id
        # Bytes that are no text are decoded as U+FFFD, whatever documents hold.
        self.alphabet = frozenset().union(*(each.text for each in documents)) - {"\ufffd"}
        context = getattr(model.config, "max_position_embeddings", None)
        self.context = 1 << 62 if context is None else int(context)
        self.texts: list[Text] = []
        self.rounds: list[Round] = []
        self._pairs: tuple[int, list[Pair]] = (-1, [])
        settings = how.model_dump(mode="json", exclude={"model", "parallel"})
        digest = hashlib.sha256(json.dumps([settings, seed, self.end]).encode())
        for document in documents:
            digest.update(f"{json.dumps(document)}\n".encode())
        super().__init__(self._rows, {"synthetic": digest.hexdigest()})

    def state(self) -> dict[str, Any]:
        """All finished rounds."""
        return {
            "texts": [list(text) for text in self.texts],
            "rounds": [each.model_dump() for each in self.rounds],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to `state`."""
        self.texts = [Text(*row) for row in state["texts"]]
        self.rounds = [Round(**row) for row in state["rounds"]]
        self._pairs = (-1, [])

    def write_up_to(self, number: int) -> None:
        """All rounds to `number` that are not there yet, with the model as it is now."""
        while len(self.rounds) <= number:
            self._write(len(self.rounds))

    def _write(self, number: int) -> None:
        how = self.how
        order = self._order(len(self.seeds), "documents", number)[: how.documents]
        asked = [self.seeds[place] for place in order for _ in range(how.samples)]
        first = self._say(
            [(self._prompt(how.generator, instruction=seed.instruction), []) for seed in asked],
            "response",
            number,
        )
        unwritten: Counter[str] = Counter()
        seeds, responses = [], []
        for seed, said in zip(asked, first, strict=True):
            text = said.text.strip()
            reason = how.flaw(text, said.ended, self.alphabet) if said.room else "room"
            if reason is not None:
                unwritten[reason] += 1
            else:
                seeds.append(seed)
                responses.append(text)
        best, reasons = list(responses), ["" for _ in responses]
        for turn in range(how.passes):
            for row, said in enumerate(self._lengthened(seeds, best, number, turn)):
                text = said.text.strip()
                found = "room"
                if said.room:
                    found = how.refusal(responses[row], text, said.ended, self.alphabet) or ""
                if not found and len(words(text)) > len(words(best[row])):
                    best[row] = text
                reasons[row] = found if best[row] is responses[row] else ""
        kept = [
            Text(number, *seed[:4], response, longer)
            for seed, response, longer, why in zip(seeds, responses, best, reasons, strict=True)
            if not why
        ]
        self.texts = [*self.texts, *kept]
        self.rounds = [
            *self.rounds,
            Round(
                asked=len(asked),
                unwritten=dict(sorted(unwritten.items())),
                written=len(responses),
                refused=dict(sorted(Counter(filter(None, reasons)).items())),
                kept=len(kept),
                response_words=_mean_words(responses),
                kept_words=_mean_words([text.longer for text in kept]),
            ),
        ]
        done = self.rounds[-1]
        figures = {"length": done.kept_words, "accepted": done.accepted}
        self.watch(number + 1, how.rounds, figures)

    def _rows(self, step: int) -> Batch:
        """What optimizer step `step` learns from: documents, then what the last round kept."""
        how = self.how
        number = (step - how.warm) // how.updates
        if number < 0:
            return self._batch(list(self._documents(step)))
        self.write_up_to(number)
        if self._pairs[0] != number:
            self._pairs = number, self._kept(number)
        pairs = self._pairs[1]
        order = self._order(len(pairs), "rows", step)[: how.rows]
        return self._batch([pairs[place] for place in order])

    def _documents(self, step: int) -> Iterator[Pair]:
        """Pairs from documents whose short form and whole text have room beside each other."""
        how, many = self.how, 0
        for place in self._order(len(self.seeds), "warm", step):
            seed = self.seeds[place]
            base = self._prompt(how.extender, instruction=seed.instruction, response="")
            whole = self._fitting(seed.response, min(how.longest, self.context - len(base)) // 2)
            count = len(sentences(whole))
            if count < 2:
                continue
            short = without(whole, how.thinned, self._chances(count, "short", step, place))
            role, rest = (how.generator, short) if many % 2 else (how.extender, whole)
            prompt = self._prompt(role, instruction=seed.instruction, response=short)
            yield prompt, [*self._ids(rest), self.end]
            many += 1
            if many == how.rows:
                return
        if not many:
            raise UserError(
                f"prepare.synthetic: no document leaves two sentences beside its instruction in "
                f"the {self.context} tokens that {how.model} reads; take a model of longer context"
            )

    def _fitting(self, response: str, room: int) -> str:
        """The response up to the last sentence that has room."""
        parts = sentences(response)
        taken = 0
        for many, part in enumerate(parts):
            taken += len(self._ids(part))
            if taken >= room:
                return "".join(parts[:many]).strip()
        return response

    def _kept(self, number: int) -> list[Pair]:
        """Both roles' pairs from what round `number` kept."""
        how = self.how
        texts = [text for text in self.texts if text.round == number]
        lengths = [len(words(text.longer)) for text in texts]
        chosen = how.learned(lengths, self._chances(len(texts), "learned", number))
        pairs = []
        for row, (text, wanted) in enumerate(zip(texts, chosen, strict=True)):
            if not wanted:
                continue
            chances = self._chances(len(sentences(text.response)), "left out", number, row)
            short = how.shortened(text.response, chances)
            rest = [*self._ids(text.longer), self.end]
            for role in (how.generator, how.extender):
                prompt = self._prompt(role, instruction=text.instruction, response=short)
                if len(prompt) + len(rest) <= self.context:
                    pairs.append((prompt, rest))
        if not pairs:
            told = self.rounds[number]
            raise UserError(
                f"prepare.synthetic: none of {told.asked} texts of round {number} was kept, so "
                f"there is nothing to learn from: responses refused {told.unwritten}, lengthened "
                f"ones refused {told.refused}; raise warm, or loosen what is refused"
            )
        return pairs

    def _lengthened(
        self, seeds: Sequence[Seed], responses: Sequence[str], number: int, turn: int
    ) -> list[Said]:
        """What the Extender makes of each response, by as many answers as the method asks for."""
        how = self.how
        answers: list[list[str]] = [[] for _ in responses]
        last = [Said("", False) for _ in responses]
        for call in range(1 << 30):
            asks = [
                how.ask(response, said) if end.room else None
                for response, said, end in zip(responses, answers, last, strict=True)
            ]
            open_ = [(row, ask) for row, ask in enumerate(asks) if ask is not None]
            if not open_:
                break
            prompts = []
            for row, ask in open_:
                texts = {"instruction": seeds[row].instruction, "response": ask.response}
                prompts.append((self._prompt(how.extender, **texts), self._ids(ask.begun)))
            found = self._say(prompts, "longer", number, turn, call)
            for (row, _), said in zip(open_, found, strict=True):
                last[row] = said
                answers[row].append(said.text)
        return [
            end._replace(text=how.join(said)) if end.room else end
            for said, end in zip(answers, last, strict=True)
        ]

    @torch.no_grad()
    def _say(self, asked: Sequence[Pair], *name: int | str) -> list[Said]:
        """What the model writes behind each prompt and the beginning of its answer."""
        how = self.how
        prompts = [[*prompt, *begun] for prompt, begun in asked]
        room = [min(how.longest, self.context - len(prompt)) for prompt in prompts]
        able = [row for row, left in enumerate(room) if left > 0]
        with materialized(self.model, whole=True):
            drawn = sample(
                self.model,
                [prompts[row] for row in able],
                max_new=[room[row] for row in able],
                end=self.end,
                temperature=how.temperature,
                seed=(self.seed, "synthetic", *name),
                first=able,
                batch_size=how.parallel,
            )
        said = [Said("", False, room=False) for _ in prompts]
        for row, tokens, ended in zip(able, drawn.tokens, drawn.finished, strict=True):
            begun = asked[row][1]
            whole = self._text([*begun, *(tokens[:-1] if ended else tokens)])
            said[row] = Said(whole[len(self._text(begun)) :], ended)
        return said

    def _text(self, tokens: list[int]) -> str:
        """Decoded in one, since some tokenizers drop the white space of a first token."""
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _prompt(self, template: str, **texts: str) -> list[int]:
        """A role's template with its texts; special tokens stand in the template only."""
        return [
            token
            for piece, own in filled(template, **texts)
            for token in self._ids(piece, special=own)
        ]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        found: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=not special
        )
        return found

    def _order(self, count: int, *name: int | str) -> list[int]:
        drawn = generator(self.seed, "synthetic", *name)
        return torch.randperm(count, generator=drawn).tolist()

    def _chances(self, count: int, *name: int | str) -> list[float]:
        drawn = generator(self.seed, "synthetic", *name)
        return torch.rand(count, generator=drawn, dtype=torch.float64).tolist()

    def _batch(self, pairs: Sequence[Pair]) -> Batch:
        """Rows padded on the right with a document of end tokens that is not learned."""
        width = max(len(prompt) + len(rest) for prompt, rest in pairs)
        tokens = torch.full((len(pairs), width), self.end)
        labels = torch.full_like(tokens, IGNORE)
        places = torch.arange(width).repeat(len(pairs), 1)
        for row, (prompt, rest) in enumerate(pairs):
            size = len(prompt) + len(rest)
            tokens[row, :size] = torch.tensor(prompt + rest)
            labels[row, len(prompt) : size] = tokens[row, len(prompt) : size]
            places[row, size:] -= size
        return Batch(tokens, labels, places)


def _mean_words(texts: Sequence[str]) -> float:
    return sum(len(words(text)) for text in texts) / len(texts) if texts else 0.0
