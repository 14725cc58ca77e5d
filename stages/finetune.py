"""Stage 5: a decoder, compressed and quantized or not -> one that reasons better and shorter."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from drawplate import edits
from drawplate.core import hf
from drawplate.core.calibration import open_corpus
from drawplate.core.corpus import Corpus
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.lineage import content_hash
from drawplate.rl.driver import finetune as learn
from drawplate.rl.params import Finetune
from stages.problems import problems
from stages.quiet import keep_kernels
from stages.run import Run, Stage, device_of, write_history


class Inputs(Frozen):
    """What the stage reads."""

    model: Path = Field(description="Hugging Face model folder.")
    corpus: Path = Field(description="Folder that prepare wrote; its training problems are asked.")


class Report(Frozen):
    """How training ended."""

    steps: int
    skipped_steps: int
    reward: float
    length: float
    truncated: float
    generated: int = Field(description="Tokens that the model wrote to learn from.")
    solved_heldout: float | None = Field(
        description="Share of held-out statements that the new model proves; with self-play only."
    )
    bytes_before: int
    bytes_after: int


def body(params: Finetune, inputs: Inputs, run: Run) -> Report:
    """Learns from verified answers; the model stays compressed and quantized."""
    keep_kernels(128)  # rollouts have ever new shapes: all kernels took as much as all else
    model = hf.load(inputs.model).to(device_of(run))
    tokenizer = hf.load_tokenizer(inputs.model)
    corpus = open_corpus(inputs.corpus, tokenizer, text=False)
    if not isinstance(corpus, Corpus):
        raise UserError(f"{inputs.corpus} is plain text; finetuning needs problems with verdicts")
    asked = problems(corpus, "train")
    before, earlier = hf.stored_bytes(model), edits.of(model)
    outcome = learn(
        model,
        params,
        prompts=asked.prompts,
        score=asked.score,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        end=corpus.end,
        about=content_hash(inputs.corpus),
        work=run.work,
        watch=run.part("finetune"),
        world=run.world,
        step=lambda step: asked.step(step.prompt, step.before, step.text, step.ended),
        encode=lambda text: list(
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        ),
    )
    run.leave_to_first()
    edits.still(model, earlier)
    hf.save(model.cpu(), run.folder, tokenizer)
    write_history(run, "finetune", outcome.metrics)
    return Report(
        steps=outcome.steps,
        skipped_steps=outcome.skipped,
        **{key: outcome.last[key] for key in ("reward", "length", "truncated")},
        generated=round(outcome.last["generated"]),
        solved_heldout=outcome.last.get("solved_heldout"),
        bytes_before=before,
        bytes_after=hf.stored_bytes(model),
    )


finetune = Stage(
    "finetune", Finetune, Inputs, body, "model", example="-S finetune.steps=100", together=True
)
