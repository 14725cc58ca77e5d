"""Calibration rows, from a corpus of ours or from any UTF-8 text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from drawplate.core.batches import Share
from drawplate.core.corpus import Corpus, Stream, token_type
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, OneOf, leaves
from drawplate.core.sample import Sample
from drawplate.core.seeds import generator


class TextCorpus:
    """A text file, or a folder of `*.txt` files, cut with a model's own tokenizer.

    It has one stream, `text-train`, and no problems.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = path, tokenizer
        files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise UserError(
                f"{path}: no corpus of the prepare stage, no text file, no folder of *.txt files"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{path}: the model's tokenizer has no end token to part documents with"
            )
        self.vocabulary = len(tokenizer)
        self.end = int(tokenizer.eos_token_id)
        self.pad = int(self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        ids: list[int] = []
        offsets = [0]
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text: byte {error.start}") from None
            cut = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            ids += [*cut["input_ids"], self.end]
            offsets.append(len(ids))
        tokens = np.asarray(ids, dtype=token_type(self.vocabulary))
        self._stream = Stream(tokens, np.asarray(offsets), np.zeros(len(files), dtype=np.int64))

    def stream(self, name: str) -> Stream:
        """The text.

        Raises:
            UserError: another stream than `text-train`.
        """
        if name != "text-train":
            raise UserError(
                f"{self.folder} is plain text and has no {name}; prepare a corpus for that"
            )
        return self._stream


def open_corpus(path: Path, tokenizer: Any, text: bool = True) -> Corpus | TextCorpus:
    """A corpus, checked against the tokenizer of the model that will read it, or plain text.

    `text` says whether plain text is of use to the caller.

    Raises:
        UserError: the path is neither, or the corpus was cut with another tokenizer.
    """
    if not (path / "corpus.json").is_file():
        return TextCorpus(path, tokenizer)
    corpus = Corpus(path)
    if corpus.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{path} was cut with another tokenizer than that of {tokenizer.name_or_path}; run "
            "prepare with prepare.tokenizer set to that folder"
            f"{', or give plain text' if text else ''}"
        )
    return corpus


def require_room(model: nn.Module, name: str, length: int) -> None:
    """Raises `UserError` naming the parameter `name` where rows are longer than the model reads."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise UserError(f"{name}: rows of {length} tokens, the model reads at most {context}")


def _uniform() -> Any:
    axis: Any = Sample
    return leaves(axis)["uniform"]()


class Calibration(Frozen):
    """Which rows statistics are gathered on."""

    rows: PositiveInt = 128
    """Number of rows."""
    length: PositiveInt = 128
    """Tokens in a row."""
    problems: Share | None = None
    """Share of rows that are cut from worked problems; null: half where the corpus has problems."""
    seed: int = Field(0, ge=0)
    """Of the positions that rows are cut at."""
    sample: Annotated[Sample, OneOf()] = Field(default_factory=_uniform)
    """Which of the drawn positions are taken; rows then count alike, whatever the sample's weights.
    """

    def tokens(self, corpus: Corpus | TextCorpus) -> Tensor:
        """[rows, length] token ids, cut at drawn positions of the training streams.

        Raises:
            UserError: a stream is shorter than a row.
        """
        share = self.problems
        if share is None:
            share = 0.0 if isinstance(corpus, TextCorpus) else 0.5
        problems = round(share * self.rows)
        parts = [
            self._windows(corpus, name, count)
            for name, count in (("text-train", self.rows - problems), ("problems-train", problems))
            if count
        ]
        return torch.cat(parts)

    def _windows(self, corpus: Corpus | TextCorpus, name: str, count: int) -> Tensor:
        tokens = corpus.stream(name).tokens
        room = len(tokens) - self.length + 1
        if room < 1:
            raise UserError(
                f"{corpus.folder}: {name} holds {len(tokens)} tokens, "
                f"a calibration row {self.length}"
            )
        draw = generator(self.seed, "calibration", name)
        wanted = self.sample.candidates(count)
        begins = torch.randint(room, (wanted,), generator=draw).numpy()
        places = begins[:, None] + np.arange(self.length)
        rows = torch.from_numpy(tokens[places].astype(np.int64))
        features = self._features(rows, corpus.vocabulary)
        return rows[self.sample.pick(features, count, draw).rows]

    def _features(self, rows: Tensor, vocabulary: int) -> Tensor:
        """Token rows [N, T] -> the mean, over a row, of vectors drawn for each token, [N, M]."""
        draw = generator(self.seed, "calibration", "features")
        table = torch.randn(vocabulary, self.sample.width(), generator=draw, dtype=torch.float64)
        return torch.stack([table[row].mean(0) for row in rows])
