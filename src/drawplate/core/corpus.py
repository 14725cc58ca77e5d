"""What `prepare` hands on: token streams, problems, raw held-out text and a tokenizer.

    corpus.json                     format, vocabulary, ids of the end and padding tokens, tasks
    tokenizer/                      Hugging Face tokenizer
    {text,problems}-{train,heldout}/tokens.bin     all documents, one after another
                                    offsets.npy    where each begins, and where the last one ends
                                    prompts.npy    how many tokens of each are a prompt (0 for text)
    text-heldout.jsonl              the raw texts, and what a bigram needs for each
    problems-{train,heldout}.jsonl  the problems with their worked solutions

Every document ends in the end token. Numbers are little-endian: tokens uint16, or uint32 for more
than 65 536 of them, the rest int64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from drawplate.core.errors import Damaged, UserError

FORMAT = 2
STREAMS = ("text-train", "text-heldout", "problems-train", "problems-heldout")

Split = Literal["train", "heldout"]
Ints = NDArray[np.int64]


class Stream(NamedTuple):
    """Documents of tokens, mapped from disk: document d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """All documents, [N]."""
    offsets: Ints
    """Where each of D documents begins, and N, [D + 1]."""
    prompts: Ints
    """Leading tokens of each document that ask and are not to be learned, [D]."""


class Corpus:
    """A folder written by `prepare`, opened for reading; nothing is loaded before it is used.

    Raises:
        UserError: the folder is no corpus, or one of another format.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / "corpus.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.folder} is not a corpus: it has no corpus.json; name a folder that the "
                "prepare stage wrote"
            ) from None
        if self.facts["format"] != FORMAT:
            raise UserError(
                f"{self.folder} is a corpus of format {self.facts['format']}, this version reads "
                f"{FORMAT}; run prepare again"
            )
        self.vocabulary: int = self.facts["vocabulary"]
        self.end: int = self.facts["end"]
        self.pad: int = self.facts["pad"]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, a `PreTrainedTokenizerFast`."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer")

    def stream(self, name: str) -> Stream:
        """One of `STREAMS`.

        Raises:
            UserError: another name.
            Damaged: the tokens are not as many as the offsets say.
        """
        folder = self.folder / self._known(name, STREAMS)
        tokens = np.memmap(folder / "tokens.bin", dtype=token_type(self.vocabulary), mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        prompts = np.load(folder / "prompts.npy", mmap_mode="r", allow_pickle=False)
        if len(tokens) != offsets[-1] or len(prompts) != len(offsets) - 1:
            raise Damaged(f"{folder}: tokens.bin, offsets.npy and prompts.npy do not fit together")
        return Stream(tokens, offsets, prompts)

    def documents(self, name: str) -> list[str]:
        """Raw texts of `text-heldout`, in the order of its stream.

        Raises:
            UserError: another name; other streams keep their tokens only.
        """
        lines = read_lines(self.folder / f"{self._known(name, ('text-heldout',))}.jsonl")
        return [line["text"] for line in lines]

    def bigram_bits(self) -> list[float]:
        """What a bigram of the training text's bytes needs for each text of `text-heldout`."""
        return [line["bigram_bits"] for line in read_lines(self.folder / "text-heldout.jsonl")]

    def problems(self, split: Split) -> list[dict[str, Any]]:
        """Problems with `task`, `id`, `prompt`, `answer`, `entry`, `style` and `solution`.

        Raises:
            UserError: `split` is neither `train` nor `heldout`.
        """
        return read_lines(
            self.folder / f"problems-{self._known(split, ('train', 'heldout'))}.jsonl"
        )

    def _known(self, name: str, names: tuple[str, ...]) -> str:
        if name not in names:
            raise UserError(f"{self.folder} has no {name!r}; it has {', '.join(names)}")
        return name


def token_type(vocabulary: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def write_stream(
    folder: Path, name: str, documents: Iterable[tuple[list[int], int]], vocabulary: int
) -> Ints:
    """Write documents, each with the length of its prompt, as stream `name`; give the offsets."""
    place = folder / name
    place.mkdir()
    offsets, prompts = [0], []
    with (place / "tokens.bin").open("wb") as file:
        for tokens, prompt in documents:
            file.write(np.asarray(tokens, dtype=token_type(vocabulary)).tobytes())
            offsets.append(offsets[-1] + len(tokens))
            prompts.append(prompt)
    np.save(place / "offsets.npy", np.asarray(offsets, dtype="<i8"), allow_pickle=False)
    np.save(place / "prompts.npy", np.asarray(prompts, dtype="<i8"), allow_pickle=False)
    return np.asarray(offsets, dtype=np.int64)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write corpus.json; `facts` name at least `vocabulary`, `end` and `pad`."""
    text = json.dumps({"format": FORMAT, **facts}, indent=2, sort_keys=True) + "\n"
    (folder / "corpus.json").write_text(text, encoding="utf-8", newline="\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, in ASCII, so that any string can be written."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects that `write_lines` wrote."""
    with path.open(encoding="ascii") as file:
        return [cast("dict[str, Any]", json.loads(line)) for line in file]
