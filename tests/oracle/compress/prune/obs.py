"""SparseGPT, equation 3, from its meaning: the error that is left when w_ij is set to zero and the
other weights of the row are refitted by least squares to the dense row's outputs.
"""

import numpy as np


def reference(weight, gram, damping=0.01):
    rows, size = weight.shape
    mean = sum(gram[j, j] for j in range(size)) / size
    hessian = gram + damping * mean * np.eye(size)
    score = np.zeros_like(weight)
    for i in range(rows):
        for j in range(size):
            rest = [k for k in range(size) if k != j]
            change = np.zeros(size)
            change[j] = -weight[i, j]
            change[rest] = np.linalg.solve(
                hessian[np.ix_(rest, rest)], hessian[rest, j] * weight[i, j]
            )
            score[i, j] = change @ hessian @ change
    return score
