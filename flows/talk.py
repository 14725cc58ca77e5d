"""Talking to a model."""

from __future__ import annotations

from pathlib import Path


class Talker:
    """A loaded model that answers prompts."""

    def __init__(self, folder: Path):
        from stages.run import prepare_process

        prepare_process()
        from drawplate.core import hf

        self.folder = folder
        self.model = hf.load(folder)
        self.tokenizer = hf.load_tokenizer(folder)

    def greeting(self) -> list[str]:
        """What the model is, and what to ask it."""
        size = (self.folder / "model.safetensors").stat().st_size
        return [
            f"{self.folder}: {size:,} bytes. Ask it what it was trained on; an empty line ends."
        ]

    def __call__(self, prompt: str, max_new: int, temperature: float, seed: int) -> str:
        """The answer to one prompt, which is put in the form that training used."""
        from drawplate.data.task import asked
        from drawplate.model.sample import sample

        ids = self.tokenizer(asked(prompt), add_special_tokens=False)["input_ids"]
        answer = sample(
            self.model,
            [ids],
            max_new=max_new,
            end=self.tokenizer.eos_token_id,
            temperature=temperature,
            seed=seed,
        )
        return str(self.tokenizer.decode(answer.tokens[0], skip_special_tokens=True)).strip()
