"""Stage 3: a decoder -> the same decoder with fewer stored bytes, recovered by short training."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from drawplate import edits
from drawplate.compress.driver import Compress as Family
from drawplate.compress.driver import compress as shrink
from drawplate.compress.recover import Recover, recover
from drawplate.core import hf
from drawplate.core.calibration import Calibration, open_corpus
from drawplate.core.method import Frozen
from stages.run import Run, Stage, device_of, main, write_history, write_ledger


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
    earlier = edits.of(model)
    tokenizer = hf.load_tokenizer(inputs.model)
    corpus = open_corpus(inputs.corpus, tokenizer)
    rows = params.calibration.tokens(corpus)
    ledger = shrink(model, rows, params, run.work / "blocks", run.part("compress"))
    write_ledger(run, ledger)
    outcome = None
    if params.recover is not None:
        parent = hf.load(inputs.model).to(device_of(run))
        outcome = recover(model, parent, corpus, params.recover, run.work, run.part("recover"))
        write_history(run, "recover", outcome.metrics)
    edits.still(model, earlier)
    hf.save(model.cpu(), run.folder, tokenizer)
    return Report(
        bytes_before=ledger.bytes_before,
        bytes_after=ledger.bytes_after,
        ratio=ledger.ratio,
        activation_error=ledger.activation_error,
        recovery_loss=outcome.last["loss"] if outcome else None,
    )


compress = Stage("compress", Compress, Inputs, body, "model")

if __name__ == "__main__":
    main(compress, "A model -> fewer stored bytes by factors or sparsity, then recovery.")
