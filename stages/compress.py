"""Stage 3: a decoder -> the same decoder with fewer stored bytes, recovered by short training."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from transformers import PreTrainedModel

from drawplate import edits
from drawplate.compress.driver import Compress as Family
from drawplate.compress.driver import compress as shrink
from drawplate.compress.driver import refuse
from drawplate.compress.recover import Recover, recover
from drawplate.core import hf
from drawplate.core.calibration import Calibration, open_corpus
from drawplate.core.method import Frozen
from stages.run import Run, Stage, device_of, write_history, write_ledger


class Compress(Family):
    """What the compress stage is asked to do."""

    calibration: Calibration = Calibration()
    """Rows that statistics are gathered on."""
    recover: Recover | None = Recover()
    """Short training of what is left; null: none."""


class Inputs(Frozen):
    """What the stage reads."""

    model: Path = Field(description="Hugging Face model folder.")
    corpus: Path = Field(description="Folder that prepare wrote, or plain text.")


class Report(Frozen):
    """What compression cost and saved."""

    bytes_before: int
    bytes_after: int
    ratio: float
    activation_error: float
    recovery_loss: float | None


def body(params: Compress, inputs: Inputs, run: Run) -> Report:
    """Compresses, trains what is left, and writes a Hugging Face folder."""
    model = hf.load(inputs.model).to(device_of(run))
    refuse(model, params)
    earlier = edits.of(model)
    tokenizer = hf.load_tokenizer(inputs.model)
    corpus = open_corpus(inputs.corpus, tokenizer)
    ledger = None
    if run.world.first:
        rows = params.calibration.tokens(corpus)
        ledger = shrink(model, rows, params, run.work / "blocks", run.part("compress"))
        for group in ledger.groups:
            run.say(
                f"{len(group.paths)} layers from {group.paths[0]} on share rank {group.rank}: "
                f"error {group.error:.4f}, at most {group.threshold:g} was allowed"
            )
    if not run.world.alone:
        model = _handed_on(model, run)
    outcome = None
    if params.recover is not None:
        parent, watch = hf.load(inputs.model).to(device_of(run)), run.part("recover")
        outcome = recover(model, parent, corpus, params.recover, run.work, watch, run.world)
    run.leave_to_first()
    assert ledger is not None
    write_ledger(run, ledger)
    if outcome is not None:
        write_history(run, "recover", outcome.metrics)
    edits.still(model, earlier)
    hf.save(model.cpu(), run.folder, tokenizer)
    return Report(
        bytes_before=ledger.bytes_before,
        bytes_after=ledger.bytes_after,
        ratio=ledger.ratio,
        activation_error=ledger.activation_error,
        recovery_loss=outcome.last.get("loss") if outcome else None,
    )


def _handed_on(model: PreTrainedModel, run: Run) -> PreTrainedModel:
    """The first process' model, in every process."""
    folder = run.work / "compressed"
    if run.world.first:
        hf.save(model, folder)
    run.world.any(False)  # nobody reads before all is written
    return model if run.world.first else hf.load(folder).to(device_of(run))


compress = Stage(
    "compress", Compress, Inputs, body, "model", example="-S compress.ratio=0.4", together=True
)
