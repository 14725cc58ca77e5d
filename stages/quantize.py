"""Stage 4: a decoder, compressed or not -> packed codes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from drawplate import edits
from drawplate.core import hf
from drawplate.core.calibration import Calibration, open_corpus
from drawplate.core.method import Frozen
from drawplate.quantize.driver import Quantize as Codes
from drawplate.quantize.driver import quantize as pack
from stages.run import Run, Stage, device_of, write_ledger


class Quantize(Codes):
    """What the quantize stage is asked to do."""

    calibration: Calibration = Calibration()
    """Rows that statistics are gathered on."""


class Inputs(Frozen):
    """What the stage reads."""

    model: Path = Field(description="Hugging Face model folder.")
    corpus: Path = Field(description="Folder that prepare wrote, or plain text.")


class Report(Frozen):
    """What quantization saved."""

    bytes_before: int
    bytes_after: int
    ratio: float
    activation_error: float
    """Mean over the quantized linear layers."""


def body(params: Quantize, inputs: Inputs, run: Run) -> Report:
    """Quantizes and writes a Hugging Face folder."""
    model = hf.load(inputs.model).to(device_of(run))
    earlier = edits.of(model)
    tokenizer = hf.load_tokenizer(inputs.model)
    rows = params.calibration.tokens(open_corpus(inputs.corpus, tokenizer))
    ledger = pack(model, rows, params, run.work / "blocks", run.part("quantize"))
    write_ledger(run, ledger)
    edits.still(model, earlier)
    hf.save(model.cpu(), run.folder, tokenizer)
    errors = [row.activation_error for row in ledger.layers if row.activation_error is not None]
    return Report(
        bytes_before=ledger.bytes_before,
        bytes_after=ledger.bytes_after,
        ratio=ledger.ratio,
        activation_error=sum(errors) / max(len(errors), 1),
    )


quantize = Stage("quantize", Quantize, Inputs, body, "model", example="-S quantize.bits=3")
