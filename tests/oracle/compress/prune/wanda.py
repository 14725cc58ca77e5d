"""Wanda, equation 1: S_ij = |W_ij| * |X_j|_2; here its square with a mean over tokens."""

import numpy as np


def reference(weight, gram):
    score = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            score[i, j] = (abs(weight[i, j]) * np.sqrt(gram[j, j])) ** 2
    return score
