"""The projector on the k coordinates with the largest second moment."""

import numpy as np


def reference(gram, kept, normal):
    best = sorted(range(len(gram)), key=lambda i: -gram[i, i])[:kept]
    result = np.zeros_like(gram)
    for i in best:
        result[i, i] = 1
    return result
