"""Held-out loss with the usual loop, document by document or in padded batches of like length."""

import torch
from transformers import AutoModelForCausalLM
from turns import Settings, Turns, documents

IGNORE = -100


@torch.no_grad()
def main() -> None:
    settings = Settings()
    turns = Turns(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    texts = documents(settings.count, settings.mean, settings.longest, settings.vocabulary)
    if settings.batch > 1:
        texts.sort(key=len)
    given = [torch.tensor([settings.end, *text]) for text in texts]
    while True:
        turns.wait()
        nats = 0.0
        for start in range(0, len(given), settings.batch):
            part = given[start : start + settings.batch]
            tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=IGNORE)
            mask = None if len(part) == 1 else (labels != IGNORE).long()
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            nats += float(loss) * sum(len(text) - 1 for text in part)
        turns.done(nats=nats, tokens=sum(map(len, texts)))


if __name__ == "__main__":
    main()
