"""Chee et al. 2023, algorithm 1, lines 2 to 5: dense Kronecker products and the rescaling.

d_i = (H_ii / (W^T W)_ii)^(1/4), here divided by its geometric mean.
"""

import numpy as np


def matrix(left, right):
    """[p, p] and [q, q] -> [p q, p q], entry (a, b), (c, d) = left_ac right_bd."""
    p, q = len(left), len(right)
    whole = np.zeros((p * q, p * q))
    for a in range(p):
        for b in range(q):
            for c in range(p):
                for d in range(q):
                    whole[a * q + b, c * q + d] = left[a][c] * right[b][d]
    return whole


def reference(weight, gram, inputs, outputs, rescale="balanced", **_):
    """Weight [O, I], gram [I, I], factors -> V, U, d, U W D V^T and V D^-1 gram D^-1 V^T."""
    weight, gram = np.array(weight), np.array(gram)
    columns = weight.shape[1]
    d = np.ones(columns)
    if rescale == "balanced":
        for i in range(columns):
            d[i] = (gram[i, i] / sum(w**2 for w in weight[:, i])) ** 0.25
        d /= np.prod(d ** (1 / columns))
    before, after = (matrix(side["left"], side["right"]) for side in (inputs, outputs))
    turned = after @ (weight * d) @ before.T
    return before, after, d, turned, before @ (gram / np.outer(d, d)) @ before.T
