"""The nucleus by its definition: add the likeliest tokens until their probabilities reach p.

Holtzman et al. 2019, arXiv:1904.09751, equation 2: the smallest V with sum over V of P(x) >= p.
Tokens as likely as the last one added belong to it.
"""

from math import exp


def reference(logits, p):
    kept = []
    for row in logits:
        top = max(row)
        weights = [exp(value - top) for value in row]
        total = sum(weights)
        reached, least = 0.0, None
        for weight in sorted(weights, reverse=True):
            if least is not None and reached >= p:
                break
            reached += weight / total
            least = weight
        kept.append([weight >= least for weight in weights])
    return kept
