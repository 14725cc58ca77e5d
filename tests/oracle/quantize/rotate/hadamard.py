"""Dense randomised Walsh-Hadamard matrices, entry by entry from the parity of i & j."""

import numpy as np


def matrix(signs):
    """Signs [passes, n], True for minus -> the orthogonal matrix [n, n]."""
    width = len(signs[0])
    power = 1
    while 2 * power <= width:
        power *= 2
    total = np.eye(width)
    for number, flips in enumerate(signs):
        first = 0 if number == 0 else width - power
        step = np.eye(width)
        for i in range(power):
            for j in range(power):
                parity = bin(i & j).count("1") % 2
                step[first + i, first + j] = (-1) ** parity / power**0.5
        total = step @ np.diag([-1.0 if flip else 1.0 for flip in flips]) @ total
    return total


def reference(weight, gram, inputs, outputs, sides="both", **_):
    """Weight [O, I], gram [I, I], signs -> V, U, d, U W V^T and V gram V^T."""
    weight, gram = np.array(weight), np.array(gram)
    rows, columns = weight.shape
    before = matrix(inputs["signs"])
    after = np.eye(rows)
    if sides == "both":
        after = matrix(outputs["signs"])
    return before, after, np.ones(columns), after @ weight @ before.T, before @ gram @ before.T
