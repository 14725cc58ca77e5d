"""Talking to a model."""

from __future__ import annotations

from pathlib import Path


class Talker:
    """A loaded model that answers prompts."""

    def __init__(self, folder: Path):
        from stages.run import prepare_process

        prepare_process()
        from drawplate.core import hf
        from drawplate.lineage import read

        self.folder = folder
        trail = read(folder)
        self.ours = any(node.stage == "prepare" for node in trail.ancestors.values())
        self.model = hf.load(folder)
        self.tokenizer = hf.load_tokenizer(folder)

    def greeting(self) -> list[str]:
        """What the model is, and what to ask it."""
        from drawplate.core import hf

        size = hf.stored_bytes(self.model)
        return [
            f"{self.folder}: {size:,} bytes. Ask it what it was trained on; an empty line ends."
        ]

    def __call__(self, prompt: str, max_new: int, temperature: float, seed: int) -> str:
        """The answer to one prompt, asked as in training where drawplate trained the model."""
        from drawplate.data.task import asked
        from drawplate.model.sample import sample

        text = asked(prompt) if self.ours else prompt
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = sample(
            self.model,
            [ids],
            max_new=max_new,
            end=self.tokenizer.eos_token_id,
            temperature=temperature,
            seed=seed,
        )
        return str(self.tokenizer.decode(answer.tokens[0], skip_special_tokens=True)).strip()
