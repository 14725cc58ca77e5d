"""Training with our loop, as the pretrain driver calls it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from turns import Settings, Turns, rows

from drawplate.core.batches import Batch
from drawplate.train.attention import attention_for
from drawplate.train.language import NextToken
from drawplate.train.loop import Training, train
from drawplate.train.precision import choose


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    group = {"rate": settings.rate}
    training = Training.model_validate(
        {
            "steps": 1 << 20,
            "save_every": 1 << 20,
            "precision": settings.precision,
            "compile": settings.compile,
            "schedule": {"name": "constant", "warmup": 0.0},
            "optimizer": {"matrices": group, "rest": group},
        }
    )

    def batch(step: int) -> Batch:
        tokens = rows(settings.batch, settings.length, settings.vocabulary, step)
        return Batch(tokens, tokens, torch.arange(settings.length).expand_as(tokens))

    def watch(step: int, total: int, metrics: Mapping[str, float]) -> None:
        turns.every(settings.steps, step, loss=metrics["loss"])

    model.train()
    with tempfile.TemporaryDirectory(dir=settings.folder) as work:
        turns.wait()
        with attention_for(model, settings.length, choose(settings.precision, model.device)):
            train(model, NextToken(batch, {"tokens": "random"}), training, Path(work), watch)


if __name__ == "__main__":
    main()
