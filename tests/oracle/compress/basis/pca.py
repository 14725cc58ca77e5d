"""Ashkboos et al. 2024, section 3.3: the projector on the k eigenvectors of largest eigenvalue."""

import numpy as np


def reference(gram, kept, normal):
    values, vectors = np.linalg.eig(gram)
    best = sorted(range(len(gram)), key=lambda i: -values[i].real)[:kept]
    return sum(np.outer(vectors[:, i], vectors[:, i]).real for i in best)
