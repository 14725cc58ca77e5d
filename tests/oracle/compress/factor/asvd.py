"""ASVD: W' = (truncated SVD of W S) S^-1 with S = diag(mean |x|^alpha), alpha = 0.5."""

import numpy as np


def reference(weight, gram, absmean, rank, alpha=0.5):
    smallest = min(a for a in absmean if a > 0)
    scale = np.array([max(a, smallest) ** alpha for a in absmean])
    u, s, vt = np.linalg.svd(weight @ np.diag(scale), full_matrices=False)
    result = np.zeros_like(weight)
    for k in range(rank):
        result += s[k] * np.outer(u[:, k], vt[k])
    return result @ np.diag(1 / scale), s**2
