"""Jain et al. 2012: exact alternating minimisation, one row or column after the other.

Gu et al. 2023 allow each of these least squares problems an error; without one, this is the result.
"""

import numpy as np


def reference(matrix, counts, rank, rounds=8):
    rows, columns = matrix.shape
    zeroed = matrix.copy()
    for i, j in np.ndindex(matrix.shape):
        zeroed[i, j] *= counts[i, j]
    left = np.linalg.svd(zeroed, full_matrices=False)[0][:, :rank]
    right = zeroed.T @ left
    for _ in range(rounds):
        for j in range(columns):
            seen = [i for i in range(rows) if counts[i, j]]
            right[j] = np.linalg.lstsq(left[seen], matrix[seen, j], rcond=None)[0]
        for i in range(rows):
            seen = [j for j in range(columns) if counts[i, j]]
            left[i] = np.linalg.lstsq(right[seen], matrix[i, seen], rcond=None)[0]
    return left @ right.T
