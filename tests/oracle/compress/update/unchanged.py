"""W' = W where the mask says so, 0 elsewhere."""

import numpy as np


def reference(weight, keep, gram):
    result = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            if keep[i, j]:
                result[i, j] = weight[i, j]
    return result
