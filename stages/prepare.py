"""Stage 1: raw sources -> corpus (tokens, tokenizer, task sets, reports)."""

from __future__ import annotations

import json

from drawplate.core.method import Frozen
from drawplate.data.prepare import Prepare, PrepareReport
from drawplate.data.prepare import prepare as make
from stages.run import Run, Stage, device_of


class Inputs(Frozen):
    """Sources are named by the parameters."""


def body(params: Prepare, inputs: Inputs, run: Run) -> PrepareReport:
    """Writes the corpus; raises where held-out problems occur in training text."""
    device = device_of(run) if params.folders else "cpu"
    watch, engine = run.part("prepare"), run.execution.engine
    report = make(params, run.folder, watch, run.work, engine, device, run.part)
    facts = json.loads((run.folder / "corpus.json").read_bytes())
    run.sources |= {
        f"{number} {source['name']}": json.dumps(source["origin"], sort_keys=True)
        for number, source in enumerate(facts["sources"])
    }
    run.artifacts += ["contamination.json", "corpus.json"]
    if params.synthetic is not None:
        run.artifacts.append("synthetic.json")
    return report


prepare = Stage(
    "prepare",
    Prepare,
    Inputs,
    body,
    "corpus",
    example="-S 'prepare.sources=[{name: text}]' -S 'prepare.tasks=[{name: chain_sum}]'",
    named=lambda params: params.folders,
)
