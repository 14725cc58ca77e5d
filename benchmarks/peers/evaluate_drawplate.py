"""Held-out loss with our evaluation."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from turns import Settings, Turns, documents

from drawplate.evaluate.quality import Windows, loss


def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    texts = documents(settings.count, settings.mean, settings.longest, settings.vocabulary)
    given = [np.array(text) for text in texts]
    windows = Windows(precision=settings.precision)
    while True:
        turns.wait()
        found = loss(model, given, [4 * len(text) for text in texts], settings.end, windows)
        turns.done(nats=float(found.nats.sum()), tokens=int(found.tokens.sum()))


if __name__ == "__main__":
    main()
