"""Eckart and Young: W' = sum over the r largest singular values of s_k u_k v_k^T."""

import numpy as np


def reference(weight, gram, absmean, rank):
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    result = np.zeros_like(weight)
    for k in range(rank):
        result += s[k] * np.outer(u[:, k], vt[k])
    return result, s**2
