"""The problem that greedy blocks solve, by cyclic coordinate descent until nothing moves."""

import numpy as np


def reference(weight, keep, gram, damping=1e-3, penalty=0.0):
    """min (w' - w) H (w' - w)^T / 2 + t |w'|_1 on the support, t a share of the row's largest."""
    rows, size = weight.shape
    mean = sum(gram[j, j] for j in range(size)) / size
    hessian = gram + damping * mean * np.eye(size)
    result = np.zeros_like(weight)
    for i in range(rows):
        on = [j for j in range(size) if keep[i, j]]
        pull = hessian @ weight[i]
        toll = penalty * max((abs(pull[j]) for j in on), default=0.0)
        for _ in range(100_000):
            largest = 0.0
            for j in on:
                rest = pull[j] - hessian[j] @ result[i] + hessian[j, j] * result[i, j]
                new = np.sign(rest) * max(abs(rest) - toll, 0.0) / hessian[j, j]
                largest = max(largest, abs(new - result[i, j]))
                result[i, j] = new
            if largest < 1e-15:
                break
    return result
