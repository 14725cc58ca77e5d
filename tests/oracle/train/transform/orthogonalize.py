"""The iteration acts on singular values alone: s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5.

So: singular value decomposition, divide by the Frobenius norm, polynomial, put together again.
"""

import numpy as np


def reference(gradients, parameter, steps, eps):
    """List of [O, I] gradients -> list of [O, I] steps."""
    found = []
    for gradient in gradients:
        left, values, right = np.linalg.svd(gradient, full_matrices=False)
        values = values / (np.sqrt((values**2).sum()) + eps)
        for _ in range(steps):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        found.append(left @ np.diag(values) @ right)
    return found
