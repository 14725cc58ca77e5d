"""Sources and tasks in; a corpus folder out, with an account of every record that was read.

    read = kept + quarantined + exact duplicates + near-duplicates + contaminated

The steps: read and vet (quarantine.jsonl), drop repeats (duplicates.jsonl), split by hash, make the
problems, search the training data for held-out problems (contamination.json), train or adopt the
tokenizer, write the streams. Everything written is a function of the parameters and the sources.

With `synthetic`, a model makes further texts from the training texts (synthetic.jsonl says from
which and in which round, synthetic.json what came of the rounds). They count as read and go the
same way: vetted, compared with all texts and among one another, searched for held-out problems.
What is left of them is training text, never held-out text, and no text of a source is dropped for
one of them.
"""

from __future__ import annotations

import json
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from drawplate.core.corpus import (
    STREAMS,
    Split,
    read_lines,
    write_facts,
    write_lines,
    write_stream,
)
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen, OneOf
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import seed_of
from drawplate.data.baselines import bigram_bits, gzip_bits
from drawplate.data.contamination import Contaminated, in_problems, in_texts
from drawplate.data.duplicates import Duplicates, Repeat
from drawplate.data.engine import Engine, Here
from drawplate.data.source import Bad, Document, Source, vet
from drawplate.data.synthetic import Synthetic
from drawplate.data.task import Problem, Style, Task, allot
from drawplate.data.tokenizer import SMALLEST, adopt, encode, train

if TYPE_CHECKING:
    import torch

STEPS = 6
SPLITS: tuple[Split, ...] = ("train", "heldout")

Share = Annotated[float, Field(ge=0, le=1)]


class Prepare(Frozen):
    """What to prepare."""

    seed: int = 0
    """Chooses the problems and the style of each solution, not the split of the texts."""
    sources: Annotated[tuple[Annotated[Source, OneOf()], ...], Field(min_length=1)]
    """Where text comes from."""
    longest: PositiveInt = 1_000_000
    """Longest record in bytes; longer ones are quarantined."""
    duplicates: Duplicates = Duplicates()
    """What counts as a repeat."""
    heldout_text: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the texts held out, chosen by each text's own hash."""
    tasks: Annotated[tuple[Annotated[Task, OneOf()], ...], Field(min_length=1)]
    """What problems are made, in proportion to each task's `share`."""
    train_problems: PositiveInt = 20_000
    """Problems to learn from."""
    heldout_problems: PositiveInt = 500
    """Problems to be judged by; none of them is in the training data."""
    verbose: Share = 0.5
    """Share of the solutions in the verbose style."""
    window: PositiveInt = 13
    """Words in a row that a text may not share with a held-out problem, or the whole problem."""
    contaminated_text: Literal["refuse", "drop"] = "refuse"
    """Whether a text that asks a held-out problem stops the preparation or is left out."""
    synthetic: Annotated[Synthetic, OneOf()] | None = None
    """How a model makes more training texts; null: none are made."""
    tokenizer: Path | None = None
    """Folder of a tokenizer to adopt; without one, a tokenizer is trained."""
    vocabulary: Annotated[int, Field(ge=SMALLEST)] = 4096
    """Most tokens of a tokenizer that is trained."""

    @property
    def folders(self) -> dict[str, Path]:
        """Folders of models that are read, by the key that names them."""
        return {} if self.synthetic is None else {"prepare.synthetic.model": self.synthetic.model}


class PrepareReport(Frozen):
    """What came of it."""

    read: int
    """Records met in all sources, and texts that a model made."""
    kept: int
    """Texts that are training or held-out text."""
    quarantined: int
    """Records that could not be used; quarantine.jsonl says where and why."""
    exact_duplicates: int
    near_duplicates: int
    """Texts that repeat a kept one; duplicates.jsonl says which."""
    contaminated: int
    """Texts left out because they ask a held-out problem."""
    synthetic: int
    """Training texts that a model made."""
    train_texts: int
    heldout_texts: int
    train_bytes: int
    heldout_bytes: int
    """UTF-8 bytes of text."""
    train_tokens: int
    heldout_tokens: int
    """Tokens of text, one end token per text included."""
    train_problems: int
    heldout_problems: int
    problem_tokens: int
    """Tokens of the training problems with their solutions and end tokens."""
    longest_problem: int
    """Tokens of the longest training problem: the shortest row that holds every one."""
    verbose_problems: int
    """Training problems with a verbose solution."""
    vocabulary: int
    """Tokens in the tokenizer."""
    bytes_per_token: float
    """Of the held-out text."""
    gzip_bits_per_byte: float
    bigram_bits_per_byte: float
    """Bounds on the held-out text that a model has to beat."""


class Added(NamedTuple):
    """Texts that a model made, and what became of them."""

    read: int = 0
    kept: Sequence[Document] = ()
    bad: Sequence[Bad] = ()
    told: Sequence[dict[str, Any]] = ()
    """Rows of duplicates.jsonl."""
    contaminated: int = 0


def prepare(
    params: Prepare,
    folder: Path,
    watch: Watch = silent,
    work: Path | None = None,
    engine: Engine | None = None,
    device: torch.device | str = "cpu",
    part: Callable[[str], Watch] = lambda label: silent,
) -> PrepareReport:
    """Write a corpus into the existing, empty `folder`; `drawplate.core.corpus` reads it.

    Sources are read in parts, by `engine`, which keeps finished ones in `work`; without the one
    they are read here, without the other nothing is kept. A model that makes texts does so on
    `device`, goes on from its checkpoints in `work`, and tells the watch of each `part` of its
    work how far it is.

    Raises:
        UserError: a source, task, tokenizer or model is not as the parameters say, or leaves no
            text.
        Contaminated: training data holds a held-out problem.
    """
    parts = [source.parts() for source in params.sources]
    # Before anything is read: what a kept part was read from, and what the lineage will say.
    origins = [[part.origin() for part in some] for some in parts]
    with tempfile.TemporaryDirectory() as nowhere:
        place = work or Path(nowhere)
        read, documents, bad = _read(parts, origins, params.longest, engine or Here(), place)
    watch(1, STEPS, {"read": read, "quarantined": len(bad)})

    repeats = params.duplicates.find([document.text for document in documents])
    told = list(_told(documents, repeats))
    watch(2, STEPS, _split_repeats(told))

    texts: dict[Split, list[Document]] = {"train": [], "heldout": []}
    for index, document in enumerate(documents):
        if index not in repeats:
            held = _chance("heldout", document.text) < params.heldout_text
            texts["heldout" if held else "train"].append(document)
    problems = _problems(params)
    watch(3, STEPS, {split: len(found) for split, found in problems.items()})

    asking = _gate(params, texts["train"], problems, folder, work)
    texts["train"] = [text for place, text in enumerate(texts["train"]) if place not in asking]
    for split, found in texts.items():
        if not found:
            raise UserError(
                f"prepare.sources: no {split} text is left of {read} records ({len(bad)} "
                f"quarantined, {len(repeats)} duplicates); give more text or another heldout_text"
            )
    added = Added()
    if params.synthetic is not None:
        with tempfile.TemporaryDirectory() as nowhere:
            place = work or Path(nowhere)
            added = _add(params, params.synthetic, texts, problems, folder, place, device, part)
    texts["train"] += added.kept
    told += added.told
    write_lines(folder / "quarantine.jsonl", (row._asdict() for row in [*bad, *added.bad]))
    write_lines(folder / "duplicates.jsonl", told)
    contaminated = len(asking) + added.contaminated
    watch(4, STEPS, {"contaminated": contaminated})

    asked = {split: _solve(params, found) for split, found in problems.items()}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for split in SPLITS:
        write_lines(folder / f"problems-{split}.jsonl", asked[split])
        pairs[f"text-{split}"] = [("", document.text) for document in texts[split]]
        pairs[f"problems-{split}"] = [(row["prompt"], row["solution"]) for row in asked[split]]
    raw = {split: [text for _, text in pairs[f"text-{split}"]] for split in SPLITS}
    bigram = bigram_bits(raw["train"], raw["heldout"])
    write_lines(
        folder / "text-heldout.jsonl",
        (
            {"text": text, "bigram_bits": bits}
            for text, bits in zip(raw["heldout"], bigram, strict=True)
        ),
    )

    if params.tokenizer:
        tokenizer = adopt(params.tokenizer)
    else:
        learned = pairs["text-train"] + pairs["problems-train"]
        tokenizer = train((part for pair in learned for part in pair), params.vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_facts(folder, _facts(params, origins, tokenizer))
    watch(5, STEPS, {"vocabulary": len(tokenizer)})

    offsets = {
        name: write_stream(folder, name, _coded(tokenizer, pairs[name]), len(tokenizer))
        for name in STREAMS
    }
    size = {split: sum(len(text.encode()) for text in raw[split]) for split in SPLITS}
    report = PrepareReport(
        read=read + added.read,
        kept=len(raw["train"]) + len(raw["heldout"]),
        quarantined=len(bad) + len(added.bad),
        **_split_repeats(told),
        contaminated=contaminated,
        synthetic=len(added.kept),
        train_texts=len(raw["train"]),
        heldout_texts=len(raw["heldout"]),
        train_bytes=size["train"],
        heldout_bytes=size["heldout"],
        train_tokens=int(offsets["text-train"][-1]),
        heldout_tokens=int(offsets["text-heldout"][-1]),
        train_problems=len(asked["train"]),
        heldout_problems=len(asked["heldout"]),
        problem_tokens=int(offsets["problems-train"][-1]),
        longest_problem=int(np.diff(offsets["problems-train"]).max()),
        verbose_problems=sum(row["style"] == "verbose" for row in asked["train"]),
        vocabulary=len(tokenizer),
        bytes_per_token=size["heldout"] / int(offsets["text-heldout"][-1]),
        gzip_bits_per_byte=gzip_bits(raw["heldout"]),
        bigram_bits_per_byte=sum(bigram) / size["heldout"],
    )
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    watch(6, STEPS, {"train_tokens": report.train_tokens, "problem_tokens": report.problem_tokens})
    return report


def _read(
    grouped: Sequence[Sequence[Source]],
    origins: Sequence[Sequence[dict[str, str]]],
    longest: int,
    engine: Engine,
    work: Path,
) -> tuple[int, list[Document], list[Bad]]:
    """All records in the order of the sources, whoever read them in whatever order.

    The file of a part is another one if what it is read from changes.
    """
    parts = tuple(chain(*grouped))
    keys = (
        seed_of(part.model_dump_json(), json.dumps(origin), longest)
        for part, origin in zip(parts, chain(*origins), strict=True)
    )
    places = tuple(work / f"part-{number:06}-{key:016x}.jsonl" for number, key in enumerate(keys))
    engine.run(partial(_read_part, parts, places, longest), len(parts), work / "engine")
    documents, bad = [], []
    for place in places:
        for row in read_lines(place):
            if "text" in row:
                documents.append(Document(**row))
            else:
                bad.append(Bad(**row))
    return len(documents) + len(bad), documents, bad


def _read_part(parts: Sequence[Source], places: Sequence[Path], longest: int, number: int) -> None:
    """Reads and vets one part into a file of its own, unless that is there already."""
    place = places[number]
    if place.exists():
        return
    vetted = (vet(record, longest) for record in parts[number].read(longest))
    half = place.with_suffix(".half")
    write_lines(half, (record._asdict() for record in vetted))
    half.replace(place)


def _told(documents: Sequence[Document], repeats: Mapping[int, Repeat]) -> Iterator[dict[str, Any]]:
    for index, repeat in sorted(repeats.items()):
        dropped, kept = documents[index], documents[repeat.kept]
        yield {
            "file": dropped.file,
            "line": dropped.line,
            "exact": repeat.exact,
            "kept_file": kept.file,
            "kept_line": kept.line,
        }


def _split_repeats(told: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    exact = sum(row["exact"] for row in told)
    return {"exact_duplicates": exact, "near_duplicates": len(told) - exact}


def _add(
    params: Prepare,
    how: Synthetic,
    texts: Mapping[Split, Sequence[Document]],
    problems: Mapping[Split, Sequence[Problem]],
    folder: Path,
    work: Path,
    device: torch.device | str,
    part: Callable[[str], Watch],
) -> Added:
    """Makes texts from the training texts and leads them the way of all records.

    One that asks a held-out problem is left out whatever `contaminated_text` says, since there is
    no source from which to take it.
    """
    from drawplate.data.synthesis import synthesize  # loads transformers

    made = synthesize(how, texts["train"], params.seed, work, device, part)
    write_lines(
        folder / "synthetic.jsonl",
        ({"text": text.text, "model": made.model, **text._asdict()} for text in made.texts),
    )
    told = {"model": made.model, "rounds": [each.model_dump() for each in made.rounds]}
    (folder / "synthetic.json").write_text(json.dumps(told, indent=2) + "\n", encoding="ascii")

    numbered = enumerate((text.text for text in made.texts), 1)
    records = [
        vet(Document(text, "synthetic.jsonl", line), params.longest) for line, text in numbered
    ]
    good = [record for record in records if isinstance(record, Document)]
    standing = [*texts["train"], *texts["heldout"]]
    together = [*standing, *good]
    repeats = params.duplicates.find([each.text for each in together], len(standing))
    new = [each for place, each in enumerate(good, len(standing)) if place not in repeats]

    path, heldout = folder / "contamination.json", problems["heldout"]
    asked = in_texts(heldout, [each.text for each in new], params.window)
    account = json.loads(path.read_bytes())
    account["training_texts"] += len(new)
    account["found"] += _shown((heldout[hit.problem], _where(new[hit.place])) for hit in asked)
    _write_account(path, account)
    asking = {hit.place for hit in asked}
    return Added(
        read=len(records),
        kept=[each for place, each in enumerate(new) if place not in asking],
        bad=[record for record in records if isinstance(record, Bad)],
        told=list(_told(together, repeats)),
        contaminated=len(asking),
    )


def _chance(*parts: int | str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return seed_of(*parts) / 2**63


def _problems(params: Prepare) -> dict[Split, list[Problem]]:
    """Held-out problems first, then training problems that are none of them."""
    made: dict[Split, list[Problem]] = {"heldout": [], "train": []}
    sizes: dict[Split, int] = {
        "heldout": params.heldout_problems,
        "train": params.train_problems,
    }
    taken: set[str] = set()
    for split, found in made.items():
        for task, size in zip(params.tasks, allot(params.tasks, sizes[split]), strict=True):
            some = task.problems(size, params.seed, skip=taken)
            taken.update(problem.id for problem in some)
            found += some
    # By their hash, so that no part of the list is one task's.
    return {split: sorted(found, key=lambda problem: problem.id) for split, found in made.items()}


def _gate(
    params: Prepare,
    texts: Sequence[Document],
    problems: Mapping[Split, Sequence[Problem]],
    folder: Path,
    work: Path | None,
) -> set[int]:
    """The training texts to leave out, if that is wanted; otherwise there are none.

    The account is part of the corpus in `folder`, or of `work` where there will be no corpus.
    """
    heldout, training = problems["heldout"], problems["train"]
    repeated = in_problems(heldout, training)
    asked = in_texts(heldout, [text.text for text in texts], params.window)
    found = [
        (heldout[hit.problem], f"training problem {training[hit.place].id}") for hit in repeated
    ]
    found += [(heldout[hit.problem], _where(texts[hit.place])) for hit in asked]
    account = {
        "heldout_problems": len(heldout),
        "training_problems": len(training),
        "training_texts": len(texts),
        "window": params.window,
        "contaminated_text": params.contaminated_text,
        "found": _shown(found),
    }
    _write_account(folder / "contamination.json", account)
    if repeated or (asked and params.contaminated_text == "refuse"):
        listed = ""
        if work is not None:
            _write_account(work / "contamination.json", account)
            listed = f" ({work / 'contamination.json'} lists all)"
        count = len({problem.id for problem, _ in found})
        first = "; ".join(f"{p.prompt.strip()!r} in {place}" for p, place in found[:3])
        raise Contaminated(
            f"{count} of {len(heldout)} held-out problems are in the training data: "
            f"{first}{listed}; take them out of the sources, or set "
            "prepare.contaminated_text to drop"
        )
    return {hit.place for hit in asked}


def _where(text: Document) -> str:
    return f"{text.file}:{text.line}"


def _shown(found: Iterable[tuple[Problem, str]]) -> list[dict[str, str]]:
    return [{"task": p.task, "prompt": p.prompt, "place": place} for p, place in found]


def _write_account(path: Path, account: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(account, indent=2) + "\n", encoding="ascii")


def _solve(params: Prepare, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    rows = []
    # Entries of one task may differ in their settings, but not in how they solve a problem.
    tasks = {task.name: task for task in params.tasks}
    for problem in problems:
        style: Style = (
            "verbose" if _chance(params.seed, "style", problem.id) < params.verbose else "concise"
        )
        solution = tasks[problem.task].solution(problem, style)
        rows.append({**problem.model_dump(), "style": style, "solution": solution})
    return rows


def _coded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], int]]:
    """Prompt and the rest are coded apart, as at generation, where the rest is not yet known."""
    prompts = encode(tokenizer, [prompt for prompt, _ in pairs])
    for prompt, rest in zip(prompts, encode(tokenizer, [rest for _, rest in pairs]), strict=True):
        yield [*prompt, *rest, tokenizer.eos_token_id], len(prompt)


def _facts(
    params: Prepare, origins: Sequence[Sequence[dict[str, str]]], tokenizer: Any
) -> dict[str, Any]:
    return {
        "vocabulary": len(tokenizer),
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "sources": [
            {"name": source.name, "origin": dict(ChainMap(*some))}
            for source, some in zip(params.sources, origins, strict=True)
        ],
        "tasks": [task.model_dump(mode="json") for task in params.tasks],
    }
