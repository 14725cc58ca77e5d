"""A corpus and models small enough to evaluate in a test, and a judge for their answers."""

import json
from pathlib import Path

import torch

from drawplate.core.artifact import publish
from drawplate.core.corpus import Corpus, write_facts, write_lines, write_stream
from drawplate.core.hf import save
from drawplate.data.tokenizer import encode, train
from drawplate.evaluate.driver import Evaluation, Model, evaluate
from drawplate.evaluate.interval import Chance
from drawplate.evaluate.quality import Windows
from drawplate.evaluate.results import Evaluate
from tests import tiny

VOCABULARY = 270
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\x00\x1b[31m‮\ud800"
TASKS = ("add", "<b>sort</b>")
SMALL = Evaluate(
    windows=Windows(window=24, overlap=8, batch_tokens=64, precision="float32"),
    problems=8,
    samples=3,
    passes=(1, 3),
    max_new=6,
    chance=Chance(resamples=200),
    probe=None,
)


def corpus(folder: Path) -> Corpus:
    """Seven held-out texts and ten held-out problems of two kinds."""
    texts = [f"text {i} " + "word äöü " * (3 * i) for i in range(7)]
    tokenizer = train(texts, VOCABULARY)
    coded = [[*ids, tokenizer.eos_token_id] for ids in encode(tokenizer, texts)]
    prompts = [f"{i}+{i + 1}=?\n" for i in range(10)]
    asked = list(encode(tokenizer, prompts))
    folder.mkdir()
    write_stream(folder, "text-heldout", ((ids, 0) for ids in coded), len(tokenizer))
    write_stream(
        folder, "problems-heldout", (([*ids, 5, 6], len(ids)) for ids in asked), len(tokenizer)
    )
    rows = [{"text": text, "bigram_bits": 3.0 * i} for i, text in enumerate(texts)]
    write_lines(folder / "text-heldout.jsonl", rows)
    problems = [
        {"task": TASKS[i % 2], "id": f"{i:016x}", "prompt": prompts[i], "answer": str(2 * i + 1)}
        for i in range(10)
    ]
    write_lines(folder / "problems-heldout.jsonl", problems)
    facts = {"vocabulary": len(tokenizer), "end": tokenizer.eos_token_id, "tasks": []}
    write_facts(folder, facts | {"pad": tokenizer.pad_token_id})
    tokenizer.save_pretrained(folder / "tokenizer")
    return Corpus(folder)


def store(folder: Path, seed: int, ending: float, context: int = 64) -> Path:
    """A published random Llama for this vocabulary; `ending`: how large the end token is."""
    model = tiny.model("llama", seed, VOCABULARY, context)
    with torch.no_grad():
        table = model.get_input_embeddings().weight  # the row of the padding token starts as zeros
        table[0] = ending * table[3]
    with publish(folder, "model") as inside:
        save(model, inside)
    return folder


def judge(number: int, text: str) -> float:
    """An arbitrary verdict that depends on the problem and on the text."""
    return float((len(text) + number) % 3 == 0)


def run(folder: Path, params: Evaluate = SMALL, **given: object) -> Evaluation:
    """Two models, the second made from the first, on the corpus of `folder`."""
    opened = corpus(folder / "corpus")
    assert opened.end == 0
    models = [
        Model("base", store(folder / "base", 0, 0.5)),
        Model("child", store(folder / "child", 1, 4.0), "base"),
    ]
    return evaluate(models, opened, judge, params, **given)


def as_json(evaluation: Evaluation) -> str:
    """All of a report that must not change from run to run."""
    return json.dumps(evaluation.report.model_dump(mode="json", exclude={"machine"}))
