"""numpy's answers to the questions of drawplate.core.linalg."""

import numpy as np


def reference(what, *given):
    return globals()[f"_{what}"](*given)


def _damped(gram, damping):
    size = len(gram)
    mean = sum(gram[j][j] for j in range(size)) / size
    return np.array(gram) + damping * (mean or 1.0) * np.eye(size)


def _cholesky(gram, damping):
    return np.linalg.cholesky(_damped(gram, damping))


def _inverse_root(gram, damping):
    """The upper factor, from the inverse itself."""
    return np.linalg.cholesky(np.linalg.inv(_damped(gram, damping))).T


def _energies(matrix):
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def _output_error(difference, gram):
    return sum(row @ gram @ row for row in difference)
