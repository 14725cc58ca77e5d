"""SVD-LLM: W' = U_r D_r V_r^T L^-1 for W L = U D V^T, L the Cholesky factor of G."""

import numpy as np


def reference(weight, gram, absmean, rank, damping=1e-6):
    size = len(gram)
    mean = sum(gram[j, j] for j in range(size)) / size
    lower = np.linalg.cholesky(gram + damping * mean * np.eye(size))
    u, s, vt = np.linalg.svd(weight @ lower, full_matrices=False)
    result = np.zeros_like(weight)
    for k in range(rank):
        result += s[k] * np.outer(u[:, k], vt[k])
    return result @ np.linalg.inv(lower), s**2
