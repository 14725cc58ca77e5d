"""You et al. 2019, arXiv:1904.00962, algorithm 2: phi(|w|) / |r| times r, phi capping the norm."""

import math


def reference(gradients, parameter, cap):
    """List of [O, I] gradients -> list of [O, I] steps."""
    size = min(math.sqrt(sum(w * w for w in parameter.flat)), cap)
    found = []
    for gradient in gradients:
        length = math.sqrt(sum(g * g for g in gradient.flat))
        found.append(gradient * size / length if size and length else gradient)
    return found
