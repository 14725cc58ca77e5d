"""Han et al. 2015, section 3: weights are ranked by |w|; here by its square."""

import numpy as np


def reference(weight, gram):
    score = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            score[i, j] = abs(weight[i, j]) ** 2
    return score
