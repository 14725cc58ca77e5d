"""Stage 2: corpus -> a decoder trained from scratch, or adopted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from drawplate.core import hf
from drawplate.core.corpus import Corpus
from drawplate.core.method import Frozen
from drawplate.pretrain import Pretrain
from drawplate.pretrain.budget import Plan
from drawplate.pretrain.driver import planned
from drawplate.pretrain.driver import pretrain as make
from stages.run import Run, Stage, device_of, write_history


class Inputs(Frozen):
    """What the stage reads."""

    corpus: Path = Field(description="Folder that prepare wrote.")


class Report(Frozen):
    """Figures of a trained or adopted decoder."""

    parameters: int
    stored_bytes: int
    steps: int
    skipped_steps: int
    loss: float | None
    plan: Plan | None = None
    """What a budget planned."""


def body(params: Pretrain, inputs: Inputs, run: Run) -> Report:
    """Trains or adopts, and writes a Hugging Face folder."""
    world = replace(run.world, mode="sharded" if run.execution.sharded else "data")
    corpus, watch = Corpus(inputs.corpus), run.part("pretrain")
    model, tokenizer, outcome = make(params, corpus, run.work, watch, world, device_of(run))
    run.leave_to_first()
    hf.save(model.cpu(), run.folder, tokenizer)
    if outcome is not None:
        write_history(run, "pretrain", outcome.metrics)
    return Report(
        parameters=sum(p.numel() for p in model.parameters()),
        stored_bytes=hf.stored_bytes(model),
        steps=outcome.steps if outcome else 0,
        skipped_steps=outcome.skipped if outcome else 0,
        loss=outcome.last.get("loss") if outcome else None,
        plan=planned(params, corpus),
    )


pretrain = Stage(
    "pretrain",
    Pretrain,
    Inputs,
    body,
    "model",
    example="-S pretrain.training.steps=500",
    together=True,
    named=lambda params: {"pretrain.adopt": params.adopt} if params.adopt else {},
)
