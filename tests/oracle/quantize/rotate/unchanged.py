"""No rotation: the weight and the Gram matrix are what they were."""

import numpy as np


def reference(weight, gram, **_):
    """Weight [O, I], gram [I, I] -> V, U, d, the turned weight and the turned gram."""
    rows, columns = np.shape(weight)
    one = np.ones(columns)
    return np.eye(columns), np.eye(rows), one, np.array(weight), np.array(gram)
