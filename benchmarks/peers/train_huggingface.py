"""Training with transformers' Trainer, in fp32 or bf16 (its automatic casting), compiled or not."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from turns import Settings, Turns, rows


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random tokens."""

    def __init__(self, settings: Settings):
        self.length, self.vocabulary = settings.length, settings.vocabulary

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = rows(1, self.length, self.vocabulary, index)[0]
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """Stops after every round."""

    def __init__(self, turns: Turns, steps: int):
        self.turns, self.steps = turns, steps

    def on_step_end(self, *given: Any, **_: Any) -> None:
        """A round is `steps` of these; the loss of a step is the trainer's affair."""
        self.turns.every(self.steps, given[1].global_step)


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    transformers.logging.set_verbosity_error()
    arguments = TrainingArguments(
        output_dir=settings.folder,
        max_steps=1 << 20,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=settings.bf16,
        torch_compile=settings.compile,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=settings.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        args=arguments,
        train_dataset=Rows(settings),
        callbacks=[Clock(turns, settings.steps)],
    )
    turns.wait()
    trainer.train()


if __name__ == "__main__":
    main()
