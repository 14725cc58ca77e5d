"""GRPO with our `finetune`, all weights moving: a round is one step, sampling included."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import Settings, Turns, rows

from drawplate.rl.driver import finetune
from drawplate.rl.params import Finetune


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    dtype = getattr(torch, settings.dtype)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    group = {"rate": settings.rate}
    how = Finetune.model_validate(
        {
            "steps": 1 << 20,
            "save_every": 1 << 20,
            "precision": {"float32": "float32", "bfloat16": "bf16"}[settings.dtype],
            "optimizer": {"matrices": group, "rest": group},
            "prompts": settings.prompts,
            "samples": settings.samples,
            "length": {"name": "constant", "tokens": settings.new},
            "adapt": {"name": "full"},
            "select": {"name": "every"},
            "shaping": [],
            "advantage": {"name": "group"},
            "surrogate": {"name": "ppo_clip"},
            "reduce": {"name": "token_mean"},
        }
    )

    def score(index: int, text: str) -> float:
        """Share of even tokens."""
        ids = [int(word[1:]) for word in text.split()]
        return sum(i % 2 == 0 for i in ids) / len(ids)

    def watch(step: int, total: int, metrics: Mapping[str, float]) -> None:
        turns.every(settings.steps, step, new=[metrics["length"]])

    with tempfile.TemporaryDirectory(dir=settings.folder) as work:
        turns.wait()
        finetune(
            AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype),
            how,
            prompts=rows(settings.prompts * 64, settings.prompt, settings.vocabulary, 7).tolist(),
            score=score,
            decode=tokenizer.decode,
            end=-1,
            about="even tokens",
            work=Path(work),
            watch=watch,
        )


if __name__ == "__main__":
    main()
