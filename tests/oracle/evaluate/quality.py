"""Held-out loss and divergence one document and one token at a time.

Bits per byte: the sum over all tokens of -log2 p(token | tokens before it in its document, behind
the end-of-text token), divided by bytes. KL(p || q) = sum_v p_v ln(p_v / q_v).
"""

import math

import torch


def contexts(length, window, overlap):
    """For each token of a document, the first input that its prediction may look at."""
    begin, first = 0, []
    for token in range(length):
        if token >= begin + window:
            begin = token - overlap
        first.append(begin)
    return first


def predictions(model, document, end, window, overlap):
    """ln p(v) for each token of a document, float64 lists."""
    sequence = [end, *document]
    found = []
    for token, first in enumerate(contexts(len(document), window, overlap)):
        inputs = torch.tensor([sequence[first : token + 1]])
        with torch.no_grad():
            logits = model(input_ids=inputs).logits[0, -1].double().tolist()
        most = max(logits)
        total = math.log(math.fsum(math.exp(x - most) for x in logits)) + most
        found.append([x - total for x in logits])
    return found


def reference(model, parent, document, end, window, overlap):
    """(nats, divergence from the parent in nats) of one document."""
    ours = predictions(model, document, end, window, overlap)
    theirs = predictions(parent, document, end, window, overlap)
    nats = -math.fsum(q[token] for q, token in zip(ours, document, strict=True))
    apart = math.fsum(
        math.exp(p) * (p - q)
        for before, after in zip(theirs, ours, strict=True)
        for p, q in zip(before, after, strict=True)
    )
    return nats, apart
