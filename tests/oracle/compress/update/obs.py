"""SparseGPT, algorithm 1, one row and one weight at a time, with an explicit inverse.

The inverse loses each column as it is passed (equations 2 and 3 of the paper); there are no blocks
and no Cholesky factor.
"""

import numpy as np


def reference(weight, keep, gram, damping=0.01):
    rows, size = weight.shape
    mean = sum(gram[j, j] for j in range(size)) / size
    hessian = gram + damping * mean * np.eye(size)
    result = weight.copy()
    for i in range(rows):
        inverse = np.linalg.inv(hessian)
        for j in range(size):
            if not keep[i, j]:
                result[i] = result[i] - result[i, j] / inverse[j, j] * inverse[j]
                result[i, j] = 0.0
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, :] = 0.0
            inverse[:, j] = 0.0
    return result
