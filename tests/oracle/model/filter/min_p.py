"""Min-p by its two steps: scale the base probability by the largest one, compare.

Nguyen et al. 2024, arXiv:2407.01082, section 3.1: p_scaled = p_base * p_max, keep P(v) >= p_scaled.
"""

from math import exp


def reference(logits, share):
    kept = []
    for row in logits:
        weights = [exp(value - max(row)) for value in row]
        probabilities = [weight / sum(weights) for weight in weights]
        kept.append([p >= share * max(probabilities) for p in probabilities])
    return kept
