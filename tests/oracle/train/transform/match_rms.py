"""Liu et al. 2025, arXiv:2502.16982: the update of an A x B matrix times 0.2 sqrt(max(A, B))."""

import math


def reference(gradients, parameter, rms):
    """List of [O, I] gradients -> list of [O, I] steps."""
    return [g * rms * math.sqrt(max(parameter.shape)) for g in gradients]
