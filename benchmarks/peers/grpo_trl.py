"""GRPO with TRL's GRPOTrainer: a round is one step, sampling included."""

from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Settings, Turns, rows


class Clock(TrainerCallback):
    """Stops after every round."""

    def __init__(self, turns: Turns, settings: Settings, lengths: list[int]):
        self.turns, self.steps, self.lengths = turns, settings.steps, lengths

    def on_step_end(self, *given: Any, **_: Any) -> None:
        """A round is `steps` of these."""
        self.turns.every(self.steps, given[1].global_step, new=sorted(set(self.lengths)))


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    transformers.logging.set_verbosity_error()
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Share of even tokens."""
        lengths[:] = [len(ids) for ids in completion_ids]
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    prompts = rows(settings.prompts * 64, settings.prompt, settings.vocabulary, 7).tolist()
    asked = [" ".join(f"t{token}" for token in prompt) for prompt in prompts]
    arguments = GRPOConfig(
        output_dir=settings.folder,
        max_steps=1 << 20,
        per_device_train_batch_size=settings.prompts * settings.samples,
        num_generations=settings.samples,
        max_completion_length=settings.new,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=settings.rate,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1 << 20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dtype = getattr(torch, settings.dtype)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=tokenizer,
        callbacks=[Clock(turns, settings, lengths)],
    )
    turns.wait()
    trainer.train()


if __name__ == "__main__":
    main()
